//! Serving with one HTTP/2 configuration, until told to stop, and then politely.

use std::time::Duration;

use bytes::Bytes;
use tokio::sync::oneshot;
use tonic::body::Body;
use tonic::service::Routes;
use tonic::transport::Server;
use tonic::transport::server::Router;
use tower::{BoxError, Layer, Service};

use crate::listen::{Incoming, Listener};
use crate::{CONNECTION_WINDOW, KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, MAX_FRAME, STREAM_WINDOW};

/// The server came to an end by itself.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Nothing to serve on.
    #[error("there is no listener")]
    NoListener,
    /// The transport failed.
    #[error("the server failed")]
    Transport(#[from] tonic::transport::Error),
}

/// A server with the windows and keepalive of this project; add layers and services.
///
/// It speaks HTTP/1 too, for scrapers and browsers: see [`with_web`](crate::with_web), which keeps
/// that away from gRPC.
pub fn server() -> Server {
    Server::builder()
        .accept_http1(true)
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .max_frame_size(MAX_FRAME)
        .http2_keepalive_interval(Some(Duration::from_secs(KEEPALIVE_S)))
        .http2_keepalive_timeout(Some(Duration::from_secs(KEEPALIVE_TIMEOUT_S)))
}

/// Serves `router` on every listener until `shutdown` completes, then accepts nothing more and
/// answers what is in flight, for `drain` at most.
///
/// Long-lived streams must end by themselves when `shutdown` completes: the drain waits for them.
/// Connections that are left after `drain` end with the runtime.
pub async fn serve<L, ResBody>(
    router: Router<L>,
    listeners: Vec<Listener>,
    shutdown: impl Future<Output = ()>,
    drain: Duration,
) -> Result<(), ServeError>
where
    L: Layer<Routes>,
    L::Service:
        Service<http::Request<Body>, Response = http::Response<ResBody>> + Clone + Send + 'static,
    <L::Service as Service<http::Request<Body>>>::Future: Send,
    <L::Service as Service<http::Request<Body>>>::Error: Into<BoxError> + Send,
    ResBody: http_body::Body<Data = Bytes> + Send + 'static,
    ResBody::Error: Into<BoxError>,
{
    if listeners.is_empty() {
        return Err(ServeError::NoListener);
    }
    let (stopping, stopped) = oneshot::channel();
    let mut serving = std::pin::pin!(router.serve_with_incoming_shutdown(
        Incoming::new(listeners),
        async {
            shutdown.await;
            let _ = stopping.send(());
        }
    ));
    tokio::select! {
        ended = &mut serving => return Ok(ended?),
        _ = stopped => {}
    }
    match tokio::time::timeout(drain, serving).await {
        Ok(ended) => Ok(ended?),
        Err(_) => {
            tracing::warn!(
                drain_s = drain.as_secs_f64(),
                "connections were left open at the end"
            );
            Ok(())
        }
    }
}

//! From an accepted socket to a TLS connection.

use std::convert::Infallible;
use std::time::Duration;

use http::{HeaderValue, Request, Response, StatusCode, Version, header};
use hyper::body::Incoming;
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tonic::Status;
use tonic::body::Body;

use crate::error_chain;
use crate::socket::{Connection, Tls};
use crate::tls::{ServerTls, explain};

/// How long a client may take until both sides know each other, in seconds.
const HANDSHAKE_TIMEOUT_S: u64 = 10;
/// First byte of a TLS connection: a handshake record.
const HANDSHAKE_RECORD: u8 = 0x16;
/// What a plain client is told.
const PLAIN: &str = "this address speaks TLS: use https:// and a certificate";

/// Does the handshake. `None` when it fails; the log says why.
pub(crate) async fn accept(tcp: TcpStream, tls: ServerTls) -> Option<Connection> {
    let peer = tcp.peer_addr().ok();
    let limit = Duration::from_secs(HANDSHAKE_TIMEOUT_S);
    let done = timeout(limit, async {
        let mut first = [0];
        if tcp.peek(&mut first).await? == 1 && first[0] != HANDSHAKE_RECORD {
            let why = "it does not speak TLS, and this address does";
            tracing::warn!(?peer, "refused a client: {why}");
            refuse_plain(tcp).await;
            return Ok(None);
        }
        tls.acceptor().accept(tcp).await.map(Some)
    });
    let why = match done.await {
        Ok(Ok(stream)) => return stream.map(|stream| Connection::Tls(Tls::server(stream))),
        Ok(Err(error)) => match explain(&error, "client") {
            Some(text) => format!("{text}: {}", error_chain(&error)),
            None => error_chain(&error),
        },
        Err(_) => format!("no TLS within {HANDSHAKE_TIMEOUT_S} s"),
    };
    tracing::warn!(?peer, "refused a client: {why}");
    None
}

/// Answers whatever a client without TLS asks, in its own protocol, with a refusal.
async fn refuse_plain(tcp: TcpStream) {
    let refuse = tower::service_fn(|request: Request<Incoming>| {
        std::future::ready(Ok::<_, Infallible>(refusal(&request)))
    });
    // Ends with the client, at the latest with the time limit of the handshake.
    let _ = Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(tcp), TowerToHyperService::new(refuse))
        .await;
}

fn refusal(request: &Request<Incoming>) -> Response<Body> {
    if request.version() == Version::HTTP_2 {
        return Status::unauthenticated(PLAIN).into_http();
    }
    let mut response = Response::new(Body::new(format!("{PLAIN}\n")));
    *response.status_mut() = StatusCode::BAD_REQUEST;
    let close = HeaderValue::from_static("close");
    response.headers_mut().insert(header::CONNECTION, close);
    response
}

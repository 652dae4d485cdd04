//! gRPC and ordinary HTTP on one port.
//!
//! Scrapers and browsers speak HTTP/1. A browser runs pages of strangers, and a page may send
//! POST requests anywhere as long as they look like a form: a gRPC service that answered HTTP/1
//! would be driven by any page that its user opens. Over HTTP/2 without TLS, which browsers do not
//! speak, gRPC is as reachable as before.

use axum::extract::Request;
use axum::http::{StatusCode, Version};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use tonic::service::Routes;

/// The services of `grpc`, over HTTP/2 only, and `web` beside them.
///
/// Paths of `web` must not look like `/package.Service/Method`, and it has no fallback: what
/// neither part knows is answered here.
pub fn with_web(grpc: Routes, web: axum::Router) -> Routes {
    grpc.into_axum_router()
        .layer(middleware::from_fn(only_http2))
        .merge(web)
        .into()
}

async fn only_http2(request: Request, next: Next) -> Response {
    if request.version() < Version::HTTP_2 {
        let text = "nothing is here; gRPC is spoken over HTTP/2 only\n";
        return (StatusCode::NOT_FOUND, text).into_response();
    }
    next.run(request).await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpStream;
    use tokio::sync::oneshot;

    use super::*;
    use crate::{Address, Listener};

    /// The answer to a request of an old browser.
    async fn http1(authority: &str, request: &str) -> String {
        let mut stream = TcpStream::connect(authority).await.unwrap();
        let head = format!("Host: {authority}\r\nConnection: close\r\nContent-Length: 0\r\n");
        let request = format!("{request} HTTP/1.1\r\n{head}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn a_browser_reaches_the_page_and_not_the_services() {
        let (_, health) = tonic_health::server::health_reporter();
        let web = axum::Router::new().route("/page", axum::routing::get(async || "a page"));
        let routes = with_web(Routes::new(health), web);
        let listener = Listener::bind(&"http://127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let url = listener.address().unwrap();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(crate::serve(
            crate::server().add_routes(routes),
            vec![listener],
            async { drop(stopped.await) },
            Duration::from_secs(5),
        ));

        let Address::Tcp(authority) = &url else {
            panic!("bound TCP")
        };
        let page = http1(authority, "GET /page").await;
        assert!(
            page.starts_with("HTTP/1.1 200") && page.ends_with("a page"),
            "{page}"
        );
        for refused in [
            "POST /grpc.health.v1.Health/Check",
            "GET /grpc.health.v1.Health/Check",
            "GET /elsewhere",
        ] {
            let answer = http1(authority, refused).await;
            assert!(answer.starts_with("HTTP/1.1 404"), "{refused}: {answer}");
        }
        crate::healthcheck(&url.to_string()).await.unwrap();

        drop(stop);
        serving.await.unwrap().unwrap();
    }
}

//! A small OTLP receiver with the part of Jaeger's query API that the tests of this project need.
//!
//! It is a tool for tests: of the exporters in the three programs, and of the compose file on
//! machines that can pull no image. Spans are kept as they came, in memory, the oldest ones go
//! first.
//!
//! | port of Jaeger | what is served |
//! |---|---|
//! | 4317 | `opentelemetry.proto.collector.trace.v1.TraceService` |
//! | 16686 | `GET /api/v3/services`, `GET /api/v3/traces/{trace_id}`: OTLP JSON inside `result` |

mod query;
mod store;

use std::future::Future;
use std::io;

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::TraceServiceServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;

pub use store::{MAX_SPANS, Received, Store};

/// Serves OTLP on one listener and the query API on the other, until `stop` resolves.
pub async fn run(
    store: Store,
    otlp: TcpListener,
    query: TcpListener,
    stop: impl Future<Output = ()>,
) -> io::Result<()> {
    let receiver = tonic::transport::Server::builder()
        .add_service(TraceServiceServer::new(store.clone()))
        .serve_with_incoming(TcpListenerStream::new(otlp));
    let answers = axum::serve(query, query::router(store));
    tokio::select! {
        () = stop => Ok(()),
        ended = receiver => ended.map_err(io::Error::other),
        ended = answers => ended,
    }
}

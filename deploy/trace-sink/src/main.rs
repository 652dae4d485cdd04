//! `trace-sink`: receives spans until SIGTERM or Ctrl-C.

use std::io;
use std::net::SocketAddr;

use clap::Parser;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use trace_sink::{Store, run};

/// Receives OTLP traces and answers the part of Jaeger's query API that tests need.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// Where OTLP over gRPC is received
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:4317")]
    otlp: SocketAddr,
    /// Where the query API is served
    #[arg(long, value_name = "ADDR", default_value = "0.0.0.0:16686")]
    query: SocketAddr,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> io::Result<()> {
    let args = Args::parse();
    let otlp = TcpListener::bind(args.otlp).await?;
    let query = TcpListener::bind(args.query).await?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stop = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    run(Store::default(), otlp, query, stop).await
}

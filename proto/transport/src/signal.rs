//! When a service is asked to stop.

use std::io::{Read as _, stdin};

use tokio::signal::ctrl_c;
use tokio::signal::unix::{SignalKind, signal};

/// Completes at SIGTERM or Ctrl-C.
///
/// Without a handler the signal ends the process as it always did, so a failure to install one is
/// reported and the other signal still counts.
pub async fn shutdown_signal() {
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => {
                terminate.recv().await;
            }
            Err(error) => {
                tracing::warn!(%error, "SIGTERM is not handled");
                std::future::pending().await
            }
        }
    };
    let interrupt = async {
        if let Err(error) = ctrl_c().await {
            tracing::warn!(%error, "SIGINT is not handled");
            std::future::pending().await
        }
    };
    tokio::select! {
        () = terminate => tracing::info!("SIGTERM, stopping"),
        () = interrupt => tracing::info!("SIGINT, stopping"),
    }
}

/// Completes when standard input is closed: a parent that holds the other end of a pipe takes its
/// child along, however it dies. What arrives before is dropped.
pub async fn stdin_closed() {
    let (closed, wait) = tokio::sync::oneshot::channel();
    // A thread of its own, since a read of standard input cannot be cancelled: the runtime would
    // wait for it at its end.
    let reader = std::thread::Builder::new()
        .name("stdin".into())
        .spawn(move || {
            let mut buffer = [0; 4096];
            while matches!(stdin().lock().read(&mut buffer), Ok(1..)) {}
            let _ = closed.send(());
        });
    if let Err(error) = reader {
        tracing::warn!(%error, "standard input is not watched");
        std::future::pending().await
    }
    let _ = wait.await;
    tracing::info!("standard input was closed, stopping");
}

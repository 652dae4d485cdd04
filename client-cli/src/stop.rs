//! Ctrl-C and SIGTERM, seen from the places that wait.
//!
//! A command is not dropped when a signal comes: whatever it waits for ends with
//! [`Error::Interrupted`], and it takes its VM down on the way out. A second signal ends the
//! process at once.

use tokio::sync::watch;

use crate::error::Error;

/// Tells whether the process was asked to stop.
#[derive(Debug, Clone)]
pub struct Stop {
    asked: watch::Receiver<bool>,
}

impl Stop {
    /// Listens for signals from here on.
    pub fn on_signal() -> Self {
        let (ask, asked) = watch::channel(false);
        tokio::spawn(async move {
            transport::shutdown_signal().await;
            // Fails when nobody listens any more; then there is nothing to stop.
            let _ = ask.send(true);
            transport::shutdown_signal().await;
            std::process::exit(i32::from(Error::Interrupted.exit_code()));
        });
        Self { asked }
    }

    /// One that never comes, for the clean-up behind a signal.
    pub fn never() -> Self {
        Self {
            asked: watch::channel(false).1,
        }
    }

    /// Whether a signal came.
    pub fn is_asked(&self) -> bool {
        *self.asked.borrow()
    }

    /// Completes when a signal comes.
    pub async fn asked(&self) {
        let mut asked = self.asked.clone();
        if asked.wait_for(|asked| *asked).await.is_err() {
            // The sender is gone without a signal: it will never come.
            std::future::pending().await
        }
    }
}

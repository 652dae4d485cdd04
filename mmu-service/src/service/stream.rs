//! Answers that come in pieces.
//!
//! A reader may be slow or gone, the core must not wait for it for ever. Progress is dropped when
//! there is no room; what must arrive is waited for, within the configured stall time.

use std::sync::Arc;
use std::time::Duration;

use tdp_mmu::{Vm, VmError};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::{Instrument as _, Span};

use crate::registry::VmEntry;
use crate::shell::Shell;
use crate::status;

/// The pieces, or the status that ends them.
pub(crate) type Answers<T> = ReceiverStream<Result<T, Status>>;

/// Messages that wait for the reader.
const PIECES: usize = 4;

/// Where an operation puts its pieces.
pub(super) struct Pieces<T> {
    out: mpsc::Sender<Result<T, Status>>,
    stall: Duration,
    runtime: tokio::runtime::Handle,
}

impl<T> Pieces<T> {
    /// A piece that may be lost.
    pub(super) fn progress(&self, piece: T) {
        let _ = self.out.try_send(Ok(piece));
    }

    /// A piece that must arrive; for threads of the core. `false` when the reader is gone, or
    /// takes nothing for the stall time.
    pub(super) fn deliver(&self, piece: T) -> bool {
        self.runtime
            .block_on(self.out.send_timeout(Ok(piece), self.stall))
            .is_ok()
    }
}

/// Has `work` produce pieces on a thread of its own, and the last one as its result.
pub(super) fn answer<T: Send + 'static>(
    shell: &Arc<Shell>,
    entry: Arc<VmEntry>,
    span: Span,
    work: impl FnOnce(&Vm, &Pieces<T>) -> Result<Option<T>, VmError> + Send + 'static,
) -> Answers<T> {
    let (out, answers) = mpsc::channel(PIECES);
    let stall = shell.limits.stall();
    let pieces = Pieces {
        out: out.clone(),
        stall,
        runtime: tokio::runtime::Handle::current(),
    };
    let task = {
        let (shell, span) = (Arc::clone(shell), span.clone());
        async move {
            let result = shell
                .operate(&entry, span, move |vm| work(vm, &pieces))
                .await;
            if let Err(refusal) = &result {
                shell.metrics.refused(refusal);
            }
            if let Some(last) = result.transpose() {
                send(&out, last, stall).await;
            }
        }
    };
    shell.spawn(task.instrument(span));
    ReceiverStream::new(answers)
}

/// Hands a message to a reader that may have stopped reading. `false` when nobody takes it.
pub(super) async fn send<T>(
    out: &mpsc::Sender<Result<T, Status>>,
    message: Result<T, Status>,
    stall: Duration,
) -> bool {
    match out.send_timeout(message, stall).await {
        Ok(()) => true,
        Err(mpsc::error::SendTimeoutError::Closed(_)) => false,
        Err(mpsc::error::SendTimeoutError::Timeout(_)) => {
            tracing::debug!(status = %status::stalled(stall), "stream given up");
            false
        }
    }
}

//! Running a batch: one section without an await, inline when it is short, on a thread of its own
//! when it is long.
//!
//! A handler is dropped when its caller's deadline passes. That can happen at an await only, and
//! there is none between the first call of a batch and the record of its answer (S2): a long batch
//! takes the lock of its session along to its thread.

use std::sync::Arc;
use std::time::Instant;

use tdx_defs::SeamcallResult;
use tdx_module::Module;
use tokio::sync::OwnedMutexGuard;

use crate::batch::{Batch, Ticket};
use crate::metrics::{Metrics, Via};
use crate::replay::{Session, Window};
use crate::status::Refusal;
use crate::trace::Tracer;

/// Leaf runs above which a batch gets a thread of its own. Those below keep a worker busy for
/// about as long as a message takes to decode.
const LONG_BATCH_RUNS: u64 = 2048;

/// Who counts a batch, and as what.
#[derive(Clone)]
pub(crate) struct Meter {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) via: Via,
}

/// Runs `batch`, or recalls its answer from `session`; `answer` makes a reply of the results.
pub(crate) async fn perform<R: Send + 'static>(
    module: &Arc<Module>,
    meter: Meter,
    batch: Batch,
    session: Option<Session>,
    answer: impl FnOnce(&[SeamcallResult]) -> R + Send + 'static,
) -> Result<R, Refusal> {
    let under_way = meter.metrics.started();
    let replay = match (session, &batch.ticket) {
        (Some(session), Some(ticket)) => {
            let window = session.lock_owned().await;
            if let Some(results) = window.recall(ticket)? {
                meter.metrics.replayed();
                return Ok(answer(results));
            }
            Some((window, ticket.clone()))
        }
        _ => None,
    };
    if batch.runs <= LONG_BATCH_RUNS {
        return Ok(run_and_record(module, &meter, &batch, replay, answer));
    }
    let module = module.clone();
    tokio::task::spawn_blocking(move || {
        // It is under way although the caller may be gone.
        let _under_way = under_way;
        run_and_record(&module, &meter, &batch, replay, answer)
    })
    .await
    .map_err(|_| Refusal::ModuleFailed)
}

fn run_and_record<R>(
    module: &Module,
    meter: &Meter,
    batch: &Batch,
    replay: Option<(OwnedMutexGuard<Window>, Ticket)>,
    answer: impl FnOnce(&[SeamcallResult]) -> R,
) -> R {
    let started = Instant::now();
    let results = run(module, batch);
    meter
        .metrics
        .ran(meter.via, batch, &results, started.elapsed());
    let reply = answer(&results);
    if let Some((mut window, ticket)) = replay {
        window.record(&ticket, results);
    }
    reply
}

/// The results of the calls that ran: all of them, or up to the first error.
///
/// An answer without the error bit (a range that is blocked already, say) ends the repeat that it
/// belongs to and not the batch.
fn run(module: &Module, batch: &Batch) -> Vec<SeamcallResult> {
    let mut tracer = Tracer::open(batch);
    if tracer.is_off() {
        return module.seamcalls(batch.lp, &batch.calls, batch.stop_on_error);
    }
    let mut results = Vec::with_capacity(batch.calls.len());
    for call in &batch.calls {
        let result = tracer.leaf(call, || module.seamcall(batch.lp, call));
        results.push(result);
        if batch.stop_on_error && result.status().is_error() {
            break;
        }
    }
    results
}

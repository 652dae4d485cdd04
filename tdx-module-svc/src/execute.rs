//! Running a batch: one section without an await, inline when it is short, on a thread of its own
//! when it is long.
//!
//! A handler is dropped when its caller's deadline passes. That can happen at an await only, and
//! there is none between the first call of a batch and the record of its answer (S2): a long batch
//! takes the lock of its session along to its thread.

use std::sync::Arc;
use std::time::Instant;

use tdx_defs::{CompletionStatus, Repeat, Seamcall, SeamcallResult};
use tdx_module::Module;
use tokio::sync::OwnedMutexGuard;

use crate::batch::{Batch, Ticket};
use crate::faults::{Faults, Verdict};
use crate::metrics::{Metrics, Via};
use crate::replay::{Room, Session, Window};
use crate::running::Run;
use crate::status::Refusal;
use crate::trace::Tracer;

/// Who counts a batch, and as what.
#[derive(Clone)]
pub(crate) struct Meter {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) via: Via,
}

/// Runs `batch`, or recalls its answer from `session`; `answer` makes a reply of the results.
/// A batch that runs meets what `faults` have for it.
pub(crate) async fn perform<R: Send + 'static>(
    run: &Arc<Run>,
    faults: &Faults,
    meter: Meter,
    batch: Batch,
    session: Option<Session>,
    answer: impl FnOnce(&[SeamcallResult]) -> R + Send + 'static,
) -> Result<R, Refusal> {
    let under_way = meter.metrics.started();
    let module = &run.module;
    let replay = match (session, &batch.ticket) {
        (Some(session), Some(ticket)) => {
            let mut window = session.lock_owned().await;
            window.acknowledge(ticket);
            if let Some(results) = window.recall(ticket)? {
                meter.metrics.replayed();
                return Ok(answer(results));
            }
            if !window.goes_on(batch.chain) {
                let room = run.sessions.room(&window, ticket, 0)?;
                window.record(ticket, Vec::new(), room);
                return Ok(answer(&[]));
            }
            let room = run.sessions.room(&window, ticket, batch.calls.len())?;
            Some((window, ticket.clone(), room))
        }
        _ => None,
    };
    let verdict = faults.decide(&batch.calls);
    if let Some(delay) = verdict.delay {
        // With the lock of the session, as if the batch took so long.
        tokio::time::sleep(delay).await;
    }
    if verdict.abort_before {
        std::process::abort();
    }
    if verdict.cut {
        return Err(Refusal::Cut);
    }
    let reply = if !batch.is_long() {
        run_and_record(module, &verdict, &meter, &batch, replay, answer)
    } else {
        let (module, verdict) = (module.clone(), verdict.clone());
        tokio::task::spawn_blocking(move || {
            // It is under way although the caller may be gone.
            let _under_way = under_way;
            run_and_record(&module, &verdict, &meter, &batch, replay, answer)
        })
        .await
        .map_err(|_| Refusal::ModuleFailed)?
    };
    if verdict.lose_reply {
        return Err(Refusal::ReplyLost);
    }
    Ok(reply)
}

fn run_and_record<R>(
    module: &Module,
    verdict: &Verdict,
    meter: &Meter,
    batch: &Batch,
    replay: Option<(OwnedMutexGuard<Window>, Ticket, Room)>,
    answer: impl FnOnce(&[SeamcallResult]) -> R,
) -> R {
    let started = Instant::now();
    let results = calls(module, verdict, batch);
    meter
        .metrics
        .ran(meter.via, batch, &results, started.elapsed());
    let reply = answer(&results);
    if let Some((mut window, ticket, room)) = replay {
        if let Some(chain) = batch.chain {
            window.link(chain, batch.ran_whole(&results));
        }
        window.record(&ticket, results, room);
    }
    if verdict.abort_after {
        std::process::abort();
    }
    reply
}

/// The results of the calls that ran: all of them, or up to the first error.
///
/// An answer without the error bit (a range that is blocked already, say) ends the repeat that it
/// belongs to and not the batch.
fn calls(module: &Module, verdict: &Verdict, batch: &Batch) -> Vec<SeamcallResult> {
    let mut tracer = Tracer::open(batch);
    if tracer.is_off() && verdict.statuses.is_empty() {
        let results = module.seamcalls(batch.lp, &batch.calls, batch.stop_on_error);
        tracer.ran(&results);
        return results;
    }
    let mut results = Vec::with_capacity(batch.calls.len());
    for (at, call) in batch.calls.iter().enumerate() {
        let result = tracer.leaf(call, || match verdict.instead(at) {
            None => module.seamcall(batch.lp, call),
            Some(instead) => {
                let before = runs_before(call, instead.run);
                let done = before.map(|call| module.seamcall(batch.lp, &call));
                met(call, done, instead.run, instead.status)
            }
        });
        results.push(result);
        if batch.stop_on_error && result.status().is_error() {
            break;
        }
    }
    results
}

/// The first `count` runs of a call, if there are any.
fn runs_before(call: &Seamcall, count: u32) -> Option<Seamcall> {
    let repeat = call.repeat.filter(|_| count > 0)?;
    Some(Seamcall {
        repeat: Some(Repeat { count, ..repeat }),
        ..call.clone()
    })
}

/// The answer of a call whose run number `run` was not made, after those before it were `done`. A
/// leaf that met a lock leaves its registers as they were, details of an entry aside.
fn met(
    call: &Seamcall,
    done: Option<SeamcallResult>,
    run: u32,
    status: CompletionStatus,
) -> SeamcallResult {
    match done {
        // It ended before the run that was to be met.
        Some(done) if done.completed < run => done,
        _ => SeamcallResult {
            rax: status.0,
            rcx: 0,
            rdx: 0,
            r8: call.r8,
            r9: call.r9,
            r10: call.r10,
            r11: call.r11,
            completed: run,
        },
    }
}

//! Carrying SEAMCALLs: one by one or in runs, counted, with the retries that every wrapper has.
//!
//! Source: arch/x86/include/asm/tdx.h, `sc_retry()` (entropy). In propagation mode `kernel` each
//! call is a message of its own; in mode `batched` neighbours travel as runs, many a message.

use tdx_defs::{CompletionStatus, Leaf, PAGE_SIZE, Repeat, Seamcall, SeamcallResult};

use super::calls::Step;
use crate::counts::Counts;
use crate::seam::{Batch, MAX_CALLS, MAX_REPEAT, SeamError, SeamPort, Ticket, Via};
use crate::vm::Mode;

/// RDRAND_RETRY_LOOPS: tries of a call that found no entropy.
const ENTROPY_TRIES: u32 = 10;
/// Most calls that one operation keeps for its report.
const MAX_TRACE: usize = 4096;

/// What to do about a step that did not succeed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Make the call once more.
    Again,
    /// Go on with the next step.
    Next,
    /// Leave out everything behind it.
    Stop,
}

/// The way to the module for the length of one operation.
pub(crate) struct Seam<'a> {
    port: &'a dyn SeamPort,
    pub(crate) mode: Mode,
    lp: u32,
    pub(crate) counts: Counts,
    /// Calls as they were made, when somebody wants to see them.
    trace: Option<Vec<(Leaf, CompletionStatus)>>,
}

/// A message under way, with what is needed to count its answer.
pub(crate) struct InFlight {
    ticket: Ticket,
    runs: Vec<(Leaf, u32)>,
}

impl<'a> Seam<'a> {
    pub(crate) fn new(port: &'a dyn SeamPort, mode: Mode, lp: u32) -> Self {
        Self {
            port,
            mode,
            lp,
            counts: Counts::default(),
            trace: None,
        }
    }

    /// Keeps the calls for a report.
    pub(crate) fn traced(self) -> Self {
        Self {
            trace: Some(Vec::new()),
            ..self
        }
    }

    /// Whether somebody watches this operation.
    pub(crate) fn is_traced(&self) -> bool {
        self.trace.is_some()
    }

    pub(crate) fn take_trace(&mut self) -> Vec<(Leaf, CompletionStatus)> {
        self.trace.take().unwrap_or_default()
    }

    /// Sends a message.
    pub(crate) fn submit(&mut self, lp: Option<u32>, calls: Vec<Seamcall>) -> InFlight {
        let runs = calls.iter().map(|call| (call.leaf, call.count())).collect();
        let via = match self.mode {
            Mode::Kernel => Via::Rpc,
            Mode::Batched => Via::Stream,
        };
        self.counts.rpcs += 1;
        let lp = lp.unwrap_or(self.lp);
        let ticket = self.port.submit(Batch {
            lp,
            via,
            stop_on_error: true,
            calls,
        });
        InFlight { ticket, runs }
    }

    /// Waits for a message's answer and counts what ran.
    pub(crate) fn wait(&mut self, sent: InFlight) -> Result<Vec<SeamcallResult>, SeamError> {
        let results = sent.ticket.wait()?;
        for (&(leaf, runs), result) in sent.runs.iter().zip(&results) {
            let failed = u32::from(result.completed < runs);
            self.counts
                .seamcalls
                .add(leaf, u64::from(result.completed.min(runs) + failed));
            if let Some(trace) = &mut self.trace {
                let room = MAX_TRACE.saturating_sub(trace.len());
                let good = (leaf, CompletionStatus::SUCCESS);
                trace.extend(std::iter::repeat_n(
                    good,
                    (result.completed as usize).min(room),
                ));
                if failed != 0 && trace.len() < MAX_TRACE {
                    trace.push((leaf, result.status()));
                }
            }
        }
        Ok(results)
    }

    /// One call, repeated while the module finds no entropy.
    pub(crate) fn call(&mut self, step: &Step) -> Result<SeamcallResult, SeamError> {
        let mut tries = 0;
        loop {
            let sent = self.submit(step.lp, vec![step.to_seamcall()]);
            let results = self.wait(sent)?;
            let result = results.first().copied().ok_or_else(|| SeamError::Unknown {
                reason: format!("no result for {}", step.leaf),
            })?;
            tries += 1;
            let no_entropy = result.rax == CompletionStatus::RND_NO_ENTROPY.0;
            if !no_entropy || tries == ENTROPY_TRIES {
                return Ok(result);
            }
        }
    }

    /// Makes the calls of `steps` in order. `judge` decides about each that does not succeed; it
    /// must bound its own retries.
    pub(crate) fn script(
        &mut self,
        steps: &[Step],
        judge: &mut dyn FnMut(&mut Counts, usize, &SeamcallResult) -> Verdict,
    ) -> Result<(), SeamError> {
        let mut pending: Vec<usize> = (0..steps.len()).collect();
        let mut no_entropy = 0;
        while !pending.is_empty() {
            let (lp, calls, taken) = self.pack(steps, &pending);
            let sent = self.submit(lp, calls);
            let results = self.wait(sent)?;
            if results.is_empty() {
                return Err(SeamError::Unknown {
                    reason: "no result for a batch".into(),
                });
            }
            let mut done = vec![false; taken.last().map_or(0, |range| range.end)];
            for (range, result) in taken.into_iter().zip(&results) {
                let good = range.start + (result.completed as usize).min(range.len());
                done[range.start..good].fill(true);
                if good == range.end {
                    continue;
                }
                if result.rax == CompletionStatus::RND_NO_ENTROPY.0
                    && no_entropy + 1 < ENTROPY_TRIES
                {
                    no_entropy += 1;
                    continue;
                }
                match judge(&mut self.counts, pending[good], result) {
                    Verdict::Again => {}
                    Verdict::Next => done[good] = true,
                    Verdict::Stop => return Ok(()),
                }
            }
            let mut at = 0;
            pending.retain(|_| {
                at += 1;
                !done.get(at - 1).copied().unwrap_or(false)
            });
        }
        Ok(())
    }

    /// The next message: logical processor, calls, and which pending steps each call stands for.
    fn pack(
        &self,
        steps: &[Step],
        pending: &[usize],
    ) -> (Option<u32>, Vec<Seamcall>, Vec<std::ops::Range<usize>>) {
        let lp = steps[pending[0]].lp;
        let mut calls: Vec<Seamcall> = Vec::new();
        let mut taken: Vec<std::ops::Range<usize>> = Vec::new();
        for (at, &index) in pending.iter().enumerate() {
            let step = &steps[index];
            if step.lp != lp || (self.mode == Mode::Kernel && at == 1) {
                break;
            }
            let joined = match (calls.last_mut(), taken.last_mut()) {
                (Some(run), Some(range)) => {
                    let joined = join(run, step);
                    range.end += usize::from(joined);
                    joined
                }
                _ => false,
            };
            if !joined {
                if calls.len() == MAX_CALLS {
                    break;
                }
                calls.push(step.to_seamcall());
                taken.push(at..at + 1);
            }
        }
        (lp, calls, taken)
    }
}

/// Makes `step` the next call of `run`, if the registers go on as a run's do.
pub(crate) fn join(run: &mut Seamcall, step: &Step) -> bool {
    let same = run.leaf == step.leaf
        && run.version == step.version
        && run.rdx == step.rdx
        && run.data.is_empty()
        && step.data.is_none();
    if !same {
        return false;
    }
    let count = i64::from(run.count());
    let strides = match run.repeat {
        Some(repeat) => (repeat.rcx_stride, repeat.r8_stride, repeat.r9_stride),
        None => (
            step.rcx.wrapping_sub(run.rcx).cast_signed(),
            step.r8.wrapping_sub(run.r8).cast_signed(),
            step.r9.wrapping_sub(run.r9).cast_signed(),
        ),
    };
    // Only neighbours make a run: pages, or chunks of a page.
    let near = |stride: i64| stride.unsigned_abs() <= PAGE_SIZE;
    let follows = |first: u64, stride: i64, now: u64| {
        first.wrapping_add_signed(stride.wrapping_mul(count)) == now
    };
    let joins = near(strides.0)
        && near(strides.1)
        && near(strides.2)
        && run.count() < MAX_REPEAT
        && follows(run.rcx, strides.0, step.rcx)
        && follows(run.r8, strides.1, step.r8)
        && follows(run.r9, strides.2, step.r9);
    if !joins {
        return false;
    }
    run.repeat = Some(Repeat {
        count: run.count() + 1,
        rcx_stride: strides.0,
        r8_stride: strides.1,
        r9_stride: strides.2,
    });
    true
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::super::calls;
    use super::*;
    use crate::sync::{Mutex, lock};
    use tdx_defs::{Gfn, Pfn};

    /// A module that answers busy to the calls whose RCX it is told, once each.
    struct Busy(Mutex<Vec<u64>>, Mutex<Vec<Batch>>);

    impl SeamPort for Busy {
        fn submit(&self, batch: Batch) -> Ticket {
            lock(&self.1).push(batch.clone());
            let mut results = Vec::new();
            for mut call in batch.calls {
                let mut result = SeamcallResult::default();
                for _ in 0..call.count() {
                    let mut busy = lock(&self.0);
                    if let Some(at) = busy.iter().position(|&rcx| rcx == call.rcx) {
                        busy.remove(at);
                        result.rax = CompletionStatus::OPERAND_BUSY.0;
                        break;
                    }
                    result.completed += 1;
                    call.step();
                }
                results.push(result);
                if result.rax >> 63 != 0 {
                    break;
                }
            }
            Ticket::ready(Ok(results))
        }
    }

    fn blocks(count: u64) -> Vec<Step> {
        let tdr = Pfn::new(0x1000);
        (0..count)
            .map(|gfn| calls::mem_range_block(tdr, Gfn::new(gfn), tdx_defs::Level::L4K))
            .chain([calls::mem_track(tdr)])
            .collect()
    }

    #[test]
    fn runs_join_in_batched_mode_and_not_in_kernel_mode() {
        for (mode, messages) in [(Mode::Batched, 1), (Mode::Kernel, 11)] {
            let port = Busy(Mutex::default(), Mutex::default());
            let mut seam = Seam::new(&port, mode, 0);
            seam.script(&blocks(10), &mut |_, _, _| panic!("nothing fails"))
                .unwrap();
            assert_eq!(seam.counts.rpcs, messages, "{mode:?}");
            assert_eq!(seam.counts.seamcalls.get(Leaf::MEM_RANGE_BLOCK), 10);
            assert_eq!(seam.counts.seamcalls.get(Leaf::MEM_TRACK), 1);
        }
    }

    #[test]
    fn a_step_that_fails_is_judged_and_the_rest_goes_on() {
        for mode in [Mode::Batched, Mode::Kernel] {
            for (verdict, blocked, calls) in [
                (Verdict::Again, 10, 12),
                (Verdict::Next, 9, 11),
                (Verdict::Stop, 4, 5),
            ] {
                let port = Busy(Mutex::new(vec![0x4000]), Mutex::default());
                let mut seam = Seam::new(&port, mode, 0);
                let mut judged = Vec::new();
                seam.script(&blocks(10), &mut |_, step, result| {
                    assert!(result.status().is_busy());
                    judged.push(step);
                    verdict
                })
                .unwrap();
                assert_eq!(judged, [4], "{mode:?} {verdict:?}");
                assert_eq!(seam.counts.seamcalls.total(), calls, "{mode:?} {verdict:?}");
                let good: u64 = seam.counts.seamcalls.get(Leaf::MEM_RANGE_BLOCK) - 1;
                assert_eq!(good, blocked, "{mode:?} {verdict:?}");
            }
        }
    }
}

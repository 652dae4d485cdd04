//! `scale`: two vCPUs beside one, both libraries in this process.

use std::ops::Range;
use std::sync::Barrier;
use std::time::Instant;

use tdp_mmu::{Fault, Vm};
use tdx_defs::{Leaf, PAGE_SIZE};

use super::Plan;
use super::figure::{Figure, ns_per_op};
use super::in_process::{Pair, bench_error};
use crate::error::Error;
use crate::progress::Progress;

/// Faults of one batch: less than a leaf table, so that two vCPUs really meet.
const BATCH: usize = 64;

/// Which frames each of two vCPUs faults on.
#[derive(Debug, Clone, Copy)]
enum Share {
    /// Halves of the range.
    Disjoint,
    /// Every other frame.
    Interleaved,
    /// All of them, both.
    Same,
}

pub(super) async fn run(plan: Plan, progress: &Progress) -> Result<Vec<Figure>, Error> {
    let size = plan.size(256 << 20);
    let pages = size / PAGE_SIZE;
    let mut figures = Vec::new();
    for (name, share) in [
        ("one vCPU, beside two in disjoint regions", Share::Disjoint),
        ("one vCPU, beside two in one region", Share::Interleaved),
        ("one vCPU, beside two on the same pages", Share::Same),
    ] {
        let mut augs = 0;
        let samples = plan
            .repeat(progress, async || {
                tokio::task::block_in_place(|| {
                    let (one, _) = sample(size, std::slice::from_ref(&(0..pages)), share)?;
                    let halves = [0..pages / 2, pages / 2..pages];
                    let (two, made) = sample(size, &halves, share)?;
                    augs = made;
                    Ok((ns_per_op(one, pages), ns_per_op(two, pages)))
                })
            })
            .await?;
        let figure = Figure::new((name, "two vCPUs"), pages, &samples).with("augs", augs);
        figures.push(figure);
    }
    Ok(figures)
}

/// How long it takes until all pages are mapped, and how many TDH.MEM.PAGE.AUG were made.
fn sample(
    size: u64,
    halves: &[Range<u64>],
    share: Share,
) -> Result<(std::time::Duration, u64), Error> {
    let pair = Pair::new()?;
    let vcpus = u16::try_from(halves.len()).unwrap_or(1);
    let vm = pair.vm(vcpus, size)?;
    let pages = size / PAGE_SIZE;
    let start = Barrier::new(halves.len() + 1);
    let times = std::thread::scope(|scope| {
        let threads: Vec<_> = halves
            .iter()
            .cloned()
            .zip(0u32..)
            .map(|(half, vcpu)| {
                let frames: Vec<u64> = match (share, halves.len()) {
                    (_, 1) | (Share::Same, _) => (0..pages).collect(),
                    (Share::Disjoint, _) => half.collect(),
                    (Share::Interleaved, _) => (u64::from(vcpu)..pages).step_by(2).collect(),
                };
                let (vm, start) = (&vm, &start);
                scope.spawn(move || {
                    start.wait();
                    fault(vm, vcpu, &frames)
                })
            })
            .collect();
        let from = Instant::now();
        start.wait();
        let done: Result<Vec<()>, Error> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err(Error::Interrupted)))
            .collect();
        done.map(|_| from.elapsed())
    })?;
    let augs = vm.stats().counts.seamcalls.get(Leaf::MEM_PAGE_AUG);
    vm.destroy().map_err(bench_error)?;
    Ok((times, augs))
}

fn fault(vm: &Vm, vcpu: u32, frames: &[u64]) -> Result<(), Error> {
    for batch in frames.chunks(BATCH) {
        let faults: Vec<Fault> = batch
            .iter()
            .map(|frame| Fault {
                gpa: frame * PAGE_SIZE,
                qualification: 2,
                ..Fault::default()
            })
            .collect();
        vm.handle_faults(vcpu, &faults).map_err(bench_error)?;
    }
    Ok(())
}

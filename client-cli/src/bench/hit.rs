//! `hit`: private faults that the mirror answers, beside a bare walk of the same tables.

use std::hint::black_box;

use tdp_mmu::{Fault, Vm};
use tdx_defs::PAGE_SIZE;

use super::figure::{Figure, ns_per_op};
use super::in_process::{Pair, bench_error};
use super::{Plan, timed};
use crate::error::Error;
use crate::progress::Progress;

const GIB: u64 = 1 << 30;
/// Faults of one batch.
const BATCH: usize = 4096;
/// Batches of one sample.
const BATCHES: u64 = 64;
/// Pages of one leaf table.
const HOT_PAGES: u64 = 512;

pub(super) async fn run(plan: Plan, progress: &Progress) -> Result<Vec<Figure>, Error> {
    let size = plan.size(16 * GIB);
    let pair = Pair::new()?;
    let vm = tokio::task::block_in_place(|| {
        let vm = pair.vm(1, size)?;
        vm.pre_fault_memory(0, 0, size, &mut |_| {})
            .map_err(bench_error)?;
        Ok::<_, Error>(vm)
    })?;
    let pages = size / PAGE_SIZE;
    let mut figures = Vec::new();
    for (name, span) in [
        ("hit in one leaf table", HOT_PAGES.min(pages)),
        ("hit anywhere", pages),
    ] {
        let samples = plan
            .repeat(progress, async || {
                tokio::task::block_in_place(|| sample(&vm, span))
            })
            .await?;
        let floor = "bare walk of the mirror";
        let ops = BATCHES * BATCH as u64;
        figures.push(Figure::new((name, floor), ops, &samples));
    }
    tokio::task::block_in_place(|| vm.destroy().map_err(bench_error))?;
    Ok(figures)
}

/// Nanoseconds a hit, and a bare walk of the same addresses.
fn sample(vm: &Vm, span: u64) -> Result<(f64, f64), Error> {
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    let mut hit = std::time::Duration::ZERO;
    let mut walk = std::time::Duration::ZERO;
    for _ in 0..BATCHES {
        let faults: Vec<Fault> = (0..BATCH)
            .map(|_| {
                // xorshift64: cheap and the same in every run.
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                Fault {
                    gpa: random % span * PAGE_SIZE,
                    qualification: 2,
                    ..Fault::default()
                }
            })
            .collect();
        let (walked, time) = timed(|| {
            faults
                .iter()
                .filter(|fault| vm.mirror_leaf(fault.gpa).is_some())
                .count()
        });
        walk += time;
        assert_eq!(black_box(walked), BATCH, "everything is mapped");
        let (report, time) = timed(|| vm.handle_faults(0, &faults));
        hit += time;
        assert_eq!(report.map_err(bench_error)?.spurious as usize, BATCH);
    }
    let ops = BATCHES * BATCH as u64;
    Ok((ns_per_op(hit, ops), ns_per_op(walk, ops)))
}

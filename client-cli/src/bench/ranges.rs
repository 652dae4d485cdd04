//! `populate` and `convert`: whole ranges, as batching is for.

use std::time::Instant;

use mirror_proto::mmu::Mode;
use tdx_defs::PAGE_SIZE;

use super::figure::{Figure, median, ns_per_op};
use super::in_process::{Pair, bench_error};
use super::memory::Footprint;
use super::{Memory, Plan, remote, timed};
use crate::args::Visibility;
use crate::client::Client;
use crate::error::Error;
use crate::progress::Progress;
use crate::tally::Tally;

pub(super) const GIB: u64 = 1 << 30;
/// Mode `kernel` makes a call a page: a part of the range is enough to know what one costs.
const KERNEL_SIZE: u64 = 4 << 20;

/// Prefault of a range: through both services, with both libraries in one process, and in mode
/// `kernel`.
pub(super) async fn populate(
    client: &Client,
    memory: Memory<'_>,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let size = plan.size(GIB);
    let pages = size / PAGE_SIZE;
    let mut tally = Tally::default();
    let mut footprint = None;
    // Buffers of the connections are no part of what a page costs.
    remote::with_td(client, Mode::Batched, KERNEL_SIZE, true, async |vm| {
        remote::prefault(client, vm, KERNEL_SIZE).await
    })
    .await?;
    let samples = plan
        .repeat(progress, async || {
            let mut while_there = None;
            let batched = remote::with_td(client, Mode::Batched, size, true, async |vm| {
                let empty = memory();
                let start = Instant::now();
                tally = remote::prefault(client, vm, size).await?;
                let took = start.elapsed();
                while_there = empty.zip(memory());
                Ok(took)
            })
            .await?;
            if footprint.is_none() {
                let around = while_there.zip(memory());
                footprint = around.map(|((empty, full), gone)| Footprint { empty, full, gone });
            }
            let kernel_size = KERNEL_SIZE.min(size);
            let kernel = remote::with_td(client, Mode::Kernel, kernel_size, true, async |vm| {
                let start = Instant::now();
                remote::prefault(client, vm, kernel_size).await?;
                Ok(start.elapsed())
            })
            .await?;
            let here = tokio::task::block_in_place(|| populate_here(size))?;
            Ok([
                ns_per_op(batched, pages),
                here,
                ns_per_op(kernel, kernel_size / PAGE_SIZE),
            ])
        })
        .await?;
    let batched: Vec<_> = samples
        .iter()
        .map(|&[batched, here, _]| (batched, here))
        .collect();
    let kernel: Vec<_> = samples
        .iter()
        .map(|&[batched, _, kernel]| (kernel, batched))
        .collect();
    let names = ("populate a page", "both libraries in one process");
    let mut figure = Figure::new(names, pages, &batched).counts(&tally);
    if let Some(footprint) = footprint {
        figure = figure
            .with("memory", footprint.to_json(pages))
            .note(footprint.to_text(pages));
    }
    let names = ("populate a page in mode kernel", "populate a page");
    let against = Figure::new(names, KERNEL_SIZE.min(size) / PAGE_SIZE, &kernel);
    Ok(vec![figure, against])
}

pub(super) fn populate_here(size: u64) -> Result<f64, Error> {
    let pair = Pair::new()?;
    let vm = pair.vm(1, size)?;
    let (done, time) = timed(|| vm.pre_fault_memory(0, 0, size, &mut |_| {}));
    done.map_err(bench_error)?;
    vm.destroy().map_err(bench_error)?;
    Ok(ns_per_op(time, size / PAGE_SIZE))
}

/// Conversion of a populated range to shared, beside its population.
pub(super) async fn convert(
    client: &Client,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let size = plan.size(GIB);
    let pages = size / PAGE_SIZE;
    let mut tally = Tally::default();
    let samples = plan
        .repeat(progress, async || {
            remote::with_td(client, Mode::Batched, size, true, async |vm| {
                let start = Instant::now();
                remote::prefault(client, vm, size).await?;
                let populate = start.elapsed();
                let start = Instant::now();
                tally = remote::convert(client, vm, size, Visibility::Shared).await?;
                let convert = start.elapsed();
                Ok((ns_per_op(convert, pages), ns_per_op(populate, pages)))
            })
            .await
        })
        .await?;
    let names = ("convert a page to shared", "populate a page");
    let per_chunk = median([ratio(tally.rpcs, size.div_ceil(16 << 20))]);
    let figure = Figure::new(names, pages, &samples)
        .counts(&tally)
        .with("rpcs_per_16_mib", per_chunk);
    Ok(vec![figure])
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn ratio(of: u64, to: u64) -> f64 {
    of as f64 / to.max(1) as f64
}

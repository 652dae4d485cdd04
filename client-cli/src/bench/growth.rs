//! `growth`: what a page costs in TDs of growing size, each in memory that the one before it did
//! not have: time, and bytes in both processes.

use std::time::Instant;

use mirror_proto::mmu::Mode;
use tdx_defs::PAGE_SIZE;

use super::figure::{Figure, ns_per_op};
use super::memory::Footprint;
use super::ranges::GIB;
use super::{Memory, Plan, remote};
use crate::args::Visibility;
use crate::client::Client;
use crate::error::Error;
use crate::progress::Progress;

/// Sizes, and how they are called.
const SIZES: [(u64, &str); 8] = [
    (2 << 20, "a page of 2 MiB"),
    (16 << 20, "a page of 16 MiB"),
    (128 << 20, "a page of 128 MiB"),
    (GIB, "a page of 1 GiB"),
    (8 * GIB, "a page of 8 GiB"),
    (64 * GIB, "a page of 64 GiB"),
    (256 * GIB, "a page of 256 GiB"),
    (1024 * GIB, "a page of 1 TiB"),
];

/// Populates beside conversions, for each size up to that of the plan.
pub(super) async fn run(
    client: &Client,
    memory: Memory<'_>,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let most = plan.size(8 * GIB);
    let mut figures = Vec::new();
    for (size, name) in SIZES.into_iter().filter(|&(size, _)| size <= most) {
        let pages = size / PAGE_SIZE;
        let mut footprint = None;
        let samples = plan
            .repeat(progress, async || {
                let (populate, convert, around) =
                    remote::with_td(client, Mode::Batched, size, true, async |vm| {
                        let empty = memory();
                        let start = Instant::now();
                        remote::prefault(client, vm, size).await?;
                        let populate = start.elapsed();
                        let around = empty.zip(memory());
                        let start = Instant::now();
                        remote::convert(client, vm, size, Visibility::Shared).await?;
                        Ok((populate, start.elapsed(), around))
                    })
                    .await?;
                if footprint.is_none() {
                    let all = around.zip(memory());
                    footprint = all.map(|((empty, full), gone)| Footprint { empty, full, gone });
                }
                Ok((ns_per_op(populate, pages), ns_per_op(convert, pages)))
            })
            .await?;
        let mut figure = Figure::new((name, "its conversion"), pages, &samples).with("size", size);
        if let Some(footprint) = footprint {
            figure = figure.with("memory", footprint.to_json(pages));
        }
        figures.push(figure);
    }
    Ok(figures)
}

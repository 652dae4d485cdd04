//! `life`: one TD from its first page to its last: populated page by page, audited, converted,
//! destroyed. The only benchmark that is meant for terabytes: nothing of its size is in this
//! process.

use std::time::{Duration, Instant};

use mirror_proto::mmu::Mode;
use tdx_defs::PAGE_SIZE;

use super::figure::{Figure, ns_per_op};
use super::memory::Footprint;
use super::ranges::{GIB, populate_here};
use super::{Memory, Plan, remote};
use crate::args::Visibility;
use crate::client::Client;
use crate::error::Error;
use crate::progress::Progress;
use crate::replay::audit;
use crate::tally::Tally;

/// How long each part took.
struct Parts {
    populate: Duration,
    audit: Duration,
    convert: Duration,
    destroy: Duration,
}

pub(super) async fn run(
    client: &Client,
    memory: Memory<'_>,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let size = plan.size(4 * GIB);
    let pages = size / PAGE_SIZE;
    let mut populated = Tally::default();
    let mut converted = Tally::default();
    let mut footprint = None;
    let samples = plan
        .repeat(progress, async || {
            let mut around = None;
            let (mut parts, end) = remote::with_td(client, Mode::Batched, size, true, async |vm| {
                let empty = memory();
                let start = Instant::now();
                populated = remote::prefault(client, vm, size).await?;
                let populate = start.elapsed();
                around = empty.zip(memory());
                let start = Instant::now();
                let found = audit(client, vm).await?;
                let audit = start.elapsed();
                if found.mismatches != 0 || found.frozen != 0 || found.leaves != pages {
                    let reason = format!(
                        "{} mismatches, {} frozen entries and {} of {pages} leaves after populate",
                        found.mismatches, found.frozen, found.leaves
                    );
                    return Err(Error::Bench(reason.into()));
                }
                let start = Instant::now();
                converted = remote::convert(client, vm, size, Visibility::Shared).await?;
                let convert = start.elapsed();
                let destroy = Duration::ZERO;
                let parts = Parts {
                    populate,
                    audit,
                    convert,
                    destroy,
                };
                Ok((parts, Instant::now()))
            })
            .await?;
            parts.destroy = end.elapsed();
            if footprint.is_none() {
                let all = around.zip(memory());
                footprint = all.map(|((empty, full), gone)| Footprint { empty, full, gone });
            }
            let here = tokio::task::block_in_place(|| populate_here(size.min(GIB)))?;
            Ok((parts, here))
        })
        .await?;
    let beside_populate = |part: fn(&Parts) -> Duration| -> Vec<(f64, f64)> {
        let each = |parts: &Parts| {
            (
                ns_per_op(part(parts), pages),
                ns_per_op(parts.populate, pages),
            )
        };
        samples.iter().map(|(parts, _)| each(parts)).collect()
    };
    let populate: Vec<_> = samples
        .iter()
        .map(|(parts, here)| (ns_per_op(parts.populate, pages), *here))
        .collect();
    let names = ("populate a page", "a page of at most 1 GiB in one process");
    let mut first = Figure::new(names, pages, &populate).counts(&populated);
    if let Some(footprint) = footprint {
        first = first
            .with("memory", footprint.to_json(pages))
            .note(footprint.to_text(pages));
    }
    let audited = beside_populate(|parts| parts.audit);
    let shared = beside_populate(|parts| parts.convert);
    let gone = beside_populate(|parts| parts.destroy);
    Ok(vec![
        first,
        Figure::new(("audit a page", "populate a page"), pages, &audited),
        Figure::new(
            ("convert a page to shared", "populate a page"),
            pages,
            &shared,
        )
        .counts(&converted),
        Figure::new(
            ("destroy what a page left", "populate a page"),
            pages,
            &gone,
        ),
    ])
}

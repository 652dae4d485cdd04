//! `build`: a measured image through both services, beside hashing the same bytes.

use std::hint::black_box;
use std::time::Instant;

use bytes::Bytes;
use mirror_proto::mmu::{InitMemRegionRequest, Mode};
use ring::digest::{Context, SHA384};
use tdx_defs::PAGE_SIZE;

use super::figure::{Figure, ns_per_op};
use super::{Plan, remote, timed};
use crate::client::Client;
use crate::error::Error;
use crate::progress::Progress;
use crate::tally::Tally;

/// Bytes of one region.
const REGION: u64 = 1 << 20;
/// Bytes that one TDH.MR.EXTEND measures, and the header in front of them.
const CHUNK: usize = 256;
const HEADER: usize = 128;

pub(super) async fn run(
    client: &Client,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let size = plan.size(16 << 20);
    let pages = size / PAGE_SIZE;
    let mut tally = Tally::default();
    let samples = plan
        .repeat(progress, async || {
            let built = remote::with_td(client, Mode::Batched, size, false, async |vm_id| {
                let start = Instant::now();
                tally = add(client, vm_id, size).await?;
                let took = start.elapsed();
                remote::finalize(client, vm_id).await?;
                Ok(took)
            })
            .await?;
            let hashed = tokio::task::block_in_place(|| hash(size));
            Ok((ns_per_op(built, pages), hashed))
        })
        .await?;
    let names = ("add and measure a page", "SHA-384 over its records");
    Ok(vec![Figure::new(names, pages, &samples).counts(&tally)])
}

async fn add(client: &Client, vm_id: u64, size: u64) -> Result<Tally, Error> {
    // The image is in memory before it is sent.
    let region = Bytes::from(vec![0xA5; usize::try_from(REGION).unwrap_or(0)]);
    let starts = (0..size).step_by(usize::try_from(REGION).unwrap_or(usize::MAX));
    let regions = starts.map(move |gpa| {
        let part = REGION.min(size - gpa);
        InitMemRegionRequest {
            vm_id,
            gpa,
            size: part,
            data: region.slice(..usize::try_from(part).unwrap_or(0)),
            measure: true,
            ..Default::default()
        }
    });
    let regions = tokio_stream::iter(regions);
    let answer = client
        .long("InitMemRegions", regions, async |mut mmu, request| {
            mmu.init_mem_regions(request).await
        })
        .await?;
    let mut tally = Tally::default();
    tally.add(answer.counts.as_ref());
    Ok(tally)
}

/// What the measurement of the same pages hashes: a record for each page and each chunk.
pub(super) fn hash(size: u64) -> f64 {
    let record = [0xA5; HEADER];
    let chunk = [0x5A; CHUNK];
    let pages = size / PAGE_SIZE;
    let (digest, time) = timed(|| {
        let mut hash = Context::new(&SHA384);
        for _ in 0..pages {
            hash.update(&record);
            for _ in 0..4096 / CHUNK {
                hash.update(&record);
                hash.update(&chunk);
            }
        }
        hash.finish()
    });
    black_box(digest);
    ns_per_op(time, pages)
}

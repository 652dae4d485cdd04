//! `scatter`: faults in random order through the fault stream, beside both libraries in one process.

use std::time::Instant;

use mirror_proto::mmu::{Fault as WireFault, HandleFaultsRequest, Mode};
use tdp_mmu::Fault;
use tdx_defs::PAGE_SIZE;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::figure::{Figure, ns_per_op};
use super::in_process::{Pair, bench_error};
use super::{Plan, remote, timed};
use crate::client::Client;
use crate::error::Error;
use crate::progress::Progress;
use crate::tally::Tally;

const CALL: &str = "HandleFaults";
/// Faults of one message.
const BATCH: usize = 4096;
/// Messages that may wait for their answer.
const AHEAD: usize = 4;

pub(super) async fn run(
    client: &Client,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let size = plan.size(256 << 20);
    let order = shuffled(size / PAGE_SIZE);
    let pages = order.len() as u64;
    let mut tally = Tally::default();
    let samples = plan
        .repeat(progress, async || {
            let wire = remote::with_td(client, Mode::Batched, size, true, async |vm_id| {
                let start = Instant::now();
                tally = faults(client, vm_id, &order, &mut String::new).await?;
                Ok(start.elapsed())
            })
            .await?;
            let here = tokio::task::block_in_place(|| faults_here(size, &order))?;
            Ok((ns_per_op(wire, pages), here))
        })
        .await?;
    let names = ("fault in random order", "both libraries in one process");
    Ok(vec![Figure::new(names, pages, &samples).counts(&tally)])
}

/// Frames 0 to `pages`, in an order that is the same in every run.
fn shuffled(pages: u64) -> Vec<u64> {
    let mut frames: Vec<u64> = (0..pages).collect();
    let mut random = 0x9E37_79B9_7F4A_7C15u64;
    for at in (1..frames.len()).rev() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Below `at`, which is an index.
        let other = usize::try_from(random % (at as u64 + 1)).unwrap_or(0);
        frames.swap(at, other);
    }
    frames
}

/// Write accesses to the frames of `order`; each message has its `traceparent`.
pub(super) async fn faults(
    client: &Client,
    vm_id: u64,
    order: &[u64],
    traceparent: &mut dyn FnMut() -> String,
) -> Result<Tally, Error> {
    let (asks, requests) = mpsc::channel(AHEAD);
    let mut answers = client
        .open(
            CALL,
            ReceiverStream::new(requests),
            async |mut mmu, requests| mmu.handle_faults(requests).await,
        )
        .await?;
    let batches: Vec<HandleFaultsRequest> = order
        .chunks(BATCH)
        .map(|frames| HandleFaultsRequest {
            vm_id,
            vcpu_id: 0,
            faults: frames
                .iter()
                .map(|frame| WireFault {
                    gpa: frame * PAGE_SIZE,
                    qualification: 2,
                    ..WireFault::default()
                })
                .collect(),
            traceparent: traceparent(),
            ..HandleFaultsRequest::default()
        })
        .collect();
    let count = batches.len();
    let send = async {
        for batch in batches {
            // A stream that takes nothing has ended, and its last message says why.
            if asks.send(batch).await.is_err() {
                break;
            }
        }
    };
    let mut tally = Tally::default();
    let receive = async {
        for _ in 0..count {
            let answer = client.next(CALL, &mut answers).await?;
            let answer = answer.ok_or(Error::Truncated { call: CALL })?;
            tally.add(answer.counts.as_ref());
        }
        Ok::<_, Error>(())
    };
    let ((), received) = tokio::join!(send, receive);
    received?;
    Ok(tally)
}

fn faults_here(size: u64, order: &[u64]) -> Result<f64, Error> {
    let pair = Pair::new()?;
    let vm = pair.vm(1, size)?;
    let faults: Vec<Fault> = order
        .iter()
        .map(|frame| Fault {
            gpa: frame * PAGE_SIZE,
            qualification: 2,
            ..Fault::default()
        })
        .collect();
    let (done, time) = timed(|| {
        faults
            .chunks(BATCH)
            .try_for_each(|batch| vm.handle_faults(0, batch).map(drop))
    });
    done.map_err(bench_error)?;
    vm.destroy().map_err(bench_error)?;
    Ok(ns_per_op(time, order.len() as u64))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_order_has_every_frame_once_and_is_no_ascent() {
        let mut frames = shuffled(1000);
        assert!(!frames.is_sorted());
        frames.sort_unstable();
        assert!(frames.into_iter().eq(0..1000));
    }
}

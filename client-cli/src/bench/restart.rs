//! What it costs that VMs outlive mmu-service: the time from its kill until it serves again, and what a
//! change costs that is written down.
//!
//! A pair of services of its own keeps a state; the session's services, which keep none, are beside it.

use std::time::{Duration, Instant};

use tdx_defs::PAGE_SIZE;

use super::figure::{Figure, median, ns_per_op};
use super::ranges::GIB;
use super::{Plan, remote};
use crate::args::Visibility;
use crate::chaos::stack::Stack;
use crate::client::{Client, Limits};
use crate::error::Error;
use crate::local::child::Role;
use crate::progress::Progress;

/// Changes of one repeat that are written down.
const CHANGES: u32 = 100;
/// How long one answer may take: a conversion, or the first request after a recovery.
const LIMIT: Duration = Duration::from_secs(60);

struct Sample {
    recovery: Duration,
    /// A restart without VMs.
    start: Duration,
    /// All changes, with a state and without.
    written: Duration,
    unwritten: Duration,
}

pub(super) async fn run(
    client: &Client,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let size = plan.size(GIB);
    let pages = size / PAGE_SIZE;
    let samples = plan
        .repeat(progress, async || {
            let mut stack = Stack::start(client.stop()).await.map_err(Error::Local)?;
            let measured = measure(&mut stack, client, size).await;
            stack.stop().await;
            measured
        })
        .await?;
    let pairs = |with: fn(&Sample) -> Duration, without: fn(&Sample) -> Duration, ops: u64| {
        let pair = |sample| {
            let (with, without) = (with(sample), without(sample));
            (ns_per_op(with, ops), ns_per_op(without, ops))
        };
        samples.iter().map(pair).collect::<Vec<_>>()
    };
    let seconds =
        |of: fn(&Sample) -> Duration| median(samples.iter().map(|sample| of(sample).as_secs_f64()));
    let recovery = Figure::new(
        ("restart after kill -9, a page", "restart without VMs"),
        pages,
        &pairs(|sample| sample.recovery, |sample| sample.start, pages),
    )
    .with("recovery_s", seconds(|sample| sample.recovery))
    .with("floor_recovery_s", seconds(|sample| sample.start));
    let changes = u64::from(CHANGES);
    let written = Figure::new(
        ("attribute change with --state", "without a state"),
        changes,
        &pairs(|sample| sample.written, |sample| sample.unwritten, changes),
    );
    Ok(vec![recovery, written])
}

async fn connect(stack: &Stack, client: &Client) -> Result<Client, Error> {
    let limits = Limits::new(Some(LIMIT));
    let stop = client.stop().clone();
    Client::connect(stack.mmu_url(), None, None, limits, stop).await
}

async fn measure(stack: &mut Stack, client: &Client, size: u64) -> Result<Sample, Error> {
    let start = restart(stack).await?;
    let kept = connect(stack, client).await?;
    remote::populated_td(&kept, size).await?;
    let recovery = restart(stack).await?;
    // Nothing of it is worth a figure that was not recovered.
    let kept = connect(stack, client).await?;
    let list = mirror_proto::mmu::ListVmsRequest {};
    let list = kept
        .short("ListVms", list, async |mut mmu, request| {
            mmu.list_vms(request).await
        })
        .await?;
    let mapped: u64 = list.vms.iter().map(|vm| vm.pages_4k).sum();
    if mapped != size / PAGE_SIZE {
        let reason = format!("{mapped} of {} pages are there again", size / PAGE_SIZE);
        return Err(Error::Bench(reason.into()));
    }
    Ok(Sample {
        recovery,
        start,
        written: changes(&kept).await?,
        unwritten: changes(client).await?,
    })
}

/// From the kill until it serves.
async fn restart(stack: &mut Stack) -> Result<Duration, Error> {
    let start = Instant::now();
    stack.kill(Role::Mmu).await.map_err(Error::Local)?;
    Ok(start.elapsed())
}

/// Attributes of a page that nobody mapped, there and back: no call to the module, one note each.
async fn changes(client: &Client) -> Result<Duration, Error> {
    remote::with_td(
        client,
        mirror_proto::mmu::Mode::Batched,
        2 << 20,
        false,
        async |vm_id| {
            let start = Instant::now();
            for at in 0..CHANGES {
                let to = if at % 2 == 0 {
                    Visibility::Shared
                } else {
                    Visibility::Private
                };
                remote::convert(client, vm_id, PAGE_SIZE, to).await?;
            }
            Ok(start.elapsed())
        },
    )
    .await
}

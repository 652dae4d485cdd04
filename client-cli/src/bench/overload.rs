//! Ten times the clients that the service admits, beside as many as it does.
//!
//! Every client has a connection of its own and asks again as soon as it is answered; one that is
//! refused comes back after the delay that the refusal names. The memory is populated, so that a
//! call costs the same in both loads.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use mirror_proto::mmu::{Fault, HandleFaultRequest};
use tokio::task::JoinSet;
use tonic::Code;
use tonic_types::StatusExt as _;

use super::figure::{Figure, median};
use super::{Plan, remote};
use crate::client::{Client, with_deadline};
use crate::error::{Error, Refusal};
use crate::progress::Progress;
use crate::session::Session;

/// Requests that the service has places for.
const PLACES: usize = 32;
/// The options that say so.
pub const OPTIONS: &[&str] = &[
    "--max-requests",
    "32",
    "--max-operations",
    "16",
    "--max-vm-operations",
    "8",
];
/// VMs that the clients share.
const VMS: usize = 8;
/// Memory of each.
const SIZE: u64 = 16 << 20;
/// How many times the places there are clients.
const TIMES: usize = 10;
/// How long each load is kept up.
const PERIOD: Duration = Duration::from_secs(3);
/// A call that takes longer hangs.
const LIMIT: Duration = Duration::from_secs(30);

/// What one load came to.
struct Load {
    answered: u64,
    refused: u64,
    latencies_us: Vec<u64>,
    took: Duration,
}

impl Load {
    #[expect(
        clippy::cast_precision_loss,
        reason = "times and counts are far below 2^52"
    )]
    fn ns_per_call(&self) -> f64 {
        self.took.as_nanos() as f64 / self.answered.max(1) as f64
    }

    /// Microseconds within which so many of a hundred calls that were admitted are answered.
    fn percentile(&self, percent: usize) -> u64 {
        let at = (self.latencies_us.len() * percent / 100).min(self.latencies_us.len().max(1) - 1);
        self.latencies_us.get(at).copied().unwrap_or(0)
    }
}

pub(super) async fn run(
    session: &Session,
    client: &Client,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let size = plan.size(SIZE);
    let mut vms = Vec::new();
    for _ in 0..VMS {
        vms.push(remote::populated_td(client, size).await?);
    }
    let mut clients = Vec::new();
    for _ in 0..PLACES * TIMES {
        clients.push(session.client().await?);
    }
    let before = session.memory();
    let samples = plan
        .repeat(progress, async || {
            // Few first, then many, in each repeat.
            let few = load(&clients[..PLACES], &vms, size).await?;
            let many = load(&clients, &vms, size).await?;
            Ok((few, many))
        })
        .await?;
    let after = session.memory();
    let of = |pick: &dyn Fn(&(Load, Load)) -> u64| {
        #[expect(clippy::cast_precision_loss, reason = "microseconds, far below 2^52")]
        let values = samples.iter().map(|sample| pick(sample) as f64);
        median(values)
    };
    let sum = |pick: &dyn Fn(&(Load, Load)) -> u64| samples.iter().map(pick).sum::<u64>();
    let pairs: Vec<_> = samples
        .iter()
        .map(|(few, many)| (many.ns_per_call(), few.ns_per_call()))
        .collect();
    let answered = sum(&|(_, many)| many.answered);
    let names = ("ten times the clients", "as many clients as places");
    let mut figure = Figure::new(names, answered, &pairs)
        .with("places", PLACES)
        .with("clients", PLACES * TIMES)
        .with("refused", sum(&|(_, many)| many.refused))
        .with("p50_us", of(&|(_, many)| many.percentile(50)))
        .with("p99_us", of(&|(_, many)| many.percentile(99)))
        .with("floor_p50_us", of(&|(few, _)| few.percentile(50)))
        .with("floor_p99_us", of(&|(few, _)| few.percentile(99)));
    if let (Some(before), Some(after)) = (before, after) {
        figure = figure
            .with("mmu_growth_bytes", after.mmu.saturating_sub(before.mmu))
            .with(
                "module_growth_bytes",
                after.module.saturating_sub(before.module),
            );
    }
    Ok(vec![figure])
}

/// All of `clients` at once, for a while.
async fn load(clients: &[Client], vms: &[u64], size: u64) -> Result<Load, Error> {
    let begun = Instant::now();
    let refused = Arc::new(AtomicU64::new(0));
    let mut working = JoinSet::new();
    for (at, client) in clients.iter().enumerate() {
        let (client, vm_id) = (client.clone(), vms[at % vms.len()]);
        let refused = Arc::clone(&refused);
        working.spawn(async move {
            let mut rng = fastrand::Rng::with_seed(at as u64);
            let mut latencies_us = Vec::new();
            while begun.elapsed() < PERIOD {
                let page = rng.u64(..size >> 12);
                let asked = Instant::now();
                match one(&client, vm_id, page << 12).await? {
                    None => latencies_us
                        .push(u64::try_from(asked.elapsed().as_micros()).unwrap_or(u64::MAX)),
                    Some(delay) => {
                        refused.fetch_add(1, Ordering::Relaxed);
                        // Spread, so that the refused do not come back together.
                        let spread = rng.u32(50..150);
                        tokio::time::sleep(delay * spread / 100).await;
                    }
                }
            }
            Ok::<_, Error>(latencies_us)
        });
    }
    let mut latencies_us = Vec::new();
    while let Some(done) = working.join_next().await {
        if let Ok(done) = done {
            latencies_us.extend(done?);
        }
    }
    latencies_us.sort_unstable();
    Ok(Load {
        answered: latencies_us.len() as u64,
        refused: refused.load(Ordering::Relaxed),
        latencies_us,
        took: begun.elapsed(),
    })
}

/// One access. `None` when it was handled, else the delay that the refusal asks for.
async fn one(client: &Client, vm_id: u64, gpa: u64) -> Result<Option<Duration>, Error> {
    let message = HandleFaultRequest {
        vm_id,
        vcpu_id: 0,
        fault: Some(Fault {
            gpa,
            ..Fault::default()
        }),
        ..HandleFaultRequest::default()
    };
    let refused = |source| Error::Refused {
        call: "HandleFault",
        source: Refusal::new(source),
    };
    let mut mmu = client.mmu.clone();
    let answer = tokio::time::timeout(LIMIT, mmu.handle_fault(with_deadline(message, LIMIT)));
    match answer.await {
        Err(_) => Err(Error::NoAnswer {
            call: "HandleFault",
            limit: LIMIT,
        }),
        Ok(Ok(_)) => Ok(None),
        Ok(Err(status)) if status.code() == Code::ResourceExhausted => {
            // A refusal that does not say when to come back is none of an overload.
            match status
                .get_details_retry_info()
                .and_then(|retry| retry.retry_delay)
            {
                Some(delay) => Ok(Some(delay)),
                None => Err(refused(status)),
            }
        }
        Ok(Err(status)) => Err(refused(status)),
    }
}

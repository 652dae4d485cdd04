//! `trace`: what tracing costs, off and on.
//!
//! Faults that the mirror answers, one by one through the gate as the service has it, closed and open
//! for one in a hundred, beside the same faults without it. Populating fault by fault through the
//! services with a span of every message, which is more than one fault in a hundred, beside the same
//! without. Spans are exported where `OTEL_EXPORTER_OTLP_ENDPOINT` says; without it none are made
//! beyond the gate.

use std::hint::black_box;
use std::time::{Duration, Instant};

use mirror_proto::mmu::Mode;
use tdp_mmu::{Fault, Vm};
use tdx_defs::PAGE_SIZE;
use telemetry::Gate;
use telemetry::late::{Account, Untraced};
use tracing::{Span, info_span};

use super::figure::{Figure, ns_per_op};
use super::in_process::{Pair, bench_error};
use super::scatter::faults;
use super::{Plan, remote, timed};
use crate::client::Client;
use crate::error::Error;
use crate::progress::Progress;
use crate::tally::Tally;

/// Pages of one leaf table.
const HOT_PAGES: u64 = 512;
/// Faults of one sample on them.
const HITS: u64 = 1 << 16;
/// Rounds of a sample, by turns with and without the gate: what else the machine does meets both.
const ROUNDS: u64 = 32;
/// One in so many is traced where the gate is open.
const EVERY: u32 = 100;
/// When the service makes a span afterwards, by default.
const SLOW: Duration = Duration::from_millis(10);

pub(super) async fn run(
    client: &Client,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let pair = Pair::new()?;
    let vm = tokio::task::block_in_place(|| {
        let size = HOT_PAGES * PAGE_SIZE;
        let vm = pair.vm(1, size)?;
        vm.pre_fault_memory(0, 0, size, &mut |_| {})
            .map_err(bench_error)?;
        Ok::<_, Error>(vm)
    })?;
    let (closed, open) = (Gate::new(0, SLOW), Gate::new(EVERY, SLOW));
    let size = plan.size(256 << 20);
    let order: Vec<u64> = (0..size / PAGE_SIZE).collect();
    let pages = order.len() as u64;
    let mut tally = Tally::default();
    let mut traces = 0u64;
    let samples = plan
        .repeat(progress, async || {
            let hits =
                tokio::task::block_in_place(|| [&closed, &open].map(|gate| by_turns(&vm, gate)));
            let mut populate = async |sampled: bool| {
                remote::with_td(client, Mode::Batched, size, true, async |vm_id| {
                    let mut traceparent = || {
                        traces += 1;
                        match sampled {
                            true => format!("00-{traces:032x}-{traces:016x}-01"),
                            false => String::new(),
                        }
                    };
                    let start = Instant::now();
                    tally = faults(client, vm_id, &order, &mut traceparent).await?;
                    Ok(ns_per_op(start.elapsed(), pages))
                })
                .await
            };
            let without = populate(false).await?;
            let with = populate(true).await?;
            Ok((hits, (with, without)))
        })
        .await?;
    tokio::task::block_in_place(|| vm.destroy().map_err(bench_error))?;
    let (hits, populated): (Vec<_>, Vec<_>) = samples.into_iter().unzip();
    let (closed, open): (Vec<_>, Vec<_>) = hits
        .into_iter()
        .map(|[closed, open]| (closed, open))
        .unzip();
    Ok(vec![
        Figure::new(
            ("hit through the closed gate", "hit without it"),
            HITS,
            &closed,
        )
        .with("exported", telemetry::is_recording()),
        Figure::new(
            ("hit, one in 100 traced", "hit without the gate"),
            HITS,
            &open,
        )
        .with("exported", telemetry::is_recording()),
        Figure::new(
            (
                "populate by faults, each message traced",
                "the same, untraced",
            ),
            pages,
            &populated,
        )
        .counts(&tally)
        .with("exported", telemetry::is_recording()),
    ])
}

/// Nanoseconds of a fault through the gate, and of one without it.
fn by_turns(vm: &Vm, gate: &Gate) -> (f64, f64) {
    let (mut gated, mut bare) = (0.0, 0.0);
    for _ in 0..ROUNDS {
        gated += round(|fault| through(gate, vm, fault));
        bare += round(|fault| vm.handle_fault(0, fault).is_ok());
    }
    let rounds = ROUNDS as f64;
    (gated / rounds, bare / rounds)
}

/// Nanoseconds of one fault on the hot pages.
fn round(mut handle: impl FnMut(Fault) -> bool) -> f64 {
    const FAULTS: u64 = HITS / ROUNDS;
    let (done, time) = timed(|| {
        (0..FAULTS)
            .filter(|at| {
                handle(Fault {
                    gpa: at % HOT_PAGES * PAGE_SIZE,
                    qualification: 2,
                    ..Fault::default()
                })
            })
            .count()
    });
    assert_eq!(black_box(done) as u64, FAULTS, "everything is mapped");
    ns_per_op(time, FAULTS)
}

/// One fault as the service handles it for a caller that has not decided.
fn through(gate: &Gate, vm: &Vm, fault: Fault) -> bool {
    let (span, untraced) = if gate.admits(1) {
        (info_span!("handle_fault", kvm.vcpu = 0), None)
    } else {
        (Span::none(), Untraced::begin("handle_fault", ""))
    };
    let report = span.in_scope(|| vm.handle_fault(0, fault));
    if let Some(untraced) = untraced
        && gate.is_slow(untraced.elapsed())
    {
        untraced.tell(Account {
            reason: "slow",
            ..Account::default()
        });
    }
    report.is_ok()
}

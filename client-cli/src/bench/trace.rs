//! `trace`: what tracing costs, off and on.
//!
//! Faults that the mirror answers, one by one through the gate as the service has it, closed and open
//! for one in a hundred, beside the same faults without it: what the gate is to the library, which
//! nobody calls so. The same faults as messages to the service, which traces one in a hundred by
//! itself, beside messages to services whose tracing is switched off: what a caller sees. Populating
//! fault by fault with a span of every message, which is more than one fault in a hundred, beside the
//! same without. Spans are exported where `OTEL_EXPORTER_OTLP_ENDPOINT` says; without it none are
//! made beyond the gate.

use std::hint::black_box;
use std::time::{Duration, Instant};

use mirror_proto::mmu::mmu_service_client::MmuServiceClient;
use mirror_proto::mmu::{Fault as WireFault, HandleFaultRequest, Mode};
use tdp_mmu::{Fault, Vm};
use tdx_defs::PAGE_SIZE;
use telemetry::Gate;
use telemetry::late::{Account, Untraced};
use tonic::transport::Channel;
use tracing::{Span, info_span};

use super::figure::{Figure, ns_per_op};
use super::in_process::{Pair, bench_error};
use super::scatter::faults;
use super::{Plan, remote, timed};
use crate::client::{Client, with_deadline};
use crate::error::{Error, Refusal};
use crate::local::{Local, Options};
use crate::progress::Progress;
use crate::tally::Tally;

/// Pages of one leaf table.
const HOT_PAGES: u64 = 512;
/// Faults of one sample on them.
const HITS: u64 = 1 << 16;
/// Rounds of a sample, by turns with and without the gate: what else the machine does meets both.
const ROUNDS: u64 = 32;
/// Faults of one sample that are messages.
const MESSAGES: u64 = 4096;
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
    // Neither is the session's, which has more to do.
    let mut traced = Services::start(client, &[]).await?;
    let mut quiet = Services::start(client, &[("OTEL_SDK_DISABLED", "true")]).await?;
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
            let messages = messages_by_turns(&mut traced, &mut quiet).await?;
            Ok((hits, messages, (with, without)))
        })
        .await?;
    for services in [traced, quiet] {
        services.local.stop().await;
    }
    tokio::task::block_in_place(|| vm.destroy().map_err(bench_error))?;
    let of = |pick: fn(&Sample) -> (f64, f64)| samples.iter().map(pick).collect::<Vec<_>>();
    let figure = |names, ops, pairs: &[_]| {
        Figure::new(names, ops, pairs).with("exported", telemetry::is_recording())
    };
    Ok(vec![
        figure(
            ("hit through the closed gate", "hit without it"),
            HITS,
            &of(|sample| sample.0[0]),
        ),
        figure(
            ("hit, one in 100 traced", "hit without the gate"),
            HITS,
            &of(|sample| sample.0[1]),
        ),
        figure(
            ("hit by message, one in 100 traced", "services not tracing"),
            MESSAGES,
            &of(|sample| sample.1),
        ),
        figure(
            (
                "populate by faults, each message traced",
                "the same, untraced",
            ),
            pages,
            &of(|sample| sample.2),
        )
        .counts(&tally),
    ])
}

/// Hits closed and open, hits by message, populating: each with tracing and without.
type Sample = ([(f64, f64); 2], (f64, f64), (f64, f64));

/// A pair of services with a TD whose hot pages are mapped.
struct Services {
    local: Local,
    vm_id: u64,
    /// Without a trace layer: its calls say nothing about tracing.
    mmu: MmuServiceClient<Channel>,
    limit: Duration,
}

impl Services {
    async fn start(client: &Client, environment: &[(&str, &str)]) -> Result<Self, Error> {
        let more = Options {
            environment,
            ..Options::default()
        };
        let (stop, limits) = (client.stop(), client.limits);
        let local = Local::start(stop, more).await.map_err(Error::Local)?;
        let connected = Client::connect(local.mmu_url(), None, None, limits, stop.clone()).await?;
        let vm_id = remote::populated_td(&connected, HOT_PAGES * PAGE_SIZE).await?;
        let channel = transport::connect(local.mmu_url())
            .await
            .map_err(bench_error)?;
        Ok(Self {
            local,
            vm_id,
            mmu: MmuServiceClient::new(channel),
            limit: limits.short,
        })
    }

    /// Nanoseconds of a hit by message.
    async fn hits(&mut self) -> Result<f64, Error> {
        const FAULTS: u64 = MESSAGES / ROUNDS;
        let start = Instant::now();
        for at in 0..FAULTS {
            let message = HandleFaultRequest {
                vm_id: self.vm_id,
                fault: Some(WireFault {
                    gpa: at % HOT_PAGES * PAGE_SIZE,
                    qualification: 2,
                    ..WireFault::default()
                }),
                ..HandleFaultRequest::default()
            };
            let answer = self.mmu.handle_fault(with_deadline(message, self.limit));
            answer.await.map_err(|status| Error::Refused {
                call: "HandleFault",
                source: Refusal::new(status),
            })?;
        }
        Ok(ns_per_op(start.elapsed(), FAULTS))
    }
}

/// Nanoseconds of a hit by message with tracing, and without.
async fn messages_by_turns(
    traced: &mut Services,
    quiet: &mut Services,
) -> Result<(f64, f64), Error> {
    let (mut with, mut without) = (0.0, 0.0);
    for _ in 0..ROUNDS {
        with += traced.hits().await?;
        without += quiet.hits().await?;
    }
    let rounds = ROUNDS as f64;
    Ok((with / rounds, without / rounds))
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
        && untraced.is_slow(gate)
    {
        untraced.tell(Account {
            reason: "slow",
            ..Account::default()
        });
    }
    report.is_ok()
}

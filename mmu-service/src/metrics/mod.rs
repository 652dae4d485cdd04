//! What the service counts, at `/metrics`. docs/metrics.md lists every one.
//!
//! Counted once for an operation, from its [`Counts`], or once for a batch, by the link
//! ([`link`]). What VMs hold is read when somebody asks, and never waits for their operations.

mod link;
mod timeline;

use std::sync::{Arc, Mutex, PoisonError};

use tdp_mmu::{Counts, FaultReport, FaultsReport, RetPf, RootKind};
use telemetry::metrics::prometheus::{
    Error, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, core::Collector,
};
use telemetry::metrics::{self, register};
use tonic::Status;
use tonic_types::StatusExt as _;

pub(crate) use link::{Flight, LinkMetrics, Summary};
pub(crate) use timeline::{Event, Outcome, REMEMBERED};

use crate::convert::{ret_pf_name, root_name};
use crate::link::LinkState;
use crate::reasons;
use crate::shell::Shell;

/// A metric of a name that is well formed.
fn made<M>(metric: Result<M, Error>) -> M {
    match metric {
        Ok(metric) => metric,
        Err(error) => unreachable!("names and labels are literals: {error}"),
    }
}

/// Makes metrics and enters them into one registry.
#[derive(Clone)]
struct Maker(Registry);

impl Maker {
    fn enter<M: Collector + Clone + 'static>(&self, metric: Result<M, Error>) -> M {
        register(&self.0, made(metric))
    }

    fn counter(&self, name: &str, help: &str) -> IntCounter {
        self.enter(IntCounter::new(name, help))
    }

    fn counters(&self, name: &str, help: &str, labels: &[&str]) -> IntCounterVec {
        self.enter(IntCounterVec::new(Opts::new(name, help), labels))
    }

    fn gauge(&self, name: &str, help: &str) -> IntGauge {
        self.enter(IntGauge::new(name, help))
    }

    fn gauges(&self, name: &str, help: &str, labels: &[&str]) -> IntGaugeVec {
        self.enter(IntGaugeVec::new(Opts::new(name, help), labels))
    }

    fn registry(&self) -> &Registry {
        &self.0
    }

    fn histograms(&self, name: &str, help: &str, buckets: &[f64], labels: &[&str]) -> HistogramVec {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.enter(HistogramVec::new(options, labels))
    }

    fn histogram(&self, name: &str, help: &str, buckets: &[f64]) -> Histogram {
        let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
        self.enter(Histogram::with_opts(options))
    }
}

/// Outcomes that leave the fault handler.
const OUTCOMES: [RetPf; 4] = [RetPf::Fixed, RetPf::Spurious, RetPf::Retry, RetPf::Emulate];
/// Outcome label of a fault that ended in an error, as KVM_RUN does with an exit record.
const FAILED: &str = "error";
/// Outcome label of faults that a report counts and does not list.
const UNLISTED: &str = "unlisted";
/// Root label of faults whose report does not say which root each was for.
const BOTH: &str = "both";

/// The metrics of one service.
pub(crate) struct Metrics {
    registry: Registry,
    pub(crate) link: Arc<LinkMetrics>,
    faults: IntCounterVec,
    handler_events: [IntCounter; 6],
    mirror_hits: IntCounter,
    kicks: IntCounter,
    flushes: IntCounter,
    pages_mapped: IntCounter,
    pages_zapped: IntCounter,
    refused: IntCounterVec,
    pages: IntGaugeVec,
    vms: IntGauge,
    hkids_in_use: IntGauge,
    page_table_bytes: IntGauge,
    host_pages_in_use: IntGauge,
    module_up: IntGauge,
    /// Refusals of the admission layer that are in the numbers already.
    overloaded: Mutex<u64>,
}

impl Metrics {
    pub(crate) fn new() -> Arc<Self> {
        let make = Maker(metrics::registry());
        make.gauges(
            "mmu_info",
            "Always 1; the label says which service this is.",
            &["version"],
        )
        .with_label_values(&[env!("CARGO_PKG_VERSION")])
        .set(1);
        let events = make.counters(
            "mmu_fault_handler_events_total",
            "KVM's pf_* statistics: what happened inside the fault handler, local retries and \
             prefaulting included.",
            &["event"],
        );
        let faults = make.counters(
            "mmu_faults_total",
            "Faults answered, by outcome and root.",
            &["outcome", "root"],
        );
        for outcome in OUTCOMES
            .map(ret_pf_name)
            .into_iter()
            .chain([FAILED, UNLISTED])
        {
            for root in [
                root_name(RootKind::Direct),
                root_name(RootKind::Mirror),
                BOTH,
            ] {
                faults.with_label_values(&[outcome, root]);
            }
        }
        let refused = make.counters(
            "mmu_requests_refused_total",
            "Requests refused, by reason.",
            &["reason"],
        );
        for reason in reasons::ALL {
            refused.with_label_values(&[reason.word]);
        }
        Arc::new(Self {
            link: LinkMetrics::new(&make),
            faults,
            handler_events: [
                "taken",
                "fixed",
                "spurious",
                "emulate",
                "fast",
                "mmio_spte_created",
            ]
            .map(|event| events.with_label_values(&[event])),
            mirror_hits: make.counter(
                "mmu_mirror_hits_total",
                "Private faults that the mirror answered without the module.",
            ),
            kicks: make.counter(
                "mmu_kicks_total",
                "Rounds that forced vCPUs out of the guest.",
            ),
            flushes: make.counter("mmu_tlb_flushes_total", "Remote TLB flushes."),
            pages_mapped: make.counter(
                "mmu_pages_mapped_total",
                "4 KiB leaves installed, both roots.",
            ),
            pages_zapped: make.counter(
                "mmu_pages_zapped_total",
                "4 KiB leaves removed, both roots.",
            ),
            refused,
            pages: make.gauges(
                "mmu_pages",
                "Present leaves of both roots, by level.",
                &["level"],
            ),
            vms: make.gauge("mmu_vms", "VMs."),
            hkids_in_use: make.gauge("mmu_hkids_in_use", "Private key ids of VMs."),
            page_table_bytes: make.gauge(
                "mmu_page_table_bytes",
                "Memory of mirror and direct page tables.",
            ),
            host_pages_in_use: make.gauge(
                "mmu_host_pages_in_use",
                "Simulated host pages handed out, 4 KiB units.",
            ),
            module_up: make.gauge("mmu_module_up", "1 while the TDX module answers."),
            overloaded: Mutex::default(),
            registry: make.0,
        })
    }

    /// An operation is through.
    pub(crate) fn did(&self, counts: &Counts) {
        let amounts = [
            counts.pf_taken,
            counts.pf_fixed,
            counts.pf_spurious,
            counts.pf_emulate,
            counts.pf_fast,
            counts.pf_mmio_spte_created,
        ];
        for (counter, amount) in self.handler_events.iter().zip(amounts) {
            add(counter, amount);
        }
        add(&self.mirror_hits, counts.mirror_hits);
        add(&self.kicks, counts.kicks);
        add(&self.flushes, counts.flushes);
        add(&self.pages_mapped, counts.pages_mapped);
        add(&self.pages_zapped, counts.pages_zapped);
    }

    /// One fault is answered.
    pub(crate) fn fault(&self, report: &FaultReport) {
        self.faulted(ret_pf_name(report.ret_pf), root_name(report.root), 1);
    }

    /// One fault ended in an error.
    pub(crate) fn fault_failed(&self, root: RootKind) {
        self.faulted(FAILED, root_name(root), 1);
    }

    /// A message of faults is answered; `root` is that of all of them, if they have one.
    pub(crate) fn faults(&self, report: &FaultsReport, root: Option<RootKind>) {
        let root = root.map_or(BOTH, root_name);
        self.faulted(ret_pf_name(RetPf::Fixed), root, report.fixed.into());
        self.faulted(ret_pf_name(RetPf::Spurious), root, report.spurious.into());
        for other in &report.others {
            let outcome = match &other.result {
                Ok(ret_pf) => ret_pf_name(*ret_pf),
                Err(_) => FAILED,
            };
            self.faulted(outcome, root, 1);
        }
        // The report lists only the first ones.
        let listed = report.others.len() as u64;
        let unlisted = u64::from(report.others_count).saturating_sub(listed);
        self.faulted(UNLISTED, root, unlisted);
    }

    fn faulted(&self, outcome: &str, root: &str, faults: u64) {
        if faults != 0 {
            self.faults
                .with_label_values(&[outcome, root])
                .inc_by(faults);
        }
    }

    /// A request is refused.
    pub(crate) fn refused(&self, status: &Status) {
        let given = status.get_details_error_info();
        let reason = given.as_ref().map_or("", |info| &info.reason);
        // Only words from the table become labels.
        let known = reasons::ALL.iter().find(|known| known.word == reason);
        let reason = known.unwrap_or(&reasons::INTERNAL).word;
        self.refused.with_label_values(&[reason]).inc();
    }

    /// Everything as text; the admission layer has refused `overloaded` requests so far.
    pub(crate) fn render(&self, shell: &Shell, overloaded: u64) -> String {
        let (mut pages, mut tables, mut hkids, mut vms) = ([0; 3], 0, 0, 0_u64);
        for entry in shell.vms.all() {
            let held = entry.vm.held();
            for (sum, here) in pages.iter_mut().zip(held.pages) {
                *sum += here;
            }
            tables += held.page_table_bytes;
            hkids += u64::from(held.hkid.is_some());
            vms += 1;
        }
        for (level, pages) in ["4k", "2m", "1g"].into_iter().zip(pages) {
            set(&self.pages.with_label_values(&[level]), pages);
        }
        set(&self.vms, vms);
        set(&self.hkids_in_use, hkids);
        set(&self.page_table_bytes, tables);
        let host_pages = match &*shell.link.state().borrow() {
            LinkState::Up(module) => Some(module.host().pages_in_use()),
            LinkState::Connecting | LinkState::Down { .. } => None,
        };
        set(&self.module_up, host_pages.is_some().into());
        set(&self.host_pages_in_use, host_pages.unwrap_or(0));
        // The layer counts by itself; only scrapes bring the two together.
        let before = {
            let mut known = self
                .overloaded
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let newest = overloaded.max(*known);
            std::mem::replace(&mut *known, newest)
        };
        add(
            &self.refused.with_label_values(&[reasons::OVERLOADED.word]),
            overloaded.saturating_sub(before),
        );
        metrics::render(&self.registry)
    }
}

fn add(counter: &IntCounter, amount: u64) {
    // Most counts of an operation are zero.
    if amount != 0 {
        counter.inc_by(amount);
    }
}

fn set(gauge: &IntGauge, value: u64) {
    gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
}

/// What an operation of the core cost, if it says so.
pub(crate) trait Costs {
    /// Its counts.
    fn costs(&self) -> Option<&Counts>;
}

/// Reports that carry counts in a field.
macro_rules! costs {
    ($($report:ty: $this:ident => $costs:expr;)*) => {
        $(impl Costs for $report {
            fn costs(&self) -> Option<&Counts> {
                let $this = self;
                $costs
            }
        })*
    };
}

costs! {
    Counts: this => Some(this);
    (u32, Counts): this => Some(&this.1);
    (Vec<u64>, Counts): this => Some(&this.1);
    u32: _this => None;
    bool: _this => None;
    (bool, Counts): this => Some(&this.1);
    (): _this => None;
    ([u8; 48], Counts): this => Some(&this.1);
    FaultReport: this => Some(&this.counts);
    FaultsReport: this => Some(&this.counts);
    tdp_mmu::Walk: _this => None;
    tdp_mmu::Map: _this => None;
    tdp_mmu::Stats: _this => None;
}

/// Counts beside whatever else the operation hands back.
impl<T> Costs for (Counts, T) {
    fn costs(&self) -> Option<&Counts> {
        Some(&self.0)
    }
}

/// What a vCPU ran, beside the same.
impl<T> Costs for (Result<tdp_mmu::RunReport, tdp_mmu::VmError>, T) {
    fn costs(&self) -> Option<&Counts> {
        self.0.as_ref().ok().map(|report| &report.counts)
    }
}

/// An answer in pieces; who makes it records what it cost.
impl<T> Costs for Option<T> {
    fn costs(&self) -> Option<&Counts> {
        None
    }
}

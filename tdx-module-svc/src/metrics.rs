//! What the service counts, at `/metrics`. docs/metrics.md lists every one.
//!
//! Counted once for a batch, after it ran; what the module holds is read when somebody asks.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::http::header::CONTENT_TYPE;
use axum::routing::get;
use tdx_defs::SeamcallResult;
use telemetry::metrics::prometheus::{
    Histogram, HistogramOpts, IntCounter, IntCounterVec, IntGauge, IntGaugeVec, Opts, Registry,
};
use telemetry::metrics::{self, CALL_BUCKETS, SECONDS_BUCKETS, SeamcallCounter, register};
use transport::AdmissionLayer;

use crate::batch::Batch;
use crate::config::release_name;
use crate::faults::{Faults, Totals};
use crate::reasons;
use crate::running::{Run, Running};
use crate::status::Refusal;

/// Which way a batch came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Via {
    /// A call of its own.
    Unary,
    /// A message of a stream.
    Stream,
}

/// The metrics of one module.
pub(crate) struct Metrics {
    registry: Registry,
    info: IntGaugeVec,
    seamcalls: SeamcallCounter,
    unary: IntCounter,
    stream: IntCounter,
    replayed: IntCounter,
    in_flight: IntGauge,
    replay_bytes: IntGauge,
    batch_calls: Histogram,
    batch_seconds: Histogram,
    refused: IntCounterVec,
    pamt_pages: IntGaugeVec,
    hkids: IntGauge,
    hkids_in_use: IntGauge,
    /// Refusals of the admission layer that are in the numbers already.
    overloaded: Mutex<u64>,
    faults_injected: IntCounterVec,
    /// Faults that are in the numbers already.
    known_faults: Mutex<Totals>,
}

/// A metric of a name that is well formed.
fn made<M>(metric: Result<M, metrics::prometheus::Error>) -> M {
    match metric {
        Ok(metric) => metric,
        Err(error) => unreachable!("names and labels are literals: {error}"),
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// Metrics of a service whose first run of the module is `run`.
    pub(crate) fn new(run: &Run) -> Arc<Self> {
        let module = &run.module;
        let registry = metrics::registry();
        let counter = |name, help| register(&registry, made(IntCounter::new(name, help)));
        let gauge = |name, help| register(&registry, made(IntGauge::new(name, help)));
        let counters = |name: &str, help: &str, label| {
            register(
                &registry,
                made(IntCounterVec::new(Opts::new(name, help), &[label])),
            )
        };
        let histogram = |name: &str, help: &str, buckets: &[f64]| {
            let options = HistogramOpts::new(name, help).buckets(buckets.to_vec());
            register(&registry, made(Histogram::with_opts(options)))
        };
        let info = register(
            &registry,
            made(IntGaugeVec::new(
                Opts::new(
                    "tdx_module_info",
                    "Always 1; the labels say which module this is.",
                ),
                &["instance", "release", "version"],
            )),
        );
        let batches = counters(
            "tdx_module_batches_total",
            "Batches that ran, by the way they came.",
            "via",
        );
        let metrics = Self {
            seamcalls: SeamcallCounter::new(
                &registry,
                "tdx_module_seamcalls_total",
                "SEAMCALLs executed, by leaf and completion status.",
            ),
            unary: batches.with_label_values(&["unary"]),
            stream: batches.with_label_values(&["stream"]),
            replayed: counter(
                "tdx_module_batches_replayed_total",
                "Batches that were sent again and got their recorded answer.",
            ),
            in_flight: gauge(
                "tdx_module_batches_in_flight",
                "Batches that are executing or wait for the one before them.",
            ),
            replay_bytes: gauge(
                "tdx_module_replay_bytes",
                "Memory that answers take which are kept for batches sent again.",
            ),
            batch_calls: histogram(
                "tdx_module_batch_calls",
                "SEAMCALLs executed in one batch, repeats taken one by one.",
                &CALL_BUCKETS,
            ),
            batch_seconds: histogram(
                "tdx_module_batch_seconds",
                "Time that one batch executed.",
                &SECONDS_BUCKETS,
            ),
            refused: counters(
                "tdx_module_requests_refused_total",
                "Requests refused, by reason.",
                "reason",
            ),
            pamt_pages: register(
                &registry,
                made(IntGaugeVec::new(
                    Opts::new(
                        "tdx_module_pamt_pages",
                        "Pages in use, 4 KiB units, by PAMT type.",
                    ),
                    &["type"],
                )),
            ),
            hkids: gauge("tdx_module_hkids", "Private key ids that TDs can have."),
            hkids_in_use: gauge("tdx_module_hkids_in_use", "Private key ids of TDs."),
            overloaded: Mutex::default(),
            faults_injected: counters(
                "tdx_module_faults_injected_total",
                "Faults that rules brought about, by what happened.",
                "action",
            ),
            known_faults: Mutex::default(),
            info,
            registry,
        };
        let own = 1;
        let all = i64::from(module.config().hkid_count) - own;
        metrics.hkids.set(all);
        for reason in reasons::ALL {
            metrics.refused.with_label_values(&[reason.word]);
        }
        Arc::new(metrics)
    }

    /// A batch is under way until the guard goes.
    pub(crate) fn started(self: &Arc<Self>) -> InFlight {
        self.in_flight.inc();
        InFlight(Arc::clone(self))
    }

    /// A batch ran.
    pub(crate) fn ran(&self, via: Via, batch: &Batch, results: &[SeamcallResult], took: Duration) {
        match via {
            Via::Unary => self.unary.inc(),
            Via::Stream => self.stream.inc(),
        }
        let calls = self
            .seamcalls
            .record(metrics::leaves(&batch.calls), results);
        #[expect(
            clippy::cast_precision_loss,
            reason = "a batch is far below 2^52 calls"
        )]
        self.batch_calls.observe(calls as f64);
        self.batch_seconds.observe(took.as_secs_f64());
    }

    /// A batch was known already.
    pub(crate) fn replayed(&self) {
        self.replayed.inc();
    }

    /// A request was refused.
    pub(crate) fn refused(&self, refusal: &Refusal) {
        self.refused
            .with_label_values(&[refusal.reason().word])
            .inc();
    }

    /// The engine counts by itself; only scrapes bring the two together.
    fn count_faults(&self, faults: &Faults) {
        let mut known = self
            .known_faults
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        // Under the lock: of two scrapes at a time the later one has the higher numbers.
        let now = faults.totals();
        for (action, now, before) in [
            ("status", now.statuses, known.statuses),
            ("delay", now.delays, known.delays),
            ("lost_reply", now.lost_replies, known.lost_replies),
            ("cut", now.cuts, known.cuts),
        ] {
            self.faults_injected
                .with_label_values(&[action])
                .inc_by(now.saturating_sub(before));
        }
        *known = now;
    }

    fn render(&self, run: &Run, admission: &AdmissionLayer, faults: &Faults) -> String {
        self.count_faults(faults);
        let module = &run.module;
        // One series: that of the present run.
        self.info.reset();
        let release = release_name(module.config().release);
        self.info
            .with_label_values(&[&run.instance, release, env!("CARGO_PKG_VERSION")])
            .set(1);
        let usage = module.usage();
        self.hkids_in_use.set(usage.hkids_in_use.into());
        let replay_bytes = i64::try_from(run.sessions.bytes()).unwrap_or(i64::MAX);
        self.replay_bytes.set(replay_bytes);
        for (page_type, pages) in usage.pages {
            let gauge = self
                .pamt_pages
                .with_label_values(&[page_type.name().unwrap_or("other")]);
            gauge.set(i64::try_from(pages).unwrap_or(i64::MAX));
        }
        // The layer counts by itself; only scrapes bring the two together.
        let now = admission.refused();
        let before = {
            let mut known = self
                .overloaded
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let newest = now.max(*known);
            std::mem::replace(&mut *known, newest)
        };
        self.refused
            .with_label_values(&[reasons::OVERLOADED.word])
            .inc_by(now.saturating_sub(before));
        metrics::render(&self.registry)
    }
}

/// A batch under way.
pub(crate) struct InFlight(Arc<Metrics>);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.in_flight.dec();
    }
}

/// `/metrics`.
pub(crate) fn routes(
    metrics: Arc<Metrics>,
    running: Arc<Running>,
    admission: AdmissionLayer,
    faults: Faults,
) -> axum::Router {
    let render = async move || {
        let text = metrics.render(&running.now(), &admission, &faults);
        ([(CONTENT_TYPE, metrics::CONTENT_TYPE)], text)
    };
    axum::Router::new().route("/metrics", get(render))
}

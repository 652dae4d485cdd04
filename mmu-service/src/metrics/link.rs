//! Batches on their way to the module and back: counted, timed, and shown on the timeline.

use std::sync::Arc;
use std::time::Instant;

use tdp_mmu::{SeamError, Via};
use tdx_defs::{CompletionStatus, Leaf, Seamcall, SeamcallResult};
use telemetry::metrics::prometheus::{Histogram, IntCounter, IntGauge};
use telemetry::metrics::{CALL_BUCKETS, SECONDS_BUCKETS, SeamcallCounter, leaves};

use super::Maker;
use super::timeline::{Event, Outcome, Timeline};

/// The metrics of the module link.
pub(crate) struct LinkMetrics {
    seamcalls: SeamcallCounter,
    in_flight: IntGauge,
    batch_calls: Histogram,
    streamed: Way,
    called: Way,
    /// The latest batches.
    pub(crate) timeline: Timeline,
}

/// One way to the module.
struct Way {
    name: &'static str,
    answered: IntCounter,
    failed: IntCounter,
    retries: IntCounter,
    seconds: Histogram,
}

/// What the end of a batch needs to know of its calls.
pub(crate) struct Summary(Box<[(Leaf, bool)]>);

impl Summary {
    pub(crate) fn of(calls: &[Seamcall]) -> Self {
        Self(leaves(calls).collect())
    }
}

impl LinkMetrics {
    pub(super) fn new(make: &Maker) -> Arc<Self> {
        let batches = make.counters(
            "mmu_link_batches_total",
            "Batches sent to the module, by the way they took and whether they were answered.",
            &["via", "outcome"],
        );
        let retries = make.counters(
            "mmu_link_retries_total",
            "Batches sent again after a lost or refused attempt, by the way they took.",
            &["via"],
        );
        let seconds = make.histograms(
            "mmu_link_round_trip_seconds",
            "Time from handing a batch over to its answer, by the way it took.",
            &SECONDS_BUCKETS,
            &["via"],
        );
        let way = |name| Way {
            name,
            answered: batches.with_label_values(&[name, "answered"]),
            failed: batches.with_label_values(&[name, "failed"]),
            retries: retries.with_label_values(&[name]),
            seconds: seconds.with_label_values(&[name]),
        };
        Arc::new(Self {
            seamcalls: SeamcallCounter::new(
                make.registry(),
                "mmu_seamcalls_total",
                "SEAMCALLs that the module answered, by leaf and completion status.",
            ),
            in_flight: make.gauge(
                "mmu_link_batches_in_flight",
                "Batches without an answer yet.",
            ),
            batch_calls: make.histogram(
                "mmu_link_batch_calls",
                "SEAMCALLs that ran in one batch, repeats taken one by one.",
                &CALL_BUCKETS,
            ),
            streamed: way("stream"),
            called: way("rpc"),
            timeline: Timeline::default(),
        })
    }

    /// A batch starts on its way.
    pub(crate) fn started(self: &Arc<Self>, via: Via, summary: Summary) -> Flight {
        self.in_flight.inc();
        Flight {
            metrics: Arc::clone(self),
            via,
            summary,
            started: Instant::now(),
        }
    }

    /// Batches are sent again.
    pub(crate) fn retried(&self, via: Via, batches: usize) {
        self.way(via).retries.inc_by(batches as u64);
    }

    /// Round trips on streams: upper bounds in seconds with their cumulative counts, and all.
    pub(crate) fn round_trips(&self) -> (Vec<(f64, u64)>, u64) {
        let (streamed, called) = (&self.streamed.seconds, &self.called.seconds);
        let counts = |way: &Histogram| {
            use telemetry::metrics::prometheus::core::Metric as _;
            let metric = way.metric();
            let histogram = metric.get_histogram();
            let buckets: Vec<u64> = histogram
                .get_bucket()
                .iter()
                .map(|bucket| bucket.cumulative_count())
                .collect();
            (buckets, way.get_sample_count())
        };
        let ((streamed, all_streamed), (called, all_called)) = (counts(streamed), counts(called));
        let buckets = SECONDS_BUCKETS
            .into_iter()
            .zip(streamed.into_iter().zip(called).map(|(one, two)| one + two));
        (buckets.collect(), all_streamed + all_called)
    }

    fn way(&self, via: Via) -> &Way {
        match via {
            Via::Stream => &self.streamed,
            Via::Rpc => &self.called,
        }
    }
}

/// A batch under way. Without an answer it counts as failed.
pub(crate) struct Flight {
    metrics: Arc<LinkMetrics>,
    via: Via,
    summary: Summary,
    started: Instant,
}

impl Flight {
    /// The batch has its answer, or the most that is certain.
    pub(crate) fn landed(&self, answer: &Result<Vec<SeamcallResult>, SeamError>) {
        let metrics = &*self.metrics;
        let way = metrics.way(self.via);
        let took = self.started.elapsed();
        let calls = self.summary.0.iter().copied();
        let (outcome, ran) = match answer {
            Ok(results) => {
                let ran = metrics.seamcalls.record(calls.clone(), results);
                #[expect(
                    clippy::cast_precision_loss,
                    reason = "a batch is far below 2^52 calls"
                )]
                metrics.batch_calls.observe(ran as f64);
                way.answered.inc();
                way.seconds.observe(took.as_secs_f64());
                (Outcome::Answered(worst(results)), ran)
            }
            Err(error) => {
                way.failed.inc();
                (Outcome::failed(error), 0)
            }
        };
        metrics.timeline.push(Event::new(
            way.name,
            calls.map(|(leaf, _)| leaf),
            ran,
            outcome,
            took,
        ));
    }
}

impl Drop for Flight {
    fn drop(&mut self) {
        self.metrics.in_flight.dec();
    }
}

/// The first status that is not success: the one that a reader looks for.
fn worst(results: &[SeamcallResult]) -> CompletionStatus {
    results
        .iter()
        .map(SeamcallResult::status)
        .find(|status| !status.is_success())
        .unwrap_or(CompletionStatus::SUCCESS)
}

impl std::fmt::Debug for LinkMetrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("LinkMetrics").finish_non_exhaustive()
    }
}

//! Counters of a service, as Prometheus reads them.
//!
//! Source: Prometheus, text exposition format 0.0.4 and its naming practice: one prefix for each
//! service, base units, `_total` behind counters. Metrics of the process itself have the names
//! that every client library gives them, `process_…`.
//!
//! Invariants
//! - M1  A label has few values, all known beforehand: never an address, a VM or a text that a
//!   caller chose.
//! - M2  Recording happens for an operation or a batch, never for a page.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::Duration;

use prometheus::core::Collector;
use prometheus::process_collector::ProcessCollector;
use prometheus::{IntCounter, IntCounterVec, Opts, Registry, TextEncoder};
use tdx_defs::{CompletionStatus, Leaf, Seamcall, SeamcallResult};

pub use prometheus;

/// Content type of [`render`].
pub const CONTENT_TYPE: &str = prometheus::TEXT_FORMAT;

/// Upper bounds of calls in a batch: powers of four up to the largest batch.
pub const CALL_BUCKETS: [f64; 11] = [
    1.0,
    4.0,
    16.0,
    64.0,
    256.0,
    1024.0,
    4096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
];

/// Upper bounds of durations in seconds: from one leaf in the same process to a batch at its
/// deadline.
pub const SECONDS_BUCKETS: [f64; 18] = [
    5e-6, 1e-5, 2.5e-5, 5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1,
    0.25, 1.0, 2.5, 10.0,
];

/// Label for a number that has no name.
const OTHER: &str = "other";

/// A registry that holds the metrics of the process.
pub fn registry() -> Registry {
    let registry = Registry::new();
    // The only metrics of these names in a registry that is new.
    let _ = registry.register(Box::new(ProcessCollector::for_self()));
    registry
}

/// Enters a metric into a registry and hands it back.
///
/// # Panics
/// When the registry has a metric of this name: names are literals.
pub fn register<M: Collector + Clone + 'static>(registry: &Registry, metric: M) -> M {
    let outcome = registry.register(Box::new(metric.clone()));
    assert!(outcome.is_ok(), "two metrics have the same name");
    metric
}

/// Everything in the registry as text.
pub fn render(registry: &Registry) -> String {
    let mut text = String::new();
    // Fails for a metric without a name or a value, which no registry takes.
    if let Err(error) = TextEncoder::new().encode_utf8(&registry.gather(), &mut text) {
        tracing::error!(%error, "metrics cannot be rendered");
    }
    text
}

/// Leaves that have a counter of their own for success, by number.
const LEAVES: usize = 64;

/// SEAMCALLs by leaf and status.
///
/// Success is by far the most frequent status and costs one addition; the others look their
/// counter up.
#[derive(Debug)]
pub struct SeamcallCounter {
    family: IntCounterVec,
    success: Vec<IntCounter>,
    others: Mutex<HashMap<(Leaf, u32), IntCounter>>,
}

impl SeamcallCounter {
    /// A family `name` with the labels `leaf` and `status`.
    ///
    /// # Panics
    /// When `name` is not a metric name.
    pub fn new(registry: &Registry, name: &str, help: &str) -> Self {
        let family = IntCounterVec::new(Opts::new(name, help), &["leaf", "status"]);
        let Ok(family) = family else {
            unreachable!("{name} is a metric name");
        };
        let family = register(registry, family);
        let success = (0..LEAVES)
            .map(|leaf| {
                let leaf = Leaf(u16::try_from(leaf).unwrap_or(u16::MAX));
                let status = status_label(CompletionStatus::SUCCESS);
                match leaf.name() {
                    Some(name) => family.with_label_values(&[name, &status]),
                    None => family.with_label_values(&[OTHER, &status]),
                }
            })
            .collect();
        Self {
            family,
            success,
            others: Mutex::default(),
        }
    }

    /// Adds the answers of one batch. Returns how many calls ran, repeats taken one by one.
    pub fn record<'a>(
        &self,
        calls: impl IntoIterator<Item = (Leaf, bool)>,
        results: impl IntoIterator<Item = &'a SeamcallResult>,
    ) -> u64 {
        let mut all = 0;
        // Neighbours are alike in a batch, so that most of it is one addition.
        let mut run = (Leaf::default(), 0);
        for ((leaf, repeated), result) in calls.into_iter().zip(results) {
            let status = result.status();
            let failed = !status.is_success();
            let succeeded = match (repeated, failed) {
                (true, _) => u64::from(result.completed),
                (false, failed) => u64::from(!failed),
            };
            if run.0 != leaf {
                self.succeeded(run);
                run = (leaf, 0);
            }
            run.1 += succeeded;
            if failed {
                self.other(leaf, status).inc();
            }
            all += succeeded + u64::from(failed);
        }
        self.succeeded(run);
        all
    }

    fn succeeded(&self, (leaf, calls): (Leaf, u64)) {
        if calls == 0 {
            return;
        }
        match self.success.get(usize::from(leaf.0)) {
            Some(counter) => counter.inc_by(calls),
            None => self.other(leaf, CompletionStatus::SUCCESS).inc_by(calls),
        }
    }

    fn other(&self, leaf: Leaf, status: CompletionStatus) -> IntCounter {
        let code = u32::try_from(status.code().0 >> 32).unwrap_or(u32::MAX);
        let name = leaf.name().unwrap_or(OTHER);
        let status = status_label(status);
        // What has no name is one label, so the map is as bounded as the labels are.
        let key = match (name, &*status) {
            (OTHER, _) | (_, OTHER) => None,
            _ => Some((leaf, code)),
        };
        let Some(key) = key else {
            return self.family.with_label_values(&[name, &status]);
        };
        let mut others = self
            .others
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner);
        others
            .entry(key)
            .or_insert_with(|| self.family.with_label_values(&[name, &status]))
            .clone()
    }
}

/// Leaf and kind of each call, as [`SeamcallCounter::record`] takes them.
pub fn leaves(calls: &[Seamcall]) -> impl Iterator<Item = (Leaf, bool)> + '_ {
    calls.iter().map(|call| (call.leaf, call.repeat.is_some()))
}

/// The name of a status without its details, or "other".
pub fn status_label(status: CompletionStatus) -> String {
    status.code().name().unwrap_or_else(|| OTHER.to_owned())
}

/// A duration in seconds, as histograms take it.
pub fn seconds(duration: Duration) -> f64 {
    duration.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answered(status: CompletionStatus, completed: u32) -> SeamcallResult {
        SeamcallResult {
            rax: status.0,
            completed,
            ..SeamcallResult::default()
        }
    }

    #[test]
    fn a_run_counts_each_of_its_calls_and_its_failure_once() {
        let registry = Registry::new();
        let counter = SeamcallCounter::new(&registry, "calls_total", "Calls.");
        let busy = CompletionStatus::OPERAND_BUSY.with_details(0x92);
        let all = counter.record(
            [
                (Leaf::MEM_SEPT_ADD, false),
                (Leaf::MEM_PAGE_AUG, true),
                (Leaf::MEM_PAGE_AUG, false),
                (Leaf(999), false),
                (Leaf::MEM_TRACK, false),
            ],
            &[
                answered(CompletionStatus::SUCCESS, 0),
                answered(busy, 7),
                answered(CompletionStatus::SUCCESS, 0),
                answered(CompletionStatus(0x7777 << 48), 0),
            ],
        );
        assert_eq!(
            all,
            1 + 8 + 1 + 1,
            "the call behind the last answer did not run"
        );
        let text = render(&registry);
        for line in [
            r#"calls_total{leaf="TDH.MEM.SEPT.ADD",status="TDX_SUCCESS"} 1"#,
            r#"calls_total{leaf="TDH.MEM.PAGE.AUG",status="TDX_SUCCESS"} 8"#,
            r#"calls_total{leaf="TDH.MEM.PAGE.AUG",status="TDX_OPERAND_BUSY"} 1"#,
            r#"calls_total{leaf="other",status="other"} 1"#,
            r#"calls_total{leaf="TDH.MEM.TRACK",status="TDX_SUCCESS"} 0"#,
        ] {
            assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
        }
    }

    #[test]
    fn numbers_without_a_name_share_one_label() {
        let registry = Registry::new();
        let counter = SeamcallCounter::new(&registry, "calls_total", "Calls.");
        let series = || render(&registry).lines().count();
        counter.record(
            [(Leaf(64), false)],
            &[answered(CompletionStatus(1 << 63), 0)],
        );
        let before = series();
        for number in 64..2000_u16 {
            let status = CompletionStatus(u64::from(number) << 48 | 1 << 63);
            counter.record([(Leaf(number), false)], &[answered(status, 0)]);
        }
        assert_eq!(series(), before);
    }

    #[test]
    fn the_process_reports_its_memory() {
        let text = render(&registry());
        let resident = text
            .lines()
            .find_map(|line| line.strip_prefix("process_resident_memory_bytes "))
            .expect("resident memory");
        assert!(resident.parse::<f64>().unwrap() > 0.0);
    }
}

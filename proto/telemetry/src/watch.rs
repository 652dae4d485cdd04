//! The spans of one trace, kept in memory for whoever asked: an explanation without a collector.
//!
//! A [`Watch`] names a trace. While it lives, spans of that trace are recorded in this process even
//! if none are exported, and kept for [`Watch::take`]. Spans of another process join by [`offer`].
//!
//! Invariants
//! - W1  At most [`MAX_WATCHES`] traces are watched, with at most [`MAX_SPANS`] spans each.
//! - W2  Without a watch the cost is one atomic load.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use mirror_proto::trace as wire;
use opentelemetry::trace::{SpanId, SpanKind, Status, TraceId};
use opentelemetry::{Context, Key, KeyValue};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::error::OTelSdkResult;
use opentelemetry_sdk::trace::{Span, SpanData, SpanProcessor};

/// Traces that are watched at a time.
pub const MAX_WATCHES: usize = 64;
/// Spans kept for one trace.
pub const MAX_SPANS: usize = 1024;
/// Attributes and events told of one span.
const MAX_PARTS: usize = 64;

/// How many traces are watched: what the hot path looks at.
static WATCHED: AtomicUsize = AtomicUsize::new(0);
static TRACES: LazyLock<Mutex<HashMap<TraceId, Kept>>> = LazyLock::new(Mutex::default);

#[derive(Debug, Default)]
struct Kept {
    watchers: usize,
    spans: Vec<wire::Span>,
}

impl Kept {
    fn push(&mut self, span: wire::Span) {
        if self.spans.len() < MAX_SPANS {
            self.spans.push(span);
        }
    }
}

fn traces() -> MutexGuard<'static, HashMap<TraceId, Kept>> {
    TRACES.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Somebody's interest in one trace. Several may watch the same one; they share its spans.
#[derive(Debug)]
#[must_use = "dropping it ends the watch"]
pub struct Watch(TraceId);

impl Watch {
    /// Watches the trace that a sampled `traceparent` names. `None` when it names none, or when too
    /// many are watched already.
    pub fn begin(traceparent: &str) -> Option<Self> {
        let context = crate::context::parse(traceparent).filter(|parent| parent.is_sampled())?;
        let trace_id = context.trace_id();
        let mut traces = traces();
        if !traces.contains_key(&trace_id) && traces.len() >= MAX_WATCHES {
            return None;
        }
        traces.entry(trace_id).or_default().watchers += 1;
        WATCHED.store(traces.len(), Ordering::Relaxed);
        Some(Self(trace_id))
    }

    /// Watches the trace of the current span.
    pub fn begin_current() -> Option<Self> {
        Self::begin(&crate::traceparent_of_current_span()?)
    }

    /// The spans that have ended so far, in the order of their end; each is given once.
    pub fn take(&self) -> Vec<wire::Span> {
        traces()
            .get_mut(&self.0)
            .map(|kept| std::mem::take(&mut kept.spans))
            .unwrap_or_default()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut traces = traces();
        if let Some(kept) = traces.get_mut(&self.0) {
            kept.watchers -= 1;
            if kept.watchers == 0 {
                traces.remove(&self.0);
            }
        }
        WATCHED.store(traces.len(), Ordering::Relaxed);
    }
}

/// Whether any trace is watched.
pub(crate) fn any() -> bool {
    WATCHED.load(Ordering::Relaxed) > 0
}

/// Whether the trace that `traceparent` names is watched here.
pub fn is_watched(traceparent: &str) -> bool {
    any()
        && crate::context::parse(traceparent)
            .is_some_and(|context| traces().contains_key(&context.trace_id()))
}

/// Adds spans of another process to the trace that `traceparent` names, if it is watched.
pub fn offer(traceparent: &str, spans: Vec<wire::Span>) {
    if spans.is_empty() || !any() {
        return;
    }
    if let Some(context) = crate::context::parse(traceparent)
        && let Some(kept) = traces().get_mut(&context.trace_id())
    {
        spans.into_iter().for_each(|span| kept.push(span));
    }
}

/// Puts finished spans of watched traces aside.
#[derive(Debug, Default)]
pub(crate) struct Collector {
    service: String,
}

impl SpanProcessor for Collector {
    fn on_start(&self, _: &mut Span, _: &Context) {}

    fn on_end(&self, span: SpanData) {
        if !any() {
            return;
        }
        if let Some(kept) = traces().get_mut(&span.span_context.trace_id()) {
            kept.push(to_wire(&self.service, span));
        }
    }

    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    fn shutdown_with_timeout(&self, _: Duration) -> OTelSdkResult {
        Ok(())
    }

    fn set_resource(&mut self, resource: &Resource) {
        self.service = resource
            .get(&Key::from_static_str("service.name"))
            .map(|name| name.to_string())
            .unwrap_or_default();
    }
}

fn to_wire(service: &str, span: SpanData) -> wire::Span {
    wire::Span {
        span_id: span.span_context.span_id().to_bytes().to_vec(),
        parent_span_id: if span.parent_span_id == SpanId::INVALID {
            Vec::new()
        } else {
            span.parent_span_id.to_bytes().to_vec()
        },
        service: service.to_owned(),
        name: span.name.into_owned(),
        kind: match span.span_kind {
            SpanKind::Server | SpanKind::Consumer => "server",
            SpanKind::Client | SpanKind::Producer => "client",
            SpanKind::Internal => "internal",
        }
        .to_owned(),
        start_unix_ns: nanoseconds(span.start_time),
        end_unix_ns: nanoseconds(span.end_time),
        error: matches!(span.status, Status::Error { .. }),
        attributes: attributes(&span.attributes),
        events: span
            .events
            .iter()
            .take(MAX_PARTS)
            .map(|event| wire::Event {
                unix_ns: nanoseconds(event.timestamp),
                name: event.name.to_string(),
                attributes: attributes(&event.attributes),
            })
            .collect(),
    }
}

fn attributes(attributes: &[KeyValue]) -> Vec<wire::Attribute> {
    attributes
        .iter()
        .take(MAX_PARTS)
        .map(|attribute| wire::Attribute {
            key: attribute.key.to_string(),
            value: attribute.value.to_string(),
        })
        .collect()
}

fn nanoseconds(time: SystemTime) -> u64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::testing::Spans;

    /// Tests that count watches, or do without any, run one after the other.
    pub(crate) fn alone() -> MutexGuard<'static, ()> {
        static ALONE: Mutex<()> = Mutex::new(());
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }

    #[test]
    fn a_watch_gets_the_spans_of_its_trace_and_of_no_other() {
        let _alone = alone();
        let _spans = Spans::collect();
        drop(tracing::info_span!("before"));
        let root = tracing::info_span!("root");
        let (watch, traceparent) = root.in_scope(|| {
            let watch = Watch::begin_current().unwrap();
            let inner = tracing::info_span!("inner", kvm.gfn = 7);
            inner.in_scope(|| tracing::info!(kvm.retry.count = 1, "busy"));
            (watch, crate::traceparent_of_current_span().unwrap())
        });
        drop(tracing::info_span!("another trace"));
        assert!(is_watched(&traceparent));
        let elsewhere = wire::Span {
            name: "elsewhere".into(),
            ..Default::default()
        };
        offer(&traceparent, vec![elsewhere]);
        drop(root);

        let spans = watch.take();
        let names: Vec<&str> = spans.iter().map(|span| span.name.as_str()).collect();
        assert_eq!(names, ["inner", "elsewhere", "root"]);
        assert_eq!(spans[0].parent_span_id, spans[2].span_id);
        assert_eq!(spans[2].parent_span_id, Vec::<u8>::new());
        assert!(spans[0].end_unix_ns >= spans[0].start_unix_ns);
        assert_eq!(spans[0].events[0].name, "busy");
        assert!(
            spans[0]
                .attributes
                .iter()
                .any(|one| one.key == "kvm.gfn" && one.value == "7")
        );
        assert_eq!(watch.take(), [], "each span is given once");
        drop(watch);
        assert!(!is_watched(&traceparent));
    }

    #[test]
    fn watches_and_their_spans_are_bounded() {
        let _alone = alone();
        let traceparent = |trace: usize| format!("00-{:032x}-b7ad6b7169203331-01", trace + 1);
        let first = Watch::begin(&traceparent(0)).unwrap();
        offer(&traceparent(0), vec![wire::Span::default(); MAX_SPANS + 10]);
        assert_eq!(first.take().len(), MAX_SPANS);
        let others: Vec<Option<Watch>> = (1..MAX_WATCHES + 2)
            .map(|trace| Watch::begin(&traceparent(trace)))
            .collect();
        assert!(others.last().unwrap().is_none());
        // The same trace needs no further place.
        assert!(Watch::begin(&traceparent(0)).is_some());
    }

    #[test]
    fn what_is_not_sampled_is_not_watched() {
        for traceparent in [
            "",
            "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
        ] {
            assert!(Watch::begin(traceparent).is_none(), "{traceparent:?}");
        }
    }
}

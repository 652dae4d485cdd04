//! Spans that are made when the work is over, for work that turned out to be worth one.
//!
//! The gate decides before anything is known. A fault that it kept out costs two looks at the
//! processor's time stamp counter, where there is one to rely on; when it was slow, failed, or met
//! a busy module, its span is made from them and from the report, with explicit times. Such a span
//! says so (`kvm.trace.late`) and has no children: in the other process nobody watched. What that
//! one answered is in its events.

use std::sync::LazyLock;
use std::time::{Duration, SystemTime};

use opentelemetry::trace::{
    Event, Span as _, SpanContext, SpanKind, Status, TraceContextExt as _, TraceFlags, Tracer,
    TracerProvider as _,
};
use opentelemetry::{Context, KeyValue, global};
use quanta::Clock;

use crate::Gate;

/// Events of a late span.
const MAX_EVENTS: usize = 64;

/// Set up by the first look, which takes a millisecond and up to 200 where the counter is unsteady.
static CLOCK: LazyLock<Clock> = LazyLock::new(Clock::new);

/// Sets up the clock, so that no fault has to.
pub(crate) fn prepare() {
    LazyLock::force(&CLOCK);
}

/// When untraced work began, and on whose behalf.
#[derive(Debug, Clone)]
pub struct Untraced {
    name: &'static str,
    /// In units of [`CLOCK`].
    started: u64,
    traceparent: String,
}

/// What a late span tells.
#[derive(Debug, Default)]
pub struct Account {
    /// Why it was made: "slow", "failed", "busy".
    pub reason: &'static str,
    /// Attributes beside the reason.
    pub attributes: Vec<KeyValue>,
    /// What happened, in order: a name and its attributes. The first 64 are kept.
    pub events: Vec<(&'static str, Vec<KeyValue>)>,
    /// The error, if it failed.
    pub error: Option<String>,
}

impl Untraced {
    /// Work that begins now; `None` while spans are not exported. `traceparent` of the caller may
    /// be empty, and need not be sampled.
    #[inline]
    pub fn begin(name: &'static str, traceparent: &str) -> Option<Self> {
        crate::is_recording().then(|| Self::now(name, traceparent))
    }

    #[inline]
    fn now(name: &'static str, traceparent: &str) -> Self {
        Self {
            name,
            started: CLOCK.raw(),
            // Read only if there is something to tell.
            traceparent: traceparent.to_owned(),
        }
    }

    /// Whether this has taken so long that `gate` wants to be told.
    #[inline]
    pub fn is_slow(&self, gate: &Gate) -> bool {
        gate.is_slow(self.elapsed_ns())
    }

    #[inline]
    fn elapsed_ns(&self) -> u64 {
        CLOCK.delta_as_nanos(self.started, CLOCK.raw())
    }

    /// Makes the span of work that ends now.
    pub fn tell(self, account: Account) {
        self.tell_with(&global::tracer_provider().tracer("late"), account);
    }

    fn tell_with<T: Tracer>(self, tracer: &T, account: Account) {
        // In this order, so that the start is not before the work's.
        let (elapsed, ended) = (Duration::from_nanos(self.elapsed_ns()), SystemTime::now());
        let started = ended.checked_sub(elapsed).unwrap_or(ended);
        let base = Context::new();
        let context = match crate::context::parse(&self.traceparent) {
            // The caller did not ask for its trace to be kept; this part of it is, under its id.
            Some(parent) => base.with_remote_span_context(SpanContext::new(
                parent.trace_id(),
                parent.span_id(),
                TraceFlags::SAMPLED,
                true,
                parent.trace_state().clone(),
            )),
            None => base,
        };
        let mut attributes = account.attributes;
        attributes.push(KeyValue::new("kvm.trace.late", account.reason));
        let events = account
            .events
            .into_iter()
            .take(MAX_EVENTS)
            .map(|(name, attributes)| Event::new(name, ended, attributes, 0))
            .collect();
        let mut span = tracer
            .span_builder(self.name)
            .with_kind(SpanKind::Server)
            .with_start_time(started)
            .with_attributes(attributes)
            .with_events(events)
            .start_with_context(tracer, &context);
        if let Some(error) = account.error {
            span.set_status(Status::error(error));
        }
        span.end_with_timestamp(ended);
    }
}

#[cfg(test)]
mod tests {
    use opentelemetry::trace::SpanId;
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SdkTracerProvider};

    use super::*;
    use crate::testing::attribute;

    #[test]
    fn a_late_span_has_the_times_of_the_work_and_the_trace_of_an_unsampled_caller() {
        const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
        for (case, traceparent, parent) in [
            ("no caller", String::new(), SpanId::INVALID.to_string()),
            (
                "a caller that is not sampled",
                format!("00-{TRACE}-b7ad6b7169203331-00"),
                "b7ad6b7169203331".to_owned(),
            ),
        ] {
            let exporter = InMemorySpanExporter::default();
            let provider = SdkTracerProvider::builder()
                .with_simple_exporter(exporter.clone())
                .build();
            let before = SystemTime::now();
            let untraced = Untraced::now("handle_fault", &traceparent);
            let account = Account {
                reason: "busy",
                attributes: vec![KeyValue::new("kvm.gfn", "0x1")],
                events: vec![("seamcall", vec![]); 100],
                error: Some("no answer".into()),
            };
            untraced.tell_with(&provider.tracer("test"), account);
            let [span] = <[_; 1]>::try_from(exporter.get_finished_spans().unwrap()).unwrap();
            assert!(span.start_time >= before && span.end_time >= span.start_time);
            assert_eq!(span.parent_span_id.to_string(), parent, "{case}");
            assert_eq!(
                span.span_context.trace_id().to_string() == TRACE,
                !traceparent.is_empty(),
                "{case}"
            );
            assert_eq!(attribute(&span, "kvm.trace.late").as_deref(), Some("busy"));
            assert_eq!(attribute(&span, "kvm.gfn").as_deref(), Some("0x1"));
            assert_eq!(span.events.len(), MAX_EVENTS);
            assert_eq!(span.status, Status::error("no answer"));
        }
    }
}

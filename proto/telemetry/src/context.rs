//! Trace context inside messages.
//!
//! One gRPC stream serves many spans, so its headers cannot name the span that sends a message:
//! the message carries a `traceparent` of its own.
//!
//! Source: W3C Trace Context, `traceparent` version 00: `00-<trace id>-<span id>-<flags>`, hex in
//! lower case; bit 0 of the flags says "sampled".

use std::collections::HashMap;

use opentelemetry::propagation::TextMapPropagator as _;
use opentelemetry::trace::{SpanContext, TraceContextExt as _};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use tracing::Span;
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

/// Length of a version 00 `traceparent`.
const TRACEPARENT_LEN: usize = 55;

/// The 32 hex digits of the current span's trace; `None` when it is not sampled.
pub fn current_trace_id() -> Option<String> {
    sampled_context(&Span::current()).map(|context| context.trace_id().to_string())
}

/// The current span as a `traceparent`; `None` when it is not sampled.
pub fn traceparent_of_current_span() -> Option<String> {
    sampled_context(&Span::current()).map(|context| format(&context))
}

/// A span as a `traceparent`; empty when there is none.
pub(crate) fn format(context: &SpanContext) -> String {
    if !context.is_valid() {
        return String::new();
    }
    let (trace, span) = (context.trace_id(), context.span_id());
    format!("00-{trace}-{span}-{:02x}", context.trace_flags())
}

/// Whether `traceparent` names a sampled span: the cheap question before a span is opened for it.
pub fn is_sampled(traceparent: &str) -> bool {
    traceparent.len() >= TRACEPARENT_LEN
        && traceparent
            .as_bytes()
            .get(TRACEPARENT_LEN - 2..TRACEPARENT_LEN)
            .and_then(|flags| std::str::from_utf8(flags).ok())
            .and_then(|flags| u8::from_str_radix(flags, 16).ok())
            .is_some_and(|flags| flags & 1 != 0)
}

/// Makes the span that `traceparent` names the parent of `span`, which must not have been entered.
/// A malformed value leaves the span as it is.
pub fn set_remote_parent(span: &Span, traceparent: &str) {
    if span.is_disabled() || traceparent.is_empty() {
        return;
    }
    if let Some(parent) = parse(traceparent) {
        // Fails when there is no OpenTelemetry layer: then there is no trace to join.
        let _ = span.set_parent(opentelemetry::Context::new().with_remote_span_context(parent));
    }
}

/// Gives `span` a link to the span that `traceparent` names, if it names one.
pub fn add_link(span: &Span, traceparent: &str) {
    if span.is_disabled() {
        return;
    }
    if let Some(linked) = parse(traceparent) {
        span.add_link(linked);
    }
}

/// The span that `traceparent` names; `None` when it is malformed.
pub(crate) fn parse(traceparent: &str) -> Option<SpanContext> {
    if traceparent.is_empty() {
        return None;
    }
    let carrier = HashMap::from([("traceparent".to_owned(), traceparent.to_owned())]);
    // An empty base, not the current context: that would keep the local parent of a malformed value.
    let context = TraceContextPropagator::new()
        .extract_with_context(&opentelemetry::Context::new(), &carrier);
    let context = context.span().span_context().clone();
    context.is_valid().then_some(context)
}

fn sampled_context(span: &Span) -> Option<SpanContext> {
    let context = span.context();
    let context = context.span().span_context().clone();
    (context.is_valid() && context.is_sampled()).then_some(context)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Spans;

    const SAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    #[test]
    fn only_well_formed_sampled_parents_count() {
        for (case, traceparent, sampled) in [
            ("sampled", SAMPLED, true),
            (
                "not sampled",
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00",
                false,
            ),
            (
                "other flags",
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-02",
                false,
            ),
            ("empty", "", false),
            ("short", "00-0af7-b7ad-01", false),
            (
                "no hex",
                "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-zz",
                false,
            ),
            ("cut inside a character", &"é".repeat(40), false),
        ] {
            assert_eq!(is_sampled(traceparent), sampled, "{case}");
        }
    }

    #[test]
    fn a_traceparent_joins_two_spans() {
        let spans = Spans::collect();
        let sender = tracing::info_span!("sender");
        let (traceparent, trace_id) =
            sender.in_scope(|| (traceparent_of_current_span().unwrap(), current_trace_id()));
        drop(sender);
        let receiver = tracing::info_span!("receiver");
        set_remote_parent(&receiver, &traceparent);
        drop(receiver);

        let [sender, receiver] = <[_; 2]>::try_from(spans.finished()).unwrap();
        assert_eq!(Some(sender.span_context.trace_id().to_string()), trace_id);
        assert_eq!(
            receiver.span_context.trace_id(),
            sender.span_context.trace_id()
        );
        assert_eq!(receiver.parent_span_id, sender.span_context.span_id());
    }

    #[test]
    fn malformed_parents_leave_a_span_alone() {
        let spans = Spans::collect();
        for traceparent in [
            "",
            "nonsense",
            "00-00000000000000000000000000000000-0000000000000000-01",
        ] {
            set_remote_parent(&tracing::info_span!("alone"), traceparent);
        }
        let finished = spans.finished();
        assert_eq!(finished.len(), 3);
        for span in finished {
            assert_eq!(span.parent_span_id, opentelemetry::trace::SpanId::INVALID);
        }
    }

    #[test]
    fn without_a_layer_there_is_no_trace() {
        let span = tracing::info_span!("dark");
        set_remote_parent(&span, SAMPLED);
        assert_eq!(span.in_scope(current_trace_id), None);
        assert_eq!(traceparent_of_current_span(), None);
    }
}

//! The span of a message to the module, and what happens to the message on its way.
//!
//! Source: OpenTelemetry semantic conventions for gRPC, for the names of `rpc.*` and `server.*`.
//!
//! A message has a span only inside a span that is recorded. An operation that sends many has spans
//! of the first [`MAX_MESSAGE_SPANS`]; the others are in its counts.

use std::cell::Cell;

use tdp_mmu::{SeamError, Via};
use tracing::{Span, field};
use transport::Address;

/// Messages of one operation that have spans.
const MAX_MESSAGE_SPANS: u32 = 64;

thread_local! {
    /// Message spans left to the operation that works on this thread.
    static LEFT: Cell<u32> = const { Cell::new(0) };
}

/// Runs one operation of the core, which sends its messages from this thread.
pub(crate) fn operation<T>(work: impl FnOnce() -> T) -> T {
    LEFT.set(MAX_MESSAGE_SPANS);
    work()
}

/// A message that may be traced: its span, and the name by which the module continues it.
#[derive(Debug, Clone)]
pub(super) struct MessageSpan {
    span: Span,
    traceparent: String,
}

impl MessageSpan {
    /// The span of a message with `calls` calls, from its submission to its answer.
    pub(super) fn open(module: &Address, lp: u32, via: Via, calls: usize) -> Self {
        let untraced = Self {
            span: Span::none(),
            traceparent: String::new(),
        };
        if Span::current().is_none() || telemetry::traceparent_of_current_span().is_none() {
            return untraced;
        }
        let left = LEFT.get();
        if left == 0 {
            return untraced;
        }
        LEFT.set(left - 1);
        let (server, port) = module.server();
        let span = tracing::info_span!(
            "seamcall batch",
            otel.kind = "client",
            rpc.system.name = "grpc",
            rpc.method = match via {
                Via::Rpc => "tdx.module.v1.TdxModuleService/Execute",
                Via::Stream => "tdx.module.v1.TdxModuleService/ExecuteStream",
            },
            server.address = server,
            server.port = port,
            tdx.lp = lp,
            tdx.calls = calls,
            otel.status_code = field::Empty,
            error.type = field::Empty,
            error.message = field::Empty,
        );
        let traceparent = span.in_scope(telemetry::traceparent_of_current_span);
        Self {
            span,
            traceparent: traceparent.unwrap_or_default(),
        }
    }

    /// For the message; empty when it is not traced.
    pub(super) fn traceparent(&self) -> &str {
        &self.traceparent
    }

    /// The message goes out once more, under the same number.
    pub(super) fn sent_again(&self) {
        if !self.span.is_none() {
            tracing::info!(target: "link", parent: &self.span, "sent again");
        }
    }

    /// An attempt failed.
    pub(super) fn failed(&self, reason: &str) {
        if !self.span.is_none() {
            tracing::info!(target: "link", parent: &self.span, reason, "attempt failed");
        }
    }

    /// The answer is there: the span ends here, and not where it was last entered.
    pub(super) fn answered(&self) {
        self.span.in_scope(|| ());
    }

    /// The end, when it brought no answer.
    pub(super) fn gave_up(&self, error: &SeamError) {
        self.span.record("otel.status_code", "ERROR");
        let kind = match error {
            SeamError::NotSent { .. } => "not_sent",
            SeamError::Unknown { .. } => "unknown_outcome",
            SeamError::Restarted { .. } => "module_restarted",
        };
        self.span.record("error.type", kind);
        self.span.record("error.message", field::display(error));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_server_is_a_socket_or_a_host_with_its_port() {
        for (url, server, port) in [
            ("unix:///run/module.sock", "/run/module.sock", None),
            ("http://localhost:50052", "localhost", Some(50052)),
            ("http://[::1]:50052", "[::1]", Some(50052)),
        ] {
            let module: Address = url.parse().unwrap();
            assert_eq!(module.server(), (server.to_owned(), port), "{url}");
        }
    }

    #[test]
    fn outside_of_a_recorded_span_a_message_is_not_traced() {
        let module = "unix:///run/module.sock".parse().unwrap();
        let message = operation(|| MessageSpan::open(&module, 0, Via::Stream, 1));
        assert_eq!(message.traceparent(), "");
    }
}

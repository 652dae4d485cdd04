//! Tower layers that open a span for each gRPC call and carry the trace context in its headers.
//!
//! Source: OpenTelemetry semantic conventions for gRPC: span name and `rpc.method` are
//! `package.Service/Method`, `rpc.response.status_code` is the name of the status.
//!
//! A status comes in the headers (a call that fails at once) or in the trailers behind the body,
//! so the span lives until the body ends. A body that is dropped before is a cancelled call.
//! Health checks, reflection and requests that are not gRPC get no span. A server hears what its
//! caller decided about the trace; without a caller it decides by the rules of its layer, before a
//! span is made.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, HeaderValue, Request, Response, header};
use http_body::{Body, Frame, SizeHint};
use opentelemetry::global;
use opentelemetry::propagation::{Extractor, Injector};
use opentelemetry::trace::TraceContextExt as _;
use pin_project_lite::pin_project;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::{Instrument as _, Span, field, instrument::Instrumented};
use tracing_opentelemetry::OpenTelemetrySpanExt as _;

use crate::gate::Gate;

/// Services whose calls say nothing about the model.
const UNTRACED_SERVICES: [&str; 2] = ["/grpc.health.", "/grpc.reflection."];

/// Target of the spans: off in the log by default, `RUST_LOG=rpc=info` shows them.
macro_rules! rpc_span {
    ($kind:literal, $method:expr) => {
        tracing::info_span!(
            target: "rpc",
            "rpc",
            otel.name = $method,
            otel.kind = $kind,
            rpc.system.name = "grpc",
            rpc.method = $method,
            server.address = field::Empty,
            server.port = field::Empty,
            rpc.response.status_code = field::Empty,
            error.type = field::Empty,
            otel.status_code = field::Empty,
        )
    };
}

/// Which end of a call a span describes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Server,
}

/// What a layer makes no span of, and what it knows about the other end.
#[derive(Debug, Clone, Default)]
struct Rules {
    /// Paths of methods without spans.
    skip: Vec<String>,
    /// Paths of methods that are traced now and then, unless the caller has decided.
    gated: Vec<(String, Gate)>,
    /// No span without a caller that has one.
    continued_only: bool,
    /// The server: host or socket path, and port.
    server: Option<(String, Option<u16>)>,
}

impl Rules {
    /// Whether a call whose caller has not decided is traced.
    fn admit(&self, path: &str) -> bool {
        let gate = self.gated.iter().find(|(gated, _)| gated == path);
        !self.continued_only && gate.is_none_or(|(_, gate)| gate.admits(1))
    }
}

/// Layer for servers: continues the trace of the caller.
#[derive(Debug, Clone, Default)]
pub struct ServerTraceLayer {
    rules: Arc<Rules>,
}

impl ServerTraceLayer {
    /// Traces one method only as often as `gate` says, by its path `/package.Service/Method`,
    /// unless the caller has decided.
    #[must_use]
    pub fn gate(mut self, path: &str, gate: Gate) -> Self {
        let rules = Arc::make_mut(&mut self.rules);
        rules.gated.push((path.to_owned(), gate));
        self
    }

    /// Begins no trace: only calls of a traced caller have a span.
    #[must_use]
    pub fn continued_only(mut self) -> Self {
        Arc::make_mut(&mut self.rules).continued_only = true;
        self
    }
}

/// Layer for channels: hands the trace on to the server.
#[derive(Debug, Clone, Default)]
pub struct ClientTraceLayer {
    rules: Arc<Rules>,
}

impl ClientTraceLayer {
    /// Names the server in the spans: a host with its port, or the path of a socket.
    #[must_use]
    pub fn server(mut self, address: &str, port: Option<u16>) -> Self {
        Arc::make_mut(&mut self.rules).server = Some((address.to_owned(), port));
        self
    }
}

/// [`ServerTraceLayer`] around a service.
#[derive(Debug, Clone)]
pub struct ServerTrace<S> {
    inner: S,
    rules: Arc<Rules>,
}

/// [`ClientTraceLayer`] around a channel.
#[derive(Debug, Clone)]
pub struct ClientTrace<S> {
    inner: S,
    rules: Arc<Rules>,
}

/// What [`ClientTraceLayer`] makes of a channel.
pub type TracedChannel = ClientTrace<tonic::transport::Channel>;

macro_rules! layer_and_service {
    ($layer:ident, $service:ident, $side:expr, $open:ident) => {
        impl $layer {
            /// A layer for every method outside health and reflection.
            pub fn new() -> Self {
                Self::default()
            }

            /// Leaves out one method too, by its path `/package.Service/Method`: a stream that is
            /// open for hours is no span, its messages carry their own trace context.
            #[must_use]
            pub fn skip(mut self, path: &str) -> Self {
                Arc::make_mut(&mut self.rules).skip.push(path.to_owned());
                self
            }
        }

        impl<S> Layer<S> for $layer {
            type Service = $service<S>;

            fn layer(&self, inner: S) -> Self::Service {
                $service {
                    inner,
                    rules: self.rules.clone(),
                }
            }
        }

        impl<S, B, R> Service<Request<B>> for $service<S>
        where
            S: Service<Request<B>, Response = Response<R>>,
        {
            type Response = Response<TracedBody<R>>;
            type Error = S::Error;
            type Future = TracedFuture<S::Future>;

            fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
                self.inner.poll_ready(cx)
            }

            fn call(&mut self, mut request: Request<B>) -> Self::Future {
                let span = if is_traced(&request, &self.rules.skip) {
                    $open(&mut request, &self.rules)
                } else {
                    Span::none()
                };
                let outcome = Outcome {
                    span: span.clone(),
                    side: $side,
                    open: true,
                };
                let call = span.in_scope(|| self.inner.call(request));
                TracedFuture {
                    call: call.instrument(span),
                    outcome: Some(outcome),
                }
            }
        }
    };
}

layer_and_service!(
    ServerTraceLayer,
    ServerTrace,
    Side::Server,
    open_server_span
);
layer_and_service!(
    ClientTraceLayer,
    ClientTrace,
    Side::Client,
    open_client_span
);

/// Whether a request is gRPC and not among the silent ones. Clients set the content type further
/// in, so a request without one counts.
fn is_traced<B>(request: &Request<B>, skip: &[String]) -> bool {
    let path = request.uri().path();
    let grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_none_or(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    grpc && !UNTRACED_SERVICES
        .iter()
        .any(|service| path.starts_with(service))
        && !skip.iter().any(|skipped| skipped == path)
}

fn open_server_span<B>(request: &mut Request<B>, rules: &Rules) -> Span {
    if !tracing::enabled!(target: "rpc", tracing::Level::INFO) {
        return Span::none();
    }
    let parent = global::get_text_map_propagator(|w3c| w3c.extract(&HeadersRef(request.headers())));
    let caller = parent.span().span_context().clone();
    let path = request.uri().path();
    let admitted = if caller.is_valid() {
        caller.is_sampled()
    } else {
        rules.admit(path)
    };
    if !admitted {
        return Span::none();
    }
    let span = rpc_span!("server", path.trim_start_matches('/'));
    if caller.is_valid() {
        let _ = span.set_parent(parent);
    }
    span
}

fn open_client_span<B>(request: &mut Request<B>, rules: &Rules) -> Span {
    let span = rpc_span!("client", request.uri().path().trim_start_matches('/'));
    if !span.is_disabled() {
        if let Some((address, port)) = &rules.server {
            span.record("server.address", address.as_str());
            if let Some(port) = port {
                span.record("server.port", port);
            }
        }
        let context = span.context();
        global::get_text_map_propagator(|w3c| {
            w3c.inject_context(&context, &mut Headers(request.headers_mut()));
        });
    }
    span
}

/// The caller's span as the headers name it, as a `traceparent`; empty when they name none.
pub fn traceparent_of(headers: &HeaderMap) -> String {
    if headers.get("traceparent").is_none() {
        return String::new();
    }
    let context = global::get_text_map_propagator(|w3c| w3c.extract(&HeadersRef(headers)));
    crate::context::format(context.span().span_context())
}

struct HeadersRef<'a>(&'a HeaderMap);

impl Extractor for HeadersRef<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

struct Headers<'a>(&'a mut HeaderMap);

impl Injector for Headers<'_> {
    fn set(&mut self, key: &str, value: String) {
        if let (Ok(name), Ok(value)) = (
            http::HeaderName::try_from(key),
            HeaderValue::try_from(value),
        ) {
            self.0.insert(name, value);
        }
    }
}

/// Writes the status of a call into its span, once.
#[derive(Debug)]
struct Outcome {
    span: Span,
    side: Side,
    open: bool,
}

impl Outcome {
    fn record(&mut self, code: Code) {
        if !std::mem::take(&mut self.open) || self.span.is_disabled() {
            return;
        }
        let name = code_name(code);
        self.span.record("rpc.response.status_code", name);
        if self.side.is_failure(code) {
            self.span.record("error.type", name);
            self.span.record("otel.status_code", "ERROR");
        }
    }

    fn record_headers(&mut self, headers: &HeaderMap) {
        if let Some(status) = Status::from_header_map(headers) {
            self.record(status.code());
        }
    }
}

impl Drop for Outcome {
    fn drop(&mut self) {
        self.record(Code::Cancelled);
    }
}

impl Side {
    /// A server did not fail when it refused a bad request; for the caller every refusal counts.
    fn is_failure(self, code: Code) -> bool {
        match self {
            Self::Client => code != Code::Ok,
            Self::Server => matches!(
                code,
                Code::Unknown
                    | Code::DeadlineExceeded
                    | Code::Unimplemented
                    | Code::Internal
                    | Code::Unavailable
                    | Code::DataLoss
            ),
        }
    }
}

/// The name of a status, as `rpc.response.status_code` has it.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

pin_project! {
    /// A call inside its span, until the response headers.
    #[derive(Debug)]
    pub struct TracedFuture<F> {
        #[pin]
        call: Instrumented<F>,
        outcome: Option<Outcome>,
    }
}

impl<F, R, E> Future for TracedFuture<F>
where
    F: Future<Output = Result<Response<R>, E>>,
{
    type Output = Result<Response<TracedBody<R>>, E>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let this = self.project();
        let answer = ready!(this.call.poll(cx));
        let mut outcome = this.outcome.take();
        Poll::Ready(match answer {
            Ok(response) => {
                if let Some(outcome) = &mut outcome {
                    outcome.record_headers(response.headers());
                }
                Ok(response.map(|body| TracedBody { body, outcome }))
            }
            Err(error) => {
                if let Some(outcome) = &mut outcome {
                    outcome.record(Code::Unavailable);
                }
                Err(error)
            }
        })
    }
}

pin_project! {
    /// A response body that ends the span of its call.
    #[derive(Debug)]
    pub struct TracedBody<B> {
        #[pin]
        body: B,
        outcome: Option<Outcome>,
    }
}

impl<B: Body> Body for TracedBody<B> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let this = self.project();
        let frame = ready!(this.body.poll_frame(cx));
        if let Some(outcome) = this.outcome {
            match &frame {
                Some(Ok(frame)) => {
                    if let Some(trailers) = frame.trailers_ref() {
                        outcome.record_headers(trailers);
                    }
                }
                Some(Err(_)) => outcome.record(Code::Unknown),
                // An end without a status: the peer broke the protocol or went away.
                None => outcome.record(Code::Unknown),
            }
        }
        if !matches!(&frame, Some(Ok(frame)) if frame.is_data()) {
            *this.outcome = None;
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests;

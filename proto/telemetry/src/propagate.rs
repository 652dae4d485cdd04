//! Tower layers that open a span for each gRPC call and carry the trace context in its headers.
//!
//! Source: OpenTelemetry semantic conventions for gRPC: span name and `rpc.method` are
//! `package.Service/Method`, `rpc.response.status_code` is the name of the status.
//!
//! A status comes in the headers (a call that fails at once) or in the trailers behind the body,
//! so the span lives until the body ends. A body that is dropped before is a cancelled call.
//! Health checks, reflection and requests that are not gRPC get no span.

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

/// Layer for servers: continues the trace of the caller.
#[derive(Debug, Clone, Default)]
pub struct ServerTraceLayer {
    skip: Arc<[String]>,
}

/// Layer for channels: hands the trace on to the server.
#[derive(Debug, Clone, Default)]
pub struct ClientTraceLayer {
    skip: Arc<[String]>,
}

/// [`ServerTraceLayer`] around a service.
#[derive(Debug, Clone)]
pub struct ServerTrace<S> {
    inner: S,
    skip: Arc<[String]>,
}

/// [`ClientTraceLayer`] around a channel.
#[derive(Debug, Clone)]
pub struct ClientTrace<S> {
    inner: S,
    skip: Arc<[String]>,
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
            pub fn skip(self, path: &str) -> Self {
                Self {
                    skip: self.skip.iter().cloned().chain([path.to_owned()]).collect(),
                }
            }
        }

        impl<S> Layer<S> for $layer {
            type Service = $service<S>;

            fn layer(&self, inner: S) -> Self::Service {
                $service {
                    inner,
                    skip: self.skip.clone(),
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
                let span = if is_traced(&request, &self.skip) {
                    $open(&mut request)
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

fn open_server_span<B>(request: &mut Request<B>) -> Span {
    let span = rpc_span!("server", request.uri().path().trim_start_matches('/'));
    if !span.is_disabled() {
        let parent =
            global::get_text_map_propagator(|w3c| w3c.extract(&Headers(request.headers_mut())));
        if parent.span().span_context().is_valid() {
            let _ = span.set_parent(parent);
        }
    }
    span
}

fn open_client_span<B>(request: &mut Request<B>) -> Span {
    let span = rpc_span!("client", request.uri().path().trim_start_matches('/'));
    if !span.is_disabled() {
        let context = span.context();
        global::get_text_map_propagator(|w3c| {
            w3c.inject_context(&context, &mut Headers(request.headers_mut()));
        });
    }
    span
}

struct Headers<'a>(&'a mut HeaderMap);

impl Extractor for Headers<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key)?.to_str().ok()
    }

    fn keys(&self) -> Vec<&str> {
        self.0.keys().map(http::HeaderName::as_str).collect()
    }
}

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

fn code_name(code: Code) -> &'static str {
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

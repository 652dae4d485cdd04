use std::convert::Infallible;

use http_body_util::{BodyExt as _, Empty, Full};
use opentelemetry::trace::{SpanKind, Status as SpanStatus};
use tower::service_fn;

use super::*;
use crate::testing::{Spans, attribute};

const METHOD: &str = "tdx.module.v1.TdxModuleService/Execute";
const PARENT: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

type NoBody = Empty<&'static [u8]>;

fn request(path: &str, headers: &[(&'static str, &'static str)]) -> Request<NoBody> {
    let mut request = Request::builder().uri(format!("http://module{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    request.body(Empty::new()).unwrap()
}

fn block_on<F: Future>(future: F) -> F::Output {
    tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap()
        .block_on(future)
}

/// An answer with its status in the trailers, behind one message.
fn answer(code: &'static str) -> Response<impl Body<Data = &'static [u8], Error = Infallible>> {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from_static(code));
    let body = Full::new(&b"message"[..]);
    Response::new(body.with_trailers(std::future::ready(Some(Ok(trailers)))))
}

#[test]
fn a_server_span_continues_the_callers_trace_and_holds_the_status() {
    for (code, name, failed) in [
        ("0", "OK", false),
        ("3", "INVALID_ARGUMENT", false),
        ("13", "INTERNAL", true),
        ("14", "UNAVAILABLE", true),
    ] {
        let spans = Spans::collect();
        let mut server = ServerTraceLayer::new().layer(service_fn(|_: Request<NoBody>| async {
            Ok::<_, Infallible>(answer(code))
        }));
        let request = request(&format!("/{METHOD}"), &[("traceparent", PARENT)]);
        block_on(async {
            let response = server.call(request).await.unwrap();
            response.into_body().collect().await.unwrap();
        });

        let [span] = <[_; 1]>::try_from(spans.finished()).unwrap();
        assert_eq!(span.name, METHOD, "{name}");
        assert_eq!(span.span_kind, SpanKind::Server);
        assert_eq!(span.span_context.trace_id().to_string(), PARENT[3..35]);
        assert_eq!(span.parent_span_id.to_string(), PARENT[36..52]);
        assert_eq!(attribute(&span, "rpc.system.name").as_deref(), Some("grpc"));
        assert_eq!(attribute(&span, "rpc.method").as_deref(), Some(METHOD));
        assert_eq!(
            attribute(&span, "rpc.response.status_code").as_deref(),
            Some(name)
        );
        assert_eq!(
            matches!(span.status, SpanStatus::Error { .. }),
            failed,
            "{name}"
        );
    }
}

#[test]
fn a_client_span_travels_in_the_headers() {
    let spans = Spans::collect();
    let seen = std::sync::Mutex::new(None);
    let mut client = ClientTraceLayer::new().layer(service_fn(|request: Request<NoBody>| {
        *seen.lock().unwrap() = request.headers().get("traceparent").cloned();
        async { Ok::<_, Infallible>(answer("3")) }
    }));
    block_on(async {
        let response = client
            .call(request(&format!("/{METHOD}"), &[]))
            .await
            .unwrap();
        response.into_body().collect().await.unwrap();
    });

    let [span] = <[_; 1]>::try_from(spans.finished()).unwrap();
    let (trace, id) = (span.span_context.trace_id(), span.span_context.span_id());
    assert_eq!(
        seen.lock().unwrap().take().unwrap(),
        format!("00-{trace}-{id}-01")
    );
    assert_eq!(span.span_kind, SpanKind::Client);
    assert_eq!(
        attribute(&span, "error.type").as_deref(),
        Some("INVALID_ARGUMENT")
    );
}

#[test]
fn a_dropped_body_is_a_cancelled_call() {
    let spans = Spans::collect();
    let mut server = ServerTraceLayer::new().layer(service_fn(|_: Request<NoBody>| async {
        Ok::<_, Infallible>(answer("0"))
    }));
    drop(block_on(server.call(request(&format!("/{METHOD}"), &[]))).unwrap());
    let [span] = <[_; 1]>::try_from(spans.finished()).unwrap();
    assert_eq!(
        attribute(&span, "rpc.response.status_code").as_deref(),
        Some("CANCELLED")
    );
}

#[test]
fn silent_requests_get_no_span() {
    let spans = Spans::collect();
    let mut server = ServerTraceLayer::new()
        .skip("/tdx.module.v1.TdxModuleService/ExecuteStream")
        .layer(service_fn(|_: Request<NoBody>| async {
            Ok::<_, Infallible>(answer("0"))
        }));
    for (path, headers) in [
        ("/grpc.health.v1.Health/Check", &[][..]),
        (
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            &[],
        ),
        ("/tdx.module.v1.TdxModuleService/ExecuteStream", &[]),
        ("/index.html", &[("content-type", "text/html")]),
    ] {
        drop(block_on(server.call(request(path, headers))).unwrap());
        assert_eq!(spans.finished().len(), 0, "{path}");
    }
}

#[test]
fn a_server_hears_its_caller_and_decides_itself_only_without_one() {
    let unsampled = PARENT.replace("-01", "-00").leak();
    let open = || ServerTraceLayer::new();
    // Nothing is exported in this test, so the gate is closed.
    let gate = || Gate::new(1, std::time::Duration::ZERO);
    let path = format!("/{METHOD}");
    for (case, layer, traceparent, traced) in [
        ("no caller", open(), None, true),
        (
            "a caller that is not sampled",
            open(),
            Some(&*unsampled),
            false,
        ),
        ("a closed gate", open().gate(&path, gate()), None, false),
        (
            "a closed gate, asked",
            open().gate(&path, gate()),
            Some(PARENT),
            true,
        ),
        (
            "the gate of another method",
            open().gate("/other", gate()),
            None,
            true,
        ),
        (
            "continued only, no caller",
            open().continued_only(),
            None,
            false,
        ),
        (
            "continued only, asked",
            open().continued_only(),
            Some(PARENT),
            true,
        ),
    ] {
        let spans = Spans::collect();
        let mut server = layer.layer(service_fn(|_: Request<NoBody>| async {
            Ok::<_, Infallible>(answer("0"))
        }));
        let headers: Vec<_> = traceparent
            .map(|value| ("traceparent", value))
            .into_iter()
            .collect();
        drop(block_on(server.call(request(&path, &headers))).unwrap());
        assert_eq!(spans.finished().len(), usize::from(traced), "{case}");
    }
}

#[test]
fn a_client_span_names_the_server() {
    for (address, port) in [("localhost", Some(50051)), ("/run/mmu.sock", None)] {
        let spans = Spans::collect();
        let mut client = ClientTraceLayer::new()
            .server(address, port)
            .layer(service_fn(|_: Request<NoBody>| async {
                Ok::<_, Infallible>(answer("0"))
            }));
        drop(block_on(client.call(request(&format!("/{METHOD}"), &[]))).unwrap());
        let [span] = <[_; 1]>::try_from(spans.finished()).unwrap();
        assert_eq!(attribute(&span, "server.address").as_deref(), Some(address));
        let given = port.map(|port: u16| port.to_string());
        assert_eq!(attribute(&span, "server.port"), given);
    }
}

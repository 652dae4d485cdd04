//! One fault is one trace through three processes, seen by a real OTLP receiver.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use crate::common::Services;

/// Spans as they arrived, each with the `service.name` of its process.
#[derive(Clone, Default)]
struct Collected(Arc<Mutex<Vec<(String, Span)>>>);

#[tonic::async_trait]
impl TraceService for Collected {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.0.lock().unwrap();
        for resource_spans in request.into_inner().resource_spans {
            let attributes = resource_spans.resource.unwrap_or_default().attributes;
            let service = attributes
                .into_iter()
                .find(|attribute| attribute.key == "service.name")
                .and_then(|attribute| attribute.value?.value)
                .and_then(|value| match value {
                    Value::StringValue(name) => Some(name),
                    _ => None,
                })
                .unwrap_or_default();
            for scope in resource_spans.scope_spans {
                spans.extend(scope.spans.into_iter().map(|span| (service.clone(), span)));
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

/// An OTLP collector on an ephemeral port, until dropped.
struct Receiver {
    spans: Collected,
    endpoint: String,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Receiver {
    fn start() -> Self {
        let spans = Collected::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let service = TraceServiceServer::new(spans.clone());
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                tell.send(listener.local_addr().unwrap()).unwrap();
                let _ = tonic::transport::Server::builder()
                    .add_service(service)
                    .serve_with_incoming_shutdown(TcpListenerStream::new(listener), async {
                        let _ = stopped.await;
                    })
                    .await;
            });
        });
        let endpoint = format!("http://{}", told.recv().unwrap());
        Self {
            spans,
            endpoint,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// The spans of one trace.
    fn trace(&self, trace_id: &str) -> Vec<(String, Span)> {
        let spans = self.spans.0.lock().unwrap();
        spans
            .iter()
            .filter(|(_, span)| hex(&span.trace_id) == trace_id)
            .cloned()
            .collect()
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn one_fault_is_one_trace_with_spans_of_three_processes() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)]);
    services.ok("vm create");
    services.ok("vcpu add --vm 1");
    services.ok("slot set --vm 1 --gpa 0 --size 2G");
    services.ok("convert --vm 1 --gpa 0 --size 2G --to private");
    services.ok("vm finalize --vm 1");
    // The first fault also loads the vCPU's roots; the second one is in another GiB.
    services.ok("fault --vm 1 --gpa 0x1000");
    let fault = services.ok("fault --vm 1 --gpa 0x40000000");
    let trace_id = fault["trace_id"].as_str().unwrap().to_owned();
    // Ending flushes what is not sent yet.
    drop(services);

    let spans = receiver.trace(&trace_id);
    let processes: BTreeSet<&str> = spans.iter().map(|(service, _)| service.as_str()).collect();
    assert_eq!(
        processes,
        BTreeSet::from(["mmu-service", "mmuctl", "tdx-module-svc"])
    );

    let by_id: BTreeMap<&[u8], &(String, Span)> = spans
        .iter()
        .map(|span| (span.1.span_id.as_slice(), span))
        .collect();
    let roots: Vec<_> = spans
        .iter()
        .filter(|(_, span)| span.parent_span_id.is_empty())
        .collect();
    assert_eq!(roots.len(), 1, "{roots:?}");
    assert_eq!(roots[0].0, "mmuctl");
    for (service, span) in spans
        .iter()
        .filter(|(_, span)| !span.parent_span_id.is_empty())
    {
        assert!(
            by_id.contains_key(span.parent_span_id.as_slice()),
            "{service} {}",
            span.name
        );
    }

    let count = |process: &str, name: &str| {
        spans
            .iter()
            .filter(|(service, span)| service == process && span.name == name)
            .count()
    };
    for (process, name, expected) in [
        ("mmu-service", "handle_fault", 1),
        ("mmu-service", "walk", 1),
        ("mmu-service", "begin", 1),
        ("mmu-service", "settle", 1),
        ("mmu-service", "seamcall batch", 1),
        ("tdx-module-svc", "seamcall batch", 1),
        ("tdx-module-svc", "TDH.MEM.SEPT.ADD", 2),
        ("tdx-module-svc", "TDH.MEM.PAGE.AUG", 1),
    ] {
        assert_eq!(count(process, name), expected, "{process}: {name}");
    }
}

//! The real binary: what a trace viewer gets to see of it, by a collector in this process, and
//! how it ends.

use std::process::Stdio;
use std::sync::{Arc, Mutex};

use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use mirror_proto::module::{ExecuteRequest, Repeat, Seamcall};
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::KeyValue;
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use tdx_defs::Leaf;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tokio_stream::StreamExt as _;
use tonic::{Request, Response, Status};
use transport::Listener;

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const SENDER: &str = "b7ad6b7169203331";
const METHOD: &str = "tdx.module.v1.TdxModuleService/Execute";

#[derive(Clone, Default)]
struct Collector(Arc<Mutex<Vec<ExportTraceServiceRequest>>>);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        self.0.lock().unwrap().push(request.into_inner());
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    /// Collects on a free port, for as long as the test runs.
    async fn start() -> (Self, String) {
        let collector = Self::default();
        let listener = Listener::bind(&"http://127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let url = listener.address().unwrap().to_string();
        let router = transport::server().add_service(TraceServiceServer::new(collector.clone()));
        tokio::spawn(transport::serve(
            router,
            vec![listener],
            std::future::pending(),
            std::time::Duration::ZERO,
        ));
        (collector, url)
    }

    /// Each span with the name of its service.
    fn spans(&self) -> Vec<(String, Span)> {
        let exports = self.0.lock().unwrap();
        let resources = exports.iter().flat_map(|export| &export.resource_spans);
        resources
            .flat_map(|spans| {
                let resource = spans.resource.as_ref().unwrap();
                let service = text(&resource.attributes, "service.name").unwrap();
                let spans = spans
                    .scope_spans
                    .iter()
                    .flat_map(|scope| scope.spans.clone());
                spans.map(move |span| (service.clone(), span))
            })
            .collect()
    }
}

fn text(attributes: &[KeyValue], key: &str) -> Option<String> {
    let found = attributes.iter().find(|attribute| attribute.key == key)?;
    Some(match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

fn hex(id: &[u8]) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn traceparent() -> String {
    format!("00-{TRACE}-{SENDER}-01")
}

/// The binary, once it listens at `url`.
async fn start_service(url: &str, collector: &str) -> Child {
    let mut service = Command::new(env!("CARGO_BIN_EXE_tdx-module-svc"))
        .args(["--profile", "conformance", "--listen", url])
        .env("OTEL_EXPORTER_OTLP_ENDPOINT", collector)
        .env_remove("OTEL_SERVICE_NAME")
        .env_remove("OTEL_RESOURCE_ATTRIBUTES")
        .env_remove("OTEL_TRACES_EXPORTER")
        .env_remove("OTEL_SDK_DISABLED")
        .env_remove("RUST_LOG")
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    let mut log = BufReader::new(service.stderr.take().unwrap()).lines();
    while !log
        .next_line()
        .await
        .unwrap()
        .expect("it stopped early")
        .contains("listening")
    {}
    tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
    service
}

async fn terminate(mut service: Child) {
    let pid = service.id().unwrap().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .await
            .unwrap()
            .success()
    );
    assert!(service.wait().await.unwrap().success());
}

fn rdmd(page: u64) -> Seamcall {
    Seamcall {
        leaf: Leaf::PHYMEM_PAGE_RDMD.0.into(),
        rcx: page,
        ..Seamcall::default()
    }
}

#[tokio::test]
async fn a_traced_batch_arrives_as_a_tree_and_an_untraced_one_not_at_all() {
    let (collector, collector_url) = Collector::start().await;
    let dir = tempfile::tempdir().unwrap();
    let url = format!("unix://{}", dir.path().join("module.sock").display());
    let service = start_service(&url, &collector_url).await;
    let channel = transport::connect(&url).await.unwrap();
    let mut client = TdxModuleServiceClient::new(channel);

    let aug = Seamcall {
        leaf: Leaf::MEM_PAGE_AUG.0.into(),
        rcx: 0x8000_0000,
        repeat: Some(Repeat {
            count: 2,
            ..Repeat::default()
        }),
        ..Seamcall::default()
    };
    let batch = |sequence, calls, traceparent: String| ExecuteRequest {
        session: "spans".into(),
        sequence,
        calls,
        traceparent,
        ..ExecuteRequest::default()
    };
    let requests = [
        batch(1, vec![rdmd(0x4000_0000), aug], traceparent()),
        batch(2, vec![rdmd(0x4000_0000); 100], traceparent()),
        batch(3, vec![rdmd(0x4000_0000)], String::new()),
        batch(
            4,
            vec![rdmd(0x4000_0000)],
            traceparent().replace("-01", "-00"),
        ),
    ];
    let answers = client
        .execute_stream(tokio_stream::iter(requests))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        answers.map(Result::unwrap).collect::<Vec<_>>().await.len(),
        4
    );

    // A call of its own carries the context in its headers.
    let mut single = Request::new(batch(5, vec![rdmd(0x4000_0000)], String::new()));
    single
        .metadata_mut()
        .insert("traceparent", traceparent().parse().unwrap());
    client.execute(single).await.unwrap();
    transport::healthcheck(&url).await.unwrap();
    drop(client);
    terminate(service).await;

    let spans = collector.spans();
    assert!(spans.iter().all(|(service, _)| service == "tdx-module-svc"));
    let spans: Vec<Span> = spans.into_iter().map(|(_, span)| span).collect();
    assert!(
        spans.iter().all(|span| hex(&span.trace_id) == TRACE),
        "{spans:#?}"
    );
    let find = |sequence: &str| {
        spans
            .iter()
            .find(|span| text(&span.attributes, "tdx.sequence").as_deref() == Some(sequence))
            .unwrap_or_else(|| panic!("batch {sequence} has no span"))
    };
    let leaves = |parent: &Span| -> Vec<Span> {
        spans
            .iter()
            .filter(|span| span.parent_span_id == parent.span_id)
            .cloned()
            .collect()
    };

    let first = find("1");
    assert_eq!(
        (first.name.as_str(), hex(&first.parent_span_id).as_str()),
        ("seamcall batch", SENDER)
    );
    assert_eq!(first.kind, SpanKind::Server as i32);
    let [read, run] = <[Span; 2]>::try_from(leaves(first)).unwrap();
    assert_eq!(read.name, "TDH.PHYMEM.PAGE.RDMD");
    assert_eq!(
        text(&read.attributes, "tdx.status").as_deref(),
        Some("0x0000000000000000")
    );
    assert_eq!(run.name, "TDH.MEM.PAGE.AUG");
    for (key, value) in [
        ("tdx.seamcall.leaf", "TDH.MEM.PAGE.AUG"),
        ("kvm.gfn", "0x80000"),
        ("tdx.sept.level", "0"),
        ("tdx.repeat.count", "2"),
        ("tdx.completed", "0"),
    ] {
        assert_eq!(text(&run.attributes, key).as_deref(), Some(value), "{key}");
    }

    let bulk = find("2");
    assert!(leaves(bulk).is_empty());
    for (key, value) in [
        ("tdx.calls", "100"),
        ("tdx.calls.ran", "100"),
        ("tdx.calls.failed", "0"),
    ] {
        assert_eq!(text(&bulk.attributes, key).as_deref(), Some(value), "{key}");
    }
    let call = spans.iter().find(|span| span.name == METHOD).unwrap();
    assert_eq!(hex(&call.parent_span_id), SENDER);
    assert_eq!(
        text(&call.attributes, "rpc.response.status_code").as_deref(),
        Some("OK")
    );
    assert_eq!(find("5").parent_span_id, call.span_id);
    // Batches 1, 2 and 5, their leaves, and one call: nothing of 3, 4, the stream or the health check.
    assert_eq!(spans.len(), 3 + 2 + 1 + 1);
}

#[tokio::test]
async fn a_service_stops_with_the_parent_that_holds_its_standard_input() {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("unix://{}", dir.path().join("module.sock").display());
    let mut service = Command::new(env!("CARGO_BIN_EXE_tdx-module-svc"))
        .args(["--stop-with-stdin", "--listen", &url])
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()
        .unwrap();
    drop(service.stdin.take());
    assert!(service.wait().await.unwrap().success());
    assert!(!dir.path().join("module.sock").exists());
}

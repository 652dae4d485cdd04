//! One fault is one trace through three processes, seen by a real OTLP receiver. Faults that nobody
//! asked to be traced are traced by count, or afterwards when they are worth it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use mirror_proto::mmu::mmu_service_client::MmuServiceClient;
use mirror_proto::mmu::{Fault, HandleFaultRequest, HandleFaultsRequest, RunVcpuRequest};
use mirror_proto::module::lock::Object;
use mirror_proto::module::tdx_platform_service_client::TdxPlatformServiceClient;
use mirror_proto::module::{HoldLockRequest, Lock};
use serde_json::Value;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tonic::Code;
use tonic::transport::Channel;
use trace_sink::{Received, Store};

use crate::common::Services;

/// An OTLP collector on ephemeral ports, until dropped.
struct Receiver {
    spans: Store,
    endpoint: String,
    query: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Receiver {
    fn start() -> Self {
        let spans = Store::default();
        let (stop, stopped) = oneshot::channel::<()>();
        let (tell, told) = std::sync::mpsc::channel();
        let store = spans.clone();
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            runtime.unwrap().block_on(async {
                let otlp = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let query = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let addresses = (otlp.local_addr().unwrap(), query.local_addr().unwrap());
                tell.send(addresses).unwrap();
                let stop = async {
                    let _ = stopped.await;
                };
                trace_sink::run(store, otlp, query, stop).await.unwrap();
            });
        });
        let (otlp, query) = told.recv().unwrap();
        Self {
            spans,
            endpoint: format!("http://{otlp}"),
            query,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    /// What `GET` answers on the query port.
    fn get(&self, path: &str) -> String {
        use std::io::{Read as _, Write as _};
        let mut stream = std::net::TcpStream::connect(self.query).unwrap();
        let host = self.query;
        write!(
            stream,
            "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        )
        .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
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

#[test]
fn one_fault_is_one_trace_with_spans_of_three_processes() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)]);
    build(&services);
    // The first fault also loads the vCPU's roots; the second one is in another GiB.
    services.ok("fault --vm 1 --gpa 0x1000");
    let fault = services.ok("fault --vm 1 --gpa 0x40000000");
    let trace_id = fault["trace_id"].as_str().unwrap().to_owned();
    // Ending flushes what is not sent yet.
    drop(services);

    let spans = receiver.spans.trace(&trace_id);
    let processes: BTreeSet<&str> = spans.iter().map(Received::service).collect();
    assert_eq!(
        processes,
        BTreeSet::from(["mmu-service", "mmuctl", "tdx-module-svc"])
    );

    let by_id: BTreeMap<&[u8], &Received> = spans
        .iter()
        .map(|received| (received.span.span_id.as_slice(), received))
        .collect();
    let (roots, children): (Vec<&Received>, Vec<&Received>) = spans
        .iter()
        .partition(|received| received.span.parent_span_id.is_empty());
    assert_eq!(roots.len(), 1, "{roots:?}");
    assert_eq!(roots[0].service(), "mmuctl");
    for received in children {
        assert!(
            by_id.contains_key(received.span.parent_span_id.as_slice()),
            "{} {}",
            received.service(),
            received.span.name
        );
    }

    let count = |process: &str, name: &str| {
        spans
            .iter()
            .filter(|received| received.service() == process && received.span.name == name)
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

    // Both processes name things alike.
    for (process, name, key, expected) in [
        (
            "mmuctl",
            "kvm.mmu.v1.MmuService/HandleFault",
            "rpc.system.name",
            "grpc",
        ),
        (
            "mmu-service",
            "kvm.mmu.v1.MmuService/HandleFault",
            "rpc.response.status_code",
            "OK",
        ),
        ("mmu-service", "handle_fault", "kvm.gfn", "0x40000"),
        (
            "mmu-service",
            "handle_fault",
            "kvm.pf.outcome",
            "RET_PF_FIXED",
        ),
        (
            "mmu-service",
            "seamcall batch",
            "rpc.method",
            "tdx.module.v1.TdxModuleService/ExecuteStream",
        ),
        ("tdx-module-svc", "TDH.MEM.PAGE.AUG", "kvm.gfn", "0x40000"),
        (
            "tdx-module-svc",
            "TDH.MEM.PAGE.AUG",
            "tdx.status",
            "0x0000000000000000",
        ),
    ] {
        let received = spans
            .iter()
            .find(|received| received.service() == process && received.span.name == name);
        let value = received.and_then(|received| received.attribute(key));
        assert_eq!(value.as_deref(), Some(expected), "{process}: {name}: {key}");
    }
    let call = spans
        .iter()
        .find(|received| received.service() == "mmuctl" && received.span.kind == 3);
    let server = call
        .and_then(|call| call.attribute("server.address"))
        .unwrap();
    assert!(server.ends_with("mmu.sock"), "{server}");

    // What stands in for Jaeger tells the same over the query API.
    let answer = receiver.get(&format!("/api/v3/traces/{trace_id}"));
    for expected in ["resourceSpans", "TDH.MEM.PAGE.AUG", "mmuctl", &trace_id] {
        assert!(answer.contains(expected), "{expected} is not in {answer}");
    }
    let unknown = receiver.get("/api/v3/traces/00000000000000000000000000000001");
    assert!(unknown.starts_with("HTTP/1.1 404"), "{unknown}");
    assert!(receiver.get("/api/v3/services").contains("tdx-module-svc"));
}

/// A finished TD with 2 GiB of private memory and one vCPU; the address of its root page.
fn build(services: &Services) -> u64 {
    let vm = services.ok("vm create");
    let tdr = vm["tdr"].as_str().unwrap().trim_start_matches("0x");
    services.ok("vcpu add --vm 1");
    services.ok("slot set --vm 1 --gpa 0 --size 2G");
    services.ok("convert --vm 1 --gpa 0 --size 2G --to private");
    services.ok("vm finalize --vm 1");
    u64::from_str_radix(tdr, 16).unwrap()
}

/// A program that knows nothing of traces, or says what it wants in so many words.
struct Guest {
    runtime: tokio::runtime::Runtime,
    mmu: MmuServiceClient<Channel>,
}

impl Guest {
    fn connect(services: &Services) -> Self {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let channel = runtime
            .block_on(transport::connect(&services.url("mmu")))
            .unwrap();
        Self {
            runtime,
            mmu: MmuServiceClient::new(channel),
        }
    }

    fn fault(&mut self, gpa: u64, traceparent: &str) -> Result<(), Code> {
        let mut request = tonic::Request::new(HandleFaultRequest {
            vm_id: 1,
            fault: Some(fault(gpa)),
            ..Default::default()
        });
        if !traceparent.is_empty() {
            let metadata = request.metadata_mut();
            metadata.insert("traceparent", traceparent.parse().unwrap());
        }
        let answer = self.runtime.block_on(self.mmu.handle_fault(request));
        answer.map(|_| ()).map_err(|status| status.code())
    }

    fn faults(&mut self, faults: Vec<Fault>, links: &[&str]) {
        let message = HandleFaultsRequest {
            vm_id: 1,
            faults,
            links: links.iter().map(|&link| link.to_owned()).collect(),
            ..Default::default()
        };
        self.runtime.block_on(async {
            let stream = tokio_stream::iter([message]);
            let mut answers = self.mmu.handle_faults(stream).await.unwrap().into_inner();
            while answers.message().await.unwrap().is_some() {}
        });
    }
}

fn fault(gpa: u64) -> Fault {
    Fault {
        gpa,
        qualification: 1,
        ..Default::default()
    }
}

/// Spans of faults, whatever trace they are in.
fn of_faults(receiver: &Receiver) -> Vec<Received> {
    let mut spans = receiver.spans.all();
    spans.retain(|received| received.span.name.starts_with("handle_fault"));
    spans
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[test]
fn faults_that_nobody_watches_are_traced_by_count() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
        ("MMU_TRACE_EVERY", "3"),
        ("MMU_TRACE_SLOW_MS", "3600000"),
    ]);
    build(&services);
    let mut guest = Guest::connect(&services);
    for page in 0..7 {
        guest.fault(page << 12, "").unwrap();
    }
    // Sampled means asked; not sampled means that the caller decided against it.
    guest
        .fault(7 << 12, &format!("00-{TRACE}-b7ad6b7169203331-01"))
        .unwrap();
    for page in 8..20 {
        guest
            .fault(page << 12, &format!("00-{TRACE}-b7ad6b7169203332-00"))
            .unwrap();
    }
    drop(guest);
    drop(services);
    let gfns: Vec<_> = of_faults(&receiver)
        .iter()
        .map(|received| received.attribute("kvm.gfn").unwrap())
        .collect();
    assert_eq!(gfns, ["0x0", "0x3", "0x6", "0x7"]);
    let leaves = receiver.spans.all().into_iter();
    let augs = leaves.filter(|one| one.span.name == "TDH.MEM.PAGE.AUG");
    assert_eq!(augs.count(), 4, "those in the module, and no others");
}

#[test]
fn runs_of_a_vcpu_are_traced_by_count() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
        ("MMU_TRACE_EVERY", "3"),
        ("MMU_TRACE_SLOW_MS", "3600000"),
    ]);
    build(&services);
    let mut guest = Guest::connect(&services);
    let request = RunVcpuRequest {
        vm_id: 1,
        ..RunVcpuRequest::default()
    };
    let runs = guest.runtime.block_on(async {
        let requests = tokio_stream::iter(vec![request; 7]);
        let mut answers = guest.mmu.run_vcpu(requests).await.unwrap().into_inner();
        let mut runs = 0;
        while answers.message().await.unwrap().is_some() {
            runs += 1;
        }
        runs
    });
    assert_eq!(runs, 7);
    drop(guest);
    drop(services);
    let spans = receiver.spans.all();
    let named = |name: &str| spans.iter().filter(|one| one.span.name == name).count();
    assert_eq!(named("run_vcpu"), 3, "the first, the fourth, the seventh");
    assert_eq!(named("kvm.mmu.v1.MmuService/RunVcpu"), 0);
}

#[test]
fn a_traced_audit_has_a_span_a_message_and_none_a_call() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)]);
    build(&services);
    services.ok("prefault --vm 1 --gpa 0 --size 4M");
    let audit = services.ok("audit --vm 1");
    assert!(audit["entries"].as_u64().unwrap() >= 1024, "{audit}");
    drop(services);
    let spans = receiver.spans.all();
    let read = |one: &&Received| one.span.name == "TDH.MEM.SEPT.RD";
    assert!(spans.iter().filter(read).count() <= 64);
    let bulk = spans.iter().find(|one| {
        let calls = one.attribute("tdx.calls.ran");
        one.service() == "tdx-module-svc"
            && calls.is_some_and(|calls| calls.parse::<u64>().is_ok_and(|calls| calls > 64))
    });
    assert_eq!(
        bulk.and_then(|bulk| bulk.attribute("tdx.calls.failed"))
            .as_deref(),
        Some("0")
    );
}

#[test]
fn failed_faults_have_a_span_afterwards() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
        ("MMU_TRACE_EVERY", "0"),
        ("MMU_TRACE_SLOW_MS", "3600000"),
    ]);
    build(&services);
    let mut guest = Guest::connect(&services);
    guest.fault(0x1000, "").unwrap();
    // Shared memory behind an address that is private: the exit goes to the VMM.
    let unsampled = format!("00-{TRACE}-b7ad6b7169203331-00");
    guest.fault(0x8000_0000_1000, &unsampled).unwrap_err();
    guest.faults(vec![fault(0x2000), fault(0x8000_0000_3000)], &[]);
    guest.faults(vec![fault(0x4000)], &[]);
    drop(guest);
    drop(services);

    let spans = of_faults(&receiver);
    let [single, batch] = &spans[..] else {
        panic!("{spans:#?}");
    };
    assert_eq!(
        single.attribute("kvm.trace.late").as_deref(),
        Some("failed")
    );
    assert_eq!(single.attribute("kvm.gfn").as_deref(), Some("0x1"));
    assert_eq!(single.trace_id(), TRACE, "in the trace of its caller");
    assert_eq!(single.span.status.as_ref().unwrap().code, 2);
    assert!(single.span.end_time_unix_nano > single.span.start_time_unix_nano);
    assert_eq!(batch.span.name, "handle_faults");
    assert_eq!(batch.attribute("kvm.trace.late").as_deref(), Some("failed"));
    assert_eq!(batch.attribute("kvm.pf.fixed").as_deref(), Some("1"));
    assert_eq!(batch.span.events.len(), 1);
}

#[test]
fn a_busy_module_shows_in_the_events_of_a_fault_that_is_traced_and_of_one_that_is_not() {
    let receiver = Receiver::start();
    let services = Services::start_with_module(
        &[
            ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
            ("MMU_TRACE_EVERY", "0"),
            ("MMU_TRACE_SLOW_MS", "3600000"),
        ],
        &["--allow-injection"],
    );
    let tdr = build(&services);
    services.ok("fault --vm 1 --gpa 0x1000");
    // As if another processor were changing the tree.
    let mut guest = Guest::connect(&services);
    let module = guest
        .runtime
        .block_on(transport::connect(&services.url("module")))
        .unwrap();
    let lock = HoldLockRequest {
        lock: Some(Lock {
            object: Some(Object::SeptTree(tdr)),
        }),
        ..Default::default()
    };
    guest
        .runtime
        .block_on(TdxPlatformServiceClient::new(module).hold_lock(lock))
        .unwrap();
    assert_eq!(guest.fault(0x2000, ""), Err(Code::Aborted));
    let watched = services.run("fault --vm 1 --gpa 0x2000");
    assert_eq!(watched.code, Some(1), "{}", watched.stdout);
    let (_, trace) = watched.stderr.split_once("\ntrace ").unwrap();
    let trace_id = trace[..32].to_owned();
    drop(guest);
    drop(services);

    let spans = of_faults(&receiver);
    let late: Vec<&Received> = spans
        .iter()
        .filter(|one| one.attribute("kvm.trace.late").is_some())
        .collect();
    assert_eq!(late.len(), 1, "{spans:#?}");
    assert_eq!(late[0].attribute("kvm.trace.late").as_deref(), Some("busy"));
    let message = &late[0].span.status.as_ref().unwrap().message;
    assert!(message.contains("TDX_OPERAND_BUSY"), "{message}");

    let traced = spans.iter().find(|one| one.trace_id() == trace_id).unwrap();
    let busy = traced.span.events.iter().filter(|one| one.name == "busy");
    assert_eq!(busy.count(), 128, "as many as a span takes");
    let first = format!("{:?}", traced.span.events[0]);
    assert!(
        first.contains("0x80000200") && first.contains("tdx.operand_id"),
        "{first}"
    );
    assert_eq!(traced.span.status.as_ref().unwrap().code, 2);
}

#[test]
fn slow_faults_have_a_span_afterwards_with_the_answers_of_the_module() {
    let receiver = Receiver::start();
    // Everything is slow.
    let services = Services::start_with(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
        ("MMU_TRACE_EVERY", "0"),
        ("MMU_TRACE_SLOW_MS", "0"),
    ]);
    build(&services);
    let mut guest = Guest::connect(&services);
    guest.fault(0x1000, "").unwrap();
    drop(guest);
    drop(services);
    let spans = of_faults(&receiver);
    let [span] = &spans[..] else {
        panic!("{spans:#?}");
    };
    assert_eq!(span.attribute("kvm.trace.late").as_deref(), Some("slow"));
    assert_eq!(
        span.attribute("kvm.pf.outcome").as_deref(),
        Some("RET_PF_FIXED")
    );
    assert_eq!(span.span.events.len(), 4, "three tables and a page");
}

#[test]
fn a_message_of_faults_is_one_span_with_links_to_those_that_are_watched() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[
        ("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint),
        ("MMU_TRACE_EVERY", "0"),
    ]);
    build(&services);
    let mut guest = Guest::connect(&services);
    let watched = format!("00-{TRACE}-b7ad6b7169203331-01");
    guest.faults(
        (0..100).map(|page| fault(page << 12)).collect(),
        &[&watched],
    );
    drop(guest);
    drop(services);
    let spans = of_faults(&receiver);
    let [span] = &spans[..] else {
        panic!("{spans:#?}");
    };
    assert_eq!(span.attribute("kvm.faults").as_deref(), Some("100"));
    assert_eq!(span.attribute("kvm.pf.fixed").as_deref(), Some("100"));
    let links: Vec<String> = span
        .span
        .links
        .iter()
        .map(|link| {
            link.span_id
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect()
        })
        .collect();
    assert_eq!(links, ["b7ad6b7169203331"]);
    assert_ne!(span.trace_id(), TRACE);
    let module = receiver.spans.trace(&span.trace_id());
    assert!(
        module.iter().any(|one| one.service() == "tdx-module-svc"),
        "{module:#?}"
    );
}

#[test]
fn health_checks_and_the_services_own_calls_make_no_traces() {
    let receiver = Receiver::start();
    let services = Services::start_with(&[("OTEL_EXPORTER_OTLP_ENDPOINT", &receiver.endpoint)]);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    for name in ["mmu", "module"] {
        let url = services.url(name);
        // The MMU service serves once it has found the module; each check is one more to see.
        let serves = || runtime.block_on(transport::healthcheck(&url)).is_ok();
        assert!((0..1_000).any(|_| serves()), "{name} does not serve");
    }
    drop(services);
    assert_eq!(receiver.spans.all(), []);
}

/// Depth-first names with the process that each span is of.
fn names(node: &Value, found: &mut Vec<(String, String)>) {
    let text = |key: &str| node[key].as_str().unwrap().to_owned();
    found.push((text("service"), text("name")));
    for child in node["children"].as_array().unwrap() {
        names(child, found);
    }
}

#[test]
fn a_fault_is_explained_without_a_collector_and_with_one() {
    let receiver = Receiver::start();
    for collector in [None, Some(receiver.endpoint.as_str())] {
        let mut environment = vec![
            ("MMUCTL_JAEGER", "http://localhost:16686/"),
            ("MMU_TRACE_EVERY", "0"),
        ];
        environment.extend(collector.map(|url| ("OTEL_EXPORTER_OTLP_ENDPOINT", url)));
        let services = Services::start_with(&environment);
        build(&services);
        services.ok("fault --vm 1 --gpa 0x1000");
        let fault = services.ok("fault --vm 1 --gpa 0x40000000 --explain");
        let id = fault["trace_id"].as_str().unwrap();
        assert_eq!(
            fault["trace_url"].as_str().unwrap(),
            format!("http://localhost:16686/trace/{id}")
        );
        let roots = fault["spans"].as_array().unwrap();
        assert_eq!(roots.len(), 1, "{fault:#}");
        let mut found = Vec::new();
        names(&roots[0], &mut found);
        let found: Vec<(&str, &str)> = found.iter().map(|(a, b)| (&**a, &**b)).collect();
        assert_eq!(
            found,
            [
                ("mmuctl", "fault"),
                ("mmuctl", "kvm.mmu.v1.MmuService/HandleFault"),
                ("mmu-service", "handle_fault"),
                ("mmu-service", "walk"),
                ("mmu-service", "begin"),
                ("mmu-service", "seamcall batch"),
                ("tdx-module-svc", "seamcall batch"),
                ("tdx-module-svc", "TDH.MEM.SEPT.ADD"),
                ("tdx-module-svc", "TDH.MEM.SEPT.ADD"),
                ("tdx-module-svc", "TDH.MEM.PAGE.AUG"),
                ("mmu-service", "settle"),
            ],
            "collector: {collector:?}"
        );
        assert_eq!(fault["seamcalls"].as_array().unwrap().len(), 3);
    }
    assert!(receiver.spans.services().contains("mmu-service"));
}

#[test]
fn a_fault_that_fails_is_explained_too() {
    let services = Services::start();
    build(&services);
    // Shared memory behind an address that is private: the exit goes to the VMM.
    let run = services.run_table("fault --vm 1 --gpa 0x800000001000 --explain");
    assert_eq!(run.code, Some(1), "{}", run.stdout);
    for expected in ["└─ HandleFault", "handle_fault", "error.message", "µs"] {
        assert!(run.stderr.contains(expected), "{expected}: {}", run.stderr);
    }
    let last = run.stderr.lines().last().unwrap();
    assert!(last.starts_with("trace "), "{}", run.stderr);
    assert_eq!(run.stdout, "");
}

#[test]
fn an_explanation_is_a_tree_in_the_terminal() {
    let services = Services::start();
    build(&services);
    let run = services.run_table("fault --vm 1 --gpa 0x1000 --explain");
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    for expected in [
        "fault",
        "└─ HandleFault",
        "seamcall batch",
        "TDH.MEM.PAGE.AUG",
        "µs",
        "TDX_SUCCESS",
    ] {
        assert!(run.stdout.contains(expected), "{expected}: {}", run.stdout);
    }
    assert!(run.stderr.starts_with("trace "), "{}", run.stderr);
}

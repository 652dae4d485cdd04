//! One fault is one trace through three processes, seen by a real OTLP receiver.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;

use tokio::net::TcpListener;
use tokio::sync::oneshot;
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

    // What stands in for Jaeger tells the same over the query API.
    let answer = receiver.get(&format!("/api/v3/traces/{trace_id}"));
    for expected in ["resourceSpans", "TDH.MEM.PAGE.AUG", "mmuctl", &trace_id] {
        assert!(answer.contains(expected), "{expected} is not in {answer}");
    }
    let unknown = receiver.get("/api/v3/traces/00000000000000000000000000000001");
    assert!(unknown.starts_with("HTTP/1.1 404"), "{unknown}");
    assert!(receiver.get("/api/v3/services").contains("tdx-module-svc"));
}

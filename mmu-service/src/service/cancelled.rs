//! Callers that hang up: every await of an operation is the last one in turn.
//!
//! A handler is a future that its caller's end drops, at whichever await it is. Here it is dropped
//! after one poll, after two, and so on until it comes to its end, and the VM is audited each time.

use std::pin::pin;
use std::sync::Arc;
use std::task::Poll;

use clap::Parser as _;
use mirror_proto::mmu as wire;
use mirror_proto::mmu::mmu_service_server::MmuServiceServer;
use prost::Message;
use tokio::sync::{mpsc, oneshot};
use tokio_stream::StreamExt as _;
use tonic::Streaming;
use tonic::codec::Codec as _;
use tonic::service::Routes;
use tonic_prost::ProstCodec;
use transport::{Address, Listener, ScriptedCall};

use super::{Service, faults, lifecycle, memory, run, tables};
use crate::config::Config;
use crate::link::ModuleLink;
use crate::metrics::Metrics;
use crate::shell::Shell;

const PAGE: u64 = 4096;
const SLOT: u64 = 1 << 20;
const PRIVATE: u64 = 8;
/// More polls than any handler takes.
const MANY_POLLS: usize = 64;

/// The future's value, unless it takes more than `polls` polls: then it is dropped. The one thread
/// that operations have is taken until the future has been polled once, so that none is faster.
async fn at_most<T>(polls: usize, future: impl Future<Output = T>) -> Option<T> {
    let (go, wait) = std::sync::mpsc::channel::<()>();
    let gate = tokio::task::spawn_blocking(move || wait.recv());
    let mut go = Some(go);
    let mut left = polls;
    let value = {
        let mut future = pin!(future);
        std::future::poll_fn(|cx| {
            left -= 1;
            match future.as_mut().poll(cx) {
                Poll::Ready(value) => Poll::Ready(Some(value)),
                Poll::Pending if left == 0 => Poll::Ready(None),
                Poll::Pending => {
                    drop(go.take());
                    Poll::Pending
                }
            }
        })
        .await
    };
    drop(go);
    assert!(gate.await.unwrap().is_err(), "nothing is ever sent");
    value
}

/// A runtime with one thread for operations.
fn in_runtime(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(1)
        .enable_all()
        .build()
        .unwrap()
        .block_on(test);
}

/// A module behind a socket, and the shell of a service without one.
struct Bench {
    shell: Arc<Shell>,
    _dir: tempfile::TempDir,
    _stop: oneshot::Sender<()>,
}

impl Bench {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("module.sock"));
        let (stop, stopped) = oneshot::channel();
        let (bound, is_bound) = oneshot::channel();
        let listen = address.clone();
        // A runtime of its own: it needs threads, too.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().unwrap();
            runtime.block_on(async move {
                let listener = Listener::bind(&listen).await.unwrap();
                bound.send(()).unwrap();
                let config = tdx_module_svc::Config::default();
                let stop = async { drop(stopped.await) };
                tdx_module_svc::run(config, vec![listener], stop)
                    .await
                    .unwrap();
            });
        });
        is_bound.await.unwrap();
        let address = address.to_string();
        let config = Config::try_parse_from(["mmu-service", "--module", &address]).unwrap();
        let metrics = Metrics::new();
        let link =
            ModuleLink::start(config.link_config().unwrap(), Arc::clone(&metrics.link)).unwrap();
        let gate = config.tracing.gate();
        Self {
            shell: Shell::new(config.limits, gate, link, metrics, None),
            _dir: dir,
            _stop: stop,
        }
    }

    /// A VM that runs, with a private slot.
    async fn vm(&self, mode: wire::Mode) -> u64 {
        let request = wire::CreateVmRequest {
            mode: mode.into(),
            ..Default::default()
        };
        let created = lifecycle::create_vm(&self.shell, request).await.unwrap();
        let vm_id = created.vm_id;
        let vcpu = wire::CreateVcpuRequest {
            vm_id,
            create_only: false,
        };
        lifecycle::create_vcpu(&self.shell, vcpu).await.unwrap();
        let slot = wire::Slot {
            slot_id: 1,
            size: SLOT,
            guest_memfd: true,
            ..Default::default()
        };
        let region = wire::SetUserMemoryRegionRequest {
            vm_id,
            slot: Some(slot),
        };
        memory::set_user_memory_region(&self.shell, region)
            .await
            .unwrap();
        self.convert(vm_id, PRIVATE).await.unwrap();
        let finalize = wire::FinalizeVmRequest { vm_id, hw_error: 0 };
        lifecycle::finalize_vm(&self.shell, finalize).await.unwrap();
        vm_id
    }

    async fn convert(
        &self,
        vm_id: u64,
        attributes: u64,
    ) -> Result<wire::SetMemoryAttributesResponse, tonic::Status> {
        let request = wire::SetMemoryAttributesRequest {
            vm_id,
            gpa: 0,
            size: SLOT,
            attributes,
        };
        memory::set_memory_attributes(&self.shell, request).await
    }

    /// One operation of each path; `round` tells repeats apart.
    async fn operate(&self, path: Path, vm_id: u64, round: u64) {
        let shell = &self.shell;
        // What an operation answers does not matter here: a conversion that is still under way
        // makes a fault on its range one that is refused.
        match path {
            Path::Fault => {
                let fault = wire::Fault {
                    gpa: round * PAGE,
                    qualification: 2,
                    ..Default::default()
                };
                let request = wire::HandleFaultRequest {
                    vm_id,
                    fault: Some(fault),
                    ..Default::default()
                };
                let _ = faults::handle_fault(shell, "", request).await;
            }
            Path::Populate => {
                let request = wire::PreFaultMemoryRequest {
                    vm_id,
                    gpa: 0,
                    size: SLOT,
                    ..Default::default()
                };
                let mut answers = faults::pre_fault_memory(shell, request).unwrap();
                while answers.next().await.is_some() {}
            }
            Path::Convert => {
                let _ = self.convert(vm_id, PRIVATE * (round % 2)).await;
            }
            Path::PunchHole => {
                let request = wire::PunchHoleRequest {
                    vm_id,
                    slot_id: 1,
                    offset: 0,
                    size: SLOT,
                };
                let _ = memory::punch_hole(shell, request).await;
            }
            Path::Zap => {
                let request = wire::ZapRangeRequest {
                    vm_id,
                    gpa: 0,
                    size: SLOT,
                };
                let _ = tables::zap_range(shell, request).await;
            }
            // The tasks of a stream are dropped where they are, as at the end of the runtime.
            Path::Faults => {
                let (ahead, batches) = mpsc::channel(2);
                let (out, mut answers) = mpsc::channel(1);
                let read = faults::read_ahead(
                    Arc::clone(shell),
                    streamed(&fault_batches(vm_id, round)),
                    ahead,
                );
                let answer = faults::answer_batches(Arc::clone(shell), String::new(), batches, out);
                let drain = async { while answers.recv().await.is_some() {} };
                tokio::join!(read, answer, drain);
            }
            Path::Run => {
                let (out, mut answers) = mpsc::channel(1);
                let serve = run::serve(Arc::clone(shell), streamed(&runs(vm_id, round)), out);
                let drain = async { while answers.recv().await.is_some() {} };
                tokio::join!(serve, drain);
            }
            // The caller hangs up; the tasks of its stream find out.
            Path::FaultsCall => {
                self.call("HandleFaults", &fault_batches(vm_id, round))
                    .await
            }
            Path::RunCall => self.call("RunVcpu", &runs(vm_id, round)).await,
        }
    }

    async fn call(&self, method: &str, messages: &[impl Message]) {
        let path = format!("/kvm.mmu.v1.MmuService/{method}");
        let rule = crate::RULES.iter().find(|(known, _)| *known == path);
        let service = Service::new(Arc::clone(&self.shell));
        let call = ScriptedCall {
            path: rule.unwrap().0,
            message: None,
            body: body(messages),
        };
        let made = call.make(Routes::new(MmuServiceServer::new(service)), false);
        made.await.unwrap();
    }

    /// Mirror, private tree and PAMT agree, and nothing is half done. Waits for whatever the VM is
    /// still at.
    async fn assert_clean(&self, vm_id: u64, case: &str) {
        let entry = self.shell.vms.get(vm_id).unwrap();
        let audit = tokio::task::spawn_blocking(move || entry.vm.audit(&mut |_, _| {}));
        let audit = audit.await.unwrap().unwrap();
        let found = (audit.mismatches, audit.frozen);
        assert_eq!(found, (0, 0), "{case}: {:?}", audit.first_mismatches);
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Path {
    Fault,
    Populate,
    Convert,
    PunchHole,
    Zap,
    Faults,
    Run,
    FaultsCall,
    RunCall,
}

impl Path {
    const ALL: [Self; 9] = [
        Self::Fault,
        Self::Populate,
        Self::Convert,
        Self::PunchHole,
        Self::Zap,
        Self::Faults,
        Self::Run,
        Self::FaultsCall,
        Self::RunCall,
    ];

    /// Whether the path takes pages away, and so needs some.
    fn removes(self) -> bool {
        matches!(self, Self::Convert | Self::PunchHole | Self::Zap)
    }
}

/// The body of a request with several messages.
fn body(messages: &[impl Message]) -> bytes::Bytes {
    let frames = messages
        .iter()
        .map(|message| ScriptedCall::new("", message.encode_to_vec().into()).body);
    frames.collect::<Vec<_>>().concat().into()
}

/// The messages as they come to a handler.
fn streamed<T: Message + Default + 'static>(messages: &[T]) -> Streaming<T> {
    let body = tonic::body::Body::new(http_body_util::Full::new(body(messages)));
    let decoder = ProstCodec::<T, T>::default().decoder();
    Streaming::new_request(decoder, body, None, None)
}

/// Three batches of faults, of pages that no other round has.
fn fault_batches(vm_id: u64, round: u64) -> Vec<wire::HandleFaultsRequest> {
    let batch = |tag| wire::HandleFaultsRequest {
        vm_id,
        faults: (0..2)
            .map(|page| wire::Fault {
                gpa: (100 + 6 * (round % 20) + 2 * tag + page) * PAGE,
                qualification: 2,
                ..Default::default()
            })
            .collect(),
        tag,
        ..Default::default()
    };
    (0..3).map(batch).collect()
}

/// Two runs of a guest that accepts a page and writes it.
fn runs(vm_id: u64, round: u64) -> Vec<wire::RunVcpuRequest> {
    let op = |op| wire::RunOp { op: Some(op) };
    let run = |at| {
        let gpa = (40 + 2 * (round % 20) + at) * PAGE;
        wire::RunVcpuRequest {
            vm_id,
            ops: vec![
                op(wire::run_op::Op::Accept(wire::RunAccept { gpa, level: 1 })),
                op(wire::run_op::Op::Write(wire::RunWrite {
                    gpa,
                    data: vec![7],
                })),
            ],
            ..Default::default()
        }
    };
    (0..2).map(run).collect()
}

#[test]
fn every_await_of_the_fault_and_range_paths_may_be_the_last() {
    in_runtime(cancel_each_path());
}

async fn cancel_each_path() {
    let bench = Bench::start().await;
    for mode in [wire::Mode::Batched, wire::Mode::Kernel] {
        let vm_id = bench.vm(mode).await;
        for path in Path::ALL {
            let mut cancelled = 0;
            for polls in 1..MANY_POLLS {
                let case = format!("{mode:?} {path:?}, {polls} polls");
                let round = polls as u64;
                if path.removes() {
                    bench.convert(vm_id, PRIVATE).await.unwrap();
                    let gpa = wire::PreFaultMemoryRequest {
                        vm_id,
                        size: 64 * PAGE,
                        ..Default::default()
                    };
                    let mut answers = faults::pre_fault_memory(&bench.shell, gpa).unwrap();
                    while answers.next().await.is_some() {}
                }
                let operation = bench.operate(path, vm_id, round);
                let is_through = at_most(polls, operation).await.is_some();
                bench.assert_clean(vm_id, &case).await;
                if is_through {
                    break;
                }
                cancelled += 1;
            }
            assert!(cancelled >= 1, "{mode:?} {path:?} has no await");
            assert!(cancelled < MANY_POLLS - 1, "{mode:?} {path:?} has no end");
        }
        let destroy = wire::DestroyVmRequest { vm_id, mode: 0 };
        let destroyed = lifecycle::destroy_vm(&bench.shell, destroy).await.unwrap();
        assert_eq!(destroyed.pages_leaked, 0, "{mode:?}");
    }
}

#[test]
fn a_caller_that_leaves_during_birth_or_end_leaves_no_half_vm() {
    in_runtime(cancel_birth_and_end());
}

async fn cancel_birth_and_end() {
    let bench = Bench::start().await;
    for polls in 1..MANY_POLLS {
        let request = wire::CreateVmRequest::default();
        let created = lifecycle::create_vm(&bench.shell, request);
        if at_most(polls, created).await.is_some() {
            assert!(polls > 1, "creation has an await");
            break;
        }
    }
    for polls in 1..MANY_POLLS {
        let vm_id = bench.vm(wire::Mode::Batched).await;
        bench.operate(Path::Fault, vm_id, 0).await;
        let destroy = wire::DestroyVmRequest { vm_id, mode: 0 };
        if at_most(polls, lifecycle::destroy_vm(&bench.shell, destroy))
            .await
            .is_some()
        {
            assert!(polls > 1, "the end has an await");
            break;
        }
    }
    // Everything that was begun comes to its end, and then nothing is left but whole VMs.
    bench.shell.start_draining();
    let deadline = tokio::time::Instant::now() + std::time::Duration::from_secs(60);
    let attachment = bench.shell.link.attach(std::time::Duration::from_secs(1));
    let host = Arc::clone(attachment.await.unwrap().host());
    bench.shell.finish(deadline).await;
    assert!(bench.shell.vms.all().is_empty());
    assert_eq!(host.pages_in_use(), 0);
}

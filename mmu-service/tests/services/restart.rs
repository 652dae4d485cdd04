//! mmu-service killed, and started again on the same state: a real process, so that the end is one.

use std::io::{BufRead as _, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};

use mirror_proto::mmu::mmu_service_client::MmuServiceClient;
use mirror_proto::mmu::run_op::Op;
use mirror_proto::mmu::run_result::Result as Outcome;
use mirror_proto::mmu::run_vcpu_response::Exit;
use mirror_proto::mmu::{self as wire, Mode};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;
use transport::Address;

use crate::proxy::Proxy;
use crate::stack::{MIB, PAGE, PRIVATE, Process, Stack, assert_refused, calls, socket};

/// The program itself.
struct Service {
    child: Arc<Mutex<Child>>,
}

impl Service {
    /// Starts it; returns when it listens.
    fn start(stack: &Stack, link: &Address) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_mmu-service"))
            .arg("--listen")
            .arg(socket(stack.dir.path(), "mmu").to_string())
            .arg("--module")
            .arg(link.to_string())
            .arg("--state")
            .arg(stack.dir.path().join("state"))
            .env("NO_COLOR", "1")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap()).lines();
        let listens = log.by_ref().map_while(Result::ok).any(|line| {
            eprintln!("{line}");
            line.contains("listening")
        });
        assert!(listens, "the service ended before it listened");
        // What it says later is the test's output, too; and its pipe must not fill.
        std::thread::spawn(move || {
            log.map_while(Result::ok)
                .for_each(|line| eprintln!("{line}"))
        });
        Self {
            child: Arc::new(Mutex::new(child)),
        }
    }

    /// SIGKILL.
    fn kill(mut self) {
        self.end();
    }

    fn end(&mut self) {
        let mut child = self.child.lock().unwrap();
        let _ = child.kill();
        let _ = child.wait();
    }

    /// Kills it from wherever this is called.
    fn killer(&self) -> impl FnOnce() + Send + 'static {
        let child = Arc::clone(&self.child);
        move || drop(child.lock().unwrap().kill())
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.end();
    }
}

/// A module in this process, and a service that is one of its own.
struct Pair {
    stack: Stack,
    link: Address,
    service: Option<Service>,
}

impl Pair {
    async fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let link = socket(dir.path(), "module");
        let module = Some(Process::module(&link));
        Self::beside(dir, module, link).await
    }

    async fn beside(dir: tempfile::TempDir, module: Option<Process>, link: Address) -> Self {
        let mmu = socket(dir.path(), "mmu").to_string();
        let client = MmuServiceClient::new(transport::endpoint(&mmu).unwrap().connect_lazy());
        let stack = Stack {
            dir,
            module,
            service: None,
            client,
        };
        let mut pair = Self {
            stack,
            link,
            service: None,
        };
        pair.start_service().await;
        pair
    }

    async fn start_service(&mut self) {
        self.service = Some(Service::start(&self.stack, &self.link));
        let mmu = socket(self.stack.dir.path(), "mmu").to_string();
        self.stack.client = MmuServiceClient::new(transport::connect(&mmu).await.unwrap());
        self.stack.wait_until(ServingStatus::Serving).await;
    }

    async fn kill_and_restart(&mut self) {
        self.service.take().unwrap().kill();
        self.start_service().await;
    }

    /// SIGTERM: an orderly end.
    async fn stop_and_restart(&mut self) {
        let service = self.service.take().unwrap();
        let pid = service.child.lock().unwrap().id().to_string();
        assert!(Command::new("kill").arg(&pid).status().unwrap().success());
        let ended = service.child.lock().unwrap().wait().unwrap();
        assert!(ended.success(), "{ended}");
        self.start_service().await;
    }

    async fn run(&mut self, vm_id: u64, ops: Vec<Op>) -> wire::RunVcpuResponse {
        let (asks, requests) = tokio::sync::mpsc::channel(1);
        let ops = ops.into_iter().map(|op| wire::RunOp { op: Some(op) });
        let request = wire::RunVcpuRequest {
            vm_id,
            ops: ops.collect(),
            ..Default::default()
        };
        asks.send(request).await.unwrap();
        let answers = self.stack.client.run_vcpu(ReceiverStream::new(requests));
        let mut answers = answers.await.unwrap().into_inner();
        answers.message().await.unwrap().unwrap()
    }
}

fn accept(gpa: u64) -> Op {
    Op::Accept(wire::RunAccept { gpa, level: 0 })
}

fn write(gpa: u64, data: &[u8]) -> Op {
    let data = data.to_vec();
    Op::Write(wire::RunWrite { gpa, data })
}

fn read(gpa: u64, length: u32) -> Op {
    Op::Read(wire::RunRead { gpa, length })
}

#[tokio::test]
async fn vms_and_their_memory_outlive_a_killed_service() {
    let mut pair = Pair::start().await;
    for mode in [Mode::Batched, Mode::Kernel] {
        let vm_id = pair.stack.running_vm(mode, 2, 16 * MIB).await;
        let half_built = pair.stack.vm(mode, 1, 4 * MIB).await;
        let ops = vec![accept(0x3000), write(0x3004, b"secret")];
        assert_eq!(pair.run(vm_id, ops).await.exit, Some(Exit::Done(true)));
        pair.stack.prefault(vm_id, 2 * MIB, 4 * MIB).await.unwrap();
        pair.stack.convert(vm_id, 3 * MIB, MIB, 0).await.unwrap();
        let before = pair.stack.list().await;
        let held = pair.stack.platform().await;

        pair.kill_and_restart().await;
        assert_eq!(pair.stack.list().await, before, "{mode:?}");
        assert_eq!(pair.stack.platform().await.pages, held.pages);
        pair.stack.assert_clean(vm_id).await;
        let ran = pair.run(vm_id, vec![read(0x3000, 12)]).await;
        let Some(Outcome::Resumed(resumed)) = &ran.results[0].result else {
            panic!("{ran:?}");
        };
        assert_eq!(resumed.data, b"\0\0\0\0secret\0\0");

        pair.stop_and_restart().await;
        assert_eq!(
            pair.stack.list().await,
            before,
            "{mode:?}: an orderly end keeps them"
        );
        pair.stack.assert_clean(vm_id).await;

        // It works on: what is there is there, what was converted is shared, the rest can come.
        let again = pair.stack.prefault(vm_id, 2 * MIB, MIB).await.unwrap();
        assert_eq!(calls(&again.counts.unwrap(), "TDH.MEM.PAGE.AUG"), 0);
        let shared = pair.stack.fault(vm_id, 0, 3 * MIB).await;
        assert_refused(shared, Code::FailedPrecondition, "MEMORY_FAULT");
        pair.stack
            .convert(vm_id, 3 * MIB, MIB, PRIVATE)
            .await
            .unwrap();
        pair.stack.prefault(vm_id, 3 * MIB, 8 * MIB).await.unwrap();
        pair.stack.assert_clean(vm_id).await;

        // The one that was being built is built on.
        let finalize = wire::FinalizeVmRequest {
            vm_id: half_built,
            hw_error: 0,
        };
        pair.stack.client.finalize_vm(finalize).await.unwrap();
        pair.stack.fault(half_built, 0, PAGE).await.unwrap();
        pair.stack.assert_clean(half_built).await;

        let new = pair.stack.vm(mode, 1, 4 * MIB).await;
        assert!(new > half_built, "ids are not used again");
        for vm_id in [vm_id, half_built, new] {
            assert_eq!(pair.stack.destroy(vm_id).await.pages_leaked, 0, "{mode:?}");
        }
        pair.stack.assert_all_given_back().await;
        pair.kill_and_restart().await;
        assert!(pair.stack.list().await.is_empty(), "gone for good");
    }
}

#[tokio::test]
async fn vms_of_a_module_that_restarted_meanwhile_are_dead() {
    let mut pair = Pair::start().await;
    let vm_id = pair.stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    pair.service.take().unwrap().kill();
    pair.stack.module.take().unwrap().kill();
    pair.stack.module = Some(Process::module(&pair.link));
    pair.start_service().await;

    let listed = pair.stack.list().await;
    assert_eq!((listed[0].vm_id, &*listed[0].state), (vm_id, "dead"));
    let reason = &listed[0].reason;
    assert!(reason.contains("restarted"), "{reason}");
    let fault = pair.stack.fault(vm_id, 0, 0).await;
    assert_refused(fault, Code::FailedPrecondition, "VM_DEAD");
    let new = pair.stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    pair.stack.prefault(new, 0, MIB).await.unwrap();
    pair.kill_and_restart().await;
    pair.stack.assert_clean(new).await;
    assert_eq!(pair.stack.list().await.len(), 2);
    pair.stack.destroy(vm_id).await;
    assert_eq!(pair.stack.destroy(new).await.pages_leaked, 0);
    pair.stack.assert_all_given_back().await;
    pair.kill_and_restart().await;
    assert!(pair.stack.list().await.is_empty());
}

/// An operation that is cut short.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Cut {
    Populate,
    Convert,
    PunchHole,
    Build,
    MeasuredBuild,
    Destroy,
}

impl Cut {
    /// A VM that is ready for it.
    async fn prepare(self, stack: &mut Stack, mode: Mode) -> u64 {
        match self {
            Self::Build | Self::MeasuredBuild => stack.vm(mode, 1, 8 * MIB).await,
            _ => {
                let vm_id = stack.running_vm(mode, 1, 8 * MIB).await;
                if self != Self::Populate {
                    stack.prefault(vm_id, 0, MIB).await.unwrap();
                }
                vm_id
            }
        }
    }

    /// Whether it came to its end.
    async fn run(self, stack: &mut Stack, vm_id: u64) -> bool {
        let build = |measure| wire::InitMemRegionRequest {
            vm_id,
            size: 128 * PAGE,
            data: vec![3; 5000].into(),
            measure,
            ..Default::default()
        };
        match self {
            Self::Populate => stack.prefault(vm_id, 0, 4 * MIB).await.is_ok(),
            Self::Convert => stack.convert(vm_id, 0, 4 * MIB, 0).await.is_ok(),
            Self::PunchHole => {
                let hole = wire::PunchHoleRequest {
                    vm_id,
                    slot_id: 1,
                    offset: 0,
                    size: MIB,
                };
                stack.client.punch_hole(hole).await.is_ok()
            }
            Self::Build => stack.client.init_mem_region(build(false)).await.is_ok(),
            Self::MeasuredBuild => stack.client.init_mem_region(build(true)).await.is_ok(),
            Self::Destroy => {
                let destroy = wire::DestroyVmRequest { vm_id, mode: 0 };
                stack.client.destroy_vm(destroy).await.is_ok()
            }
        }
    }
}

#[tokio::test]
async fn a_service_that_is_killed_in_the_middle_comes_back_whole() {
    let dir = tempfile::tempdir().unwrap();
    let (module_at, link) = (socket(dir.path(), "module"), socket(dir.path(), "proxy"));
    let module = Some(Process::module(&module_at));
    let proxy = Proxy::cutting_after(&link, &module_at, u64::MAX);
    let mut pair = Pair::beside(dir, module, link).await;
    let mut kills = 0;
    for cut in [
        Cut::Populate,
        Cut::Convert,
        Cut::PunchHole,
        Cut::Build,
        Cut::MeasuredBuild,
        Cut::Destroy,
    ] {
        for (mode, pieces) in [
            (Mode::Batched, 1),
            (Mode::Batched, 2),
            (Mode::Kernel, 5),
            (Mode::Kernel, 60),
        ] {
            let vm_id = cut.prepare(&mut pair.stack, mode).await;
            proxy.after_requests(pieces, pair.service.as_ref().unwrap().killer());
            let is_done = cut.run(&mut pair.stack, vm_id).await;
            if !proxy.has_acted() {
                assert!(is_done, "{cut:?} {mode:?}: refused by a service that lives");
            } else {
                kills += 1;
                pair.kill_and_restart().await;
            }
            for vm in pair.stack.list().await {
                let may_be_dead = cut == Cut::MeasuredBuild;
                assert!(
                    may_be_dead || vm.reason.is_empty(),
                    "{cut:?} {mode:?}: {vm:?}"
                );
                pair.stack.assert_clean(vm.vm_id).await;
                if vm.state == "runnable" {
                    pair.stack
                        .convert(vm.vm_id, 0, 8 * MIB, PRIVATE)
                        .await
                        .unwrap();
                    pair.stack.prefault(vm.vm_id, 0, 2 * MIB).await.unwrap();
                    pair.stack.assert_clean(vm.vm_id).await;
                }
                let destroyed = pair.stack.destroy(vm.vm_id).await;
                assert_eq!(destroyed.pages_leaked, 0, "{cut:?} {mode:?}");
            }
            pair.stack.assert_all_given_back().await;
        }
    }
    assert!(kills >= 16, "{kills} kills");
    drop(pair);
    proxy.stop();
}

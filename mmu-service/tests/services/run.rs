//! vCPUs that run through both services: RunVcpu.

use mirror_proto::mmu::run_op::Op;
use mirror_proto::mmu::run_result::Result as Outcome;
use mirror_proto::mmu::run_vcpu_response::Exit;
use mirror_proto::mmu::{self as wire, Mode};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::stack::{MIB, PAGE, Process, Stack, socket};

const SHARED: u64 = 1 << 47;

/// A stream of runs of one vCPU.
struct Runs {
    vm_id: u64,
    asks: mpsc::Sender<wire::RunVcpuRequest>,
    answers: Streaming<wire::RunVcpuResponse>,
}

impl Runs {
    async fn open(stack: &mut Stack, vm_id: u64) -> Self {
        let (asks, requests) = mpsc::channel(1);
        let answers = stack
            .client
            .run_vcpu(ReceiverStream::new(requests))
            .await
            .unwrap()
            .into_inner();
        Self {
            vm_id,
            asks,
            answers,
        }
    }

    async fn run(&mut self, ops: Vec<Op>) -> Result<wire::RunVcpuResponse, Status> {
        let ops = ops
            .into_iter()
            .map(|op| wire::RunOp { op: Some(op) })
            .collect();
        let request = wire::RunVcpuRequest {
            vm_id: self.vm_id,
            ops,
            ..Default::default()
        };
        self.asks.send(request).await.unwrap();
        Ok(self.answers.message().await?.unwrap())
    }
}

fn accept(gpa: u64) -> Op {
    Op::Accept(wire::RunAccept { gpa, level: 0 })
}

fn read(gpa: u64, length: u32) -> Op {
    Op::Read(wire::RunRead { gpa, length })
}

fn write(gpa: u64, data: &[u8]) -> Op {
    let data = data.to_vec();
    Op::Write(wire::RunWrite { gpa, data })
}

fn data(response: &wire::RunVcpuResponse, at: usize) -> &[u8] {
    match &response.results[at].result {
        Some(Outcome::Resumed(resumed)) => &resumed.data,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_guest_runs_through_both_services_in_both_modes() {
    let mut stack = Stack::start().await;
    for mode in [Mode::Kernel, Mode::Batched] {
        let vm_id = stack.running_vm(mode, 1, 8 * MIB).await;
        let mut runs = Runs::open(&mut stack, vm_id).await;
        let ops = vec![accept(0x3000), write(0x3004, b"secret"), read(0x3000, 12)];
        let ran = runs.run(ops).await.unwrap();
        assert_eq!(ran.exit, Some(Exit::Done(true)));
        assert_eq!(data(&ran, 2), b"\0\0\0\0secret\0\0");
        assert_eq!(ran.entries, 2, "one exit for the page that was not there");

        // MapGPA: user space converts, and the page that comes back is empty.
        let map_gpa = wire::RunMapGpa {
            gpa: SHARED | 0x3000,
            size: PAGE,
        };
        let ran = runs.run(vec![Op::MapGpa(map_gpa)]).await.unwrap();
        let Some(Exit::MapGpa(exit)) = ran.exit else {
            panic!("{ran:?}");
        };
        assert_eq!((exit.gpa, exit.pages, exit.private), (0x3000, 1, false));
        stack
            .convert(vm_id, exit.gpa, exit.pages * PAGE, 0)
            .await
            .unwrap();
        let ran = runs.run(vec![
            read(SHARED | 0x3000, 12),
            write(SHARED | 0x3000, b"x"),
        ]);
        let ran = ran.await.unwrap();
        assert_eq!(ran.exit, Some(Exit::Done(true)));
        assert_eq!(ran.results.len(), 3, "the call of before, and two accesses");
        assert_eq!(data(&ran, 1), [0; 12]);

        // A private access to what is shared now leaves with its record.
        let ran = runs.run(vec![read(0x3000, 1)]).await.unwrap();
        let Some(Exit::Failed(failure)) = &ran.exit else {
            panic!("{ran:?}");
        };
        let record = failure.memory_fault.unwrap();
        assert_eq!((failure.errno, record.gpa, record.flags), (14, 0x3000, 8));
        stack.assert_clean(vm_id).await;
    }
}

#[tokio::test]
async fn what_cannot_be_run_is_refused() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    let building = stack.vm(Mode::Batched, 1, 8 * MIB).await;
    for (case, vm_id, ops, code) in [
        ("no such VM", 99, vec![], Code::NotFound),
        ("not finalised", building, vec![], Code::FailedPrecondition),
        (
            "two pages",
            vm_id,
            vec![read(0xFFF, 2)],
            Code::InvalidArgument,
        ),
        (
            "unaligned",
            vm_id,
            vec![accept(0x10)],
            Code::InvalidArgument,
        ),
        (
            "too many",
            vm_id,
            vec![accept(0); 4097],
            Code::InvalidArgument,
        ),
    ] {
        let mut runs = Runs::open(&mut stack, vm_id).await;
        let refused = runs.run(ops).await.unwrap_err();
        assert_eq!(refused.code(), code, "{case}: {refused}");
    }
    let mut runs = Runs::open(&mut stack, vm_id).await;
    runs.run(vec![accept(0x1000)]).await.unwrap();
}

#[tokio::test]
async fn a_guest_whose_module_restarts_is_told_so() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    let mut runs = Runs::open(&mut stack, vm_id).await;
    runs.run(vec![accept(0x1000)]).await.unwrap();
    stack.module.take().unwrap().kill();
    stack.module = Some(Process::module(&socket(stack.dir.path(), "module")));
    // The run that meets the loss reports it, or is refused once the service knows.
    let lost = runs.run(vec![read(0x1000, 1)]).await;
    match lost {
        Ok(ran) => assert!(matches!(ran.exit, Some(Exit::Failed(_))), "{ran:?}"),
        Err(status) => assert_eq!(status.code(), Code::FailedPrecondition, "{status}"),
    }
}

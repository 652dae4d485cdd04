//! A table of requests that are refused: each with its code and its field, and with nothing
//! changed.

use mirror_proto::mmu::{self as wire, Mode};
use tonic::{Code, Status};

use crate::stack::{MIB, PAGE, Stack, field_of, reason_of};

/// The slot of the VM under test, in bytes.
pub(crate) const SIZE: u64 = 8 * MIB;

/// Everything that a refused request could have changed.
#[derive(Debug, PartialEq)]
struct State {
    vms: Vec<wire::VmInfo>,
    stats: wire::GetStatsResponse,
    module: mirror_proto::module::GetPlatformResponse,
}

pub(crate) struct Table {
    pub(crate) stack: Stack,
    pub(crate) vm: u64,
    state: State,
}

impl Table {
    /// A VM with one vCPU, finalised and with some pages when told so.
    pub(crate) async fn new(finalize: bool) -> Self {
        let mut stack = Stack::start().await;
        let vm = if finalize {
            let vm = stack.running_vm(Mode::Batched, 1, SIZE).await;
            stack.prefault(vm, 0, 16 * PAGE).await.unwrap();
            vm
        } else {
            stack.vm(Mode::Batched, 1, SIZE).await
        };
        let state = state(&mut stack).await;
        Self { stack, vm, state }
    }

    /// The same over an ordinary VM with two slots of user memory, the second with a dirty log, and
    /// some pages.
    pub(crate) async fn ordinary() -> Self {
        let mut stack = Stack::start().await;
        let vm = stack.ordinary(wire::CreateVmRequest::default()).await;
        for (slot_id, gpa, log_dirty) in [(0, 0, false), (1, 1 << 30, true)] {
            let slot = wire::Slot {
                slot_id,
                gpa,
                size: SIZE,
                userspace_addr: 0x7f00_0000_0000 + gpa,
                log_dirty,
                ..Default::default()
            };
            stack.set_slot(vm, slot).await.unwrap();
            stack.prefault(vm, gpa, 4 * PAGE).await.unwrap();
        }
        let state = state(&mut stack).await;
        Self { stack, vm, state }
    }

    /// A refusal with this code, which blames this field.
    pub(crate) async fn check(
        &mut self,
        case: &str,
        outcome: Result<(), Status>,
        code: Code,
        field: Option<&str>,
    ) {
        let status = outcome.expect_err(case);
        assert_eq!(status.code(), code, "{case}: {status}");
        assert_eq!(field_of(&status).as_deref(), field, "{case}: {status}");
        assert!(!reason_of(&status).1.is_empty(), "{case}: an errno");
        self.check_unchanged(case).await;
    }

    /// The last request has left no trace.
    pub(crate) async fn check_unchanged(&mut self, case: &str) {
        let now = state(&mut self.stack).await;
        assert_eq!(now, self.state, "{case} changed something");
    }
}

async fn state(stack: &mut Stack) -> State {
    let mut stats = stack.stats(0).await;
    // How often the handler was entered is no state.
    stats.counts = None;
    State {
        vms: stack.list().await,
        stats,
        module: stack.platform().await,
    }
}

/// `check!(table, "case", rpc, request, Code, field)` for unary RPCs.
macro_rules! check {
    ($table:ident, $case:expr, $rpc:ident, $request:expr, $code:ident, $field:expr) => {{
        let outcome = $table.stack.client.$rpc($request).await.map(drop);
        $table
            .check($case, outcome, tonic::Code::$code, $field)
            .await;
    }};
}

/// The same for RPCs that answer with a stream.
macro_rules! check_stream {
    ($table:ident, $case:expr, $rpc:ident, $request:expr, $code:ident, $field:expr) => {{
        let outcome = match $table.stack.client.$rpc($request).await {
            Ok(answers) => crate::stack::last(answers.into_inner()).await.map(drop),
            Err(status) => Err(status),
        };
        $table
            .check($case, outcome, tonic::Code::$code, $field)
            .await;
    }};
}

pub(crate) use {check, check_stream};

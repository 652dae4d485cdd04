//! The guest runs, or KVM_PRE_FAULT_MEMORY runs ahead of it.

use mirror_proto::mmu::{HostChange, PreFaultMemoryRequest, TouchMemoryRequest};

use super::{Context, Done};
use crate::compare::arguments::{self, argument};
use crate::compare::recording::Step;
use crate::compare::report::Difference;
use crate::compare::service::{RecordedVm, answered, call};
use crate::compare::stimuli;
use crate::error::Error;

/// Addresses in one TouchMemory: the limit of the wire.
const TOUCHES: u64 = 4096;
/// Addresses of one step that are touched.
const MAX_TOUCHED: u64 = 1 << 20;

/// The guest runs: its faults, and what it touched without one.
pub(super) async fn access(context: Context<'_>) -> Result<Done, Error> {
    let Context {
        vm,
        host,
        settings,
        step,
        ..
    } = context;
    let change = step
        .title
        .contains("DONTNEED")
        .then_some(HostChange::DropToZero);
    let effects = stimuli::play(vm, host, step, change).await?;
    let mut done = Done::default().with(effects);
    if settings.ages
        && let Err(reason) = touch(vm, step).await?
    {
        done.skip.get_or_insert(reason);
    }
    Ok(done)
}

/// Sets the accessed bits that the guest's accesses set. An address that faults has none.
async fn touch(vm: &RecordedVm, step: &Step) -> Result<Result<(), String>, Error> {
    let argument = |key| step.optional(&[key]);
    let (gpa, count, stride) = match (argument("gpa"), argument("count"), argument("stride")) {
        (Ok(gpa), Ok(count), Ok(stride)) => (gpa, count, stride),
        (Err(reason), ..) | (_, Err(reason), _) | (.., Err(reason)) => return Ok(Err(reason)),
    };
    let (Some(gpa), Some(count)) = (gpa, count) else {
        return Ok(Ok(()));
    };
    let stride = stride.unwrap_or(0);
    let op = step.field("op").map(str::to_ascii_uppercase);
    let write = op.unwrap_or_else(|| step.words()).contains("WRITE");
    let count = count.min(MAX_TOUCHED);
    let mut at = 0;
    while at < count {
        let part = TOUCHES.min(count - at);
        let message = TouchMemoryRequest {
            vm_id: vm.vm_id,
            gpa: gpa.wrapping_add(at.wrapping_mul(stride)),
            count: u32::try_from(part).unwrap_or(1),
            stride,
            write,
        };
        // Addresses that cannot be were no accesses either.
        let _ = call!(vm.client, "TouchMemory", touch_memory, message)?;
        at += part;
    }
    Ok(Ok(()))
}

pub(super) async fn pre_fault(context: Context<'_>) -> Result<Done, Error> {
    const CALL: &str = "PreFaultMemory";
    let Context { vm, step, .. } = context;
    let size = number!(step, "size", "len");
    let vcpu = readable!(step.optional(&["vcpu", "vcpu_id"])).unwrap_or(0);
    let vcpu_id = u32::try_from(vcpu).unwrap_or(u32::MAX);
    let message = PreFaultMemoryRequest {
        vm_id: vm.vm_id,
        vcpu_id,
        gpa: number!(step, "gpa"),
        size,
    };
    let mut stream = match call!(vm.client, "PreFaultMemory", pre_fault_memory, message)? {
        Ok(stream) => stream,
        Err(errno) => return Ok(Done::of::<()>(Err(errno))),
    };
    let mut last = None;
    loop {
        let next = vm.client.next(CALL, &mut stream).await;
        match answered(next)? {
            Ok(Some(answer)) => last = Some(answer),
            Ok(None) => break,
            Err(errno) => return Ok(Done::of::<()>(Err(errno))),
        }
    }
    let last = last
        .filter(|last| last.finished)
        .ok_or(Error::Truncated { call: CALL })?;
    let left = size.saturating_sub(last.done);
    let noted = step
        .note("PRE_FAULT")
        .and_then(|note| arguments::number(argument(note, "left_size")?));
    Ok(Done {
        difference: noted
            .filter(|noted| *noted != left)
            .map(|noted| Difference::new("left_size", format!("{noted:#x}"), format!("{left:#x}"))),
        ..Done::default()
    })
}

//! RunVcpu: KVM_RUN, once a message.

use std::sync::Arc;

use mirror_proto::InvalidField;
use mirror_proto::mmu::run_op::Op;
use mirror_proto::mmu::run_result::Result as Outcome;
use mirror_proto::mmu::run_vcpu_response::Exit;
use mirror_proto::mmu::{self as wire};
use tdp_mmu::{GuestOp, GuestStep, RunExit, RunReport, RunRequest, VmError};
use tdx_defs::{Gpa, Gpr, Gprs, GuestLeaf, Level};
use telemetry::KeyValue;
use telemetry::late::Untraced;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{Instrument as _, Span, info_span};

use super::stream::{Answers, send};
use super::traced;
use crate::convert::counts_to_wire;
use crate::link::GuestLine;
use crate::shell::Shell;
use crate::status;

/// Answers that wait for their reader.
const AHEAD: usize = 4;

/// Runs of one stream, one after the other.
pub(super) fn run_vcpu(
    shell: &Arc<Shell>,
    requests: Streaming<wire::RunVcpuRequest>,
) -> Answers<wire::RunVcpuResponse> {
    let (out, answers) = mpsc::channel(AHEAD);
    shell.spawn(serve(Arc::clone(shell), requests, out).in_current_span());
    ReceiverStream::new(answers)
}

pub(super) async fn serve(
    shell: Arc<Shell>,
    mut requests: Streaming<wire::RunVcpuRequest>,
    out: mpsc::Sender<Result<wire::RunVcpuResponse, Status>>,
) {
    let mut draining = shell.draining();
    let mut line = None;
    loop {
        let request = tokio::select! {
            biased;
            () = out.closed() => return,
            _ = draining.wait_for(|draining| *draining) => Err(status::draining()),
            message = requests.message() => match message {
                Ok(Some(request)) => Ok(request),
                Ok(None) | Err(_) => return,
            },
        };
        let answer = match request {
            Ok(request) => run(&shell, request, &mut line).await,
            Err(end) => Err(end),
        };
        let ends = answer.is_err();
        if !send(&out, answer, shell.limits.stall()).await || ends {
            return;
        }
    }
}

async fn run(
    shell: &Arc<Shell>,
    request: wire::RunVcpuRequest,
    line: &mut Option<GuestLine>,
) -> Result<wire::RunVcpuResponse, Status> {
    let wire::RunVcpuRequest {
        vm_id,
        vcpu_id,
        ops,
        answer,
    } = request;
    let ops = ops
        .into_iter()
        .enumerate()
        .map(|(at, op)| op_from_wire(op).map_err(|error| error.within(&format!("ops[{at}]"))))
        .collect::<Result<Vec<_>, _>>()
        .map_err(status::of_field)?;
    let entry = shell.live_vm(vm_id)?;
    // Inside a traced call every run is traced, as its caller asked.
    let traced = telemetry::current_trace_id().is_some() || shell.gate.admits(1);
    let (span, untraced) = if traced {
        let span = info_span!(
            "run_vcpu",
            kvm.vm = vm_id,
            kvm.vcpu = vcpu_id,
            ops = ops.len()
        );
        (span, None)
    } else {
        (Span::none(), Untraced::begin("run_vcpu", ""))
    };
    let mut mine = line
        .take()
        .filter(|line| line.leads_to(&entry.attachment))
        .unwrap_or_else(|| GuestLine::new(&shell.link, &entry.attachment));
    let outcome = shell
        .operate(&entry, span, move |vm| {
            let ran = vm.run_vcpu(vcpu_id, &mut mine, &RunRequest { ops, answer });
            Ok((ran, mine))
        })
        .await;
    let outcome = outcome.and_then(|(ran, mine)| {
        *line = Some(mine);
        ran.map_err(|error| status::of_vm(&error))
    });
    if let Some(untraced) = untraced {
        let attributes = vec![
            KeyValue::new("kvm.vm", vm_id.to_string()),
            KeyValue::new("kvm.vcpu", i64::from(vcpu_id)),
        ];
        traced::tell_run(untraced, &shell.gate, &outcome, attributes);
    }
    outcome.map(report_to_wire)
}

fn op_from_wire(op: wire::RunOp) -> Result<GuestOp, InvalidField> {
    let op = op.op.ok_or_else(|| InvalidField::new("op", "missing"))?;
    Ok(match op {
        Op::Read(read) => GuestOp::Read {
            gpa: Gpa::new(read.gpa),
            len: usize::try_from(read.length).unwrap_or(usize::MAX),
        },
        Op::Write(write) => GuestOp::Write {
            gpa: Gpa::new(write.gpa),
            data: write.data,
        },
        Op::Execute(gpa) => GuestOp::Execute { gpa: Gpa::new(gpa) },
        Op::Accept(accept) => {
            let level = match accept.level {
                0 | 1 => Level::L4K,
                2 => Level::L2M,
                other => {
                    let reason = format!("{other} is neither 1 (4 KiB) nor 2 (2 MiB)");
                    return Err(InvalidField::new("accept.level", reason));
                }
            };
            if accept.gpa % level.bytes() != 0 {
                let reason = format!("{:#x} is not aligned to its page", accept.gpa);
                return Err(InvalidField::new("accept.gpa", reason));
            }
            GuestOp::Accept {
                gpa: Gpa::new(accept.gpa),
                level: level.to_tdx(),
            }
        }
        Op::Tdcall(call) => GuestOp::Tdcall {
            leaf: u16::try_from(call.leaf).map_err(|_| {
                InvalidField::new("tdcall.leaf", format!("{} is above 65535", call.leaf))
            })?,
            version: u8::try_from(call.version).map_err(|_| {
                InvalidField::new("tdcall.version", format!("{} is above 255", call.version))
            })?,
            regs: regs_from_wire(&call.regs)?,
        },
        Op::MapGpa(map) => GuestOp::Tdcall {
            leaf: GuestLeaf::VP_VMCALL.0,
            version: 0,
            regs: map_gpa(map.gpa, map.size),
        },
    })
}

/// The registers of TDG.VP.VMCALL<MapGPA>: R10 to R15 are shown to the host.
fn map_gpa(gpa: u64, size: u64) -> Gprs {
    const SHOWN: u64 = 0xFC00;
    const MAP_GPA: u64 = 0x1_0001;
    Gprs::default()
        .with(Gpr::Rcx, SHOWN)
        .with(Gpr::R11, MAP_GPA)
        .with(Gpr::R12, gpa)
        .with(Gpr::R13, size)
}

fn regs_from_wire(given: &[u64]) -> Result<Gprs, InvalidField> {
    if given.len() > Gpr::ALL.len() {
        let reason = format!("{} registers, there are {}", given.len(), Gpr::ALL.len());
        return Err(InvalidField::new("tdcall.regs", reason));
    }
    let mut regs = Gprs::default();
    for (register, value) in Gpr::ALL.into_iter().zip(given) {
        regs[register] = *value;
    }
    Ok(regs)
}

fn regs_to_wire(regs: &Gprs) -> wire::RunRegs {
    wire::RunRegs {
        regs: Gpr::ALL
            .into_iter()
            .map(|register| regs[register])
            .collect(),
    }
}

fn step_to_wire(step: GuestStep) -> wire::RunResult {
    let result = match step {
        GuestStep::Resumed(resumed) => Outcome::Resumed(wire::RunResumed {
            regs: resumed.regs.as_ref().map(regs_to_wire),
            injected_vector: resumed.injected.map(Into::into),
            data: resumed.data,
        }),
        GuestStep::Exited(regs) => Outcome::TdExit(regs_to_wire(&regs)),
        GuestStep::Violated(violation) => Outcome::Violation(violation),
    };
    wire::RunResult {
        result: Some(result),
    }
}

fn failure(error: &VmError) -> wire::RunFailure {
    wire::RunFailure {
        errno: error.errno(),
        reason: error.to_string(),
        memory_fault: error.memory_fault().map(|record| wire::MemoryFaultExit {
            gpa: record.gpa,
            size: record.size,
            flags: record.flags,
        }),
    }
}

fn report_to_wire(report: RunReport) -> wire::RunVcpuResponse {
    let exit = match report.exit {
        RunExit::Done => Exit::Done(true),
        RunExit::MapGpa {
            gpa,
            pages,
            private,
        } => Exit::MapGpa(wire::MapGpaExit {
            gpa,
            pages,
            private,
        }),
        RunExit::Mmio { gpa, len, write } => Exit::Mmio(wire::MmioExit {
            gpa,
            length: len.into(),
            write,
        }),
        RunExit::Hlt => Exit::Hlt(true),
        RunExit::Interrupted => Exit::Interrupted(true),
        RunExit::Unknown { rax } => Exit::Unknown(rax),
        RunExit::Failed(error) => Exit::Failed(failure(&error)),
    };
    wire::RunVcpuResponse {
        results: report.done.into_iter().map(step_to_wire).collect(),
        exit: Some(exit),
        entries: report.entries,
        counts: Some(counts_to_wire(&report.counts)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_guest_cannot_do_is_refused_by_its_field() {
        let tdcall = |leaf, version, regs| {
            Some(Op::Tdcall(wire::RunTdcall {
                leaf,
                version,
                regs: vec![0; regs],
            }))
        };
        let accept = |gpa, level| Some(Op::Accept(wire::RunAccept { gpa, level }));
        for (op, field) in [
            (None, "op"),
            (tdcall(1 << 16, 0, 0), "tdcall.leaf"),
            (tdcall(0, 256, 0), "tdcall.version"),
            (tdcall(0, 0, 17), "tdcall.regs"),
            (accept(0, 3), "accept.level"),
            (accept(0x1001, 0), "accept.gpa"),
            (accept(0x1000, 2), "accept.gpa"),
        ] {
            assert_eq!(op_from_wire(wire::RunOp { op }).unwrap_err().field, field);
        }
    }
}

//! Guest events and their outcome, wire ⇄ core. What cannot be is refused before anything runs.

use mirror_proto::InvalidField;
use mirror_proto::module::guest_op::Op;
use mirror_proto::module::guest_result::Result as Outcome;
use mirror_proto::module::{self as wire, violation::Kind};
use tdx_defs::{Gpa, Gprs, GuestLeaf, PAGE_SIZE, TdxLevel};
use tdx_module::{GuestOp, GuestStep, MAX_ACCESS, Tdcall, Violation};

/// An event of the guest.
pub(super) fn op_from_wire(op: wire::GuestOp) -> Result<GuestOp, InvalidField> {
    let op = op.op.ok_or_else(|| InvalidField::new("op", "missing"))?;
    Ok(match op {
        Op::Read(read) => {
            let len = usize::try_from(read.length).unwrap_or(usize::MAX);
            GuestOp::Read {
                gpa: in_one_page(read.gpa, len, "read.length")?,
                len,
            }
        }
        Op::Write(write) => GuestOp::Write {
            gpa: in_one_page(write.gpa, write.data.len(), "write.data")?,
            data: write.data,
        },
        Op::Execute(execute) => GuestOp::Execute {
            gpa: Gpa::new(execute.gpa),
        },
        Op::Tdcall(call) => GuestOp::Tdcall(tdcall(call)?),
        Op::EptViolation(violation) => GuestOp::EptViolation {
            gpa: Gpa::new(violation.gpa),
            qualification: violation.qualification,
            same_rip: violation.same_rip,
        },
        Op::Hlt(_) => GuestOp::Hlt,
        Op::ExternalInterrupt(interrupt) => GuestOp::ExternalInterrupt {
            vector: u8::try_from(interrupt.vector).map_err(|_| {
                let reason = format!("{} is above 255", interrupt.vector);
                InvalidField::new("external_interrupt.vector", reason)
            })?,
        },
        Op::Accept(accept) => {
            let level = u8::try_from(accept.level)
                .ok()
                .and_then(|level| TdxLevel::new(level).ok());
            let level = level.filter(|level| level.get() <= 1).ok_or_else(|| {
                let reason = format!("{} is neither 0 (4 KiB) nor 1 (2 MiB)", accept.level);
                InvalidField::new("accept.level", reason)
            })?;
            if accept.gpa % PAGE_SIZE != 0 {
                let reason = format!("{:#x} is not page aligned", accept.gpa);
                return Err(InvalidField::new("accept.gpa", reason));
            }
            GuestOp::accept(Gpa::new(accept.gpa), level)
        }
        Op::MapGpa(map) => GuestOp::map_gpa(Gpa::new(map.gpa), map.size),
    })
}

/// The first byte of an access that lies in one page.
fn in_one_page(gpa: u64, len: usize, field: &str) -> Result<Gpa, InvalidField> {
    let offset = usize::try_from(gpa % PAGE_SIZE).unwrap_or(MAX_ACCESS);
    if len == 0 || len > MAX_ACCESS - offset {
        let reason = format!("{len} bytes at {gpa:#x} are none or do not lie in one 4 KiB page");
        return Err(InvalidField::new(field, reason));
    }
    Ok(Gpa::new(gpa))
}

fn tdcall(call: wire::Tdcall) -> Result<Tdcall, InvalidField> {
    let leaf = u16::try_from(call.leaf)
        .map_err(|_| InvalidField::new("tdcall.leaf", format!("{} is above 65535", call.leaf)))?;
    let version = u8::try_from(call.version).map_err(|_| {
        InvalidField::new("tdcall.version", format!("{} is above 255", call.version))
    })?;
    Ok(Tdcall {
        leaf: GuestLeaf(leaf),
        version,
        regs: call.regs.map(Gprs::from).unwrap_or_default(),
    })
}

/// What came of an event; nothing for one that did not happen.
pub(super) fn step_to_wire(step: GuestStep) -> Option<wire::GuestResult> {
    let result = match step {
        GuestStep::Resumed(resumed) => Outcome::Resumed(wire::Resumed {
            regs: resumed.regs.map(Into::into),
            injected_vector: resumed.injected.map(|vector| vector.0.into()),
            data: resumed.data,
        }),
        GuestStep::Exited(exit) => Outcome::TdExit(wire::TdExit {
            regs: Some(exit.regs.into()),
            violation: exit.violation.map(violation_to_wire),
        }),
        GuestStep::Violated(violation) => Outcome::Violated(violation_to_wire(violation)),
        // The vCPU was made to leave by somebody else: a reset of the module.
        GuestStep::Impossible(_) => return None,
    };
    Some(wire::GuestResult {
        result: Some(result),
    })
}

fn violation_to_wire(violation: Violation) -> wire::Violation {
    let message = violation.to_string();
    let (kind, gpa, page) = match violation {
        Violation::StaleTranslation { gpa, page } => (Kind::StaleTranslation, gpa, page),
        Violation::MachineCheck { gpa, page } => (Kind::MachineCheck, gpa, page),
    };
    wire::Violation {
        kind: kind.into(),
        gpa: gpa.get(),
        hpa: page.get(),
        message,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_cannot_be_are_refused_by_their_field() {
        for (op, field) in [
            (None, "op"),
            (
                Some(Op::Read(wire::GuestRead {
                    gpa: 0xFFF,
                    length: 2,
                })),
                "read.length",
            ),
            (
                Some(Op::Read(wire::GuestRead { gpa: 0, length: 0 })),
                "read.length",
            ),
            (
                Some(Op::Write(wire::GuestWrite {
                    gpa: 8,
                    data: vec![0; 4089],
                })),
                "write.data",
            ),
            (
                Some(Op::Tdcall(wire::Tdcall {
                    leaf: 1 << 16,
                    ..Default::default()
                })),
                "tdcall.leaf",
            ),
            (
                Some(Op::Tdcall(wire::Tdcall {
                    version: 256,
                    ..Default::default()
                })),
                "tdcall.version",
            ),
            (
                Some(Op::ExternalInterrupt(wire::ExternalInterrupt {
                    vector: 256,
                })),
                "external_interrupt.vector",
            ),
            (
                Some(Op::Accept(wire::GuestAccept { gpa: 0, level: 2 })),
                "accept.level",
            ),
            (
                Some(Op::Accept(wire::GuestAccept { gpa: 7, level: 0 })),
                "accept.gpa",
            ),
        ] {
            let error = op_from_wire(wire::GuestOp { op }).unwrap_err();
            assert_eq!(error.field, field);
        }
    }

    #[test]
    fn an_access_may_fill_its_page() {
        let op = Some(Op::Read(wire::GuestRead {
            gpa: 0x1000,
            length: 4096,
        }));
        let read = op_from_wire(wire::GuestOp { op }).unwrap();
        assert!(matches!(read, GuestOp::Read { len: 4096, .. }));
    }
}

//! One event on the processor that is inside: which function of the module handles it.
//!
//! Source: TDX module source, tdx_td_dispatcher.c; td_exit.c for the registers of a TD exit.

use tdx_defs::{CompletionStatus as Status, Gpa, Gpr, Gprs, GuestLeaf, OperandId};

use super::ops::{GuestOp, Tdcall};
use super::processor::Inside;
use super::step::{GuestStep, Resumed, TdExit, Vector, Violation};
use super::tlb::Tlb;
use super::vcpu_state::{LastExit, VeInfo};
use crate::Module;

/// Exit reason of an external interrupt.
const EXTERNAL_INTERRUPT: u64 = 1;
/// Exit reason of a system management interrupt, the way in which a machine check arrives.
const OTHER_SMI: u32 = 6;
/// Exit reason of HLT.
const HLT: u32 = 12;
/// Interruption information: valid, type external interrupt.
const INTERRUPT_VALID: u64 = 1 << 31;

/// A TD exit that is about to happen.
#[derive(Debug)]
pub(super) struct Leaving {
    pub(super) exit: TdExit,
    pub(super) last_exit: LastExit,
    /// The TD's memory cannot be used any more.
    pub(super) is_lost: bool,
}

/// An exit travels as an error, which should be small.
pub(super) type Leave = Box<Leaving>;

impl Leaving {
    /// An exit with registers.
    pub(super) fn with(regs: Gprs, last_exit: LastExit) -> Leave {
        Box::new(Self {
            exit: TdExit {
                regs,
                violation: None,
            },
            last_exit,
            is_lost: false,
        })
    }
}

/// Outcome of an event: a step, or a TD exit.
pub(super) type Event = Result<GuestStep, Leave>;

/// A processor that is inside.
pub(super) struct Cpu<'p> {
    pub(super) module: &'p Module,
    pub(super) inside: &'p Inside,
    pub(super) tlb: &'p mut Tlb,
}

impl<'p> Cpu<'p> {
    pub(super) fn new(module: &'p Module, inside: &'p Inside, tlb: &'p mut Tlb) -> Self {
        Self {
            module,
            inside,
            tlb,
        }
    }

    /// Handles an event.
    pub(super) fn run(&mut self, op: &GuestOp) -> Event {
        match op {
            GuestOp::Read { gpa, len } => self.read(*gpa, *len),
            GuestOp::Write { gpa, data } => self.write(*gpa, data),
            GuestOp::Execute { gpa } => self.execute(*gpa),
            GuestOp::Tdcall(call) => {
                self.step_forward();
                self.tdcall(call)
            }
            GuestOp::EptViolation {
                gpa,
                qualification,
                same_rip,
            } => {
                if !same_rip {
                    self.step_forward();
                }
                self.ept_violation(*gpa, *qualification)
            }
            GuestOp::Hlt => {
                self.step_forward();
                Ok(self.inject_ve(HLT, 0, Gpa::new(0)))
            }
            GuestOp::ExternalInterrupt { vector } => Err(Self::interrupt(*vector)),
        }
    }

    /// The guest made a step.
    pub(super) fn step_forward(&self) {
        let mut state = self.inside.vcpu.guest();
        state.zero_step.step_forward();
        state.faulted = None;
    }

    fn tdcall(&mut self, call: &Tdcall) -> Event {
        let mut regs = call.regs;
        // TDG.VP.VEINFO.GET alone has a version above 0 among the leaves that exist here, and the
        // base release does not have that one.
        let outcome = if call.version > 0 {
            Err(Status::OPERAND_INVALID.with(OperandId::RAX))
        } else {
            match call.leaf {
                GuestLeaf::VP_VMCALL => return self.vmcall(regs),
                GuestLeaf::VP_INFO => self.vp_info(&mut regs),
                GuestLeaf::VP_VEINFO_GET => self.veinfo_get(&mut regs),
                GuestLeaf::MR_RTMR_EXTEND => match self.rtmr_extend(&regs)? {
                    Access::Done(outcome) => outcome,
                    Access::Instead(step) => return Ok(step),
                },
                GuestLeaf::MEM_PAGE_ACCEPT => self.page_accept(regs[Gpr::Rcx])?,
                GuestLeaf::MEM_PAGE_ATTR_RD => self.attributes_read(&mut regs)?,
                GuestLeaf::MEM_PAGE_ATTR_WR => self.attributes_write(&mut regs)?,
                // Model: reports, metadata, L2 VMs and service TDs are answered like numbers
                // without a leaf.
                _ => Err(Status::OPERAND_INVALID.with(OperandId::RAX)),
            }
        };
        regs[Gpr::Rax] = outcome.err().unwrap_or(Status::SUCCESS).0;
        Ok(GuestStep::Resumed(Resumed {
            regs: Some(regs),
            ..Resumed::default()
        }))
    }

    /// Injects #VE, or #DF while the guest has not fetched the information of an earlier #VE.
    pub(super) fn inject_ve(&self, reason: u32, qualification: u64, gpa: Gpa) -> GuestStep {
        let mut state = self.inside.vcpu.guest();
        if state.ve_info.is_some() {
            return Self::inject(Vector::DF);
        }
        state.ve_info = Some(VeInfo {
            reason,
            qualification,
            gla: gpa.get(),
            gpa: gpa.get(),
            instruction: 0,
        });
        Self::inject(Vector::VE)
    }

    /// Injects an exception.
    pub(super) fn inject(vector: Vector) -> GuestStep {
        GuestStep::Resumed(Resumed {
            injected: Some(vector),
            ..Resumed::default()
        })
    }

    /// The exit of an external interrupt.
    pub(super) fn interrupt(vector: u8) -> Leave {
        Leaving::with(interrupt_exit(vector), LastExit::AsyncFault)
    }

    /// A violation that costs the TD its life.
    ///
    /// Model: on hardware the machine check arrives as a system management interrupt, and which
    /// access caused it cannot always be told.
    pub(super) fn machine_check(&self, violation: Violation) -> Leave {
        self.module.violations.count(violation);
        self.inside.td.set_fatal();
        let status = Status::NON_RECOVERABLE_TD_NON_ACCESSIBLE.with_details(OTHER_SMI);
        Box::new(Leaving {
            exit: TdExit {
                regs: Gprs::default().with(Gpr::Rax, status.0),
                violation: Some(violation),
            },
            last_exit: LastExit::AsyncFault,
            is_lost: true,
        })
    }
}

/// The registers of the exit of an external interrupt.
pub(crate) fn interrupt_exit(vector: u8) -> Gprs {
    Gprs::default()
        .with(Gpr::Rax, EXTERNAL_INTERRUPT)
        .with(Gpr::R9, INTERRUPT_VALID | u64::from(vector))
}

/// How a TDCALL that touches guest memory ends.
pub(super) enum Access {
    /// With a completion status.
    Done(Result<(), Status>),
    /// With something else than a completion: an exception, or a violation.
    Instead(GuestStep),
}

//! What happens inside a TD: a vCPU between TDH.VP.ENTER and its TD exit.
//!
//! Source: TDX module source, tdx_td_dispatcher.c, td_exit.c; sections on guest-side functions and
//! EPT violations of the module's ABI.
//!
//! There is no guest code here. Whoever plays the guest enters a vCPU with
//! [`Module::enter_vcpu`] and hands over one event at a time with [`Module::guest`]: memory
//! accesses, TDCALLs, interrupts. Each either resumes the guest or makes a TD exit. From entry to
//! exit the vCPU *is* inside: its TDR and TDVPR are locked shared, its epoch is counted, and every
//! host call sees that.
//!
//! | file | content |
//! |---|---|
//! | `ops`, `step` | events and their outcome, as values |
//! | `cpu` | one event on the processor that is inside |
//! | `access` | memory accesses through the processor's TLB |
//! | `tlb` | cached translations |
//! | `violation` | EPT violations: #VE, TD exit, exit qualification |
//! | `page_accept`, `page_attributes`, `rtmr_extend`, `vmcall`, `info` | TDCALL leaves |
//! | `processor` | what a logical processor keeps between events; the TD exit |
//! | `vcpu_state`, `zero_step` | what a vCPU keeps; the zero-step defence |

mod access;
mod cpu;
mod info;
mod ops;
mod page_accept;
mod page_attributes;
mod processor;
mod rtmr_extend;
mod step;
mod tlb;
mod vcpu_state;
mod violation;
mod vmcall;
mod zero_step;

use tdx_defs::{Gprs, Hpa, Seamcall, SeamcallResult};

use crate::dispatch;
use crate::{LpId, Module};

pub use access::MAX_ACCESS;
pub use ops::{AccessKind, GuestOp, Tdcall};
pub use step::{GuestError, GuestStep, Resumed, TdExit, Vector, Violation, Violations};
pub use tlb::Translation;

pub(crate) use cpu::interrupt_exit;
pub(crate) use processor::{Inside, Processors};
pub(crate) use step::ViolationCounters;
pub(crate) use vcpu_state::{GuestState, LastExit};
pub(crate) use violation::EPT_VIOLATION;

/// Outcome of TDH.VP.ENTER for a host that brings a guest along.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// The vCPU runs on the logical processor until a [`GuestStep::Exited`].
    Entered {
        /// The guest's registers after the TDG.VP.VMCALL that it left with, filled with what the
        /// host passed; absent after any other kind of exit and on the first entry.
        vmcall: Option<Gprs>,
    },
    /// The guest was not entered; the registers as TDH.VP.ENTER returns them.
    Refused(SeamcallResult),
}

impl Module {
    /// TDH.VP.ENTER on a logical processor, for a host that plays the guest with
    /// [`Module::guest`]. `call` is the SEAMCALL with its registers; its leaf and repeat are not
    /// looked at.
    ///
    /// Model: a processor that is inside a TD cannot make a SEAMCALL on hardware. Here it is
    /// answered `TDX_OPERAND_BUSY` + TDVPR.
    pub fn enter_vcpu(&self, lp: LpId, call: &Seamcall) -> Entry {
        dispatch::enter_vcpu(self, lp, call)
    }

    /// The next event of the guest that runs on a logical processor.
    pub fn guest(&self, lp: LpId, op: &GuestOp) -> GuestStep {
        let Some(mut processor) = self.processors.lock(lp) else {
            return GuestStep::Impossible(GuestError::NotInside { lp });
        };
        processor.step(self, lp, op)
    }

    /// The TDR and TDVPR of the vCPU that runs on a logical processor.
    pub fn vcpu_inside(&self, lp: LpId) -> Option<(Hpa, Hpa)> {
        self.processors.lock(lp)?.inside()
    }

    /// The logical processors that are inside a TD: those to interrupt after TDH.MEM.TRACK.
    pub fn processors_inside(&self, tdr: Hpa) -> Vec<LpId> {
        self.processors
            .all()
            .filter(|lp| self.vcpu_inside(*lp).is_some_and(|(td, _)| td == tdr))
            .collect()
    }

    /// Integrity violations that guests ran into so far.
    pub fn violations(&self) -> Violations {
        self.violations.read()
    }

    /// What a logical processor's TLB holds. Translations of a TD that is not inside are flushed
    /// before they can be used again, if they have to be.
    pub fn inspect_tlb(&self, lp: LpId) -> Vec<Translation> {
        self.processors
            .lock(lp)
            .map(|processor| processor.translations())
            .unwrap_or_default()
    }
}

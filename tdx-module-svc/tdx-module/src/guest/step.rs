//! Outcomes of guest events, as values.

use std::sync::atomic::{AtomicU64, Ordering};

use tdx_defs::{CompletionStatus, Gpa, Gpr, Gprs, Hpa};

use crate::LpId;

/// Vector of an exception that the module injects.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Vector(pub u8);

impl Vector {
    /// Double fault: a second #VE before the first one was fetched.
    pub const DF: Self = Self(8);
    /// Page fault.
    pub const PF: Self = Self(14);
    /// Virtualisation exception.
    pub const VE: Self = Self(20);
}

/// What memory encryption's integrity, or the TLB, would have let through or caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// The processor still holds a translation to a page that the Secure EPT no longer maps there:
    /// a TLB flush is missing. The access was not carried out, and the vCPU stays inside.
    #[error("stale translation of {gpa} to {page}: the page was taken away without a TLB flush")]
    StaleTranslation {
        /// The address.
        gpa: Gpa,
        /// The page that the translation names.
        page: Hpa,
    },
    /// The host wrote to the private page behind the address. The read is a machine check: the TD
    /// is fatal.
    #[error("machine check at {gpa}: the host wrote to the private page {page}")]
    MachineCheck {
        /// The address.
        gpa: Gpa,
        /// The page.
        page: Hpa,
    },
}

/// The guest goes on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resumed {
    /// The guest's registers after a TDCALL, RAX with its completion status.
    pub regs: Option<Gprs>,
    /// The exception that the module injected.
    pub injected: Option<Vector>,
    /// What a read returned.
    pub data: Vec<u8>,
}

impl Resumed {
    /// The completion status of a TDCALL.
    pub fn status(&self) -> Option<CompletionStatus> {
        self.regs.map(|regs| CompletionStatus(regs[Gpr::Rax]))
    }
}

/// TDH.VP.ENTER returned to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TdExit {
    /// The host's registers: RAX with status and exit reason, the others as the exit defines.
    pub regs: Gprs,
    /// What made the TD fatal, if that was the cause.
    pub violation: Option<Violation>,
}

impl TdExit {
    /// RAX: the completion status, with the exit reason in bits 31:0.
    pub fn status(&self) -> CompletionStatus {
        CompletionStatus(self.regs[Gpr::Rax])
    }

    /// The architectural exit reason in bits 15:0 of RAX.
    pub fn reason(&self) -> u16 {
        (self.regs[Gpr::Rax] & 0xFFFF) as u16
    }
}

/// An event that cannot be.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// No vCPU runs there.
    #[error("no vcpu runs on logical processor {}", lp.0)]
    NotInside {
        /// The logical processor.
        lp: LpId,
    },
    /// The access is empty, longer than [`super::MAX_ACCESS`], or crosses a 4 KiB boundary.
    #[error("an access of {len} bytes at {gpa} is empty or does not lie in one 4 KiB page")]
    AccessAcrossPages {
        /// First byte.
        gpa: Gpa,
        /// Number of bytes.
        len: usize,
    },
}

/// Outcome of one guest event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestStep {
    /// The guest goes on.
    Resumed(Resumed),
    /// A TD exit: the vCPU is no longer inside.
    Exited(TdExit),
    /// The access would have broken the isolation that TLB tracking promises. It was not carried
    /// out; the vCPU stays inside.
    Violated(Violation),
    /// The event cannot be; nothing changed.
    Impossible(GuestError),
}

/// Number of violations since the module started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Violations {
    /// [`Violation::StaleTranslation`].
    pub stale_translations: u64,
    /// [`Violation::MachineCheck`].
    pub machine_checks: u64,
}

#[derive(Debug, Default)]
pub(crate) struct ViolationCounters {
    stale: AtomicU64,
    machine_checks: AtomicU64,
}

impl ViolationCounters {
    pub(super) fn count(&self, violation: Violation) {
        let counter = match violation {
            Violation::StaleTranslation { .. } => &self.stale,
            Violation::MachineCheck { .. } => &self.machine_checks,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn read(&self) -> Violations {
        Violations {
            stale_translations: self.stale.load(Ordering::Relaxed),
            machine_checks: self.machine_checks.load(Ordering::Relaxed),
        }
    }
}

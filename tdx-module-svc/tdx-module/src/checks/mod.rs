//! Check sequences that leaves share. Each fails with the status of its first failing check.
//!
//! Source: TDX module source, helpers.c and sept_manager.c. The names in capitals (PAGE, TDR, STATE,
//! GPA-VALID, WALK, TRACK …) are used by all leaves.

mod entry;
mod l2;
mod page;
mod td;

use tdx_defs::{ALL_ONES_HPA, CompletionStatus as Status, OperandId};

use crate::dispatch::Fail;
use crate::memory::Integrity;
use crate::sept::SeptEntry;
use crate::td::Td;

pub(crate) use entry::{HeldEntry, SeptOperand, Tree};
pub(crate) use l2::{L2_VMS, L2Tables, l2_fail, l2_operand};
pub(crate) use page::{FreePages, SamePages, Taken};
pub(crate) use td::{LockedTd, OpStateLock, Running};

/// Something that the model's invariants rule out. Answered as a fatal TD, the module's own way
/// out of an inconsistency, rather than by a panic.
pub(crate) fn inconsistent() -> Fail {
    Status::TD_FATAL.into()
}

/// The TD is lost when its memory turns out to be spoilt.
///
/// Model: on hardware a machine check inside the module stops the processor for good. Here only the
/// TD is lost.
pub(crate) fn check_integrity(td: &Td, integrity: Integrity) -> Result<(), Fail> {
    match integrity {
        Integrity::Good => Ok(()),
        Integrity::Poisoned => {
            td.set_fatal();
            Err(Status::TD_FATAL.into())
        }
    }
}

/// `TDX_OPERAND_INVALID` with an operand.
pub(crate) fn invalid(operand: OperandId) -> Fail {
    Status::OPERAND_INVALID.with(operand).into()
}

/// `TDX_OPERAND_BUSY` with an operand.
pub(crate) fn busy(operand: OperandId) -> Fail {
    Status::OPERAND_BUSY.with(operand).into()
}

/// A status that comes with the description of a Secure EPT entry.
pub(crate) fn with_details(status: Status, entry: SeptEntry, level: u8) -> Fail {
    Fail {
        status,
        details: Some(details(entry, level)),
    }
}

/// RCX and RDX as they describe a Secure EPT entry.
pub(crate) fn details(entry: SeptEntry, level: u8) -> [u64; 2] {
    [
        entry.architectural(),
        u64::from(level) | u64::from(entry.state().public().0) << 8,
    ]
}

/// A page operand that may be left out.
pub(crate) fn optional_page(hpa: u64) -> Option<u64> {
    (hpa != ALL_ONES_HPA).then_some(hpa)
}

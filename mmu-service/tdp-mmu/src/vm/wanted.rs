//! What a fault asks for, and how that ended.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_handle_ept_violation()`; arch/x86/kvm/mmu/mmu_internal.h,
//! `struct kvm_page_fault`.

use tdx_defs::{Gfn, Gpa, Level, Pfn, Visibility};

use super::{Fault, RetPf, Vm};
use crate::bugs::Check;
use crate::error::VmError;
use crate::mmu::spte::Access;

/// Exit qualification: the access was a write.
const WRITE: u64 = 1 << 1;
/// Exit qualification: the access was an instruction fetch.
const FETCH: u64 = 1 << 2;
/// Exit qualification: what the entry allowed; not zero when it was present.
const ALLOWED: u64 = 7 << 3;
/// Exit qualification: what the entry allowed, fetches in user mode included.
const ALLOWED_ANY: u64 = 0xF << 3;
/// Type of the extended exit qualification, and the one of a page that is pending.
const EXTENDED_TYPE: u64 = 0xF;
const EXTENDED_PENDING: u64 = 6;

/// An access to resolve.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    /// Its place in the caller's list.
    pub(super) index: usize,
    pub(super) gfn: Gfn,
    pub(super) visibility: Visibility,
    pub(super) access: Access,
    /// The faulting entry was present (qualification bits 5:3).
    pub(super) present: bool,
    /// Ahead of any access: KVM_PRE_FAULT_MEMORY.
    pub(super) prefetch: bool,
}

/// How an access ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) index: usize,
    pub(super) gfn: Gfn,
    pub(super) result: Result<RetPf, VmError>,
    pub(super) pfn: Option<Pfn>,
}

impl Vm {
    /// What a fault asks for. Fetching from shared memory is a bug of the guest that ends it (B34).
    pub(super) fn wanted(&self, index: usize, fault: Fault) -> Result<Wanted, VmError> {
        let layout = self.mmu.layout;
        if fault.gpa >> layout.width() != 0 {
            return Err(VmError::invalid(
                "gpa",
                format!(
                    "{:#x} is above the guest's {}-bit width",
                    fault.gpa,
                    layout.width()
                ),
            ));
        }
        let (gfn, visibility) = layout.split(Gpa::new(fault.gpa));
        let wanted = Wanted {
            index,
            gfn,
            visibility,
            access: Access {
                write: true,
                exec: false,
            },
            present: false,
            prefetch: false,
        };
        if visibility == Visibility::Private {
            if fault.extended & EXTENDED_TYPE == EXTENDED_PENDING
                && fault.qualification & ALLOWED_ANY == 0
            {
                self.mmu.bugs.kill(Check::PendingAccess, || {
                    format!("the guest touched {gfn} before it accepted the page")
                });
                self.alive()?;
            }
            // The real qualification is replaced by "write".
            return Ok(wanted);
        }
        if fault.qualification & FETCH != 0 {
            self.mmu.bugs.bug(Check::B34, || {
                format!("instruction fetch from shared {gfn}")
            });
            self.alive()?;
        }
        let access = Access {
            write: fault.qualification & WRITE != 0,
            exec: false,
        };
        Ok(Wanted {
            access,
            present: fault.qualification & ALLOWED != 0,
            ..wanted
        })
    }

    /// Level of what a fault maps.
    pub(super) fn level_of(ret_pf: RetPf) -> Option<Level> {
        matches!(ret_pf, RetPf::Fixed | RetPf::Spurious).then_some(Level::L4K)
    }
}

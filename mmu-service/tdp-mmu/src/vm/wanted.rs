//! What a fault asks for, and how that ended.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_handle_ept_violation()`; arch/x86/kvm/mmu/mmu_internal.h,
//! `struct kvm_page_fault`.

use std::num::NonZeroU64;

use tdx_defs::{Gfn, Gpa, Level, PAGE_SIZE, Pfn, Visibility};

use super::{Fault, RetPf, Vm};
use crate::bugs::Check;
use crate::error::VmError;
use crate::mmu::spte::{self, Access};
use crate::trace::{Event, error_code};

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
/// Exit qualification: the address came from a walk of the guest's tables.
const GVA_VALID: u64 = 1 << 7;
/// Exit qualification: it is what that walk ended with.
const GVA_TRANSLATED: u64 = 1 << 8;

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
    /// Where in the guest's own walk the access was.
    pub(super) guest_walk: GuestWalk,
    /// Bytes into the page.
    pub(super) offset: u16,
}

/// Where in the guest's own walk an access was, if the processor said so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum GuestWalk {
    Unknown,
    Inside,
    Final,
}

impl Wanted {
    /// KVM's error code (PFERR_*) of an access that is not private.
    pub(super) fn error_code(&self) -> u64 {
        let mut code = 0;
        for (set, bit) in [
            (self.present, error_code::PRESENT),
            (self.access.write, error_code::WRITE),
            (!self.access.write && !self.access.exec, error_code::USER),
            (self.access.exec, error_code::FETCH),
            (self.guest_walk == GuestWalk::Final, error_code::GUEST_FINAL),
            (self.guest_walk == GuestWalk::Inside, error_code::GUEST_PAGE),
        ] {
            code |= if set { bit } else { 0 };
        }
        code
    }
}

/// How an access ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Ended {
    pub(super) index: usize,
    pub(super) gfn: Gfn,
    pub(super) result: Result<RetPf, VmError>,
    /// How the frame is mapped, if that is known.
    pub(super) at: Option<Mapping>,
}

impl Ended {
    /// Level of the mapping.
    pub(super) fn level(&self) -> Level {
        self.at.map_or(Level::L4K, Mapping::level)
    }
}

/// Page and level of a mapping in one word, because batches keep one for each fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mapping(NonZeroU64);

impl Mapping {
    pub(super) fn new(page: Pfn, level: Level) -> Self {
        // A level is never zero.
        let word = page.get() << 3 | u64::from(level.get());
        Self(NonZeroU64::new(word).unwrap_or(NonZeroU64::MIN))
    }

    /// Of a 4 KiB leaf.
    pub(super) fn small(leaf: u64) -> Self {
        Self::new(spte::pfn(leaf), Level::L4K)
    }

    /// The page of the faulting frame.
    pub(super) fn pfn(self) -> Pfn {
        Pfn::new(self.0.get() >> 3)
    }

    fn level(self) -> Level {
        Level::new((self.0.get() & 7) as u8).unwrap_or(Level::L4K)
    }
}

impl Vm {
    /// The tracepoint kvm_page_fault.
    pub(super) fn trace_fault(&self, vcpu_id: u32, fault: Fault, wanted: &Wanted) {
        self.mmu.tracer.emit(|| Event::PageFault {
            vcpu: vcpu_id,
            // Protected guests do not show it; ordinary ones are not asked.
            rip: 0,
            address: fault.gpa,
            error_code: match wanted.visibility {
                Visibility::Private => WRITE,
                Visibility::Shared => fault.qualification,
            },
        });
    }

    /// What a fault asks for. A TD that fetches from shared memory has a bug that ends it (B34).
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
            guest_walk: GuestWalk::Unknown,
            offset: (fault.gpa & (PAGE_SIZE - 1)) as u16,
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
        let exec = fault.qualification & FETCH != 0;
        if exec && self.is_td() {
            self.mmu.bugs.bug(Check::B34, || {
                format!("instruction fetch from shared {gfn}")
            });
            self.alive()?;
        }
        let access = Access {
            write: fault.qualification & WRITE != 0,
            exec,
        };
        let guest_walk = match fault.qualification {
            bits if bits & GVA_VALID == 0 => GuestWalk::Unknown,
            bits if bits & GVA_TRANSLATED == 0 => GuestWalk::Inside,
            _ => GuestWalk::Final,
        };
        Ok(Wanted {
            access,
            present: fault.qualification & ALLOWED != 0,
            guest_walk,
            ..wanted
        })
    }
}

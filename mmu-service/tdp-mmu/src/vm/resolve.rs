//! From a faulting frame to the page behind it, and whether that still holds.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `kvm_mmu_faultin_pfn()`, `kvm_mmu_faultin_pfn_gmem()`,
//! `kvm_handle_noslot_fault()`, `is_page_fault_stale()`. The checks run in that order; the first
//! that decides is the answer.

use std::sync::Arc;

use tdx_defs::{Gfn, PAGE_SIZE, Pfn, Visibility};

use super::wanted::Wanted;
use super::{RetPf, Vm};
use crate::bugs::Check;
use crate::error::{MemoryFault, VmError, errno};
use crate::memory::backing::NoPage;
use crate::memory::slots::{Lookups, Slot};
use crate::memory::user::NoHostPage;
use crate::sync::lock;
use crate::tdx::lifecycle::out_of_memory;

/// KVM_MEMORY_EXIT_FLAG_PRIVATE.
const EXIT_PRIVATE: u64 = 8;

/// What is behind a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Page {
    pub(super) pfn: Pfn,
    pub(super) map_writable: bool,
}

/// A frame looked up.
pub(super) struct Resolved {
    /// None: no slot, MMIO.
    pub(super) page: Option<Page>,
    /// The slot that covers it, for shared memory.
    pub(super) slot: Option<Arc<Slot>>,
    /// mmu_invalidate_seq before the look-up.
    pub(super) seq: u64,
    /// Generation of slots before the look-up: an MMIO entry must not be younger than the slots
    /// that had nothing to say.
    pub(super) generation: u32,
}

/// The answer without a walk.
pub(super) enum Early {
    Ret(RetPf),
    /// The slot is on its way out: back to the vCPU loop.
    SlotGoing,
    /// The host has to copy the page first.
    CopyOnWrite(Arc<Slot>),
    Error(VmError),
}

impl From<VmError> for Early {
    fn from(error: VmError) -> Self {
        Self::Error(error)
    }
}

impl Vm {
    /// KVM_MEMORY_ATTRIBUTE_PRIVATE of a frame.
    pub(super) fn is_private(&self, slot: Option<&Slot>, gfn: Gfn) -> bool {
        match slot {
            Some(slot) => slot.is_private(gfn),
            None => lock(&self.private).contains(gfn),
        }
    }

    pub(super) fn resolve(
        &self,
        slots: &mut Lookups<'_>,
        wanted: &Wanted,
    ) -> Result<Resolved, Early> {
        let Wanted {
            gfn,
            visibility,
            prefetch,
            ..
        } = *wanted;
        let wants_private = visibility == Visibility::Private;
        if self.mmu.layout.is_alias(gfn) {
            self.mmu
                .bugs
                .bug(Check::B24, || format!("{gfn} carries the SHARED bit"));
            return Err(self
                .memory_fault(gfn, visibility, errno::EFAULT, "SHARED bit")
                .into());
        }
        let seq = self.invalidation.seq();
        let generation = match visibility {
            Visibility::Private => 0,
            Visibility::Shared => self.slots.generation(),
        };
        let slot = slots.find(gfn);
        if self.is_private(slot.map(Arc::as_ref), gfn) != wants_private {
            let reason = if wants_private {
                "a private access to a shared frame"
            } else {
                "a shared access to a private frame"
            };
            return Err(self
                .memory_fault(gfn, visibility, errno::EFAULT, reason)
                .into());
        }
        let Some(slot) = slot else {
            if wants_private {
                let reason = "no memory slot covers the private frame";
                return Err(self
                    .memory_fault(gfn, visibility, errno::EFAULT, reason)
                    .into());
            }
            return Ok(Resolved {
                page: None,
                slot: None,
                seq,
                generation,
            });
        };
        if slot.is_going() {
            return Err(match prefetch {
                true => VmError::SlotGoing(gfn.base()).into(),
                false => Early::SlotGoing,
            });
        }
        if self.invalidation.retry(seq, gfn) {
            return Err(Early::Ret(RetPf::Retry));
        }
        if slot.spec.read_only && wanted.access.write {
            return Err(Early::Ret(RetPf::Emulate));
        }
        let page = match visibility {
            Visibility::Private => self.gmem_page(slot, gfn, visibility)?,
            Visibility::Shared if self.is_gmem_only(slot) => {
                self.gmem_page(slot, gfn, visibility)?
            }
            Visibility::Shared => self.user_page(slot, gfn, wanted.access.write)?,
        };
        if self.invalidation.retry(seq, gfn) {
            return Err(Early::Ret(RetPf::Retry));
        }
        Ok(Resolved {
            page: Some(page),
            slot: (!wants_private).then(|| Arc::clone(slot)),
            seq,
            generation,
        })
    }

    /// kvm_memslot_is_gmem_only: whether shared faults get their pages from the guest_memfd, too.
    pub(super) fn is_gmem_only(&self, slot: &Slot) -> bool {
        slot.gmem.is_some() && !self.is_td()
    }

    /// kvm_mmu_faultin_pfn_gmem.
    fn gmem_page(&self, slot: &Slot, gfn: Gfn, visibility: Visibility) -> Result<Page, VmError> {
        let fault = |errno, reason| self.memory_fault(gfn, visibility, errno, reason);
        let Some(gmem) = &slot.gmem else {
            return Err(fault(errno::EFAULT, "the memory slot has no guest_memfd"));
        };
        match gmem.get(slot.offset(gfn)) {
            Ok(pfn) => Ok(Page {
                pfn,
                map_writable: !slot.spec.read_only,
            }),
            Err(NoPage::NoMemory) => Err(out_of_memory(&self.host)),
            Err(NoPage::Poisoned) => Err(fault(errno::EHWPOISON, "the page is poisoned")),
            Err(NoPage::Closed) => Err(fault(errno::EFAULT, "the guest_memfd is closed")),
        }
    }

    /// __kvm_faultin_pfn: what the host maps at the slot's user address.
    #[inline(never)]
    fn user_page(&self, slot: &Arc<Slot>, gfn: Gfn, write: bool) -> Result<Page, Early> {
        match slot.user.get(slot.offset(gfn), write) {
            Ok(page) => Ok(Page {
                pfn: page.pfn,
                map_writable: page.writable && !slot.spec.read_only,
            }),
            Err(NoHostPage::NoMemory) => Err(out_of_memory(&self.host).into()),
            Err(NoHostPage::Fault) => Err(VmError::HostFault(gfn.base()).into()),
            Err(NoHostPage::CopyOnWrite) => Err(Early::CopyOnWrite(Arc::clone(slot))),
        }
    }

    /// KVM_EXIT_MEMORY_FAULT.
    pub(super) fn memory_fault(
        &self,
        gfn: Gfn,
        visibility: Visibility,
        errno: i32,
        reason: &'static str,
    ) -> VmError {
        let flags = if visibility == Visibility::Private {
            EXIT_PRIVATE
        } else {
            0
        };
        let record = MemoryFault {
            gpa: gfn.base().get(),
            size: PAGE_SIZE,
            flags,
        };
        VmError::MemoryFault {
            record,
            errno,
            reason,
        }
    }

    /// is_page_fault_stale, for a valid root; the caller holds the read side of mmu_lock.
    pub(super) fn is_stale(&self, resolved: &Resolved, gfn: Gfn) -> bool {
        resolved.page.is_some() && self.invalidation.retry(resolved.seq, gfn)
    }
}

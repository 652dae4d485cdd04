//! The host's memory management at work behind the slots.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_mmu_notifier_invalidate_range_start()`,
//! `kvm_mmu_notifier_clear_flush_young()`, `kvm_mmu_notifier_test_young()`;
//! arch/x86/kvm/mmu/mmu.c, `kvm_age_gfn()`, `kvm_test_age_gfn()`. Host virtual addresses name user
//! memory, so nothing here reaches a mirror root.

use std::ops::Range;

use tdx_defs::{Gfn, Gpa, PAGE_SHIFT, PAGE_SIZE, Visibility};

use super::Vm;
use crate::counts::Counts;
use crate::error::VmError;
use crate::memory::slots::Slot;
use crate::memory::user::{HostChange, NoHostPage};
use crate::mmu::roots::{Filter, RootTypes};
use crate::tdx::lifecycle::out_of_memory;
use crate::tdx::seam::Seam;
use crate::trace::Event;

impl Vm {
    /// kvm_unmap_hva_range: the host takes user memory back. Only shared mappings can be meant.
    pub fn unmap_hva(&self, start: u64, end: u64) -> Result<Counts, VmError> {
        self.change_host_mapping(start, end, HostChange::Drop)
    }

    /// The host changes how it maps `[start, end)`, and tells the VM before. Bytes of host
    /// virtual address space, page aligned.
    pub fn change_host_mapping(
        &self,
        start: u64,
        end: u64,
        change: HostChange,
    ) -> Result<Counts, VmError> {
        self.alive()?;
        check_hva(start, end)?;
        let mut seam = self.seam(0);
        let notified = self.notify(&mut seam, start..end, || self.set_host(start, end, change));
        let counts = self.finish(seam);
        notified.map(|()| counts)
    }

    /// Only the notifier: the host looks for more than it changes in the end.
    pub fn notify_unmap(&self, start: u64, end: u64) -> Result<Counts, VmError> {
        self.alive()?;
        check_hva(start, end)?;
        let mut seam = self.seam(0);
        let notified = self.notify(&mut seam, start..end, || {});
        let counts = self.finish(seam);
        notified.map(|()| counts)
    }

    /// Only the change: how memory is that the guest has not touched yet.
    pub fn set_host_mapping(
        &self,
        start: u64,
        end: u64,
        change: HostChange,
    ) -> Result<(), VmError> {
        self.alive()?;
        check_hva(start, end)?;
        self.set_host(start, end, change);
        Ok(())
    }

    fn set_host(&self, start: u64, end: u64, change: HostChange) {
        let pages = start >> PAGE_SHIFT..end >> PAGE_SHIFT;
        for slot in self.slots.all().iter() {
            slot.user.change(pages.clone(), change);
        }
    }

    fn notify(
        &self,
        seam: &mut Seam<'_>,
        hva: Range<u64>,
        change: impl FnOnce(),
    ) -> Result<(), VmError> {
        self.mmu.tracer.emit(|| Event::UnmapHvaRange {
            start: hva.start,
            end: hva.end,
        });
        let ranges = self.gfns_of(&hva);
        if ranges.is_empty() {
            change();
            return Ok(());
        }
        self.zap_ranges(seam, &ranges, Filter::SHARED, change)?;
        Ok(())
    }

    /// The frames that a range of host virtual addresses backs.
    fn gfns_of(&self, hva: &Range<u64>) -> Vec<Range<u64>> {
        let slots = self.slots.all();
        slots
            .iter()
            .filter_map(|slot| Self::hva_to_gfns(slot, hva.start, hva.end))
            .collect()
    }

    /// The host copies a page that the guest is about to write.
    pub(super) fn copy_on_write(
        &self,
        seam: &mut Seam<'_>,
        slot: &Slot,
        gfn: Gfn,
    ) -> Result<(), VmError> {
        let offset = slot.offset(gfn);
        let start = slot.spec.userspace_addr + (offset << PAGE_SHIFT);
        let mut copied = Ok(());
        self.notify(seam, start..start + PAGE_SIZE, || {
            copied = slot.user.copy(offset);
        })?;
        copied.map_err(|why| match why {
            NoHostPage::NoMemory => out_of_memory(&self.host),
            _ => VmError::HostFault(gfn.base()),
        })
    }

    /// kvm_age_hva: whether shared memory behind the range was used, and forgets it. Takes no
    /// lock and flushes nothing.
    pub fn age_hva(&self, start: u64, end: u64) -> Result<bool, VmError> {
        self.alive()?;
        check_hva(start, end)?;
        self.mmu.tracer.emit(|| Event::AgeHva { start, end });
        Ok(self.age(&(start..end), true))
    }

    /// kvm_test_age_hva: whether the page was used.
    pub fn test_age_hva(&self, hva: u64) -> Result<bool, VmError> {
        self.alive()?;
        let end = hva.saturating_add(PAGE_SIZE);
        check_hva(hva, end)?;
        self.mmu.tracer.emit(|| Event::TestAgeHva { hva });
        Ok(self.age(&(hva..end), false))
    }

    fn age(&self, hva: &Range<u64>, forget: bool) -> bool {
        let _rcu = crossbeam_epoch::pin();
        let roots = self
            .mmu
            .roots_to_age(self.mmu.filter_to_root_types(Filter::SHARED));
        let mut young = false;
        for gfns in self.gfns_of(hva) {
            for &root in &roots {
                young |= self.mmu.age_range(root, gfns.clone(), forget);
                if young && !forget {
                    return true;
                }
            }
        }
        young
    }

    /// What the processor does with an access to shared memory that the tables allow: sets
    /// accessed, and dirty on a write. `false` when the access faults.
    pub fn access(&self, gpa: u64, write: bool) -> Result<bool, VmError> {
        self.alive()?;
        let layout = self.mmu.layout;
        if gpa >> layout.width() != 0 {
            let reason = format!("{gpa:#x} is above the guest's {}-bit width", layout.width());
            return Err(VmError::invalid("gpa", reason));
        }
        let (gfn, visibility) = layout.split(Gpa::new(gpa));
        if visibility == Visibility::Private {
            let reason = "the module's tables decide about private memory";
            return Err(VmError::invalid("gpa", reason));
        }
        // Under the read side, so that the log does not end in between.
        let _held = self.mmu.lock.read(0);
        let Some(&root) = self.mmu.roots(RootTypes::DIRECT).first() else {
            return Ok(false);
        };
        let Some(before) = self.mmu.hardware_access(root, gfn, write) else {
            return Ok(false);
        };
        let dirtied = write && before.spte & crate::mmu::spte::DIRTY == 0;
        if dirtied
            && self.config.pml
            && let Some(slot) = self.slots.find(gfn)
        {
            slot.log.mark(slot.offset(gfn));
        }
        Ok(true)
    }
}

fn check_hva(start: u64, end: u64) -> Result<(), VmError> {
    if !start.is_multiple_of(PAGE_SIZE) {
        return Err(VmError::invalid(
            "start",
            format!("{start:#x} is not page aligned"),
        ));
    }
    if !end.is_multiple_of(PAGE_SIZE) || end <= start {
        let reason = format!("{end:#x} is not a page-aligned address above {start:#x}");
        return Err(VmError::invalid("end", reason));
    }
    Ok(())
}

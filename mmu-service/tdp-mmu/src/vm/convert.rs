//! Taking memory away from the guest: conversion and holes, and the sequence of both.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_vm_set_mem_attributes()`;
//! arch/x86/kvm/mmu/mmu.c, `kvm_arch_pre_set_memory_attributes()`, `kvm_unmap_gfn_range()`;
//! virt/kvm/guest_memfd.c, `kvm_gmem_punch_hole()`.
//!
//! Each is the same sequence: begin under the write side, unmap, flush, let go, and later change
//! what is behind the frames, then end. Between begin and end faults in the range start over.

use std::ops::Range;
use std::sync::Arc;

use tdx_defs::{Gfn, Level, PAGE_SHIFT, PAGE_SIZE};

use super::{Mode, Vm};
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::ledger::Note;
use crate::memory::slots::Slot;
use crate::mmu::lock::WriteGuard;
use crate::mmu::removal::ExternalOp;
use crate::mmu::role::RootKind;
use crate::mmu::roots::{Filter, RootTypes};
use crate::seam::SeamError;
use crate::sync::lock;
use crate::tdx::seam::Seam;
use crate::trace::Event;

/// KVM_MEMORY_ATTRIBUTE_PRIVATE.
const ATTRIBUTE_PRIVATE: u64 = 8;
/// Leaves of one chunk in mode `batched`: 16 MiB.
const CHUNK: u64 = 4096;

impl Vm {
    /// KVM_SET_MEMORY_ATTRIBUTES: makes a range private (8) or shared (0).
    pub fn set_memory_attributes(
        &self,
        gpa: u64,
        size: u64,
        attributes: u64,
    ) -> Result<Counts, VmError> {
        if attributes & !ATTRIBUTE_PRIVATE != 0 {
            let reason = format!("{attributes:#x} has bits beside PRIVATE (8)");
            return Err(VmError::invalid("attributes", reason));
        }
        if !self.is_td() {
            let reason = "an ordinary VM has no private memory";
            return Err(VmError::invalid("attributes", reason));
        }
        let range = self.page_range(("gpa", "size"), gpa, size)?;
        self.mmu.tracer.emit(|| Event::VmSetMemAttributes {
            start: range.start,
            end: range.end,
            attributes,
        });
        let private = attributes == ATTRIBUTE_PRIVATE;
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        if lock(&self.private).is_all(&range, private) {
            return Ok(Counts::default());
        }
        let mut seam = self.seam(0);
        let slots = self.slots.overlapping(&range);
        let mut kept = Ok(());
        let mut store = || {
            // The frames have no mapping of the old kind by now, so either attribute is true.
            kept = self.note(Note::Attributes {
                gfns: range.clone(),
                private,
            });
            if kept.is_err() {
                return;
            }
            lock(&self.private).set(range.clone(), private);
            for slot in &slots {
                let from = range.start.max(slot.gfns.start) - slot.gfns.start;
                let to = range.end.min(slot.gfns.end) - slot.gfns.start;
                slot.private.set(from..to, private);
            }
        };
        if slots.is_empty() {
            store();
            let counts = self.finish(seam);
            kept?;
            return Ok(counts);
        }
        // Mappings of the old kind go.
        let filter = if private {
            Filter::SHARED
        } else {
            Filter::PRIVATE
        };
        let ends = self.ends_to_mix(&slots, &range);
        let ranges = std::slice::from_ref(&range);
        let zapped = self.zap_ranges_within(&mut seam, &ends, ranges, filter, store);
        let counts = self.finish(seam);
        zapped?;
        kept?;
        Ok(counts)
    }

    /// The partly covered huge ranges at both ends that become mixed: a fault must not make a
    /// huge page there meanwhile, though nothing in them is unmapped but what `range` says.
    fn ends_to_mix(&self, slots: &[Arc<Slot>], range: &Range<u64>) -> Vec<Range<u64>> {
        let mut ends = Vec::new();
        for slot in slots {
            for level in [Level::L2M, Level::L1G] {
                let pages = level.pages();
                for gfn in [range.start, range.end - 1] {
                    let first = gfn - gfn % pages;
                    let whole = slot.gfns.start <= first && first + pages <= slot.gfns.end;
                    let part = range.start > first || range.end < first + pages;
                    if whole && part && !self.is_mixed(Gfn::new(gfn), level) {
                        ends.push(first..first + pages);
                    }
                }
            }
        }
        ends
    }

    /// fallocate(FALLOC_FL_PUNCH_HOLE) on a slot's guest_memfd. Returns how many pages went.
    pub fn punch_hole(
        &self,
        slot_id: u32,
        offset: u64,
        size: u64,
    ) -> Result<(Counts, u64), VmError> {
        self.alive()?;
        let slot = self.slots.by_id(slot_id).ok_or(VmError::NoSlot(slot_id))?;
        let Some(gmem) = &slot.gmem else {
            return Err(VmError::invalid(
                "slot_id",
                format!("slot {slot_id} has no guest_memfd"),
            ));
        };
        for (field, bytes) in [("offset", offset), ("size", size)] {
            if bytes % PAGE_SIZE != 0 {
                return Err(VmError::invalid(
                    field,
                    format!("{bytes:#x} is not page aligned"),
                ));
            }
        }
        let end = offset
            .checked_add(size)
            .filter(|&end| end <= slot.spec.size && size != 0);
        let Some(end) = end else {
            let limit = slot.spec.size;
            let reason = format!("{offset:#x} + {size:#x} is not inside the {limit:#x} byte file");
            return Err(VmError::invalid("size", reason));
        };
        let pages = offset >> PAGE_SHIFT..end >> PAGE_SHIFT;
        let gfns = slot.gfns.start + pages.start..slot.gfns.start + pages.end;
        let _invalidate_lock = lock(&self.gmem_lock);
        let mut seam = self.seam(0);
        let mut freed = 0;
        let zapped = self.zap_ranges(&mut seam, &[gfns], Filter::PRIVATE, || {
            freed = gmem.punch(pages)
        });
        let counts = self.finish(seam);
        zapped?;
        Ok((counts, freed))
    }

    /// close(2) of a slot's guest_memfd: its mappings and pages go, and later faults leave with an
    /// exit record. How many pages went.
    ///
    /// Model: only in an ordinary VM. A TD keeps its files open until its end.
    pub fn close_guest_memfd(&self, slot_id: u32) -> Result<(Counts, u64), VmError> {
        self.alive()?;
        let slot = self.slots.by_id(slot_id).ok_or(VmError::NoSlot(slot_id))?;
        let Some(gmem) = slot.gmem.as_ref().filter(|_| self.is_gmem_only(&slot)) else {
            let reason = format!("slot {slot_id} has no guest_memfd that can be closed");
            return Err(VmError::invalid("slot_id", reason));
        };
        let _invalidate_lock = lock(&self.gmem_lock);
        let mut seam = self.seam(0);
        let mut freed = 0;
        let gfns = std::slice::from_ref(&slot.gfns);
        let zapped = self.zap_ranges(&mut seam, gfns, Filter::SHARED, || {
            gmem.close();
            freed = gmem.punch(0..slot.gfns.end - slot.gfns.start);
        });
        let counts = self.finish(seam);
        zapped?;
        Ok((counts, freed))
    }

    /// kvm_zap_gfn_range: every mapping of a range goes, shared and private, and comes back with
    /// the next fault.
    pub fn zap_gfn_range(&self, gpa: u64, size: u64) -> Result<Counts, VmError> {
        let range = self.page_range(("gpa", "size"), gpa, size)?;
        self.alive()?;
        let mut seam = self.seam(0);
        let ranges = std::slice::from_ref(&range);
        let zapped = self.zap_ranges(&mut seam, ranges, Filter::BOTH, || {});
        let counts = self.finish(seam);
        zapped.map(|()| counts).map_err(Into::into)
    }

    /// begin, unmap, flush once; `change` what is behind the ranges; end.
    pub(super) fn zap_ranges(
        &self,
        seam: &mut Seam<'_>,
        ranges: &[Range<u64>],
        filter: Filter,
        change: impl FnOnce(),
    ) -> Result<(), SeamError> {
        self.zap_ranges_within(seam, &[], ranges, filter, change)
    }

    /// The same, and faults in `around` start over, too.
    fn zap_ranges_within(
        &self,
        seam: &mut Seam<'_>,
        around: &[Range<u64>],
        ranges: &[Range<u64>],
        filter: Filter,
        change: impl FnOnce(),
    ) -> Result<(), SeamError> {
        let mut held = self.mmu.lock.write();
        self.invalidation.begin(&held);
        let types = self.mmu.filter_to_root_types(filter);
        let mut unmapped = Ok(false);
        for range in ranges.iter().chain(around) {
            self.invalidation.range_add(&held, range);
        }
        for range in ranges {
            let Ok(pending) = unmapped else { break };
            (held, unmapped) = self.unmap(seam, held, types, range);
            unmapped = unmapped.map(|flush| flush || pending);
        }
        if unmapped.is_ok_and(|flush| flush) {
            seam.counts.flushes += 1;
        }
        drop(held);
        if unmapped.is_ok() {
            change();
        }
        let held = self.mmu.lock.write();
        self.invalidation.end(&held);
        unmapped.map(drop).map_err(|Torn| {
            let reason = self.mmu.bugs.reason().unwrap_or_default();
            SeamError::Unknown { reason }
        })
    }

    /// kvm_tdp_mmu_unmap_gfn_range. Yields between chunks when a fault waits. The answer says
    /// whether the caller must flush.
    pub(super) fn unmap<'a>(
        &'a self,
        seam: &mut Seam<'_>,
        mut held: WriteGuard<'a>,
        types: RootTypes,
        range: &Range<u64>,
    ) -> (WriteGuard<'a>, Result<bool, Torn>) {
        let mut flush = false;
        for root in self.mmu.roots(types.with(RootTypes::INVALID)) {
            // A reference, for the times when the lock is let go.
            if !self.mmu.get_root(root) {
                continue;
            }
            let role = self.mmu.arena.header(root).role();
            let one_by_one = role.kind() == RootKind::Mirror && seam.mode == Mode::Kernel;
            let limit = if one_by_one { 1 } else { CHUNK };
            let mut start = range.start;
            loop {
                let mut ops = Vec::new();
                let part = start..range.end;
                let zapped = self.mmu.zap_leafs(&held, root, part, limit, &mut ops);
                seam.counts.pages_zapped += zapped.leaves;
                flush |= zapped.leaves != 0 && !role.is_invalid();
                if let Err(torn) = self.carry_out(&held, seam, &ops) {
                    self.mmu.put_root(root);
                    return (held, Err(torn));
                }
                let Some(next) = zapped.next else { break };
                start = next;
                if held.is_contended() {
                    if std::mem::take(&mut flush) {
                        seam.counts.flushes += 1;
                    }
                    drop(held);
                    held = self.mmu.lock.write();
                }
            }
            self.mmu.put_root(root);
        }
        (held, Ok(flush))
    }

    /// Has the module follow what was taken from the mirror. B15: only whoever still holds the
    /// write side of mmu_lock can ask for it.
    pub(super) fn carry_out(
        &self,
        _held: &WriteGuard<'_>,
        seam: &mut Seam<'_>,
        ops: &[ExternalOp],
    ) -> Result<(), Torn> {
        if ops.is_empty() {
            return Ok(());
        }
        match self.hooks().apply(seam, ops) {
            Ok(removed) => {
                removed
                    .kept
                    .iter()
                    .for_each(|leaving| self.leak(leaving.gfn));
                removed
                    .tables
                    .iter()
                    .for_each(|&page| self.host.memory.free_page(page));
                self.leaked
                    .fetch_add(removed.leaked_tables, super::Ordering::Relaxed);
                Ok(())
            }
            Err(error) => {
                // Mirror and private tree may differ from here on: the VM ends.
                self.mmu.bugs.kill(Check::Unsettled, || error.to_string());
                for op in ops {
                    match *op {
                        ExternalOp::RemoveSpte { gfn, .. } => self.leak(gfn),
                        ExternalOp::FreeSpt { .. } => {
                            self.leaked.fetch_add(1, super::Ordering::Relaxed);
                        }
                        ExternalOp::LinkSpt { .. } | ExternalOp::SetSpte { .. } => {}
                    }
                }
                Err(Torn)
            }
        }
    }

    /// The module may still hold the page behind a private frame.
    pub(super) fn leak(&self, gfn: Gfn) {
        if let Some(slot) = self.slots.find(gfn)
            && let Some(gmem) = &slot.gmem
        {
            if let Ok(page) = gmem.get(slot.offset(gfn))
                && let Err(error) = self.note(Note::Kept(page))
            {
                tracing::warn!(%error, %page, "a page that the module kept is not written down");
            }
            gmem.leak(slot.offset(gfn));
        }
    }
}

/// The module stopped answering in the middle; the VM is dead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Torn;

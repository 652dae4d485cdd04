//! Memory slots: which frames exist, and what is behind them.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_set_memory_region()`, `id_to_memslot()`,
//! `search_memslots()`. Lookups read a snapshot without a lock; a change makes a new snapshot,
//! as memslot generations under SRCU do.

use std::ops::Range;
use std::sync::Arc;

use arc_swap::ArcSwap;
use tdx_defs::Gfn;

use super::attributes::PrivateBits;
use super::backing::Backing;
use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};

/// KVM_USER_MEM_SLOTS is larger; a snapshot is copied on each change.
pub const MAX_SLOTS: usize = 32_764;
/// Largest slot in pages (KVM_MEM_MAX_NR_PAGES).
pub const MAX_SLOT_PAGES: u64 = (1 << 31) - 1;

/// A memory slot as user space describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct SlotSpec {
    /// Its number.
    pub slot_id: u32,
    /// First guest physical address, bytes.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// Host virtual address of the first byte.
    pub userspace_addr: u64,
    /// Private pages come from a guest_memfd.
    pub guest_memfd: bool,
    /// KVM_MEM_READONLY.
    pub read_only: bool,
}

/// A slot in use.
pub(crate) struct Slot {
    pub(crate) spec: SlotSpec,
    pub(crate) gfns: Range<u64>,
    /// guest_memfd, for private pages.
    pub(crate) gmem: Option<Backing>,
    /// User memory, for shared pages.
    pub(crate) user: Backing,
    pub(crate) private: PrivateBits,
    /// KVM_MEMSLOT_INVALID: faults retry until the deletion is through.
    pub(crate) going: AtomicBool,
}

impl Slot {
    /// Page offset of a frame in the slot.
    pub(crate) fn offset(&self, gfn: Gfn) -> u64 {
        gfn.get() - self.gfns.start
    }

    pub(crate) fn is_going(&self) -> bool {
        self.going.load(Ordering::Acquire)
    }

    pub(crate) fn is_private(&self, gfn: Gfn) -> bool {
        self.private.get(self.offset(gfn))
    }
}

/// Slots in ascending order of frames.
type Table = Vec<Arc<Slot>>;

#[derive(Default)]
pub(crate) struct Slots {
    table: ArcSwap<Table>,
    /// `memslots->generation`, by which MMIO SPTEs age.
    generation: AtomicU32,
}

impl Slots {
    /// The slot that covers a frame.
    pub(crate) fn find(&self, gfn: Gfn) -> Option<Arc<Slot>> {
        let table = self.table.load();
        let at = table.partition_point(|slot| slot.gfns.end <= gfn.get());
        table
            .get(at)
            .filter(|slot| slot.gfns.contains(&gfn.get()))
            .cloned()
    }

    pub(crate) fn by_id(&self, slot_id: u32) -> Option<Arc<Slot>> {
        self.table
            .load()
            .iter()
            .find(|slot| slot.spec.slot_id == slot_id)
            .cloned()
    }

    /// Slots that overlap a range of frames, ascending.
    pub(crate) fn overlapping(&self, range: &Range<u64>) -> Vec<Arc<Slot>> {
        let table = self.table.load();
        let first = table.partition_point(|slot| slot.gfns.end <= range.start);
        table[first..]
            .iter()
            .take_while(|slot| slot.gfns.start < range.end)
            .cloned()
            .collect()
    }

    pub(crate) fn all(&self) -> Arc<Table> {
        self.table.load_full()
    }

    /// The low bits are all that an MMIO SPTE keeps.
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire)
    }

    /// The caller holds slots_lock.
    pub(crate) fn insert(&self, slot: Slot) {
        let mut table = (*self.table.load_full()).clone();
        let at = table.partition_point(|other| other.gfns.start < slot.gfns.start);
        table.insert(at, Arc::new(slot));
        self.table.store(Arc::new(table));
        self.generation.fetch_add(1, Ordering::AcqRel);
    }

    /// The caller holds slots_lock.
    pub(crate) fn remove(&self, slot_id: u32) {
        let mut table = (*self.table.load_full()).clone();
        table.retain(|slot| slot.spec.slot_id != slot_id);
        self.table.store(Arc::new(table));
        // Once for the slot that is marked as going, once for its end.
        self.generation.fetch_add(2, Ordering::AcqRel);
    }

    pub(crate) fn clear(&self) {
        self.table.store(Arc::default());
    }
}

//! Memory slots: which frames exist, and what is behind them.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_set_memory_region()`, `id_to_memslot()`,
//! `search_memslots()`. Lookups read a snapshot without a lock; a change makes a new snapshot,
//! as memslot generations under SRCU do.

use std::ops::Range;
use std::sync::Arc;

use arc_swap::{ArcSwap, Cache};
use tdx_defs::{Gfn, Level, PAGE_SHIFT};

use super::attributes::PrivateBits;
use super::backing::Backing;
use super::dirty::DirtyLog;
use super::user::{HostPageSize, UserMemory};
use crate::mmu::spte;
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
    /// Private pages come from a guest_memfd; of an ordinary VM all pages do, as if the file had
    /// been made for mapping (GUEST_MEMFD_FLAG_MMAP).
    pub guest_memfd: bool,
    /// KVM_MEM_READONLY.
    pub read_only: bool,
    /// KVM_MEM_LOG_DIRTY_PAGES.
    pub log_dirty: bool,
    /// Page size that the host uses for user memory where alignment allows it. Counts when the
    /// slot is created.
    pub host_page_size: HostPageSize,
    /// Reads of user memory that nobody wrote get the zero page. Counts when the slot is created.
    pub demand_zero: bool,
}

/// A slot in use.
pub(crate) struct Slot {
    pub(crate) spec: SlotSpec,
    pub(crate) gfns: Range<u64>,
    /// guest_memfd, for private pages.
    pub(crate) gmem: Option<Backing>,
    /// User memory, for shared pages; kept when the slot moves or changes its flags.
    pub(crate) user: Arc<UserMemory>,
    /// Goes with the user memory.
    pub(crate) log: Arc<DirtyLog>,
    pub(crate) private: PrivateBits,
    /// KVM_MEMSLOT_INVALID: faults retry until the deletion is through.
    pub(crate) going: AtomicBool,
}

impl Slot {
    /// Page offset of a frame in the slot.
    pub(crate) fn offset(&self, gfn: Gfn) -> u64 {
        gfn.get() - self.gfns.start
    }

    /// `disallow_lpage` of `kvm_alloc_memslot_metadata()`: whether the range of the leaf of
    /// `level` over a frame sticks out of the slot, or lies otherwise than the host's addresses.
    pub(crate) fn forbids(&self, gfn: Gfn, level: Level) -> bool {
        let pages = level.pages();
        let first = gfn.align_down(pages).get();
        let apart = self.gfns.start ^ self.spec.userspace_addr >> PAGE_SHIFT;
        first < self.gfns.start || first + pages > self.gfns.end || !apart.is_multiple_of(pages)
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

const GENERATION_MASK: u32 = spte::MMIO_GEN_MASK;

pub(crate) struct Slots {
    table: ArcSwap<Table>,
    /// `memslots->generation`, by which MMIO SPTEs age.
    pub(crate) generation: AtomicU32,
    /// Address spaces share one generation: it moves by their number with every swap.
    stride: u32,
}

impl Slots {
    /// No slots, of a VM with that many address spaces.
    pub(crate) fn new(address_spaces: u32) -> Self {
        Self {
            table: ArcSwap::default(),
            generation: AtomicU32::new(0),
            stride: address_spaces,
        }
    }

    /// The slot that covers a frame.
    pub(crate) fn find(&self, gfn: Gfn) -> Option<Arc<Slot>> {
        let table = self.table.load();
        let at = table.partition_point(|slot| slot.gfns.end <= gfn.get());
        table
            .get(at)
            .filter(|slot| slot.gfns.contains(&gfn.get()))
            .cloned()
    }

    /// Look-ups of one operation.
    pub(crate) fn lookups(&self) -> Lookups<'_> {
        Lookups {
            table: Cache::new(&self.table),
            at: 0,
        }
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

    /// The bits that an MMIO SPTE keeps.
    pub(crate) fn generation(&self) -> u32 {
        self.generation.load(Ordering::Acquire) & GENERATION_MASK
    }

    /// kvm_mmu_invalidate_mmio_sptes: whether the generation came round, so that old MMIO SPTEs
    /// would look valid.
    fn swapped(&self, times: u32) -> bool {
        let before = self.generation();
        let moved = self.stride * times;
        self.generation.fetch_add(moved, Ordering::AcqRel);
        before + moved > GENERATION_MASK
    }

    /// The caller holds slots_lock. Whether the generation came round.
    pub(crate) fn insert(&self, slot: Slot) -> bool {
        let mut table = (*self.table.load_full()).clone();
        Self::put(&mut table, slot);
        self.table.store(Arc::new(table));
        self.swapped(1)
    }

    /// The same for a slot in the place of the one with its number: other flags, or moved.
    pub(crate) fn replace(&self, slot: Slot, moved: bool) -> bool {
        let mut table = (*self.table.load_full()).clone();
        table.retain(|other| other.spec.slot_id != slot.spec.slot_id);
        Self::put(&mut table, slot);
        self.table.store(Arc::new(table));
        // A slot that moves is marked as going first.
        self.swapped(1 + u32::from(moved))
    }

    fn put(table: &mut Table, slot: Slot) {
        let at = table.partition_point(|other| other.gfns.start < slot.gfns.start);
        table.insert(at, Arc::new(slot));
    }

    /// The caller holds slots_lock. Whether the generation came round.
    pub(crate) fn remove(&self, slot_id: u32) -> bool {
        let mut table = (*self.table.load_full()).clone();
        table.retain(|slot| slot.spec.slot_id != slot_id);
        self.table.store(Arc::new(table));
        // Once for the slot that is marked as going, once for its end.
        self.swapped(2)
    }

    pub(crate) fn clear(&self) {
        self.table.store(Arc::default());
    }
}

/// Look-ups that share a snapshot while it is the present one, and begin with the slot that was
/// found last. They write nothing that other threads read: a count of users that every fault
/// changes would be a line that all vCPUs fight for.
pub(crate) struct Lookups<'s> {
    table: Cache<&'s ArcSwap<Table>, Arc<Table>>,
    at: usize,
}

impl Lookups<'_> {
    /// The slot that covers a frame now.
    pub(crate) fn find(&mut self, gfn: Gfn) -> Option<&Arc<Slot>> {
        let table = self.table.load();
        let covers = |slot: &&Arc<Slot>| slot.gfns.contains(&gfn.get());
        if table.get(self.at).filter(covers).is_none() {
            self.at = table.partition_point(|slot| slot.gfns.end <= gfn.get());
        }
        table.get(self.at).filter(covers)
    }
}

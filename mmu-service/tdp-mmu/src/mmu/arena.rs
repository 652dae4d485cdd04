//! Page-table pages: 512-entry tables of 64-bit SPTEs in a growing arena.
//!
//! Source: `struct kvm_mmu_page`, arch/x86/kvm/mmu/mmu_internal.h; `tdp_mmu_alloc_sp()`,
//! `tdp_mmu_free_sp_rcu_callback()`, tdp_mmu.c.
//!
//! A table has an index and a host physical address that follows from it, so an SPTE that links
//! a table is turned into the table without a lookup. Chunks never move; growth takes a mutex,
//! walks take none.
//!
//! Model: the tables lie in an address window of their own above the machine's memory. They are
//! memory of this process, the module never sees them.
//!
//! Invariants
//! - A1  A table comes out of `alloc` with 512 × NP: zero would be an MMIO SPTE.
//! - A2  A table that was reachable goes back through `free_deferred`, so that a walker which
//!   still holds an epoch never sees it reused.

use std::sync::{Arc, OnceLock};

use crossbeam_epoch as epoch;
use tdx_defs::{Gfn, Hpa, Level, PAGE_SHIFT, Pfn};

use super::role::Role;
use super::spte;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Mutex, lock};

pub(crate) const ENTRIES: usize = 512;
/// First address of the tables' window.
const WINDOW: u64 = 1 << 50;
/// Tables in the first chunk; each further one doubles up to [`CHUNK_TABLES`].
const FIRST_TABLES: u32 = 16;
/// Tables in a full chunk: 2 MiB of entries.
const CHUNK_TABLES: u32 = 512;
const DOUBLING_CHUNKS: u32 = 6;
const DIRECTORY: usize = 256;

impl Slot {
    /// Where the entry lies.
    pub(crate) fn hpa(self) -> u64 {
        self.table.hpa().get() + self.index as u64 * 8
    }
}

/// Names a table of one arena.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub(crate) struct TableId(u32);

impl TableId {
    /// Where the table lies.
    pub(crate) fn hpa(self) -> Hpa {
        Hpa::new(WINDOW + (u64::from(self.0) << PAGE_SHIFT))
    }

    /// The table that a present non-leaf SPTE links.
    pub(crate) fn linked_by(spte: u64) -> Option<Self> {
        let offset = (spte & spte::PFN_MASK).checked_sub(WINDOW)?;
        u32::try_from(offset >> PAGE_SHIFT).ok().map(Self)
    }
}

/// One entry of one table: a sptep.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Slot {
    pub(crate) table: TableId,
    pub(crate) index: usize,
}

/// What KVM keeps beside a table (`struct kvm_mmu_page`).
pub(crate) struct Header {
    role: AtomicU32,
    /// Users of a root; 0 in other tables.
    pub(crate) root_count: AtomicU32,
    gfn: AtomicU64,
    /// Page handed to the module for this table; 0 for none.
    external: AtomicU64,
    /// `ptep`: the entry that links the table, or [`NO_PARENT`].
    parent: AtomicU64,
    /// `nx_huge_page_disallowed`: a huge page would do but for the NX mitigation.
    pub(crate) nx_disallowed: AtomicBool,
}

const NO_PARENT: u64 = u64::MAX;

impl Header {
    pub(crate) fn role(&self) -> Role {
        Role::from_word(self.role.load(Ordering::Relaxed))
    }

    pub(crate) fn set_role(&self, role: Role) {
        self.role.store(role.word(), Ordering::Relaxed);
    }

    /// First frame that the table covers, without the SHARED bit.
    pub(crate) fn gfn(&self) -> Gfn {
        Gfn::new(self.gfn.load(Ordering::Relaxed))
    }

    pub(crate) fn external(&self) -> Option<Pfn> {
        match self.external.load(Ordering::Relaxed) {
            0 => None,
            page => Some(Pfn::new(page)),
        }
    }

    /// The entry that links the table; none for a root.
    pub(crate) fn parent(&self) -> Option<Slot> {
        let packed = self.parent.load(Ordering::Acquire);
        let table = u32::try_from(packed >> 9).ok()?;
        Some(Slot {
            table: TableId(table),
            index: (packed & 0x1FF) as usize,
        })
    }

    pub(crate) fn set_parent(&self, parent: Slot) {
        let packed = u64::from(parent.table.0) << 9 | parent.index as u64;
        self.parent.store(packed, Ordering::Release);
    }

    pub(crate) fn set_external(&self, page: Option<Pfn>) {
        self.external
            .store(page.map_or(0, Pfn::get), Ordering::Relaxed);
    }
}

struct Chunk {
    entries: Box<[AtomicU64]>,
    headers: Box<[Header]>,
}

impl Chunk {
    fn new(tables: u32) -> Self {
        let tables = tables as usize;
        Self {
            entries: zeroed(tables * ENTRIES),
            headers: (0..tables).map(|_| Header::new()).collect(),
        }
    }
}

impl Header {
    fn new() -> Self {
        Self {
            role: AtomicU32::new(0),
            root_count: AtomicU32::new(0),
            gfn: AtomicU64::new(0),
            external: AtomicU64::new(0),
            parent: AtomicU64::new(NO_PARENT),
            nx_disallowed: AtomicBool::new(false),
        }
    }
}

/// Zeroed memory comes from the system untouched: a chunk costs what its tables use.
#[cfg(not(feature = "shuttle"))]
fn zeroed(entries: usize) -> Box<[AtomicU64]> {
    bytemuck::zeroed_slice_box(entries)
}

#[cfg(feature = "shuttle")]
fn zeroed(entries: usize) -> Box<[AtomicU64]> {
    (0..entries).map(|_| AtomicU64::new(spte::NP)).collect()
}

/// A part of the directory.
type Chunks = Box<[OnceLock<Chunk>]>;

#[derive(Default)]
struct FreeList {
    free: Vec<u32>,
    next: u32,
}

struct Inner {
    directory: Box<[OnceLock<Chunks>]>,
    free: Mutex<FreeList>,
}

/// The tables of one VM.
#[derive(Clone)]
pub(crate) struct Arena(Arc<Inner>);

impl Default for Arena {
    fn default() -> Self {
        Self(Arc::new(Inner {
            directory: (0..DIRECTORY).map(|_| OnceLock::new()).collect(),
            free: Mutex::default(),
        }))
    }
}

/// Chunk number, tables in that chunk, place in the chunk.
fn locate(id: u32) -> (u32, u32, u32) {
    let shifted = id + FIRST_TABLES;
    let doubled = FIRST_TABLES << DOUBLING_CHUNKS;
    if shifted < doubled {
        let chunk = (shifted / FIRST_TABLES).ilog2();
        let tables = FIRST_TABLES << chunk;
        (chunk, tables, shifted - tables)
    } else {
        let beyond = shifted - doubled;
        (
            DOUBLING_CHUNKS + beyond / CHUNK_TABLES,
            CHUNK_TABLES,
            beyond % CHUNK_TABLES,
        )
    }
}

impl Inner {
    fn chunk(&self, id: u32) -> Option<(&Chunk, usize)> {
        let (chunk, _, at) = locate(id);
        let outer = self.directory.get(chunk as usize / DIRECTORY)?.get()?;
        Some((outer[chunk as usize % DIRECTORY].get()?, at as usize))
    }

    fn grow(&self, id: u32) -> Option<()> {
        let (chunk, tables, _) = locate(id);
        let outer = self
            .directory
            .get(chunk as usize / DIRECTORY)?
            .get_or_init(|| (0..DIRECTORY).map(|_| OnceLock::new()).collect());
        outer[chunk as usize % DIRECTORY].get_or_init(|| Chunk::new(tables));
        Some(())
    }

    fn free(&self, id: TableId) {
        lock(&self.free).free.push(id.0);
    }
}

impl Arena {
    /// A fresh table with every entry NP; `None` when the arena is full.
    pub(crate) fn alloc(&self, role: Role, gfn: Gfn, external: Option<Pfn>) -> Option<TableId> {
        let id = {
            let mut list = lock(&self.0.free);
            match list.free.pop() {
                Some(id) => id,
                None => {
                    self.0.grow(list.next)?;
                    list.next += 1;
                    list.next - 1
                }
            }
        };
        let (chunk, at) = self.0.chunk(id)?;
        // Under shuttle every table is used once, and a store is a point where threads switch:
        // five hundred of them would hide those that matter.
        if !cfg!(feature = "shuttle") {
            for entry in &chunk.entries[at * ENTRIES..(at + 1) * ENTRIES] {
                entry.store(spte::NP, Ordering::Relaxed);
            }
        }
        let header = &chunk.headers[at];
        header.set_role(role);
        header.gfn.store(gfn.get(), Ordering::Relaxed);
        header.set_external(external);
        header.root_count.store(0, Ordering::Relaxed);
        header.parent.store(NO_PARENT, Ordering::Relaxed);
        header.nx_disallowed.store(false, Ordering::Relaxed);
        Some(TableId(id))
    }

    /// Gives back a table that nobody could reach.
    pub(crate) fn free(&self, id: TableId) {
        if !cfg!(feature = "shuttle") {
            self.0.free(id);
        }
    }

    /// Gives back a table once no walker can hold it (call_rcu).
    pub(crate) fn free_deferred(&self, id: TableId) {
        if cfg!(feature = "shuttle") {
            // Model: under shuttle a removed table is never reused, which is the longest grace
            // period there is and keeps the exploration deterministic.
            return;
        }
        let inner = Arc::clone(&self.0);
        epoch::pin().defer(move || inner.free(id));
    }

    /// Lets what waits for walkers go, as far as there are none (rcu_barrier): tables that wait
    /// keep the memory of their whole arena.
    pub(crate) fn collect_deferred() {
        /// A grace period is two advances of the epoch; one more for what was put off meanwhile.
        const ROUNDS: u32 = 4;
        if !cfg!(feature = "shuttle") {
            (0..ROUNDS).for_each(|_| epoch::pin().flush());
        }
    }

    /// The 512 entries of a table.
    pub(crate) fn entries(&self, id: TableId) -> &[AtomicU64] {
        match self.0.chunk(id.0) {
            Some((chunk, at)) => &chunk.entries[at * ENTRIES..(at + 1) * ENTRIES],
            None => &[],
        }
    }

    /// One entry.
    ///
    /// # Panics
    /// For a slot that no table of this arena has: slots come from walks of this arena.
    pub(crate) fn entry(&self, slot: Slot) -> &AtomicU64 {
        &self.entries(slot.table)[slot.index]
    }

    /// # Panics
    /// For a table of another arena.
    pub(crate) fn header(&self, id: TableId) -> &Header {
        match self.0.chunk(id.0) {
            Some((chunk, at)) => &chunk.headers[at],
            None => unreachable!("{id:?} was not allocated from this arena"),
        }
    }

    /// Level of the entries in a table.
    pub(crate) fn level(&self, id: TableId) -> Level {
        self.header(id).role().level()
    }

    /// Bytes of entries and headers that tables in use take.
    pub(crate) fn bytes(&self) -> u64 {
        let list = lock(&self.0.free);
        let tables = u64::from(list.next) - list.free.len() as u64;
        tables * (size_of::<[u64; ENTRIES]>() + size_of::<Header>()) as u64
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::mmu::role::RootKind;

    #[test]
    fn chunks_tile_the_index_space() {
        let mut expected = (0, 0);
        for id in 0..5000 {
            let (chunk, tables, at) = locate(id);
            assert_eq!((chunk, at), expected, "table {id}");
            expected = if at + 1 == tables {
                (chunk + 1, 0)
            } else {
                (chunk, at + 1)
            };
        }
    }

    #[test]
    fn the_memory_of_an_arena_goes_with_its_last_table() {
        let arena = Arena::default();
        let role = Role::root(Level::L512G, RootKind::Mirror);
        let id = arena.alloc(role, Gfn::new(0), None).unwrap();
        arena.free_deferred(id);
        let inner = Arc::downgrade(&arena.0);
        drop(arena);
        // Another test may hold an epoch for a moment.
        let is_gone = |_| {
            Arena::collect_deferred();
            std::thread::yield_now();
            inner.strong_count() == 0
        };
        assert!((0..1_000_000).any(is_gone));
    }

    #[test]
    fn tables_come_out_empty_and_know_their_address() {
        let arena = Arena::default();
        let role = Role::root(Level::L512G, RootKind::Mirror);
        for n in 0..2000u64 {
            let id = arena
                .alloc(role, Gfn::new(n), Some(Pfn::new(n + 1)))
                .unwrap();
            assert!(
                arena
                    .entries(id)
                    .iter()
                    .all(|e| e.load(Ordering::Relaxed) == spte::NP)
            );
            assert_eq!(TableId::linked_by(spte::nonleaf(id.hpa())), Some(id));
            assert_eq!(arena.header(id).gfn(), Gfn::new(n));
            arena.entries(id)[7].store(1, Ordering::Relaxed);
            if n % 3 == 0 {
                arena.free(id);
            }
        }
    }
}

//! Walking a TD's Secure EPT and holding one entry of it.
//!
//! Source: TDX module source, sept_manager.c, `secure_ept_walk`, and the entry lock of
//! sept_manager.h. The walk reads each entry once. Above the requested level it stops at an entry
//! without rights and at a leaf; the entry at the requested level is not judged.
//!
//! Invariants
//! - W1  An entry is changed by the holder of its TDEL bit only, except for TDHP.
//! - W2  Whoever walks holds SEPT_TREE shared, or the TDR exclusively; whoever takes a table out
//!   of the tree holds SEPT_TREE or the TDR exclusively.

use std::sync::atomic::{AtomicU64, Ordering};

use tdx_defs::{Gpa, PAGE_SHIFT};

use super::arena::{Arena, ENTRIES, Table};
use super::entry::{HOST_PRIORITY, LOCKED, SeptEntry};

/// The Secure EPT of a TD.
#[derive(Debug)]
pub(crate) struct Sept {
    arena: Arena,
}

/// One entry of a table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Slot<'t> {
    table: &'t Table,
    index: usize,
    /// Level of the entry as the module counts.
    pub(crate) level: u8,
}

/// Where a walk ended.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Walk<'t> {
    /// The last entry that was read.
    pub(crate) slot: Slot<'t>,
    /// Its value at that time.
    pub(crate) value: SeptEntry,
}

impl Sept {
    /// A tree without a table.
    pub(crate) fn new() -> Self {
        Self {
            arena: Arena::new(),
        }
    }

    /// Makes the root, table 0.
    pub(crate) fn create_root(&self) {
        self.arena.take();
    }

    /// Number of the root.
    const ROOT: u32 = 0;

    /// The root, once the TD is initialised.
    pub(crate) fn root(&self) -> Option<&Table> {
        self.arena.get(Self::ROOT)
    }

    /// Walks from the root at `root_level` towards the entry of `gpa` at `level`.
    pub(crate) fn walk(&self, root_level: u8, gpa: Gpa, level: u8) -> Option<Walk<'_>> {
        let mut slot = Slot::of(self.root()?, gpa, root_level);
        loop {
            let value = slot.read();
            if slot.level <= level || !value.is_passable() {
                return Some(Walk { slot, value });
            }
            let below = self.child(slot)?;
            slot = Slot::of(below, gpa, slot.level - 1);
        }
    }

    /// As [`Sept::walk`], but blocked links are passed, too: what may still be cached.
    pub(crate) fn walk_through_blocked(
        &self,
        root_level: u8,
        gpa: Gpa,
        level: u8,
    ) -> Option<Walk<'_>> {
        let mut slot = Slot::of(self.root()?, gpa, root_level);
        loop {
            let value = slot.read();
            if slot.level <= level || !value.state().is_non_leaf() {
                return Some(Walk { slot, value });
            }
            let below = self.child(slot)?;
            slot = Slot::of(below, gpa, slot.level - 1);
        }
    }

    /// The table behind a linked entry.
    pub(crate) fn child(&self, slot: Slot<'_>) -> Option<&Table> {
        self.arena.get(slot.table.child(slot.index)?)
    }

    /// A table without entries for `slot` to link to.
    pub(crate) fn prepare_child(&self, slot: Slot<'_>) -> Option<&Table> {
        let table = self.arena.take()?;
        slot.table.set_child(slot.index, table);
        self.arena.get(table)
    }

    /// Takes the table behind `slot` out of use. It is no longer linked, but walks that hold
    /// SEPT_TREE shared may still reach it: its entries are locked.
    pub(crate) fn retire_child(&self, slot: Slot<'_>) {
        if let Some(table) = slot.table.child(slot.index) {
            self.arena.retire(table);
        }
    }

    /// Makes retired tables usable again. The caller holds SEPT_TREE exclusively.
    pub(crate) fn reuse_retired(&self) {
        self.arena.reuse_retired();
    }

    /// Gives back the table behind `slot`, which is no longer linked.
    pub(crate) fn drop_child(&self, slot: Slot<'_>) {
        if let Some(table) = slot.table.child(slot.index) {
            self.arena.give_back(table);
        }
    }
}

impl<'t> Slot<'t> {
    /// The entry of `gpa` in a table whose entries have `level`.
    pub(crate) fn of(table: &'t Table, gpa: Gpa, level: u8) -> Self {
        let shift = PAGE_SHIFT + 9 * u32::from(level);
        Self {
            table,
            index: (gpa.get() >> shift & 0x1FF) as usize,
            level,
        }
    }

    /// The entry at `index` of a table whose entries have `level`.
    pub(crate) fn at(table: &'t Table, index: usize, level: u8) -> Self {
        Self {
            table,
            index: index % ENTRIES,
            level,
        }
    }

    /// The table that holds the entry.
    pub(crate) fn table(&self) -> &'t Table {
        self.table
    }

    fn word(&self) -> &'t AtomicU64 {
        &self.table.entries()[self.index]
    }

    /// The present value.
    pub(crate) fn read(&self) -> SeptEntry {
        SeptEntry(self.word().load(Ordering::Acquire))
    }

    /// Changes an entry that nobody else can reach: its table is not linked, or the caller
    /// holds the TDR exclusively.
    pub(crate) fn write_alone(&self, value: SeptEntry) {
        self.word().store(value.0, Ordering::Release);
    }

    /// Sets TDEL for a host call, which ends a priority that an earlier one claimed. On failure
    /// TDHP is set and the guest has to wait.
    pub(crate) fn try_lock(self) -> Option<EntryLock<'t>> {
        let word = self.word();
        let mut old = word.load(Ordering::Relaxed);
        while old & LOCKED == 0 {
            let plain = old & !HOST_PRIORITY;
            match word.compare_exchange_weak(
                old,
                plain | LOCKED,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    return Some(EntryLock {
                        slot: self,
                        value: SeptEntry(plain),
                        held: true,
                    });
                }
                Err(now) => old = now,
            }
        }
        word.fetch_or(HOST_PRIORITY, Ordering::Relaxed);
        None
    }

    /// Sets TDEL for a guest call, which fails while a host call has priority.
    pub(crate) fn try_lock_for_guest(self) -> Option<EntryLock<'t>> {
        let word = self.word();
        let mut old = word.load(Ordering::Relaxed);
        while old & (LOCKED | HOST_PRIORITY) == 0 {
            match word.compare_exchange_weak(
                old,
                old | LOCKED,
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => {
                    return Some(EntryLock {
                        slot: self,
                        value: SeptEntry(old),
                        held: true,
                    });
                }
                Err(now) => old = now,
            }
        }
        None
    }

    /// Sets TDEL without a guard.
    pub(crate) fn acquire(&self) -> bool {
        self.word().fetch_or(LOCKED, Ordering::Acquire) & LOCKED == 0
    }

    /// Clears TDEL.
    pub(crate) fn release(&self) {
        self.word().fetch_and(!LOCKED, Ordering::Release);
    }
}

/// Holds an entry's TDEL until it is dropped or committed.
#[derive(Debug)]
#[must_use = "the entry is released when the guard is dropped"]
pub(crate) struct EntryLock<'t> {
    slot: Slot<'t>,
    value: SeptEntry,
    held: bool,
}

impl<'t> EntryLock<'t> {
    /// The entry.
    pub(crate) fn slot(&self) -> Slot<'t> {
        self.slot
    }

    /// Its value, read under the lock, without the lock bits.
    pub(crate) fn value(&self) -> SeptEntry {
        self.value
    }

    /// Leaves the entry locked for good: its table is taken out of use.
    pub(crate) fn keep(mut self) {
        self.held = false;
    }

    /// Writes a new value and releases the entry. A priority that a host call claimed in the
    /// meantime stays.
    pub(crate) fn commit(mut self, value: SeptEntry) {
        let word = self.slot.word();
        let mut old = word.load(Ordering::Relaxed);
        while let Err(now) = word.compare_exchange_weak(
            old,
            value.0 & !LOCKED | old & HOST_PRIORITY,
            Ordering::Release,
            Ordering::Relaxed,
        ) {
            old = now;
        }
        self.held = false;
    }
}

impl Drop for EntryLock<'_> {
    fn drop(&mut self) {
        if self.held {
            self.slot.release();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::Release;
    use crate::sept::{EntryFormat, SeptState};
    use tdx_defs::Hpa;

    fn linked() -> Sept {
        let sept = Sept::new();
        sept.create_root();
        let format = EntryFormat::new(Release::R1_5_05);
        let lock = sept
            .walk(3, Gpa::new(0), 3)
            .unwrap()
            .slot
            .try_lock()
            .unwrap();
        sept.prepare_child(lock.slot()).unwrap();
        lock.commit(format.entry(SeptState::NL_MAPPED, Hpa::new(0x1000)));
        sept
    }

    #[test]
    fn the_walk_stops_where_nothing_is_below() {
        let sept = linked();
        for (gpa, level, reached) in [(0, 0, 2), (0, 2, 2), (0, 3, 3), (1 << 39, 0, 3)] {
            let walk = sept.walk(3, Gpa::new(gpa), level).unwrap();
            assert_eq!(walk.slot.level, reached, "{gpa:#x} at {level}");
        }
    }

    #[test]
    fn a_failed_host_attempt_marks_the_entry_until_one_succeeds() {
        let sept = linked();
        let slot = sept.walk(3, Gpa::new(0), 2).unwrap().slot;
        let held = slot.try_lock().unwrap();
        assert!(slot.try_lock().is_none());
        drop(held);
        assert_eq!(slot.read().0, SeptEntry::FREE.0 | HOST_PRIORITY);
        drop(slot.try_lock().unwrap());
        assert_eq!(slot.read(), SeptEntry::FREE);
    }
}

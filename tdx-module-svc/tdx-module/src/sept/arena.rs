//! Storage of a TD's Secure EPT pages: tables of 512 atomic words.
//!
//! Entries show the HPA of the table behind them, as the ABI has it. To follow a link without a
//! look-up by address, a table that has links keeps beside each entry the number of the child in
//! this arena. Tables are made in small blocks, reused after TDH.MEM.SEPT.REMOVE, and go away with
//! the TD.
//!
//! Units: a table number counts from 0, the root.
//!
//! Invariants
//! - A1  The child number beside a NL_MAPPED or NL_BLOCKED entry names a table that no other
//!   entry names. It is written before the entry, under the entry's lock.
//! - A2  A table in the list of spare ones is reachable from no entry, and nobody is on the way to
//!   it.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use super::entry::SeptEntry;

/// Entries in a table.
pub(crate) const ENTRIES: usize = 512;
/// Tables that are made at once: 32 KiB.
const BLOCK: u32 = 8;
/// Blocks in the first directory; each further directory is twice as long.
const FIRST_DIRECTORY: u32 = 16;
const DIRECTORIES: usize = 24;

/// One Secure EPT page.
#[derive(Debug)]
pub(crate) struct Table {
    entries: [AtomicU64; ENTRIES],
    /// Numbers of the tables behind the entries; absent while the table has never had a link.
    children: OnceLock<Box<[AtomicU32]>>,
}

impl Table {
    fn new() -> Self {
        Self {
            entries: [const { AtomicU64::new(SeptEntry::FREE.0) }; ENTRIES],
            children: OnceLock::new(),
        }
    }

    /// The entries.
    pub(crate) fn entries(&self) -> &[AtomicU64; ENTRIES] {
        &self.entries
    }

    /// Makes every entry free.
    pub(crate) fn clear(&self) {
        for entry in &self.entries {
            entry.store(SeptEntry::FREE.0, Ordering::Relaxed);
        }
    }

    /// The number of the table behind an entry.
    pub(super) fn child(&self, index: usize) -> Option<u32> {
        Some(self.children.get()?.get(index)?.load(Ordering::Relaxed))
    }

    /// Notes the number of the table behind an entry.
    pub(super) fn set_child(&self, index: usize, table: u32) {
        let children = self
            .children
            .get_or_init(|| (0..ENTRIES).map(|_| AtomicU32::new(0)).collect());
        if let Some(child) = children.get(index) {
            child.store(table, Ordering::Relaxed);
        }
    }
}

type Directory = Box<[OnceLock<Box<[Table]>>]>;

/// All tables of a TD.
#[derive(Debug)]
pub(crate) struct Arena {
    directories: [OnceLock<Directory>; DIRECTORIES],
    spare: Mutex<Spare>,
    /// Whether the list of retired tables has any: looked at without the lock.
    has_retired: AtomicBool,
}

#[derive(Debug, Default)]
struct Spare {
    returned: Vec<u32>,
    /// Not linked any more, but somebody may still be on the way to them.
    retired: Vec<u32>,
    /// Numbers from here on were never given out.
    fresh: u32,
}

impl Arena {
    pub(crate) fn new() -> Self {
        Self {
            directories: [const { OnceLock::new() }; DIRECTORIES],
            spare: Mutex::default(),
            has_retired: AtomicBool::new(false),
        }
    }

    /// The table of a number that [`Arena::take`] gave out.
    pub(crate) fn get(&self, table: u32) -> Option<&Table> {
        let (directory, block) = place(table / BLOCK);
        let block = self.directories.get(directory)?.get()?.get(block)?.get()?;
        block.get((table % BLOCK) as usize)
    }

    /// A table with free entries; `None` when the numbers are spent.
    pub(crate) fn take(&self) -> Option<u32> {
        let table = {
            let mut spare = self.spare();
            if let Some(table) = spare.returned.pop() {
                drop(spare);
                self.get(table)?.clear();
                return Some(table);
            }
            let table = spare.fresh;
            spare.fresh = table.checked_add(1)?;
            table
        };
        let (directory, block) = place(table / BLOCK);
        let length = (FIRST_DIRECTORY as usize) << directory;
        self.directories
            .get(directory)?
            .get_or_init(|| (0..length).map(|_| OnceLock::new()).collect())
            .get(block)?
            .get_or_init(|| (0..BLOCK).map(|_| Table::new()).collect());
        Some(table)
    }

    /// Gives a table back.
    pub(crate) fn give_back(&self, table: u32) {
        self.spare().returned.push(table);
    }

    /// Takes a table out of use, until [`Arena::reuse_retired`].
    pub(crate) fn retire(&self, table: u32) {
        self.spare().retired.push(table);
        self.has_retired.store(true, Ordering::Release);
    }

    /// Gives back what was retired. Nobody is on the way to any table.
    pub(crate) fn reuse_retired(&self) {
        if self.has_retired.swap(false, Ordering::Acquire) {
            let mut spare = self.spare();
            let retired = std::mem::take(&mut spare.retired);
            spare.returned.extend(retired);
        }
    }

    // The list stays whole when its holder panics: each step is one push or pop.
    fn spare(&self) -> MutexGuard<'_, Spare> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Directory and position of a block.
fn place(block: u32) -> (usize, usize) {
    let block = block as usize;
    let first = FIRST_DIRECTORY as usize;
    let directory = (block / first + 1).ilog2() as usize;
    (directory, block - ((1 << directory) - 1) * first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_fill_directories_of_doubling_length() {
        for (block, expected) in [
            (0, (0, 0)),
            (15, (0, 15)),
            (16, (1, 0)),
            (47, (1, 31)),
            (48, (2, 0)),
            (111, (2, 63)),
        ] {
            assert_eq!(place(block), expected, "{block}");
        }
    }

    #[test]
    fn tables_are_distinct_and_come_back_free() {
        let arena = Arena::new();
        let tables: Vec<_> = (0..300).map(|_| arena.take().unwrap()).collect();
        assert_eq!(tables, (0..300).collect::<Vec<_>>());
        arena.get(7).unwrap().entries()[3].store(1, Ordering::Relaxed);
        arena.give_back(7);
        assert_eq!(arena.take(), Some(7));
        assert_eq!(
            arena.get(7).unwrap().entries()[3].load(Ordering::Relaxed),
            SeptEntry::FREE.0
        );
        assert!(arena.get(1 << 20).is_none());
    }
}

//! Tables that stand where the NX mitigation forbids a huge page.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `track_possible_nx_huge_page()`,
//! `untrack_possible_nx_huge_page()`, `kvm_recover_nx_huge_pages()`. Such a table can go when the
//! guest no longer executes there; the next access makes the huge page.

use super::Mmu;
use super::arena::TableId;
use crate::sync::atomic::Ordering;
use crate::sync::lock;

impl Mmu {
    /// Puts a linked table on the list, unless it was removed meanwhile.
    pub(crate) fn track_nx(&self, table: TableId) {
        let mut pages = lock(&self.nx_pages);
        let header = self.arena.header(table);
        if header.nx_disallowed.load(Ordering::Acquire) && !pages.contains(&table) {
            pages.push_back(table);
        }
    }

    /// Takes a table off the list, if it is on it.
    pub(crate) fn untrack_nx(&self, table: TableId) {
        let header = self.arena.header(table);
        if !header.nx_disallowed.load(Ordering::Acquire) {
            return;
        }
        let mut pages = lock(&self.nx_pages);
        header.nx_disallowed.store(false, Ordering::Release);
        pages.retain(|&listed| listed != table);
    }

    /// The table that has been on the list longest, taken off it. The caller holds mmu_lock, so
    /// that the table is not reused under its hands.
    pub(crate) fn next_nx(&self) -> Option<TableId> {
        let mut pages = lock(&self.nx_pages);
        let table = pages.pop_front()?;
        let header = self.arena.header(table);
        header.nx_disallowed.store(false, Ordering::Release);
        Some(table)
    }

    /// nx_lpage_splits: how many tables are on the list.
    pub(crate) fn nx_tables(&self) -> u64 {
        lock(&self.nx_pages).len() as u64
    }
}

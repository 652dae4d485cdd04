//! User memory behind a slot, as the host's memory management arranges it.
//!
//! Source: virt/kvm/kvm_main.c, `hva_to_pfn()`; arch/x86/kvm/mmu/mmu.c,
//! `host_pfn_mapping_level()`; the behaviour of anonymous memory behind both (Linux, mm/memory.c:
//! zero page, copy on write). Pages appear when first asked for. Everything is counted in pages
//! of host virtual address space, so a huge page lies where the host's address is aligned.
//!
//! Model: each 2 MiB of address space is backed by one 2 MiB block (1 GiB by one 1 GiB page),
//! handed out with its first page and given back with its last, so the pages of a huge mapping
//! are always neighbours and naturally aligned.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::sync::Arc;

use tdx_defs::{Level, Pfn};

use crate::host::{BLOCK_PAGES, GIGA_PAGES, Host};
use crate::sync::atomic::{AtomicU8, Ordering};
use crate::sync::{Mutex, lock};

/// Page size that the host uses for user memory where alignment allows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum HostPageSize {
    /// 4 KiB.
    #[default]
    Size4K,
    /// 2 MiB.
    Size2M,
    /// 1 GiB.
    Size1G,
}

impl HostPageSize {
    /// The level of a leaf of this size.
    pub fn level(self) -> Level {
        match self {
            Self::Size4K => Level::L4K,
            Self::Size2M => Level::L2M,
            Self::Size1G => Level::L1G,
        }
    }
}

/// What the host does to a range of user memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostChange {
    /// Gives the pages up. The next access gets new ones.
    Drop,
    /// Gives the pages up; until it writes, an access gets the zero page (MADV_DONTNEED on
    /// anonymous memory).
    DropToZero,
    /// Allows reads only (mprotect).
    ReadOnly,
    /// Allows reads and writes again.
    ReadWrite,
    /// Allows nothing: accesses fail with EFAULT (PROT_NONE, munmap).
    NoAccess,
    /// Maps the range with pages of another size, where alignment allows it.
    PageSize(HostPageSize),
    /// Somebody else has the pages that are there, too: a write gets a copy first (fork).
    Share,
    /// The host itself writes: absent pages come, shared ones and the zero page become pages of
    /// the VM's own.
    Write,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Rights {
    None,
    Read,
    Write,
}

/// How a run of pages is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Attr {
    rights: Rights,
    /// Reads of absent pages get the zero page.
    zero: bool,
    size: HostPageSize,
}

/// A host page as a fault sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostPage {
    pub(crate) pfn: Pfn,
    pub(crate) writable: bool,
}

/// Why there is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoHostPage {
    /// KVM_PFN_ERR_FAULT.
    Fault,
    NoMemory,
    /// The zero page is mapped and the access writes: the host has to copy first, which takes the
    /// page away from the guest.
    CopyOnWrite,
}

/// Pages of a block, as an index.
const PAGES: usize = 512;
const _: () = assert!(PAGES as u64 == BLOCK_PAGES);

struct Block {
    pfn: Pfn,
    pages: Vec<bool>,
    used: usize,
}

struct State {
    /// Start → end and how it is mapped; covers the whole range.
    attrs: BTreeMap<u64, (u64, Attr)>,
    /// By first page, 2 MiB aligned.
    blocks: BTreeMap<u64, Block>,
    /// By first page, 1 GiB aligned.
    gigas: BTreeMap<u64, Pfn>,
    /// Pages where the zero page is mapped.
    zeroes: BTreeSet<u64>,
    zero_page: Option<Pfn>,
    /// Pages that somebody else has, too.
    shared: BTreeSet<u64>,
}

/// The memory behind `pages` pages of address space from page `first` on.
pub(crate) struct UserMemory {
    host: Arc<Host>,
    range: Range<u64>,
    /// Level of the largest pages that any part was ever mapped with: most slots need no look.
    largest: AtomicU8,
    state: Mutex<State>,
}

impl UserMemory {
    /// `first` is the host virtual page number.
    pub(crate) fn new(
        host: Arc<Host>,
        first: u64,
        pages: u64,
        size: HostPageSize,
        zero: bool,
    ) -> Self {
        let attr = Attr {
            rights: Rights::Write,
            zero,
            size,
        };
        let range = first..first + pages;
        Self {
            host,
            largest: AtomicU8::new(size.level().get()),
            state: Mutex::new(State {
                attrs: BTreeMap::from([(range.start, (range.end, attr))]),
                blocks: BTreeMap::new(),
                gigas: BTreeMap::new(),
                zeroes: BTreeSet::new(),
                zero_page: None,
                shared: BTreeSet::new(),
            }),
            range,
        }
    }

    /// hva_to_pfn: the page `offset` pages into the slot, made if it is not there.
    pub(crate) fn get(&self, offset: u64, write: bool) -> Result<HostPage, NoHostPage> {
        let page = self.range.start + offset;
        let mut state = lock(&self.state);
        let Some((_, attr)) = state.attr(page) else {
            return Err(NoHostPage::Fault);
        };
        match attr.rights {
            Rights::None => return Err(NoHostPage::Fault),
            Rights::Read if write => return Err(NoHostPage::Fault),
            Rights::Read | Rights::Write => {}
        }
        let writable = attr.rights == Rights::Write;
        if let Some(pfn) = state.present(page) {
            let shared = state.shared.contains(&page);
            return match write && shared {
                true => Err(NoHostPage::CopyOnWrite),
                false => Ok(HostPage {
                    pfn,
                    writable: writable && !shared,
                }),
            };
        }
        if state.zeroes.contains(&page) {
            return match write {
                true => Err(NoHostPage::CopyOnWrite),
                false => state.zero(&self.host),
            };
        }
        if attr.zero && !write {
            state.zeroes.insert(page);
            return state.zero(&self.host);
        }
        let level = self.mapping(&state, page);
        let pfn = state.populate(&self.host, page, level)?;
        Ok(HostPage { pfn, writable })
    }

    /// Ends a copy on write: the page of its own is there from now on.
    pub(crate) fn copy(&self, offset: u64) -> Result<(), NoHostPage> {
        let page = self.range.start + offset;
        let mut state = lock(&self.state);
        if state.shared.remove(&page) {
            // Model: the copy takes the page's place; the other one that has it is not modelled.
            return Ok(());
        }
        state.populate(&self.host, page, Level::L4K)?;
        state.zeroes.remove(&page);
        Ok(())
    }

    /// No page is mapped at a higher level.
    pub(crate) fn largest(&self) -> Level {
        Level::new(self.largest.load(Ordering::Acquire)).unwrap_or(Level::L1G)
    }

    /// host_pfn_mapping_level: the level at which the host maps the page.
    pub(crate) fn level(&self, offset: u64) -> Level {
        let page = self.range.start + offset;
        let state = lock(&self.state);
        if state.zeroes.contains(&page) {
            return Level::L4K;
        }
        self.mapping(&state, page)
    }

    fn mapping(&self, state: &State, page: u64) -> Level {
        let Some((run, attr)) = state.attr(page) else {
            return Level::L4K;
        };
        let mut level = attr.size.level();
        while level > Level::L4K {
            let first = page - page % level.pages();
            let whole = first >= run.start && first + level.pages() <= run.end;
            // A zero page in the middle keeps the host from a huge page, and so do small pages
            // that were there before it could have one.
            let in_level = first..first + level.pages();
            let shared = state.shared.range(in_level.clone()).count() as u64;
            // So does a page that was copied amid others that are still shared.
            let clean = state.zeroes.range(in_level).next().is_none()
                && (shared == 0 || shared == level.pages());
            let backed = level == Level::L2M
                || state.gigas.contains_key(&first)
                || state
                    .blocks
                    .range(first..first + level.pages())
                    .next()
                    .is_none();
            match level.child() {
                Some(child) if !(whole && clean && backed) => level = child,
                _ => break,
            }
        }
        level
    }

    /// Changes how a range is mapped; `pages` are host virtual page numbers.
    pub(crate) fn change(&self, pages: Range<u64>, change: HostChange) {
        let pages = pages.start.max(self.range.start)..pages.end.min(self.range.end);
        if pages.is_empty() {
            return;
        }
        let mut state = lock(&self.state);
        if let HostChange::PageSize(size) = change {
            self.largest.fetch_max(size.level().get(), Ordering::AcqRel);
        }
        match change {
            HostChange::Share => {
                let there = state.pages_there(pages);
                state.shared.extend(there);
                return;
            }
            HostChange::Write => return self.write(&mut state, pages),
            _ => {}
        }
        let set = |attr: &mut Attr| match change {
            HostChange::Drop | HostChange::Share | HostChange::Write => {}
            HostChange::DropToZero => attr.zero = true,
            HostChange::ReadOnly => attr.rights = Rights::Read,
            HostChange::ReadWrite => attr.rights = Rights::Write,
            HostChange::NoAccess => attr.rights = Rights::None,
            HostChange::PageSize(size) => attr.size = size,
        };
        state.set(pages.clone(), set);
        if matches!(change, HostChange::Drop | HostChange::DropToZero) {
            state.drop_pages(&self.host, pages);
        }
    }

    fn write(&self, state: &mut State, pages: Range<u64>) {
        for set in [&mut state.zeroes, &mut state.shared] {
            set.retain(|page| !pages.contains(page));
        }
        let mut page = pages.start;
        while page < pages.end {
            let level = self.mapping(state, page);
            // Without memory the rest stays as it is, and comes when somebody touches it.
            if state.present(page).is_none() && state.populate(&self.host, page, level).is_err() {
                return;
            }
            page += level.pages() - page % level.pages();
        }
    }
}

impl Drop for UserMemory {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        let all = self.range.clone();
        state.drop_pages(&self.host, all);
        if state.zero_page.take().is_some() {
            self.host.memory.put_zero_page();
        }
    }
}

impl State {
    /// The run of pages that are mapped like `page`, and how.
    fn attr(&self, page: u64) -> Option<(Range<u64>, Attr)> {
        let (&start, &(end, attr)) = self.attrs.range(..=page).next_back()?;
        (page < end).then_some((start..end, attr))
    }

    fn set(&mut self, pages: Range<u64>, set: impl Fn(&mut Attr)) {
        self.cut(pages.start);
        self.cut(pages.end);
        for (_, (_, attr)) in self.attrs.range_mut(pages) {
            set(attr);
        }
        // Runs that became alike are one run: a huge page may lie across the place of the cut.
        let runs = std::mem::take(&mut self.attrs);
        let mut last: Option<(u64, u64, Attr)> = None;
        for (start, (end, attr)) in runs {
            match &mut last {
                Some((_, last_end, like)) if *like == attr => *last_end = end,
                _ => {
                    if let Some((start, end, attr)) = last.replace((start, end, attr)) {
                        self.attrs.insert(start, (end, attr));
                    }
                }
            }
        }
        if let Some((start, end, attr)) = last {
            self.attrs.insert(start, (end, attr));
        }
    }

    /// Makes a run begin at `page`.
    fn cut(&mut self, page: u64) {
        if let Some((run, attr)) = self.attr(page)
            && run.start < page
        {
            self.attrs.insert(run.start, (page, attr));
            self.attrs.insert(page, (run.end, attr));
        }
    }

    fn present(&self, page: u64) -> Option<Pfn> {
        let giga = page - page % GIGA_PAGES;
        if let Some(pfn) = self.gigas.get(&giga) {
            return Some(pfn.offset(page - giga));
        }
        let first = page - page % BLOCK_PAGES;
        let at = (page % BLOCK_PAGES) as usize;
        let block = self.blocks.get(&first).filter(|block| block.pages[at])?;
        Some(block.pfn.offset(page - first))
    }

    fn zero(&mut self, host: &Host) -> Result<HostPage, NoHostPage> {
        let pfn = match self.zero_page {
            Some(pfn) => pfn,
            None => host.memory.zero_page().ok_or(NoHostPage::NoMemory)?,
        };
        self.zero_page = Some(pfn);
        Ok(HostPage {
            pfn,
            writable: false,
        })
    }

    /// Makes the page, and with it the whole huge page at `level`.
    fn populate(&mut self, host: &Host, page: u64, level: Level) -> Result<Pfn, NoHostPage> {
        if level == Level::L1G {
            let first = page - page % GIGA_PAGES;
            let giga = host.memory.giga().ok_or(NoHostPage::NoMemory)?;
            self.gigas.insert(first, giga);
            return Ok(giga.offset(page - first));
        }
        let first = page - page % BLOCK_PAGES;
        let block = match self.blocks.entry(first) {
            std::collections::btree_map::Entry::Occupied(block) => block.into_mut(),
            std::collections::btree_map::Entry::Vacant(free) => free.insert(Block {
                pfn: host.memory.block().ok_or(NoHostPage::NoMemory)?,
                pages: vec![false; PAGES],
                used: 0,
            }),
        };
        let at = (page % BLOCK_PAGES) as usize;
        let wanted = match level == Level::L2M {
            true => 0..PAGES,
            false => at..at + 1,
        };
        for present in &mut block.pages[wanted] {
            block.used += usize::from(!std::mem::replace(present, true));
        }
        Ok(block.pfn.offset(page - first))
    }

    /// The pages of a range that are there, the zero page not among them.
    fn pages_there(&self, pages: Range<u64>) -> Vec<u64> {
        let mut there = Vec::new();
        let from = pages.start - pages.start % GIGA_PAGES;
        for &first in self.gigas.range(from..pages.end).map(|(first, _)| first) {
            there.extend(first.max(pages.start)..(first + GIGA_PAGES).min(pages.end));
        }
        let from = pages.start - pages.start % BLOCK_PAGES;
        for (&first, block) in self.blocks.range(from..pages.end) {
            let present = (first..).zip(&block.pages).filter(|(_, present)| **present);
            there.extend(
                present
                    .map(|(page, _)| page)
                    .filter(|page| pages.contains(page)),
            );
        }
        there
    }

    fn drop_pages(&mut self, host: &Host, pages: Range<u64>) {
        for set in [&mut self.zeroes, &mut self.shared] {
            let gone: Vec<u64> = set.range(pages.clone()).copied().collect();
            for page in gone {
                set.remove(&page);
            }
        }
        let from = pages.start - pages.start % GIGA_PAGES;
        let gigas: Vec<u64> = self
            .gigas
            .range(from..pages.end)
            .map(|(&at, _)| at)
            .collect();
        for first in gigas {
            let whole = pages.start <= first && first + GIGA_PAGES <= pages.end;
            // Model: a 1 GiB page that loses a part goes as a whole, as hugetlb pages do.
            if (whole || pages.start < first + GIGA_PAGES)
                && let Some(giga) = self.gigas.remove(&first)
            {
                host.memory.free_giga(giga);
            }
        }
        let from = pages.start - pages.start % BLOCK_PAGES;
        let firsts: Vec<u64> = self
            .blocks
            .range(from..pages.end)
            .map(|(&at, _)| at)
            .collect();
        for first in firsts {
            let Some(block) = self.blocks.get_mut(&first) else {
                continue;
            };
            let part = pages.start.max(first)..pages.end.min(first + BLOCK_PAGES);
            for page in part {
                let present = &mut block.pages[(page % BLOCK_PAGES) as usize];
                block.used -= usize::from(std::mem::replace(present, false));
            }
            if block.used == 0
                && let Some(block) = self.blocks.remove(&first)
            {
                host.memory.free_block(block.pfn);
            }
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::host::tests::small;

    const FIRST: u64 = 0x7_F000_0000;

    fn memory(pages: u64, size: HostPageSize, zero: bool) -> (Arc<Host>, UserMemory) {
        let host = Host::new(small()).unwrap();
        let memory = UserMemory::new(Arc::clone(&host), FIRST, pages, size, zero);
        (host, memory)
    }

    #[test]
    fn huge_pages_are_whole_aligned_and_inside_what_is_mapped_alike() {
        for (size, offset, expected) in [
            (HostPageSize::Size4K, 0x200, Level::L4K),
            (HostPageSize::Size2M, 0x200, Level::L2M),
            (HostPageSize::Size2M, 0x41000, Level::L4K),
            (HostPageSize::Size1G, 0x200, Level::L1G),
            (HostPageSize::Size1G, 0x40000, Level::L2M),
        ] {
            let (_host, memory) = memory(0x41010, size, false);
            let page = memory.get(offset, true).unwrap();
            let level = memory.level(offset);
            assert_eq!(level, expected, "{size:?} at {offset:#x}");
            let inside = (FIRST + offset) % level.pages();
            assert_eq!(page.pfn.get() % level.pages(), inside);
            assert!(page.writable);
        }
    }

    #[test]
    fn another_protection_in_a_huge_page_takes_it_apart() {
        let (_host, memory) = memory(0x400, HostPageSize::Size2M, false);
        let before = memory.get(5, false).unwrap();
        memory.change(FIRST + 7..FIRST + 8, HostChange::ReadOnly);
        assert_eq!(memory.level(5), Level::L4K);
        assert_eq!(memory.level(0x200), Level::L2M);
        assert_eq!(memory.get(5, false).unwrap(), before, "the page stays");
        assert!(!memory.get(7, false).unwrap().writable);
        assert_eq!(memory.get(7, true), Err(NoHostPage::Fault));
        memory.change(FIRST + 7..FIRST + 8, HostChange::ReadWrite);
        assert_eq!(memory.level(5), Level::L2M);
    }

    #[test]
    fn a_page_that_somebody_else_has_is_copied_before_a_write() {
        for size in [HostPageSize::Size4K, HostPageSize::Size2M] {
            let (_host, memory) = memory(0x400, size, false);
            memory.change(FIRST..FIRST + 0x200, HostChange::Write);
            memory.change(FIRST..FIRST + 0x200, HostChange::Share);
            assert!(!memory.get(5, false).unwrap().writable, "{size:?}");
            assert_eq!(memory.level(5), size.level(), "still one page");
            assert_eq!(memory.get(5, true), Err(NoHostPage::CopyOnWrite));
            memory.copy(5).unwrap();
            assert!(memory.get(5, true).unwrap().writable, "{size:?}");
            assert_eq!(memory.level(6), Level::L4K, "the copy takes it apart");
            assert!(memory.get(0x205, true).unwrap().writable, "nothing shared");
            memory.change(FIRST..FIRST + 0x200, HostChange::Drop);
            assert!(memory.get(6, true).unwrap().writable, "a new page");
            memory.change(FIRST..FIRST + 0x200, HostChange::Share);
            memory.change(FIRST..FIRST + 0x200, HostChange::Write);
            assert!(memory.get(6, true).unwrap().writable, "the host copied it");
        }
    }

    #[test]
    fn the_host_has_one_zero_page_for_all() {
        let (host, first) = memory(8, HostPageSize::Size4K, true);
        let second = UserMemory::new(Arc::clone(&host), 0, 8, HostPageSize::Size4K, true);
        let page = first.get(1, false).unwrap();
        assert_eq!(second.get(2, false), Ok(page));
        assert_eq!(host.pages_in_use(), 1);
        drop(first);
        assert_eq!(second.get(3, false), Ok(page));
        drop(second);
        assert_eq!(host.pages_in_use(), 0);
    }

    #[test]
    fn the_zero_page_is_copied_before_a_write() {
        let (host, memory) = memory(0x400, HostPageSize::Size4K, true);
        let zero = memory.get(1, false).unwrap();
        assert_eq!(memory.get(2, false).unwrap(), zero, "one zero page");
        assert!(!zero.writable);
        assert_eq!(memory.get(1, true), Err(NoHostPage::CopyOnWrite));
        memory.copy(1).unwrap();
        let own = memory.get(1, true).unwrap();
        assert!(own.writable && own.pfn != zero.pfn);
        assert!(
            memory.get(3, true).unwrap().writable,
            "no zero page was there"
        );
        memory.change(FIRST..FIRST + 0x400, HostChange::NoAccess);
        assert_eq!(memory.get(1, false), Err(NoHostPage::Fault));
        drop(memory);
        assert_eq!(host.pages_in_use(), 0);
    }

    #[test]
    fn dropped_pages_go_back_to_the_host() {
        for size in [
            HostPageSize::Size4K,
            HostPageSize::Size2M,
            HostPageSize::Size1G,
        ] {
            let (host, memory) = memory(0x40000, size, false);
            memory.get(0, true).unwrap();
            assert_ne!(host.pages_in_use(), 0);
            memory.change(FIRST..FIRST + 0x40000, HostChange::Drop);
            assert_eq!(host.pages_in_use(), 0, "{size:?}");
            memory.get(1, true).unwrap();
            drop(memory);
            assert_eq!(host.pages_in_use(), 0, "{size:?}");
        }
    }
}

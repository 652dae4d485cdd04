//! Physical pages of the simulated host.
//!
//! Pages come singly (control structures, tables) or as naturally aligned 2 MiB blocks (guest
//! memory), so that neighbouring guest frames get neighbouring host frames and a run of them can
//! travel as one call. User memory can also have naturally aligned 1 GiB pages. Nothing is stored
//! behind a page here.
//!
//! Model: a host with buddy allocation gives no such promise; the runs it would find are what
//! its allocator happens to give.

use std::sync::{Arc, OnceLock};

use super::MemoryRange;
use crate::ledger::PoolLedger;
use crate::sync::{Mutex, lock};
use tdx_defs::{PAGE_SHIFT, Pfn};

/// Pages of a block.
pub(crate) const BLOCK_PAGES: u64 = 512;
/// Pages of a 1 GiB page.
pub(crate) const GIGA_PAGES: u64 = 512 * 512;

pub(crate) struct HostMemory {
    state: Mutex<State>,
    /// Learns of every block that is split, before its first page is handed out.
    ledger: OnceLock<Arc<dyn PoolLedger>>,
}

struct State {
    /// Blocks never handed out: `[next, end)` in frames, block aligned, last range first.
    fresh: Vec<(u64, u64)>,
    /// 1 GiB pages given back.
    gigas: Vec<u64>,
    /// Blocks given back.
    blocks: Vec<u64>,
    /// Single pages: what is left of split blocks, and pages given back.
    pages: Vec<u64>,
    in_use: u64,
    /// The page of zeroes, and how many have it.
    zero: Option<(Pfn, u64)>,
}

impl HostMemory {
    pub(super) fn new(tdmrs: &[MemoryRange]) -> Self {
        Self {
            state: Mutex::new(State::new(tdmrs)),
            ledger: OnceLock::new(),
        }
    }

    /// As if nothing had been handed out.
    pub(super) fn reset(&self, tdmrs: &[MemoryRange]) {
        *lock(&self.state) = State::new(tdmrs);
    }

    /// Has every block that is split from now on written down first.
    pub(crate) fn keep_in(&self, ledger: Arc<dyn PoolLedger>) {
        let _ = self.ledger.set(ledger);
    }

    /// Takes a block out of those never handed out: somebody has it since an earlier process.
    /// Whether it was there.
    pub(crate) fn reserve(&self, block: Pfn) -> bool {
        let mut state = lock(&self.state);
        let reserved = state.remove_block(block.get());
        if reserved {
            state.in_use += BLOCK_PAGES;
        }
        reserved
    }

    /// Takes out a block that an earlier process split: the pages of which `is_used` says so are
    /// in use, the others are free. Whether it was there.
    pub(crate) fn reserve_split(&self, block: Pfn, is_used: impl Fn(Pfn) -> bool) -> bool {
        let mut state = lock(&self.state);
        if !state.remove_block(block.get()) {
            return false;
        }
        for page in (block.get()..block.get() + BLOCK_PAGES).rev() {
            if is_used(Pfn::new(page)) {
                state.in_use += 1;
            } else {
                state.pages.push(page);
            }
        }
        true
    }

    /// One 4 KiB page.
    pub(crate) fn page(&self) -> Option<Pfn> {
        let mut state = lock(&self.state);
        if state.pages.is_empty() {
            let block = state.take_block()?;
            if let Some(ledger) = self.ledger.get()
                && let Err(error) = ledger.split(Pfn::new(block))
            {
                tracing::error!(%error, "no page can be handed out: its block cannot be written down");
                state.blocks.push(block);
                return None;
            }
            state.pages.extend((block..block + BLOCK_PAGES).rev());
        }
        let page = state.pages.pop()?;
        state.in_use += 1;
        Some(Pfn::new(page))
    }

    /// Takes a single page that is free. Whether it was.
    pub(crate) fn take_page(&self, page: Pfn) -> bool {
        let mut state = lock(&self.state);
        let at = state.pages.iter().position(|&free| free == page.get());
        if let Some(at) = at {
            state.pages.swap_remove(at);
            state.in_use += 1;
        }
        at.is_some()
    }

    /// The page of zeroes that the whole host shares; there while somebody has it.
    pub(crate) fn zero_page(&self) -> Option<Pfn> {
        if let Some((page, users)) = &mut lock(&self.state).zero {
            *users += 1;
            return Some(*page);
        }
        let page = self.page()?;
        let mut state = lock(&self.state);
        let (zero, users) = state.zero.get_or_insert((page, 0));
        *users += 1;
        let zero = *zero;
        drop(state);
        if zero != page {
            // Somebody else was first.
            self.free_page(page);
        }
        Some(zero)
    }

    /// One user fewer.
    pub(crate) fn put_zero_page(&self) {
        let mut state = lock(&self.state);
        let unused = match &mut state.zero {
            Some((page, users)) => {
                *users -= 1;
                (*users == 0).then_some(*page)
            }
            None => None,
        };
        if unused.is_some() {
            state.zero = None;
        }
        drop(state);
        if let Some(page) = unused {
            self.free_page(page);
        }
    }

    /// Several pages, or none.
    pub(crate) fn pages(&self, count: u32) -> Option<Vec<Pfn>> {
        let mut pages = Vec::new();
        for _ in 0..count {
            match self.page() {
                Some(page) => pages.push(page),
                None => {
                    pages.into_iter().for_each(|page| self.free_page(page));
                    return None;
                }
            }
        }
        Some(pages)
    }

    /// A naturally aligned 2 MiB block.
    pub(crate) fn block(&self) -> Option<Pfn> {
        let mut state = lock(&self.state);
        let block = state.take_block()?;
        state.in_use += BLOCK_PAGES;
        Some(Pfn::new(block))
    }

    pub(crate) fn free_page(&self, page: Pfn) {
        let mut state = lock(&self.state);
        state.pages.push(page.get());
        state.in_use -= 1;
    }

    pub(crate) fn free_block(&self, block: Pfn) {
        let mut state = lock(&self.state);
        state.blocks.push(block.get());
        state.in_use -= BLOCK_PAGES;
    }

    /// A naturally aligned 1 GiB page.
    pub(crate) fn giga(&self) -> Option<Pfn> {
        let mut state = lock(&self.state);
        let giga = state.take_giga()?;
        state.in_use += GIGA_PAGES;
        Some(Pfn::new(giga))
    }

    pub(crate) fn free_giga(&self, giga: Pfn) {
        let mut state = lock(&self.state);
        state.gigas.push(giga.get());
        state.in_use -= GIGA_PAGES;
    }

    pub(crate) fn in_use(&self) -> u64 {
        lock(&self.state).in_use
    }
}

impl State {
    fn new(tdmrs: &[MemoryRange]) -> Self {
        let mut fresh: Vec<(u64, u64)> = tdmrs.iter().flat_map(usable).collect();
        fresh.reverse();
        Self {
            fresh,
            gigas: Vec::new(),
            blocks: Vec::new(),
            pages: Vec::new(),
            in_use: 0,
            zero: None,
        }
    }

    /// Removes a block from the fresh ranges; what lies around it stays.
    fn remove_block(&mut self, block: u64) -> bool {
        let inside = |&(next, end): &(u64, u64)| next <= block && block + BLOCK_PAGES <= end;
        let Some(at) = self.fresh.iter().position(inside) else {
            return false;
        };
        if !block.is_multiple_of(BLOCK_PAGES) {
            return false;
        }
        let (next, end) = self.fresh[at];
        let around = [(block + BLOCK_PAGES, end), (next, block)];
        let around = around.into_iter().filter(|(from, to)| from < to);
        self.fresh.splice(at..=at, around);
        true
    }

    fn take_block(&mut self) -> Option<u64> {
        if let Some(block) = self.blocks.pop() {
            return Some(block);
        }
        while let Some((next, end)) = self.fresh.last_mut() {
            if *next + BLOCK_PAGES <= *end {
                let block = *next;
                *next += BLOCK_PAGES;
                return Some(block);
            }
            self.fresh.pop();
        }
        let giga = self.gigas.pop()?;
        self.fresh.push((giga + BLOCK_PAGES, giga + GIGA_PAGES));
        Some(giga)
    }

    /// The first whole GiB of a fresh range; what lies around it stays.
    fn take_giga(&mut self) -> Option<u64> {
        if let Some(giga) = self.gigas.pop() {
            return Some(giga);
        }
        let whole = |&(next, end): &(u64, u64)| {
            let giga = next.next_multiple_of(GIGA_PAGES);
            (giga + GIGA_PAGES <= end).then_some(giga)
        };
        let at = self
            .fresh
            .iter()
            .rposition(|range| whole(range).is_some())?;
        let (next, end) = self.fresh[at];
        let giga = whole(&(next, end))?;
        let around = [(giga + GIGA_PAGES, end), (next, giga)];
        let around = around.into_iter().filter(|(from, to)| from < to);
        self.fresh.splice(at..=at, around);
        Some(giga)
    }
}

/// The block-aligned parts of a TDMR between its reserved areas, in frames.
fn usable(range: &MemoryRange) -> Vec<(u64, u64)> {
    let frame = |bytes: u64| bytes >> PAGE_SHIFT;
    let mut reserved: Vec<(u64, u64)> = range
        .reserved
        .iter()
        .map(|&(base, size)| {
            (
                frame(base),
                frame(base.saturating_add(size).saturating_add(4095)),
            )
        })
        .collect();
    reserved.sort_unstable();
    let end = frame(range.base + range.size);
    let mut parts = Vec::new();
    let mut start = frame(range.base);
    for (from, to) in reserved.into_iter().chain([(end, end)]) {
        let part = (
            start.next_multiple_of(BLOCK_PAGES),
            from.min(end) / BLOCK_PAGES * BLOCK_PAGES,
        );
        if part.0 < part.1 {
            parts.push(part);
        }
        start = start.max(to);
    }
    parts
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    #[test]
    fn reserved_areas_are_left_out() {
        let range = MemoryRange {
            base: GIB,
            size: GIB,
            reserved: vec![(GIB + (4 << 20), 4096), (GIB, 1 << 20)],
        };
        let block = |n: u64| (GIB >> 12) + n * 512;
        assert_eq!(
            usable(&range),
            [(block(1), block(2)), (block(3), block(512))]
        );
    }

    #[test]
    fn pages_and_blocks_are_handed_out_once_until_given_back() {
        let range = MemoryRange {
            base: GIB,
            size: GIB,
            reserved: vec![],
        };
        let memory = HostMemory::new(&[range]);
        let block = memory.block().unwrap();
        let page = memory.page().unwrap();
        assert_eq!(page.align_down(512).get(), block.get() + 512);
        assert_eq!(memory.in_use(), 513);
        let mut blocks = 2;
        while memory.block().is_some() {
            blocks += 1;
        }
        assert_eq!(blocks, 512, "every block of the range once");
        assert!(memory.page().is_some(), "the split block still has pages");
        memory.free_block(block);
        assert_eq!(memory.block(), Some(block));
    }

    #[test]
    fn gigas_are_aligned_and_leave_their_surroundings_to_blocks() {
        let range = MemoryRange {
            base: GIB,
            size: 3 * GIB,
            reserved: vec![(GIB, 2 << 20)],
        };
        let memory = HostMemory::new(&[range]);
        let first = memory.block().unwrap();
        let (one, two) = (memory.giga().unwrap(), memory.giga().unwrap());
        assert_eq!((one.get(), two.get()), (2 << 18, 3 << 18));
        assert_eq!(memory.giga(), None, "the first GiB is not whole");
        assert_eq!(memory.block().unwrap(), first.offset(512));
        memory.free_giga(one);
        assert_eq!(memory.giga(), Some(one));
        memory.free_giga(one);
        let blocks = std::iter::from_fn(|| memory.block()).count();
        assert_eq!(blocks, 509 + 512, "a free GiB serves blocks, too");
        assert_eq!(memory.in_use(), GIGA_PAGES + 512 * 1023);
    }
}

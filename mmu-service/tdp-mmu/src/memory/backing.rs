//! Pages behind a slot: a guest_memfd, or the user memory of shared pages.
//!
//! Source: virt/kvm/guest_memfd.c, `kvm_gmem_get_pfn()`, `kvm_gmem_punch_hole()`.
//! Pages are of order 0. They appear when first asked for and go with a hole or the file.
//!
//! Model: each 2 MiB region of a file is backed by one 2 MiB block of host memory, handed out
//! with its first page and given back with its last, so that runs of pages stay runs.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::{Arc, OnceLock};

use tdx_defs::Pfn;

use crate::host::{BLOCK_PAGES, Host};
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{Mutex, lock};

/// Regions of one lazily made chunk: 128 MiB.
const CHUNK_REGIONS: u64 = 64;
const WORDS: usize = (BLOCK_PAGES / 64) as usize;

/// One 2 MiB region.
///
/// Who adds a page sets its bit and then looks at the block; who takes the last page away takes the
/// block and then looks at the bits. Either sees the other.
struct Region {
    /// First frame of the block behind it; 0 while there is none.
    block: AtomicU64,
    /// Which of its pages exist.
    present: [AtomicU64; WORDS],
}

struct Chunk {
    regions: Box<[Region]>,
    /// Held while blocks come and go, and while pages go.
    changing: Mutex<()>,
}

/// Why a page could not be had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoPage {
    /// The page is poisoned (EHWPOISON).
    Poisoned,
    /// Host memory is spent.
    NoMemory,
    /// The file is closed (EFAULT).
    Closed,
}

/// The pages behind one slot, by page offset.
pub(crate) struct Backing {
    host: Arc<Host>,
    pages: u64,
    chunks: Box<[OnceLock<Chunk>]>,
    /// Pages that the module may still hold: never given back to the host.
    leaked: Mutex<BTreeSet<u64>>,
    poisoned: Mutex<BTreeSet<u64>>,
    any_poisoned: AtomicU64,
    is_closed: AtomicBool,
}

impl Backing {
    pub(crate) fn new(host: Arc<Host>, pages: u64) -> Self {
        let chunks = pages.div_ceil(BLOCK_PAGES * CHUNK_REGIONS);
        Self {
            host,
            pages,
            chunks: (0..chunks).map(|_| OnceLock::new()).collect(),
            leaked: Mutex::default(),
            poisoned: Mutex::default(),
            any_poisoned: AtomicU64::new(0),
            is_closed: AtomicBool::new(false),
        }
    }

    /// kvm_gmem_release: there are no pages from now on.
    pub(crate) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
    }

    fn chunk(&self, region: u64) -> &Chunk {
        let chunk = (region / CHUNK_REGIONS) as usize % self.chunks.len();
        self.chunks[chunk].get_or_init(|| Chunk {
            regions: (0..CHUNK_REGIONS).map(|_| Region::new()).collect(),
            changing: Mutex::new(()),
        })
    }

    /// kvm_gmem_get_pfn: the frame of page `offset`, made if it is not there.
    pub(crate) fn get(&self, offset: u64) -> Result<Pfn, NoPage> {
        if self.is_closed.load(Ordering::Relaxed) {
            return Err(NoPage::Closed);
        }
        if self.any_poisoned.load(Ordering::Relaxed) != 0 && lock(&self.poisoned).contains(&offset)
        {
            return Err(NoPage::Poisoned);
        }
        let (region_at, page) = (offset / BLOCK_PAGES, offset % BLOCK_PAGES);
        let chunk = self.chunk(region_at);
        let region = &chunk.regions[(region_at % CHUNK_REGIONS) as usize];
        // While a region has its block, pages come without the lock: many vCPUs fault in it.
        let block = region.block.load(Ordering::SeqCst);
        if block != 0 {
            region.add(page);
            if region.block.load(Ordering::SeqCst) == block {
                return Ok(Pfn::new(block + page));
            }
        }
        let _changing = lock(&chunk.changing);
        let block = match region.block.load(Ordering::SeqCst) {
            0 => {
                let block = self.host.memory.block().ok_or(NoPage::NoMemory)?;
                region.block.store(block.get(), Ordering::SeqCst);
                block.get()
            }
            block => block,
        };
        region.add(page);
        Ok(Pfn::new(block + page))
    }

    /// Page `offset` is `pfn` since an earlier process. Whether that can be: the first page of a
    /// region claims its block from the host, the others must lie in it.
    pub(crate) fn adopt(&self, offset: u64, pfn: Pfn) -> bool {
        let (region_at, page) = (offset / BLOCK_PAGES, offset % BLOCK_PAGES);
        let Some(block) = pfn.get().checked_sub(page).filter(|_| offset < self.pages) else {
            return false;
        };
        let chunk = self.chunk(region_at);
        let region = &chunk.regions[(region_at % CHUNK_REGIONS) as usize];
        let _changing = lock(&chunk.changing);
        match region.block.load(Ordering::Acquire) {
            0 if self.host.memory.reserve(Pfn::new(block)) => {
                region.block.store(block, Ordering::Release);
            }
            there if there == block && block != 0 => {}
            _ => return false,
        }
        region.present[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::AcqRel);
        true
    }

    /// Takes pages away; how many there were.
    pub(crate) fn punch(&self, range: Range<u64>) -> u64 {
        let range = range.start..range.end.min(self.pages);
        let mut freed = 0;
        let mut at = range.start;
        while at < range.end {
            let region_at = at / BLOCK_PAGES;
            let region_end = (region_at + 1) * BLOCK_PAGES;
            let part = at..range.end.min(region_end);
            let chunk_at = (region_at / CHUNK_REGIONS) as usize;
            match self.chunks.get(chunk_at).and_then(OnceLock::get) {
                Some(chunk) => {
                    freed += self.punch_region(chunk, region_at, part);
                    at = region_end;
                }
                None => at = (region_at / CHUNK_REGIONS + 1) * CHUNK_REGIONS * BLOCK_PAGES,
            }
        }
        freed
    }

    fn punch_region(&self, chunk: &Chunk, region_at: u64, part: Range<u64>) -> u64 {
        let region = &chunk.regions[(region_at % CHUNK_REGIONS) as usize];
        let _changing = lock(&chunk.changing);
        let first = region_at * BLOCK_PAGES;
        let freed = region.clear(part.start - first..part.end - first);
        if region.is_empty() {
            // Whoever adds a page after this looks at the block again and finds none; a page that
            // came before is seen here, and keeps the block.
            let block = region.block.swap(0, Ordering::SeqCst);
            if block == 0 {
                return freed;
            }
            if !region.is_empty() {
                region.block.store(block, Ordering::SeqCst);
                return freed;
            }
            let leaked = lock(&self.leaked);
            // Model: a page that the module did not let go must not serve anybody else.
            if leaked.range(first..first + BLOCK_PAGES).next().is_none() {
                self.host.memory.free_block(Pfn::new(block));
            }
        }
        freed
    }

    /// Marks a page that the module may still hold.
    pub(crate) fn leak(&self, offset: u64) {
        lock(&self.leaked).insert(offset);
    }

    /// Pages that will never be given back.
    pub(crate) fn leaked(&self) -> u64 {
        lock(&self.leaked).len() as u64
    }

    /// A memory error hits the page.
    pub(crate) fn poison(&self, offset: u64) {
        if lock(&self.poisoned).insert(offset) {
            self.any_poisoned.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        self.punch(0..self.pages);
    }
}

impl Region {
    fn new() -> Self {
        Self {
            block: AtomicU64::new(0),
            present: [const { AtomicU64::new(0) }; WORDS],
        }
    }

    /// A page comes; most often it is there.
    fn add(&self, page: u64) {
        let (word, bit) = (&self.present[(page / 64) as usize], 1 << (page % 64));
        if word.load(Ordering::SeqCst) & bit == 0 {
            word.fetch_or(bit, Ordering::SeqCst);
        }
    }

    fn is_empty(&self) -> bool {
        self.present
            .iter()
            .all(|word| word.load(Ordering::SeqCst) == 0)
    }

    /// Clears the bits of `range`; how many were set.
    fn clear(&self, range: Range<u64>) -> u64 {
        let mut cleared = 0;
        for (at, word) in (0u64..).step_by(64).zip(&self.present) {
            let (from, to) = (range.start.max(at), range.end.min(at + 64));
            if from < to {
                let mask = (u64::MAX >> (64 - (to - from))) << (from - at);
                let old = word.fetch_and(!mask, Ordering::SeqCst);
                cleared += u64::from((old & mask).count_ones());
            }
        }
        cleared
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::host::Platform;

    fn host() -> Arc<Host> {
        Host::new(Platform {
            tdmrs: vec![crate::MemoryRange {
                base: 1 << 30,
                size: 1 << 30,
                reserved: vec![],
            }],
            hkid_start: 32,
            hkid_count: 4,
            global_hkid: 32,
            maxpa: 52,
            hkid_bits: 6,
            logical_processors: 1,
            packages: 1,
            tdcs_pages: 6,
            tdvps_pages: 6,
            attributes_fixed0: 0,
            attributes_fixed1: 0,
            xfam_fixed0: 3,
            xfam_fixed1: 3,
            five_level: false,
        })
        .unwrap()
    }

    #[test]
    fn neighbours_are_neighbours_and_holes_give_memory_back() {
        let host = host();
        let file = Backing::new(Arc::clone(&host), 2048);
        let first = file.get(512).unwrap();
        assert_eq!(file.get(513).unwrap(), first.offset(1));
        assert_eq!(file.get(512).unwrap(), first, "a page stays where it is");
        assert_eq!(host.pages_in_use(), 512);
        assert_eq!(file.punch(0..513), 1);
        assert_eq!(host.pages_in_use(), 512, "a page of the block is left");
        assert_eq!(file.punch(0..4096), 1);
        assert_eq!(host.pages_in_use(), 0);
    }

    #[test]
    fn leaked_and_poisoned_pages_are_kept_apart() {
        let host = host();
        let file = Backing::new(Arc::clone(&host), 1024);
        file.get(3).unwrap();
        file.leak(3);
        file.poison(600);
        assert_eq!(file.get(600), Err(NoPage::Poisoned));
        drop(file);
        assert_eq!(
            host.pages_in_use(),
            512,
            "the block with the leaked page stays away"
        );
    }

    #[test]
    fn masks_reach_the_ends_of_words() {
        let region = Region::new();
        for word in &region.present {
            word.store(u64::MAX, Ordering::Relaxed);
        }
        assert_eq!(region.clear(63..65), 2);
        assert_eq!(region.clear(0..512), 510);
        assert!(region.is_empty());
    }
}

//! Contents of simulated memory: what the host wrote for the module to read, and what private
//! pages hold. Pages that nobody wrote read as zero and take no room. A page that came with a call
//! is not copied on its way into a TD; who writes to it first takes a copy.
//!
//! Source: the memory operands of TDH.MNG.INIT and TDH.MEM.PAGE.ADD; sections on page contents of
//! TDH.MEM.PAGE.ADD, RELOCATE, MR.EXTEND, MEM.RD and MEM.WR.
//!
//! Model: host memory is bounded at [`HOST_PAGES`] pages; when it is full, the page written longest
//! ago is forgotten and reads as zero. Operands travel with their call, so nothing depends on old
//! ones. Private contents are bounded by the pages that TDs own.

use std::collections::{HashMap, VecDeque};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tdx_defs::{Hpa, PAGE_SIZE, Pfn};

use crate::Module;
use crate::pamt::{PageSize, PamtEntry};

/// Bytes of a page, as a length.
pub(crate) const PAGE: usize = 4096;
/// Pages of host memory that are kept: 16 MiB.
pub const HOST_PAGES: usize = 4096;
/// The low six bits of a frame number choose one.
const SHARDS: usize = 64;

/// Contents of a page.
pub(crate) type Page = [u8; PAGE];

/// The offset of an address in its page.
pub(crate) fn offset_in_page(hpa: u64) -> usize {
    (hpa & (PAGE_SIZE - 1)) as usize
}

/// What a page holds.
#[derive(Debug, Clone)]
pub(crate) enum Contents {
    /// As it came with a call, of [`PAGE`] bytes; others may hold the same.
    Shared(Bytes),
    Own(Box<Page>),
}

impl Contents {
    /// A page of zeros.
    fn zero() -> Self {
        Self::Own(Box::new([0; PAGE]))
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        match self {
            Self::Shared(bytes) => bytes,
            Self::Own(page) => &page[..],
        }
    }

    fn is_zero(&self) -> bool {
        self.bytes().iter().all(|byte| *byte == 0)
    }

    /// Bytes from `offset` on; `None` if they leave the page.
    fn read(&self, offset: usize, bytes: &mut [u8]) -> Option<()> {
        let stored = self.bytes().get(offset..offset + bytes.len())?;
        bytes.copy_from_slice(stored);
        Some(())
    }

    fn write(&mut self, offset: usize, bytes: &[u8]) {
        if let Self::Shared(shared) = self {
            let mut page = Box::new([0; PAGE]);
            let length = shared.len().min(PAGE);
            page[..length].copy_from_slice(&shared[..length]);
            *self = Self::Own(page);
        }
        if let Self::Own(page) = self
            && let Some(target) = page.get_mut(offset..offset + bytes.len())
        {
            target.copy_from_slice(bytes);
        }
    }
}

// Poisoned maps are whole: every change of one is a single insertion or removal.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that the host writes and the module reads.
#[derive(Debug, Default)]
pub(crate) struct HostMemory {
    pages: Mutex<HostPages>,
}

#[derive(Debug, Default)]
struct HostPages {
    by_frame: Pages,
    oldest_first: VecDeque<Pfn>,
}

impl HostPages {
    fn page_mut(&mut self, frame: Pfn) -> &mut Contents {
        if !self.by_frame.contains_key(&frame) {
            self.make_room();
            self.oldest_first.push_back(frame);
        }
        self.by_frame.entry(frame).or_insert_with(Contents::zero)
    }

    /// Forgets the oldest page when there are too many.
    fn make_room(&mut self) {
        if self.by_frame.len() >= HOST_PAGES
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            self.by_frame.remove(&oldest);
        }
    }
}

impl HostMemory {
    /// Writes bytes from `hpa` on.
    pub(crate) fn write(&self, hpa: Hpa, mut bytes: &[u8]) {
        let mut pages = lock(&self.pages);
        let mut at = hpa.get();
        while !bytes.is_empty() {
            let offset = offset_in_page(at);
            let (now, later) = bytes.split_at(bytes.len().min(PAGE - offset));
            // Zeros to a page that is not there change nothing.
            let frame = Hpa::new(at).frame();
            if pages.by_frame.contains_key(&frame) || now.iter().any(|byte| *byte != 0) {
                pages.page_mut(frame).write(offset, now);
            }
            bytes = later;
            at = at.wrapping_add(now.len() as u64);
        }
    }

    /// Writes a page as a whole: [`PAGE`] bytes.
    pub(crate) fn write_page(&self, frame: Pfn, page: Bytes) {
        let page = Contents::Shared(page);
        let mut pages = lock(&self.pages);
        if let Some(stored) = pages.by_frame.get_mut(&frame) {
            *stored = page;
        } else if !page.is_zero() {
            pages.make_room();
            pages.oldest_first.push_back(frame);
            pages.by_frame.insert(frame, page);
        }
    }

    /// Reads bytes from `hpa` on; they must lie in one page.
    pub(crate) fn read(&self, hpa: Hpa, bytes: &mut [u8]) {
        let offset = offset_in_page(hpa.get());
        let pages = lock(&self.pages);
        let stored = pages.by_frame.get(&hpa.frame());
        if stored.and_then(|page| page.read(offset, bytes)).is_none() {
            bytes.fill(0);
        }
    }

    /// What a page holds, unless nobody wrote it.
    pub(crate) fn page(&self, frame: Pfn) -> Option<Contents> {
        lock(&self.pages).by_frame.get(&frame).cloned()
    }
}

type Pages = HashMap<Pfn, Contents>;

/// Whether private memory is what its TD wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[must_use = "a poisoned read is a machine check"]
pub(crate) enum Integrity {
    Good,
    /// The host wrote to it.
    Poisoned,
}

/// What is stored of a private page.
#[derive(Debug)]
pub(crate) enum Stored {
    Content(Contents),
    Poisoned,
}

type PrivatePages = HashMap<Pfn, Stored>;

/// Contents of private pages, by 4 KiB frame.
#[derive(Debug)]
pub(crate) struct PrivateMemory {
    shards: Box<[Mutex<PrivatePages>]>,
}

impl Default for PrivateMemory {
    fn default() -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
        }
    }
}

impl PrivateMemory {
    fn shard(&self, frame: Pfn) -> MutexGuard<'_, PrivatePages> {
        let shard = (frame.get() & 0x3F) as usize;
        lock(&self.shards[shard])
    }

    /// Fills a page. Answers whether it has to be stored, that is, is not all zero.
    pub(crate) fn fill(&self, frame: Pfn, page: Contents) -> bool {
        let stored = !page.is_zero();
        if stored {
            self.shard(frame).insert(frame, Stored::Content(page));
        }
        stored
    }

    /// Takes the contents of a page away.
    pub(crate) fn take(&self, frame: Pfn) -> Option<Stored> {
        self.shard(frame).remove(&frame)
    }

    /// Puts back what [`PrivateMemory::take`] took, at another page.
    pub(crate) fn put(&self, frame: Pfn, stored: Stored) {
        self.shard(frame).insert(frame, stored);
    }

    /// Spoils a page.
    pub(crate) fn poison(&self, frame: Pfn) {
        self.put(frame, Stored::Poisoned);
    }

    /// Reads bytes that lie in one page.
    pub(crate) fn read(&self, hpa: Hpa, bytes: &mut [u8]) -> Integrity {
        let offset = offset_in_page(hpa.get());
        let read = match self.shard(hpa.frame()).get(&hpa.frame()) {
            Some(Stored::Poisoned) => return Integrity::Poisoned,
            Some(Stored::Content(page)) => page.read(offset, bytes),
            None => None,
        };
        if read.is_none() {
            bytes.fill(0);
        }
        Integrity::Good
    }

    /// What a page holds: `None` where all of it is zero.
    pub(crate) fn page(&self, frame: Pfn) -> (Integrity, Option<Contents>) {
        match self.shard(frame).get(&frame) {
            Some(Stored::Poisoned) => (Integrity::Poisoned, None),
            Some(Stored::Content(page)) => (Integrity::Good, Some(page.clone())),
            None => (Integrity::Good, None),
        }
    }

    /// Writes bytes that lie in one page.
    pub(crate) fn write(&self, hpa: Hpa, bytes: &[u8]) -> Integrity {
        let offset = offset_in_page(hpa.get());
        let mut shard = self.shard(hpa.frame());
        let stored = shard
            .entry(hpa.frame())
            .or_insert_with(|| Stored::Content(Contents::zero()));
        match stored {
            Stored::Poisoned => Integrity::Poisoned,
            Stored::Content(page) => {
                page.write(offset, bytes);
                Integrity::Good
            }
        }
    }
}

impl Module {
    /// Drops what is stored for a page that leaves its TD. The caller holds its metadata.
    pub(crate) fn forget_contents(&self, page: Hpa, size: PageSize, entry: &PamtEntry) {
        if !entry.has_content() {
            return;
        }
        for number in 0..size.pages() {
            self.private.take(page.frame().offset(number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte(memory: &HostMemory, hpa: u64) -> u8 {
        let mut byte = [0];
        memory.read(Hpa::new(hpa), &mut byte);
        byte[0]
    }

    #[test]
    fn host_writes_cross_pages_and_absent_pages_read_as_zero() {
        let memory = HostMemory::default();
        memory.write(Hpa::new(0x1FFF), &[1, 2]);
        assert_eq!(
            [0x1FFE, 0x1FFF, 0x2000, 0x2001].map(|at| byte(&memory, at)),
            [0, 1, 2, 0]
        );
        memory.write(Hpa::new(0x1FFF), &[0]);
        assert_eq!(byte(&memory, 0x1FFF), 0);
    }

    #[test]
    fn a_page_written_as_a_whole_takes_the_place_of_what_was_there() {
        let memory = HostMemory::default();
        let page = |byte| Bytes::from(vec![byte; PAGE]);
        memory.write_page(Pfn::new(1), page(0));
        assert!(memory.page(Pfn::new(1)).is_none(), "zeros take no room");
        memory.write(Hpa::new(0x1001), &[1]);
        memory.write_page(Pfn::new(1), page(7));
        memory.write(Hpa::new(0x1002), &[2]);
        assert_eq!([0x1001, 0x1002].map(|at| byte(&memory, at)), [7, 2]);
        memory.write_page(Pfn::new(1), page(0));
        assert_eq!(byte(&memory, 0x1001), 0);
        for frame in 2..=1 + HOST_PAGES as u64 {
            memory.write_page(Pfn::new(frame), page(7));
        }
        assert!(memory.page(Pfn::new(1)).is_none(), "the oldest made room");
        assert_eq!(lock(&memory.pages).by_frame.len(), HOST_PAGES);
    }

    #[test]
    fn host_memory_forgets_the_oldest_page_when_it_is_full() {
        let memory = HostMemory::default();
        for page in 0..=HOST_PAGES as u64 {
            memory.write(Hpa::new(page * PAGE_SIZE), &[7]);
        }
        assert_eq!((byte(&memory, 0), byte(&memory, PAGE_SIZE)), (0, 7));
        assert_eq!(lock(&memory.pages).by_frame.len(), HOST_PAGES);
    }

    #[test]
    fn a_private_page_of_zeros_takes_no_room() {
        let memory = PrivateMemory::default();
        assert!(!memory.fill(Pfn::new(1), Contents::zero()));
        let page = Bytes::from(vec![5; PAGE]);
        assert!(memory.fill(Pfn::new(1), Contents::Shared(page.clone())));
        assert_eq!(memory.write(Hpa::new(0x1008), &[6]), Integrity::Good);
        let mut bytes = [0; 2];
        assert_eq!(memory.read(Hpa::new(0x1007), &mut bytes), Integrity::Good);
        assert_eq!(bytes, [5, 6]);
        assert!(page.iter().all(|byte| *byte == 5), "a copy was written");
        assert!(memory.take(Pfn::new(1)).is_some());
        assert!(memory.take(Pfn::new(1)).is_none());
    }
}

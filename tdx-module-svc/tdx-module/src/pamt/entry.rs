//! One PAMT entry: 16 bytes in two atomic words.
//!
//! Source: TDX module source, pamt_manager.h. Word 0: bits 15:0 lock, 22:16 page type, bit 23
//! content, 63:24 owner (HPA bits 51:12 of the TDR). Word 1: BEPOCH.
//!
//! Model: bit 23 belongs to the type in the real layout. Here it says that the contents of the
//! page (or of a 4 KiB part of it) are stored, so that freeing a page that nobody wrote needs no
//! look-up.
//!
//! Invariants
//! - P1  Type, owner and content change only under the exclusive lock of the entry, or of the
//!   large entry above while a range is merged or split.
//! - P2  Freeing sets the type alone: owner and BEPOCH stay as they were.

use std::sync::atomic::{AtomicU64, Ordering};

use tdx_defs::{Hpa, PAGE_SHIFT, PageType};

use crate::locks::{self, Busy, LOCK_MASK, LockMode, Side};

const TYPE_SHIFT: u32 = 16;
const TYPE_MASK: u64 = 0x7F << TYPE_SHIFT;
const CONTENT: u64 = 1 << 23;
const OWNER_SHIFT: u32 = 24;
const OWNER_MASK: u64 = u64::MAX << OWNER_SHIFT;

/// Metadata of one page of 4 KiB, 2 MiB or 1 GiB.
#[derive(Debug, Default)]
pub(crate) struct PamtEntry {
    word: AtomicU64,
    bepoch: AtomicU64,
}

impl PamtEntry {
    /// An entry of a page type that nobody owns.
    pub(super) fn of_type(page_type: PageType) -> Self {
        let entry = Self::default();
        entry
            .word
            .store(u64::from(page_type.0) << TYPE_SHIFT, Ordering::Relaxed);
        entry
    }

    /// The page type.
    pub(crate) fn page_type(&self) -> PageType {
        PageType(((self.load() & TYPE_MASK) >> TYPE_SHIFT & 0x7F) as u8)
    }

    /// Whether the page is neither free nor reserved.
    pub(crate) fn is_used(&self) -> bool {
        ![PageType::NDA, PageType::RSVD].contains(&self.page_type())
    }

    /// The TDR of the owner; stale on a free page.
    pub(crate) fn owner(&self) -> Hpa {
        Hpa::new(self.load() >> OWNER_SHIFT << PAGE_SHIFT)
    }

    /// Whether the page, or a part of it, has stored contents.
    pub(crate) fn has_content(&self) -> bool {
        self.load() & CONTENT != 0
    }

    /// The TLB epoch of the last block.
    pub(crate) fn bepoch(&self) -> u64 {
        self.bepoch.load(Ordering::Relaxed)
    }

    /// Sets the TLB epoch of the last block. Takes no lock, as in the module.
    pub(crate) fn set_bepoch(&self, epoch: u64) {
        self.bepoch.store(epoch, Ordering::Relaxed);
    }

    /// Gives the page to a TD: type and owner, BEPOCH 0.
    pub(crate) fn assign(&self, page_type: PageType, owner: Hpa) {
        self.bepoch.store(0, Ordering::Relaxed);
        self.assign_keeping_bepoch(page_type, owner);
    }

    /// Gives the page to a TD without a new BEPOCH.
    pub(crate) fn assign_keeping_bepoch(&self, page_type: PageType, owner: Hpa) {
        let value = Self::value(page_type, owner);
        self.update(|word| word & u64::from(LOCK_MASK) | value);
    }

    /// Frees the page. Owner and BEPOCH keep their stale values.
    pub(crate) fn free(&self) {
        self.update(|word| word & !(TYPE_MASK | CONTENT));
    }

    /// Says whether contents are stored.
    pub(crate) fn set_content(&self, stored: bool) {
        self.update(|word| {
            if stored {
                word | CONTENT
            } else {
                word & !CONTENT
            }
        });
    }

    /// Takes the lock of this entry for a host call.
    pub(crate) fn try_lock(&self, mode: LockMode) -> Result<EntryGuard<'_>, Busy> {
        self.acquire(mode, Side::Host)?;
        Ok(EntryGuard { entry: self, mode })
    }

    /// Takes the lock without a guard.
    pub(crate) fn acquire(&self, mode: LockMode, side: Side) -> Result<(), Busy> {
        self.try_update(|lock| locks::acquired(lock, mode, side), side)
    }

    /// Gives back what [`PamtEntry::acquire`] took.
    pub(crate) fn release(&self, mode: LockMode) {
        self.word
            .fetch_sub(u64::from(locks::held_by(mode)), Ordering::Release);
    }

    /// Type and owner in their places.
    fn value(page_type: PageType, owner: Hpa) -> u64 {
        owner.frame().get() << OWNER_SHIFT | u64::from(page_type.0) << TYPE_SHIFT
    }

    fn load(&self) -> u64 {
        self.word.load(Ordering::Relaxed)
    }

    fn update(&self, change: impl Fn(u64) -> u64) {
        let mut word = self.load();
        while let Err(now) = self.word.compare_exchange_weak(
            word,
            change(word),
            Ordering::Release,
            Ordering::Relaxed,
        ) {
            word = now;
        }
    }

    fn try_update(&self, next: impl Fn(u16) -> Option<u16>, side: Side) -> Result<(), Busy> {
        let mut word = self.load();
        loop {
            let lock = (word & 0xFFFF) as u16;
            let wanted = next(lock);
            let store = wanted.unwrap_or_else(|| locks::refused(lock, side));
            match self.word.compare_exchange_weak(
                word,
                word & !u64::from(LOCK_MASK) | u64::from(store),
                Ordering::Acquire,
                Ordering::Relaxed,
            ) {
                Ok(_) => return wanted.map(|_| ()).ok_or(Busy),
                Err(now) => word = now,
            }
        }
    }
}

/// Holds the lock of a [`PamtEntry`] until it is dropped.
#[derive(Debug)]
#[must_use = "the lock is released when the guard is dropped"]
pub(crate) struct EntryGuard<'p> {
    entry: &'p PamtEntry,
    mode: LockMode,
}

impl<'p> EntryGuard<'p> {
    /// The locked entry.
    pub(crate) fn entry(&self) -> &'p PamtEntry {
        self.entry
    }

    /// Gives the page, which is held exclusively, to a TD and releases it in the same step.
    pub(crate) fn assign_and_release(self, page_type: PageType, owner: Hpa) {
        let entry = self.entry;
        let held = u64::from(locks::held_by(self.mode));
        // The update below releases the lock in the guard's place.
        std::mem::forget(self);
        entry.bepoch.store(0, Ordering::Relaxed);
        let value = PamtEntry::value(page_type, owner);
        entry.update(|word| ((word & u64::from(LOCK_MASK)) - held) | value);
    }

    /// Makes the only shared holder the exclusive one.
    pub(super) fn promote(mut self) -> Result<Self, Busy> {
        self.entry.try_update(locks::promoted, Side::Host)?;
        self.mode = LockMode::Exclusive;
        Ok(self)
    }
}

impl Drop for EntryGuard<'_> {
    fn drop(&mut self) {
        self.entry.release(self.mode);
    }
}

const _: () = assert!(size_of::<PamtEntry>() == 16);
const _: () = assert!(OWNER_MASK == !0 << OWNER_SHIFT);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn type_owner_and_lock_share_a_word_without_disturbing_each_other() {
        let entry = PamtEntry::default();
        let guard = entry.try_lock(LockMode::Exclusive).unwrap();
        entry.set_bepoch(7);
        entry.assign(PageType::REG, Hpa::new(0xF_FFFF_FFFF_F000));
        assert_eq!(entry.page_type(), PageType::REG);
        assert_eq!(entry.owner(), Hpa::new(0xF_FFFF_FFFF_F000));
        assert_eq!(entry.bepoch(), 0);
        assert!(entry.try_lock(LockMode::Shared).is_err());
        drop(guard);
        assert!(entry.try_lock(LockMode::Shared).is_ok());
    }

    #[test]
    fn a_freed_page_shows_its_old_owner() {
        let entry = PamtEntry::default();
        entry.assign(PageType::EPT, Hpa::new(0x4000_0000));
        entry.set_bepoch(3);
        entry.set_content(true);
        entry.free();
        assert_eq!(entry.page_type(), PageType::NDA);
        assert_eq!((entry.owner(), entry.bepoch()), (Hpa::new(0x4000_0000), 3));
        assert!(!entry.has_content());
    }

    #[test]
    fn a_shared_guard_is_promoted_when_it_is_alone() {
        let entry = PamtEntry::default();
        let guard = entry.try_lock(LockMode::Shared).unwrap().promote().unwrap();
        assert!(entry.try_lock(LockMode::Shared).is_err());
        drop(guard);
        let other = entry.try_lock(LockMode::Shared).unwrap();
        assert!(entry.try_lock(LockMode::Shared).unwrap().promote().is_err());
        drop(other);
        assert!(entry.try_lock(LockMode::Exclusive).is_ok());
    }
}

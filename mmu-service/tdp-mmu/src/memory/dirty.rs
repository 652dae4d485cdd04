//! The dirty log of a slot: one bit a page.
//!
//! Source: virt/kvm/kvm_main.c, `mark_page_dirty_in_slot()`, `kvm_get_dirty_log_protect()`,
//! `kvm_clear_dirty_log_protect()`.
//!
//! The log belongs to the memory, not to one description of the slot: a fault that still has the
//! slot from before logging began finds the bitmap here. The kernel waits for such faults instead
//! (SRCU).

use arc_swap::ArcSwapOption;

use crate::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;

/// `dirty_bitmap` of a slot, while KVM_MEM_LOG_DIRTY_PAGES is set.
#[derive(Default)]
pub(crate) struct DirtyLog(ArcSwapOption<DirtyBits>);

/// One bit a page, in words of 64.
pub(crate) struct DirtyBits(Box<[AtomicU64]>);

impl DirtyLog {
    /// kvm_slot_dirty_track_enabled.
    pub(crate) fn is_on(&self) -> bool {
        self.0.load().is_some()
    }

    /// Begins a log of `pages` pages, all of them dirty or none.
    pub(crate) fn enable(&self, pages: u64, all_set: bool) {
        let words = (0..pages.div_ceil(64)).map(|word| {
            let left = pages - word * 64;
            let all = if left >= 64 {
                u64::MAX
            } else {
                (1 << left) - 1
            };
            AtomicU64::new(if all_set { all } else { 0 })
        });
        self.0.store(Some(Arc::new(DirtyBits(words.collect()))));
    }

    pub(crate) fn disable(&self) {
        self.0.store(None);
    }

    /// mark_page_dirty_in_slot.
    pub(crate) fn mark(&self, page: u64) {
        if let Some(bits) = &*self.0.load() {
            let word = usize::try_from(page / 64).ok();
            if let Some(word) = word.and_then(|at| bits.0.get(at)) {
                word.fetch_or(1 << (page % 64), Ordering::AcqRel);
            }
        }
    }

    pub(crate) fn bits(&self) -> Option<Arc<DirtyBits>> {
        self.0.load_full()
    }
}

impl DirtyBits {
    /// The bitmap as it is.
    pub(crate) fn copy(&self) -> Vec<u64> {
        self.0
            .iter()
            .map(|word| word.load(Ordering::Acquire))
            .collect()
    }

    pub(crate) fn words(&self) -> usize {
        self.0.len()
    }

    /// Clears the bits of `mask` in a word; those that were set.
    pub(crate) fn take(&self, word: usize, mask: u64) -> u64 {
        match self.0.get(word) {
            Some(bits) if bits.load(Ordering::Acquire) & mask != 0 => {
                bits.fetch_and(!mask, Ordering::AcqRel) & mask
            }
            _ => 0,
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn bits_are_marked_taken_and_lost_with_the_log() {
        let log = DirtyLog::default();
        log.mark(3);
        assert!(!log.is_on() && log.bits().is_none());
        log.enable(70, true);
        assert_eq!(log.bits().unwrap().copy(), [u64::MAX, 0x3F]);
        log.enable(70, false);
        for page in [0, 63, 64, 69, 500] {
            log.mark(page);
        }
        let bits = log.bits().unwrap();
        assert_eq!(bits.copy(), [1 << 63 | 1, 1 | 1 << 5]);
        assert_eq!(bits.take(0, !1), 1 << 63);
        assert_eq!(bits.take(0, !1), 0, "taken");
        assert_eq!(bits.take(9, 1), 0, "no such word");
        assert_eq!(bits.copy(), [1, 0x21]);
        log.disable();
        assert!(!log.is_on());
    }
}

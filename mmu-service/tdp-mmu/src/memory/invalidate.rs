//! The invalidation sequence: how a fault learns that what it looked up is being taken away.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_mmu_invalidate_begin()`, `kvm_mmu_invalidate_range_add()`,
//! `kvm_mmu_invalidate_end()`; include/linux/kvm_host.h, `mmu_invalidate_retry_gfn()`.
//!
//! Begin, range_add and end run under the write side of mmu_lock. A fault samples [`seq`]
//! before it looks anything up and asks [`retry`] under the read side.
//!
//! [`seq`]: Invalidation::seq
//! [`retry`]: Invalidation::retry

use std::ops::Range;

use tdx_defs::Gfn;

use crate::mmu::lock::WriteGuard;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Condvar, Mutex, lock, wait_while};

#[derive(Debug, Default)]
pub(crate) struct Invalidation {
    seq: AtomicU64,
    in_progress: AtomicU64,
    /// The hull of all ranges in progress: frames, end exclusive.
    start: AtomicU64,
    end: AtomicU64,
    gate: Mutex<()>,
    ended: Condvar,
}

impl Invalidation {
    pub(crate) fn seq(&self) -> u64 {
        self.seq.load(Ordering::Acquire)
    }

    pub(crate) fn begin(&self, _held: &WriteGuard<'_>) {
        if self.in_progress.fetch_add(1, Ordering::AcqRel) == 0 {
            self.start.store(u64::MAX, Ordering::Relaxed);
            self.end.store(0, Ordering::Relaxed);
        }
    }

    /// Widens the hull.
    pub(crate) fn range_add(&self, _held: &WriteGuard<'_>, range: &Range<u64>) {
        self.start.fetch_min(range.start, Ordering::Relaxed);
        self.end.fetch_max(range.end, Ordering::Relaxed);
    }

    pub(crate) fn end(&self, _held: &WriteGuard<'_>) {
        self.seq.fetch_add(1, Ordering::AcqRel);
        self.in_progress.fetch_sub(1, Ordering::AcqRel);
        let _gate = lock(&self.gate);
        self.ended.notify_all();
    }

    /// Waits while operations are in progress; the caller holds no lock that they need.
    ///
    /// Model: the kernel lets the guest fault again and again meanwhile.
    pub(crate) fn wait_until_quiet(&self) {
        if self.in_progress() != 0 {
            let gate = lock(&self.gate);
            drop(wait_while(&self.ended, gate, |()| self.in_progress() != 0));
        }
    }

    /// Whether a fault on `gfn` that sampled `seq` must start over.
    pub(crate) fn retry(&self, seq: u64, gfn: Gfn) -> bool {
        let hull = self.start.load(Ordering::Relaxed)..self.end.load(Ordering::Relaxed);
        let inside = self.in_progress.load(Ordering::Acquire) != 0 && hull.contains(&gfn.get());
        inside || self.seq() != seq
    }

    /// Operations in progress: none while the VM is quiet.
    pub(crate) fn in_progress(&self) -> u64 {
        self.in_progress.load(Ordering::Acquire)
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use crate::mmu::lock::MmuLock;

    #[test]
    fn faults_retry_inside_the_hull_and_after_the_end() {
        let lock = MmuLock::default();
        let held = lock.write();
        let invalidation = Invalidation::default();
        let before = invalidation.seq();
        invalidation.begin(&held);
        invalidation.range_add(&held, &(0..10));
        invalidation.range_add(&held, &(100..110));
        for (gfn, retry) in [
            (5, true),
            (50, true),
            (109, true),
            (110, false),
            (200, false),
        ] {
            assert_eq!(
                invalidation.retry(before, Gfn::new(gfn)),
                retry,
                "gfn {gfn}"
            );
        }
        invalidation.end(&held);
        assert!(
            invalidation.retry(before, Gfn::new(200)),
            "the sequence has moved"
        );
        assert!(!invalidation.retry(invalidation.seq(), Gfn::new(5)));
        assert_eq!(invalidation.in_progress(), 0);
    }
}

//! The largest leaf that a frame may have, and what keeps it small.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `kvm_mmu_max_mapping_level()`, `kvm_mmu_hugepage_adjust()`,
//! `hugepage_has_attrs()`; page_track.c, `kvm_write_track_add_gfn()`.
//!
//! Model: the kernel keeps a count for each possible huge page of a slot, changed with whatever
//! forbids it. Here the reasons themselves are asked, at most two levels a fault.

use std::collections::BTreeSet;

use tdx_defs::{Gfn, Level};

use super::Vm;
use crate::memory::slots::Slot;
use crate::mmu::huge::MAX_LEAF_LEVEL;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};

/// Frames whose writes somebody tracks (`kvm_gfn_is_write_tracked()`).
#[derive(Default)]
pub(crate) struct WriteTracked {
    any: AtomicBool,
    gfns: Mutex<BTreeSet<u64>>,
}

impl WriteTracked {
    pub(crate) fn set(&self, gfn: Gfn, tracked: bool) {
        let mut gfns = lock(&self.gfns);
        match tracked {
            true => gfns.insert(gfn.get()),
            false => gfns.remove(&gfn.get()),
        };
        self.any.store(!gfns.is_empty(), Ordering::Release);
    }

    pub(crate) fn contains(&self, gfn: Gfn) -> bool {
        self.any_of(gfn, Level::L4K)
    }

    /// Whether the range of the leaf of `level` over a frame has a tracked one.
    fn any_of(&self, gfn: Gfn, level: Level) -> bool {
        let first = gfn.align_down(level.pages()).get();
        self.any.load(Ordering::Acquire)
            && lock(&self.gfns)
                .range(first..first + level.pages())
                .next()
                .is_some()
    }
}

impl Vm {
    /// Whether huge leaves must not be executable.
    pub(super) fn nx_huge_pages(&self) -> bool {
        self.nx_huge_pages.load(Ordering::Acquire)
    }

    /// req_level of a fault on shared memory. The caller holds mmu_lock.
    pub(super) fn req_level(&self, slot: &Slot, gfn: Gfn) -> Level {
        // The dirty log is about small pages.
        match slot.log.is_on() {
            true => Level::L4K,
            false => self.max_mapping_level(slot, gfn),
        }
    }

    /// kvm_mmu_max_mapping_level of shared memory.
    pub(super) fn max_mapping_level(&self, slot: &Slot, gfn: Gfn) -> Level {
        // Pages of a guest_memfd are of order 0.
        if self.is_gmem_only(slot) {
            return Level::L4K;
        }
        let mut level = MAX_LEAF_LEVEL.min(slot.user.largest());
        while let Some(child) = level.child() {
            let forbidden = slot.forbids(gfn, level)
                || self.tracked.any_of(gfn, level)
                || self.is_mixed(gfn, level);
            if !forbidden {
                break;
            }
            level = child;
        }
        match level {
            Level::L4K => level,
            level => level.min(slot.user.level(slot.offset(gfn))),
        }
    }

    /// hugepage_test_mixed: whether some frames of the range are private and some shared.
    pub(super) fn is_mixed(&self, gfn: Gfn, level: Level) -> bool {
        if !self.is_td() {
            return false;
        }
        let first = gfn.align_down(level.pages()).get();
        let range = first..first + level.pages();
        let private = lock(&self.private);
        !private.is_all(&range, true) && !private.is_all(&range, false)
    }
}

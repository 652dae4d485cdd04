//! TLB tracking: which translations may still be cached on some processor.
//!
//! Source: TDX module source, td_control_structures.h, helpers.c `adjust_tlb_tracking_state`,
//! helpers.h `is_tlb_tracked`, tdh_mem_track.c.
//!
//! TD_EPOCH counts TDH.MEM.TRACK. A vCPU that enters the guest is counted under the parity of the
//! epoch at its entry until it exits. Blocking stamps a page with the epoch; once no vCPU is inside
//! since that epoch or an earlier one, nobody can have a stale translation.
//!
//! Invariants
//! - E1  REFCOUNT[e mod 2] counts the vCPUs that are inside since epoch e, for the present epoch
//!   and the one before. No vCPU is inside since an older one.

use std::sync::atomic::{AtomicU16, AtomicU64, Ordering};

use crate::locks::Lock;

/// Set in a BEPOCH that holds a migration epoch instead.
const MIGRATION_EPOCH: u64 = 1 << 63;

/// A vCPU is still inside since the epoch before the present one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct PreviousEpochBusy;

/// Epoch and reference counts of a TD.
#[derive(Debug)]
pub(crate) struct Epochs {
    /// TD_EPOCH: held exclusively by TDH.MEM.TRACK.
    pub(crate) lock: Lock,
    current: AtomicU64,
    refcount: [AtomicU16; 2],
}

impl Default for Epochs {
    fn default() -> Self {
        Self {
            lock: Lock::default(),
            current: AtomicU64::new(1),
            refcount: Default::default(),
        }
    }
}

impl Epochs {
    /// TD_EPOCH.
    pub(crate) fn current(&self) -> u64 {
        self.current.load(Ordering::Acquire)
    }

    /// REFCOUNT: vCPUs inside since an even and since an odd epoch.
    pub(crate) fn refcount(&self) -> [u16; 2] {
        [self.inside_since(0), self.inside_since(1)]
    }

    fn inside_since(&self, epoch: u64) -> u16 {
        self.refcount[(epoch & 1) as usize].load(Ordering::Acquire)
    }

    /// Starts a new epoch. The caller holds the lock exclusively.
    pub(crate) fn advance(&self) -> Result<(), PreviousEpochBusy> {
        let current = self.current();
        if self.inside_since(current.wrapping_sub(1)) != 0 {
            return Err(PreviousEpochBusy);
        }
        self.current
            .store(current.wrapping_add(1), Ordering::Release);
        Ok(())
    }

    /// A vCPU goes inside; answers the epoch under which it is counted. The caller holds the lock
    /// shared.
    pub(crate) fn enter(&self) -> u64 {
        let epoch = self.current();
        self.refcount[(epoch & 1) as usize].fetch_add(1, Ordering::AcqRel);
        epoch
    }

    /// A vCPU that was counted under `epoch` is inside no more.
    pub(crate) fn leave(&self, epoch: u64) {
        self.refcount[(epoch & 1) as usize].fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether no translation from before `bepoch` can be cached any more.
    pub(crate) fn is_tracked(&self, bepoch: u64) -> bool {
        if bepoch & MIGRATION_EPOCH != 0 {
            return false;
        }
        match self.current().checked_sub(bepoch) {
            None | Some(0) => false,
            Some(1) => self.inside_since(bepoch) == 0,
            Some(_) => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_timeline_holds() {
        let epochs = Epochs::default();
        epochs.refcount[1].store(1, Ordering::Relaxed);
        let blocked = epochs.current();
        assert!(!epochs.is_tracked(blocked), "blocked now");
        epochs.advance().unwrap();
        assert!(!epochs.is_tracked(blocked), "still inside since the block");
        assert_eq!(epochs.advance(), Err(PreviousEpochBusy));
        epochs.refcount[1].store(0, Ordering::Relaxed);
        assert!(epochs.is_tracked(blocked), "everybody has left");
        epochs.refcount[0].store(1, Ordering::Relaxed);
        epochs.advance().unwrap();
        assert!(epochs.is_tracked(blocked), "two epochs ago");
        assert!(!epochs.is_tracked(MIGRATION_EPOCH | blocked));
    }
}

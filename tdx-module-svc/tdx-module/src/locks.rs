//! Try-locks: shared or exclusive, with host priority.
//!
//! Source: TDX module source, tdx_locks.h; the reference manual's lock operands (OP_STATE,
//! SEPT_TREE, TD_EPOCH, KOT …).
//!
//! A lock word has 16 bits: bit 0 exclusive, bit 1 host priority, bits 15:2 number of shared
//! holders. Nothing waits: an attempt succeeds or answers [`Busy`], which a leaf turns into
//! `TDX_OPERAND_BUSY` with the id of the object.
//!
//! Invariants
//! - L1  Exclusive excludes every other holder.
//! - L2  A failed host attempt leaves the priority bit set, a successful host attempt clears it,
//!   and a release does not touch it. While it is set, guest attempts fail.

use std::sync::atomic::{AtomicU16, Ordering};

/// The bits of a lock word inside a wider word.
pub(crate) const LOCK_MASK: u16 = u16::MAX;
const EXCLUSIVE: u16 = 1;
const HOST_PRIORITY: u16 = 1 << 1;
/// One shared holder.
const SHARED: u16 = 1 << 2;
/// The holder count is full.
const SHARED_FULL: u16 = !(SHARED - 1);

/// How a lock is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockMode {
    /// Beside other shared holders.
    Shared,
    /// Alone.
    Exclusive,
}

/// Who asks for a lock: a SEAMCALL leaf, or a TDCALL leaf of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Host,
    Guest,
}

/// Somebody else holds the lock.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Busy;

/// The word after a successful attempt, or `None` when it is held.
pub(crate) fn acquired(word: u16, mode: LockMode, side: Side) -> Option<u16> {
    if side == Side::Guest && word & HOST_PRIORITY != 0 {
        return None;
    }
    let held = word & !HOST_PRIORITY;
    match mode {
        LockMode::Shared if held & EXCLUSIVE == 0 && held & SHARED_FULL != SHARED_FULL => {
            Some(held + SHARED)
        }
        LockMode::Exclusive if held == 0 => Some(EXCLUSIVE),
        _ => None,
    }
}

/// The word after a failed attempt.
pub(crate) fn refused(word: u16, side: Side) -> u16 {
    match side {
        Side::Host => word | HOST_PRIORITY,
        Side::Guest => word,
    }
}

/// The word after the only shared holder has become the exclusive one.
pub(crate) fn promoted(word: u16) -> Option<u16> {
    (word & !HOST_PRIORITY == SHARED).then_some(EXCLUSIVE)
}

/// What a release takes away from the word.
pub(crate) fn held_by(mode: LockMode) -> u16 {
    match mode {
        LockMode::Shared => SHARED,
        LockMode::Exclusive => EXCLUSIVE,
    }
}

/// A lock that stands alone.
#[derive(Debug, Default)]
pub(crate) struct Lock {
    word: AtomicU16,
}

impl Lock {
    /// Takes the lock for a host call.
    pub(crate) fn try_lock(&self, mode: LockMode) -> Result<LockGuard<'_>, Busy> {
        self.acquire(mode, Side::Host)?;
        Ok(LockGuard { lock: self, mode })
    }

    /// Takes the lock without a guard; [`Lock::release`] gives it back.
    pub(crate) fn acquire(&self, mode: LockMode, side: Side) -> Result<(), Busy> {
        let mut word = self.word.load(Ordering::Relaxed);
        loop {
            let next = acquired(word, mode, side);
            let store = next.unwrap_or_else(|| refused(word, side));
            match self
                .word
                .compare_exchange_weak(word, store, Ordering::Acquire, Ordering::Relaxed)
            {
                Ok(_) => return next.map(|_| ()).ok_or(Busy),
                Err(now) => word = now,
            }
        }
    }

    /// Gives back what [`Lock::acquire`] took.
    pub(crate) fn release(&self, mode: LockMode) {
        self.word.fetch_sub(held_by(mode), Ordering::Release);
    }
}

/// Holds a [`Lock`] until it is dropped.
#[derive(Debug)]
#[must_use = "the lock is released when the guard is dropped"]
pub(crate) struct LockGuard<'l> {
    lock: &'l Lock,
    mode: LockMode,
}

impl Drop for LockGuard<'_> {
    fn drop(&mut self) {
        self.lock.release(self.mode);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exclusive_excludes_and_shared_shares() {
        let lock = Lock::default();
        let first = lock.try_lock(LockMode::Shared).unwrap();
        let second = lock.try_lock(LockMode::Shared).unwrap();
        assert_eq!(lock.try_lock(LockMode::Exclusive).unwrap_err(), Busy);
        drop((first, second));
        let alone = lock.try_lock(LockMode::Exclusive).unwrap();
        assert_eq!(lock.try_lock(LockMode::Shared).unwrap_err(), Busy);
        drop(alone);
        assert!(lock.try_lock(LockMode::Exclusive).is_ok());
    }

    #[test]
    fn a_failed_host_attempt_keeps_the_guest_out_until_a_host_succeeds() {
        let lock = Lock::default();
        lock.acquire(LockMode::Exclusive, Side::Guest).unwrap();
        assert_eq!(lock.acquire(LockMode::Shared, Side::Host), Err(Busy));
        lock.release(LockMode::Exclusive);
        assert_eq!(lock.acquire(LockMode::Shared, Side::Guest), Err(Busy));
        lock.acquire(LockMode::Shared, Side::Host).unwrap();
        lock.acquire(LockMode::Shared, Side::Guest).unwrap();
    }

    #[test]
    fn the_shared_count_stops_before_it_overflows() {
        let mut word = 0;
        let mut holders = 0u32;
        while let Some(next) = acquired(word, LockMode::Shared, Side::Host) {
            word = next;
            holders += 1;
        }
        assert_eq!(holders, (1 << 14) - 1);
    }

    #[test]
    fn only_the_last_shared_holder_is_promoted() {
        assert_eq!(promoted(SHARED), Some(EXCLUSIVE));
        assert_eq!(promoted(SHARED | HOST_PRIORITY), Some(EXCLUSIVE));
        assert_eq!(promoted(2 * SHARED), None);
    }
}

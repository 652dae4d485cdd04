//! `mmu_lock`: many readers or one writer, without a word that all readers write.
//!
//! Source: `kvm->mmu_lock` (rwlock_t). Each vCPU counts itself in a slot of its own cache line;
//! the writer raises a flag and sweeps the slots. A reader that sees the flag steps back, so a
//! waiting writer is not starved.
//!
//! Invariants
//! - L1  While a [`WriteGuard`] lives, every slot is zero.
//! - L2  Predicates change before `gate` is taken to notify, and are read under `gate` before a
//!   wait, so no wake-up is lost.

use crossbeam_utils::CachePadded;

use crate::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use crate::sync::{Condvar, Mutex, MutexGuard, lock, wait_while};

/// More vCPUs than this share slots; a slot is a count, so that is safe.
const SLOTS: usize = if cfg!(feature = "shuttle") { 2 } else { 16 };

pub(crate) struct MmuLock {
    readers: [CachePadded<AtomicU32>; SLOTS],
    writing: AtomicBool,
    /// Readers that wait for the writer to end (`rwlock_needbreak`).
    waiting: AtomicU32,
    writer: Mutex<()>,
    gate: Mutex<()>,
    changed: Condvar,
}

impl Default for MmuLock {
    fn default() -> Self {
        Self {
            readers: std::array::from_fn(|_| CachePadded::new(AtomicU32::new(0))),
            writing: AtomicBool::new(false),
            waiting: AtomicU32::new(0),
            writer: Mutex::new(()),
            gate: Mutex::new(()),
            changed: Condvar::new(),
        }
    }
}

/// The read side.
pub(crate) struct ReadGuard<'a> {
    lock: &'a MmuLock,
    slot: usize,
}

/// The write side.
pub(crate) struct WriteGuard<'a> {
    lock: &'a MmuLock,
    _writer: MutexGuard<'a, ()>,
}

impl MmuLock {
    /// Takes the read side in the slot of `vcpu`.
    pub(crate) fn read(&self, vcpu: u32) -> ReadGuard<'_> {
        let slot = vcpu as usize % SLOTS;
        loop {
            self.readers[slot].fetch_add(1, Ordering::SeqCst);
            if !self.writing.load(Ordering::SeqCst) {
                return ReadGuard { lock: self, slot };
            }
            self.leave(slot);
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let gate = lock(&self.gate);
            drop(wait_while(&self.changed, gate, |()| {
                self.writing.load(Ordering::SeqCst)
            }));
            self.waiting.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// Takes the write side.
    pub(crate) fn write(&self) -> WriteGuard<'_> {
        let writer = lock(&self.writer);
        self.writing.store(true, Ordering::SeqCst);
        for slot in &self.readers {
            if slot.load(Ordering::SeqCst) != 0 {
                let gate = lock(&self.gate);
                drop(wait_while(&self.changed, gate, |()| {
                    slot.load(Ordering::SeqCst) != 0
                }));
            }
        }
        WriteGuard {
            lock: self,
            _writer: writer,
        }
    }

    /// Whether a writer waits for the readers to leave.
    pub(crate) fn is_wanted(&self) -> bool {
        self.writing.load(Ordering::Relaxed)
    }

    fn leave(&self, slot: usize) {
        self.readers[slot].fetch_sub(1, Ordering::SeqCst);
        if self.writing.load(Ordering::SeqCst) {
            self.notify();
        }
    }

    fn notify(&self) {
        let _gate = lock(&self.gate);
        self.changed.notify_all();
    }
}

impl Drop for ReadGuard<'_> {
    fn drop(&mut self) {
        self.lock.leave(self.slot);
    }
}

impl WriteGuard<'_> {
    /// Whether a reader waits (`rwlock_needbreak`).
    pub(crate) fn is_contended(&self) -> bool {
        self.lock.waiting.load(Ordering::SeqCst) != 0
    }
}

impl Drop for WriteGuard<'_> {
    fn drop(&mut self) {
        self.lock.writing.store(false, Ordering::SeqCst);
        self.lock.notify();
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU64;

    #[test]
    fn a_writer_is_alone_and_readers_are_not() {
        let lock = MmuLock::default();
        let (readers, torn, writes) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for vcpu in 0..3 {
                let (lock, readers, torn) = (&lock, &readers, &torn);
                scope.spawn(move || {
                    for _ in 0..2000 {
                        let _guard = lock.read(vcpu);
                        readers.fetch_add(1, Ordering::SeqCst);
                        if readers.load(Ordering::SeqCst) == 0 {
                            torn.fetch_add(1, Ordering::SeqCst);
                        }
                        readers.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _guard = lock.write();
                        if readers.load(Ordering::SeqCst) != 0 {
                            torn.fetch_add(1, Ordering::SeqCst);
                        }
                        writes.fetch_add(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert_eq!((torn.into_inner(), writes.into_inner()), (0, 1000));
    }

    #[test]
    fn two_readers_hold_it_at_once() {
        let lock = MmuLock::default();
        let _first = lock.read(0);
        let _second = lock.read(1);
    }
}

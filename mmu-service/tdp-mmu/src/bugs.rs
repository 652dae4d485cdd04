//! KVM_BUG_ON, WARN_ON and a VM's death.
//!
//! Source: include/linux/kvm_host.h, `KVM_BUG_ON()`, `kvm_vm_bugged()`, `kvm_vm_dead()`.
//! A check that fails marks the VM bugged and dead; the operation that met it goes on as the
//! kernel's would. Every later ioctl answers EIO, teardown still runs.

use std::sync::{Arc, OnceLock};

use crate::ledger::{Ledger, Note};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};

/// Reports kept for `warnings`; a VM that goes wrong in a loop must not eat the host.
const MAX_REPORTS: usize = 256;

/// A check of the mirror root or of the change protocol, numbered as in docs/checks.md.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Check {
    /// Last reference of a valid root put.
    B1,
    /// Root types name neither direct nor mirror.
    B2,
    /// Empty attribute filter on a mirrored VM.
    B3,
    /// INVALID among the types of roots to invalidate.
    B4,
    /// A valid root on the way to its final zap.
    B5,
    /// Atomic change of a frozen entry.
    B6,
    /// Atomic change of a mirror entry to not-present.
    B7,
    /// Atomic change of a present mirror entry.
    B8,
    /// Mirror table without a page for the module.
    B9,
    /// Mirror table whose level or frame does not fit its entry.
    B10,
    /// Non-atomic change of a mirror entry to present.
    B11,
    /// Non-atomic change from or to FROZEN.
    B12,
    /// Mirror table removed under the read side of mmu_lock.
    B13,
    /// The module did not give a table page back.
    B14,
    /// Huge leaf above the goal of a mirror fault.
    B16,
    /// Install on an invalid root.
    B17,
    /// A walk that stopped at its goal.
    B18,
    /// Leaf for a table of another level.
    B19,
    /// Leaf changed to another page: a real host stops.
    B20,
    /// Not-present to not-present without MMIO or FROZEN.
    B21,
    /// Direct walk above the SHARED bit.
    B22,
    /// INVALID among the types of roots to age.
    B23,
    /// Frame with the SHARED bit in page resolution.
    B24,
    /// An entry that raises #VE by mistake.
    B25,
    /// Pages counted after the end of the VM.
    B26,
    /// Leaf hook above 4 KiB.
    B27,
    /// Leaf hook for an entry that is not present, or not RWX.
    B28,
    /// Leaf hook before finalisation without a source page.
    B29,
    /// Removal without a key id, or above 4 KiB.
    B30,
    /// Table freed while a key id is assigned.
    B31,
    /// SHARED bit of the root level differs from the VM's.
    B32,
    /// Instruction fetch from shared memory.
    B34,
    /// vCPU freed while a processor may hold its state.
    B35,
    /// The module answered an error that KVM does not expect.
    Seamcall,
    /// A call whose outcome could not be settled.
    Unsettled,
    /// The guest touched a page that it has not accepted: kvm_vm_dead, without a warning.
    PendingAccess,
}

impl Check {
    /// Every check, in the order of the enum.
    pub const ALL: [Self; 36] = [
        Self::B1,
        Self::B2,
        Self::B3,
        Self::B4,
        Self::B5,
        Self::B6,
        Self::B7,
        Self::B8,
        Self::B9,
        Self::B10,
        Self::B11,
        Self::B12,
        Self::B13,
        Self::B14,
        Self::B16,
        Self::B17,
        Self::B18,
        Self::B19,
        Self::B20,
        Self::B21,
        Self::B22,
        Self::B23,
        Self::B24,
        Self::B25,
        Self::B26,
        Self::B27,
        Self::B28,
        Self::B29,
        Self::B30,
        Self::B31,
        Self::B32,
        Self::B34,
        Self::B35,
        Self::Seamcall,
        Self::Unsettled,
        Self::PendingAccess,
    ];
}

// A check that is missing above has a higher number than the last one that is there.
const _: () = assert!(Check::PendingAccess as usize + 1 == Check::ALL.len());

/// What went wrong in a VM so far.
#[derive(Default)]
pub struct Bugs {
    bugged: AtomicBool,
    dead: AtomicBool,
    reports: Mutex<Vec<(Check, String)>>,
    /// Why the VM was dead already in an earlier process.
    earlier: Mutex<Option<String>>,
    ledger: OnceLock<Arc<dyn Ledger>>,
}

impl Bugs {
    /// KVM_BUG_ON: the VM is bugged and dead from here on.
    pub(crate) fn bug(&self, check: Check, why: impl FnOnce() -> String) {
        self.warn(check, why);
        self.bugged.store(true, Ordering::SeqCst);
        self.end();
    }

    /// WARN_ON: reported, nothing else.
    pub(crate) fn warn(&self, check: Check, why: impl FnOnce() -> String) {
        let mut reports = lock(&self.reports);
        if reports.len() < MAX_REPORTS {
            reports.push((check, why()));
        }
    }

    /// kvm_vm_dead: no WARN, but no further ioctl either.
    pub(crate) fn kill(&self, check: Check, why: impl FnOnce() -> String) {
        self.warn(check, why);
        self.end();
    }

    fn end(&self) {
        if !self.dead.swap(true, Ordering::SeqCst)
            && let Some(ledger) = self.ledger.get()
        {
            let note = Note::Dead(self.reason().unwrap_or_default());
            if let Err(error) = ledger.note(note) {
                tracing::warn!(%error, "the death of a VM is not written down");
            }
        }
    }

    /// Has the VM's death written down.
    pub(crate) fn keep_in(&self, ledger: Arc<dyn Ledger>) {
        let _ = self.ledger.set(ledger);
    }

    /// The VM was dead already in an earlier process.
    pub(crate) fn was_dead(&self, reason: String) {
        lock(&self.earlier).get_or_insert(reason);
        self.dead.store(true, Ordering::SeqCst);
    }

    /// Whether a KVM_BUG_ON fired.
    pub fn is_bugged(&self) -> bool {
        self.bugged.load(Ordering::SeqCst)
    }

    /// Whether every ioctl answers EIO.
    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::SeqCst)
    }

    /// The checks that failed, oldest first.
    pub fn reports(&self) -> Vec<(Check, String)> {
        lock(&self.reports).clone()
    }

    /// The first reason, for people.
    pub fn reason(&self) -> Option<String> {
        if let Some(earlier) = &*lock(&self.earlier) {
            return Some(earlier.clone());
        }
        lock(&self.reports)
            .first()
            .map(|(check, why)| format!("{check:?}: {why}"))
    }
}

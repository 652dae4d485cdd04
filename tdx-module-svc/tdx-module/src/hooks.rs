//! Conditions outside the calls: locks that another processor seems to hold, pending interrupts,
//! entropy, key programming, time-stamp adjustment. For tests, and for a service that replays
//! recorded sequences over a wire.
//!
//! | recorded hook | here |
//! |---|---|
//! | `HOLD_LOCK`, mode `shared` or `exclusive` | [`Module::hold_lock`] |
//! | `HOLD_LOCK` of a `SEPT_ENTRY`, mode `host` | [`Module::hold_lock`] |
//! | `HOLD_LOCK` of a `SEPT_ENTRY`, mode `guest` | [`Module::hold_lock_as_guest`] |
//! | `RELEASE_LOCK` | [`Module::release_lock`] |
//! | `HOST_INTERRUPT_PENDING` | [`Module::set_interrupt_pending`] |
//! | `KEY_PROGRAM_RESULT` | [`Module::set_key_program_result`] |
//! | `ENTROPY` | [`Module::set_entropy`] |
//! | `TSC_ADJUST` | [`Module::set_tsc_adjust`] |
//!
//! They act on the whole module and stay until they are taken back. A lock that was taken by a
//! hook has to be released by one; releasing a lock that no hook holds breaks its word.

use tdx_defs::{Gpa, Hpa, TdxLevel};

use crate::Module;
pub use crate::conditions::KeyProgramResult;
use crate::locks::{LockMode, Side};
use crate::pamt::PageSize;
use crate::sept::Slot;
pub use crate::system::SystemState;
use crate::td::Td;

/// A lock of the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LockObject {
    /// The metadata of a page; of a TDR, the lock of the TD.
    Pamt {
        /// The page.
        hpa: Hpa,
        /// The size at which its metadata is meant.
        size: PageSize,
    },
    /// SEPT_TREE of a TD.
    SeptTree {
        /// The TD.
        tdr: Hpa,
    },
    /// OP_STATE of a TD.
    OpState {
        /// The TD.
        tdr: Hpa,
    },
    /// TD_EPOCH of a TD.
    TdEpoch {
        /// The TD.
        tdr: Hpa,
    },
    /// RTMR of a TD.
    Rtmr {
        /// The TD.
        tdr: Hpa,
    },
    /// The key ownership table.
    Kot,
    /// One Secure EPT entry, always exclusive.
    SeptEntry {
        /// The TD.
        tdr: Hpa,
        /// Address that the entry maps.
        gpa: Gpa,
        /// Its level.
        level: TdxLevel,
    },
}

impl Module {
    /// Takes a lock as if another processor were in the middle of a call. Answers whether it was
    /// there and free.
    pub fn hold_lock(&self, object: LockObject, mode: LockMode) -> bool {
        self.hold_lock_as(object, mode, Side::Host)
    }

    /// As [`Module::hold_lock`], but as a guest call that runs on another processor.
    pub fn hold_lock_as_guest(&self, object: LockObject, mode: LockMode) -> bool {
        self.hold_lock_as(object, mode, Side::Guest)
    }

    fn hold_lock_as(&self, object: LockObject, mode: LockMode, side: Side) -> bool {
        self.with_lock(object, |lock| match lock {
            Lock::Page(entry) => entry.acquire(mode, side).is_ok(),
            Lock::Word(lock) => lock.acquire(mode, side).is_ok(),
            Lock::Entry(slot) => slot.acquire(),
        })
    }

    /// Gives back what [`Module::hold_lock`] took. Answers whether the object is there.
    pub fn release_lock(&self, object: LockObject, mode: LockMode) -> bool {
        self.with_lock(object, |lock| {
            match lock {
                Lock::Page(entry) => entry.release(mode),
                Lock::Word(lock) => lock.release(mode),
                Lock::Entry(slot) => slot.release(),
            }
            true
        })
    }

    /// Whether the random number generator delivers.
    pub fn set_entropy(&self, available: bool) {
        self.conditions.set_entropy(available);
    }

    /// IA32_TSC_ADJUST; zero when the module was initialised.
    pub fn set_tsc_adjust(&self, value: u64) {
        self.conditions.set_tsc_adjust(value);
    }

    /// A host interrupt is pending; a call sees it from its check number `after_checks` on.
    pub fn set_interrupt_pending(&self, pending: bool, after_checks: u32) {
        self.conditions.set_interrupt(pending, after_checks);
    }

    /// What programming a key results in.
    pub fn set_key_program_result(&self, result: KeyProgramResult) {
        self.conditions.set_key_program(result);
    }

    /// Puts a defect into the module: it no longer flushes TLBs. With it a test sees that a missing
    /// flush is noticed.
    pub fn leave_out_tlb_flushes(&self, leave_out: bool) {
        self.conditions.leave_out_flushes(leave_out);
    }

    /// Puts the module as a whole into a state. Nothing but the dispatcher looks at it, and the
    /// leaves that lead to SYS_READY have no work to do.
    pub fn set_system_state(&self, state: SystemState) {
        self.system.set(state);
    }

    /// Marks a TD fatal, as a machine check in its memory would. Answers whether it is there.
    pub fn mark_fatal(&self, tdr: Hpa) -> bool {
        let td = self.tds.get(tdr);
        td.map(|td| td.set_fatal()).is_some()
    }

    fn with_lock(&self, object: LockObject, act: impl FnOnce(Lock<'_>) -> bool) -> bool {
        let with_td =
            |tdr, act: &mut dyn FnMut(&Td) -> bool| self.tds.get(tdr).is_some_and(|td| act(&td));
        let mut act = Some(act);
        let mut act = |lock: Lock<'_>| act.take().is_some_and(|act| act(lock));
        match object {
            LockObject::Pamt { hpa, size } => self
                .pamt
                .entry(hpa, size)
                .is_some_and(|entry| act(Lock::Page(entry))),
            LockObject::Kot => act(Lock::Word(&self.kot.lock)),
            LockObject::SeptTree { tdr } => with_td(tdr, &mut |td| act(Lock::Word(&td.sept_lock))),
            LockObject::OpState { tdr } => {
                with_td(tdr, &mut |td| act(Lock::Word(&td.op_state_lock)))
            }
            LockObject::TdEpoch { tdr } => {
                with_td(tdr, &mut |td| act(Lock::Word(&td.epochs().lock)))
            }
            LockObject::Rtmr { tdr } => with_td(tdr, &mut |td| act(Lock::Word(&td.rtmrs().lock))),
            LockObject::SeptEntry { tdr, gpa, level } => with_td(tdr, &mut |td| {
                let root_level = td.config().map(|config| config.root_level);
                let walk = root_level.and_then(|root| td.sept().walk(root, gpa, level.get()));
                walk.is_some_and(|walk| {
                    walk.slot.level == level.get() && act(Lock::Entry(walk.slot))
                })
            }),
        }
    }
}

enum Lock<'m> {
    Page(&'m crate::pamt::PamtEntry),
    Word(&'m crate::locks::Lock),
    Entry(Slot<'m>),
}

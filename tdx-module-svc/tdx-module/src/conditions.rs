//! Conditions outside the calls: what the processor and its devices would report.
//!
//! Source: host interrupt check of interruptible leaves, PCONFIG results, RDRAND, IA32_TSC_ADJUST.
//! All are quiet unless a test says otherwise through [`crate::hooks`].

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};

/// Vector of the interrupts that the host sends here: Linux's reschedule vector, with which it
/// kicks vCPUs.
pub(crate) const HOST_VECTOR: u8 = 0xFD;

/// Outcome of programming an encryption key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum KeyProgramResult {
    /// Done.
    Ok = 0,
    /// The key table is in use.
    DeviceBusy = 1,
    /// No entropy for a key.
    EntropyError = 2,
}

#[derive(Debug, Default)]
pub(crate) struct Conditions {
    no_entropy: AtomicBool,
    tsc_adjust: AtomicU64,
    interrupt: AtomicBool,
    /// Checks of a call that pass before it sees the interrupt.
    interrupt_after: AtomicU32,
    key_program: AtomicU8,
    no_flushes: AtomicBool,
}

impl Conditions {
    /// Whether the random number generator delivers.
    pub(crate) fn has_entropy(&self) -> bool {
        !self.no_entropy.load(Ordering::Relaxed)
    }

    pub(crate) fn set_entropy(&self, available: bool) {
        self.no_entropy.store(!available, Ordering::Relaxed);
    }

    /// IA32_TSC_ADJUST; zero when the module was initialised.
    pub(crate) fn tsc_adjust(&self) -> u64 {
        self.tsc_adjust.load(Ordering::Relaxed)
    }

    pub(crate) fn set_tsc_adjust(&self, value: u64) {
        self.tsc_adjust.store(value, Ordering::Relaxed);
    }

    /// Whether check number `check` of a call, from 0 on, sees a pending interrupt.
    pub(crate) fn interrupt_pending(&self, check: u32) -> bool {
        self.interrupt.load(Ordering::Relaxed)
            && check >= self.interrupt_after.load(Ordering::Relaxed)
    }

    pub(crate) fn set_interrupt(&self, pending: bool, after_checks: u32) {
        self.interrupt_after.store(after_checks, Ordering::Relaxed);
        self.interrupt.store(pending, Ordering::Relaxed);
    }

    /// What programming a key results in.
    pub(crate) fn key_program(&self) -> KeyProgramResult {
        match self.key_program.load(Ordering::Relaxed) {
            1 => KeyProgramResult::DeviceBusy,
            2 => KeyProgramResult::EntropyError,
            _ => KeyProgramResult::Ok,
        }
    }

    /// Whether TLB flushes are left out, a defect of the module that a test puts in.
    pub(crate) fn leaves_out_flushes(&self) -> bool {
        self.no_flushes.load(Ordering::Relaxed)
    }

    pub(crate) fn leave_out_flushes(&self, leave_out: bool) {
        self.no_flushes.store(leave_out, Ordering::Relaxed);
    }

    pub(crate) fn set_key_program(&self, result: KeyProgramResult) {
        self.key_program.store(result as u8, Ordering::Relaxed);
    }
}

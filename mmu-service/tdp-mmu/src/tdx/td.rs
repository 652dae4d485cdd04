//! What KVM keeps of a TD.
//!
//! Source: arch/x86/kvm/vmx/tdx.h, `struct kvm_tdx`.

use tdx_defs::Pfn;

use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering};
use crate::sync::{Mutex, lock};

/// kvm_tdx->state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum TdState {
    Uninitialized,
    Initialized,
    Runnable,
}

impl TdState {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Uninitialized => "uninitialized",
            Self::Initialized => "initialized",
            Self::Runnable => "runnable",
        }
    }
}

/// A TD, seen by its host.
pub(crate) struct Td {
    pub(crate) tdr: Pfn,
    /// Control pages that were added.
    pub(crate) tdcs: Mutex<Vec<Pfn>>,
    state: AtomicU8,
    /// 0: none, or given back.
    hkid: AtomicU32,
    /// While set, a vCPU about to enter the guest turns back.
    pub(crate) wait_for_sept_zap: AtomicBool,
    mrtd: Mutex<Option<[u8; 48]>>,
}

impl Td {
    pub(crate) fn new(tdr: Pfn, hkid: u32) -> Self {
        Self {
            tdr,
            tdcs: Mutex::default(),
            state: AtomicU8::new(0),
            hkid: AtomicU32::new(hkid),
            wait_for_sept_zap: AtomicBool::new(false),
            mrtd: Mutex::new(None),
        }
    }

    /// In an ordinary VM: nothing to build, nothing to call.
    pub(crate) fn none() -> Self {
        let td = Self::new(Pfn::default(), 0);
        td.state.store(2, Ordering::Release);
        td
    }

    pub(crate) fn state(&self) -> TdState {
        match self.state.load(Ordering::Acquire) {
            0 => TdState::Uninitialized,
            1 => TdState::Initialized,
            _ => TdState::Runnable,
        }
    }

    pub(crate) fn set_initialized(&self) {
        self.state.store(1, Ordering::Release);
    }

    pub(crate) fn set_runnable(&self, mrtd: [u8; 48]) {
        *lock(&self.mrtd) = Some(mrtd);
        self.state.store(2, Ordering::Release);
    }

    pub(crate) fn is_runnable(&self) -> bool {
        self.state() == TdState::Runnable
    }

    /// The key id while it is assigned.
    pub(crate) fn hkid(&self) -> Option<u32> {
        match self.hkid.load(Ordering::Acquire) {
            0 => None,
            hkid => Some(hkid),
        }
    }

    /// The key id has been given back.
    pub(crate) fn release_hkid(&self) -> Option<u32> {
        match self.hkid.swap(0, Ordering::AcqRel) {
            0 => None,
            hkid => Some(hkid),
        }
    }

    pub(crate) fn mrtd(&self) -> Option<[u8; 48]> {
        *lock(&self.mrtd)
    }
}

//! What KVM keeps of a TD.
//!
//! Source: arch/x86/kvm/vmx/tdx.h, `struct kvm_tdx`.

use tdx_defs::Pfn;

use super::guest_mode::GuestModes;
use crate::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
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
    /// 0: none yet.
    tdr: AtomicU64,
    /// Control pages that were added.
    pub(crate) tdcs: Mutex<Vec<Pfn>>,
    state: AtomicU8,
    /// 0: none, or given back.
    hkid: AtomicU32,
    /// Which vCPUs are inside the guest.
    pub(crate) modes: GuestModes,
    mrtd: Mutex<Option<[u8; 48]>>,
}

impl Td {
    /// A VM that is no TD yet.
    pub(crate) fn new() -> Self {
        Self {
            tdr: AtomicU64::new(0),
            tdcs: Mutex::default(),
            state: AtomicU8::new(0),
            hkid: AtomicU32::new(0),
            modes: GuestModes::default(),
            mrtd: Mutex::new(None),
        }
    }

    /// The page and the key id that TDH.MNG.CREATE is about to get.
    pub(crate) fn assign(&self, tdr: Pfn, hkid: u32) {
        self.tdr.store(tdr.get(), Ordering::Release);
        self.hkid.store(hkid, Ordering::Release);
    }

    /// The TD root page; frame 0 while there is none.
    pub(crate) fn tdr(&self) -> Pfn {
        Pfn::new(self.tdr.load(Ordering::Acquire))
    }

    /// The TD root page has gone back to the host.
    pub(crate) fn forget_tdr(&self) {
        self.tdr.store(0, Ordering::Release);
    }

    /// In an ordinary VM: nothing to build, nothing to call.
    pub(crate) fn none() -> Self {
        let td = Self::new();
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

//! Private key ids that TDs can have.
//!
//! Source: Linux, arch/x86/virt/vmx/tdx/tdx.c, `tdx_guest_keyid_alloc()`.

use std::collections::BTreeSet;

use super::Platform;
use crate::sync::{Mutex, lock};

pub(crate) struct HkidPool {
    free: Mutex<BTreeSet<u32>>,
    limit: u64,
}

impl HkidPool {
    pub(super) fn new(platform: &Platform) -> Self {
        let all = platform.hkid_start..platform.hkid_start.saturating_add(platform.hkid_count);
        let free: BTreeSet<u32> = all.filter(|&hkid| hkid != platform.global_hkid).collect();
        Self {
            limit: free.len() as u64,
            free: Mutex::new(free),
        }
    }

    /// The lowest free key id.
    pub(crate) fn alloc(&self) -> Option<u32> {
        lock(&self.free).pop_first()
    }

    pub(crate) fn free(&self, hkid: u32) {
        lock(&self.free).insert(hkid);
    }

    /// How many TDs can have one at once.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }
}

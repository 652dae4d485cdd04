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
        let free = all(platform);
        Self {
            limit: free.len() as u64,
            free: Mutex::new(free),
        }
    }

    /// As if none had been handed out.
    pub(super) fn reset(&self, platform: &Platform) {
        *lock(&self.free) = all(platform);
    }

    /// The lowest free key id.
    pub(crate) fn alloc(&self) -> Option<u32> {
        lock(&self.free).pop_first()
    }

    /// Takes one that an earlier process gave to a TD. Whether it was free.
    pub(crate) fn reserve(&self, hkid: u32) -> bool {
        lock(&self.free).remove(&hkid)
    }

    pub(crate) fn free(&self, hkid: u32) {
        lock(&self.free).insert(hkid);
    }

    /// How many TDs can have one at once.
    pub(crate) fn limit(&self) -> u64 {
        self.limit
    }
}

fn all(platform: &Platform) -> BTreeSet<u32> {
    let all = platform.hkid_start..platform.hkid_start.saturating_add(platform.hkid_count);
    all.filter(|&hkid| hkid != platform.global_hkid).collect()
}

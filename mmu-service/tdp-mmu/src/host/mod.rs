//! The simulated host: its memory, its key ids, and the locks that all VMs share.

mod hkid;
mod memory;
mod platform;

use std::sync::Arc;

pub use platform::{HostError, MemoryRange, Platform};

use crate::ledger::PoolLedger;
use crate::sync::Mutex;
pub(crate) use hkid::HkidPool;
pub(crate) use memory::{BLOCK_PAGES, GIGA_PAGES, HostMemory};

/// One host with one TDX module.
pub struct Host {
    platform: Platform,
    pub(crate) memory: HostMemory,
    pub(crate) hkids: HkidPool,
    /// `tdx_lock`: TDH.MNG.CREATE, and key release as one section.
    pub(crate) tdx_lock: Mutex<()>,
}

impl Host {
    /// A host with the memory and the key ids that the module manages.
    pub fn new(platform: Platform) -> Result<Arc<Self>, HostError> {
        platform.check()?;
        Ok(Arc::new(Self {
            memory: HostMemory::new(&platform.tdmrs),
            hkids: HkidPool::new(&platform),
            tdx_lock: Mutex::new(()),
            platform,
        }))
    }

    /// A host like this one with nothing handed out, for VMs whose module is gone.
    pub fn emptied(&self) -> Arc<Self> {
        Arc::new(Self {
            memory: HostMemory::new(&self.platform.tdmrs),
            hkids: HkidPool::new(&self.platform),
            tdx_lock: Mutex::new(()),
            platform: self.platform.clone(),
        })
    }

    /// Has the host write down what [`Recovery`](crate::Recovery) must know of it. To be called
    /// before the first VM is created; a second call changes nothing.
    pub fn keep_in(&self, ledger: Arc<dyn PoolLedger>) {
        self.memory.keep_in(ledger);
    }

    /// As if nothing had been handed out: a recovery begins.
    pub(crate) fn reset(&self) {
        self.memory.reset(&self.platform.tdmrs);
        self.hkids.reset(&self.platform);
    }

    /// What the module reported.
    pub fn platform(&self) -> &Platform {
        &self.platform
    }

    /// Host pages handed out, 4 KiB units.
    pub fn pages_in_use(&self) -> u64 {
        self.memory.in_use()
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
pub(crate) use platform::tests;

//! The VMs of the service, by id.
//!
//! Invariants
//! - R1  Ids start at 1 and are never used again.
//! - R2  A VM counts against the limit from before it is built until its last user lets go.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use tdp_mmu::{Counts, Vm};
use tdx_defs::GpaLayout;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

use crate::config::size;
use crate::events::EventHub;
use crate::link::Attachment;
use crate::status;

/// One VM and what the shell knows about it.
pub(crate) struct VmEntry {
    pub(crate) id: u64,
    pub(crate) label: String,
    pub(crate) vm: Vm,
    pub(crate) layout: GpaLayout,
    pub(crate) attachment: Arc<Attachment>,
    pub(crate) events: Arc<EventHub>,
    /// Its share of the places for operations.
    operations: Arc<Semaphore>,
    _place: Place,
}

impl VmEntry {
    /// A place for one of its operations, if its share has one left.
    pub(crate) fn operation(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.operations).try_acquire_owned().ok()
    }

    /// Why the VM cannot go on although the core may not know it yet.
    pub(crate) fn lost(&self) -> Option<String> {
        self.attachment.is_retired().then(|| {
            let instance = self.attachment.instance();
            format!("the module has restarted, its instance {instance} is over")
        })
    }

    /// Refuses an operation that needs the module's run to be alive.
    pub(crate) fn check_alive(&self) -> Result<(), Status> {
        self.lost()
            .map_or(Ok(()), |reason| Err(status::vm_dead(&reason)))
    }
}

/// A place for one VM.
pub(crate) struct Place(#[expect(dead_code, reason = "held, not used")] OwnedSemaphorePermit);

/// All VMs.
pub(crate) struct Registry {
    vms: DashMap<u64, Arc<VmEntry>>,
    last_id: AtomicU64,
    places: Arc<Semaphore>,
    limit: u32,
    /// Operations of one VM at a time.
    share: usize,
    /// What VMs did that are gone.
    gone: Mutex<Counts>,
}

impl Registry {
    /// Up to `limit` VMs with `share` operations each at a time.
    pub(crate) fn new(limit: u32, share: u32) -> Self {
        Self {
            vms: DashMap::new(),
            last_id: AtomicU64::new(0),
            places: Arc::new(Semaphore::new(size(limit))),
            limit,
            share: size(share),
            gone: Mutex::default(),
        }
    }

    /// Takes a place for a VM that is going to be built.
    pub(crate) fn reserve(&self) -> Result<Place, Status> {
        let place = Arc::clone(&self.places).try_acquire_owned();
        place
            .map(Place)
            .map_err(|_| status::too_many_vms(self.limit))
    }

    /// Enters a VM under a new id.
    pub(crate) fn insert(
        &self,
        place: Place,
        label: String,
        vm: Vm,
        layout: GpaLayout,
        attachment: Arc<Attachment>,
    ) -> Arc<VmEntry> {
        let id = self.last_id.fetch_add(1, Ordering::Relaxed) + 1;
        let entry = Arc::new(VmEntry {
            id,
            label,
            vm,
            layout,
            attachment,
            events: Arc::default(),
            operations: Arc::new(Semaphore::new(self.share)),
            _place: place,
        });
        self.vms.insert(id, Arc::clone(&entry));
        entry
    }

    /// The VM with this id.
    pub(crate) fn get(&self, id: u64) -> Result<Arc<VmEntry>, Status> {
        // The guard of the shard ends here.
        self.vms
            .get(&id)
            .map(|vm| Arc::clone(&vm))
            .ok_or_else(|| status::unknown_vm(id))
    }

    /// Takes the VM out. Its counters stay in the totals.
    pub(crate) fn remove(&self, id: u64) -> bool {
        let Some((_, entry)) = self.vms.remove(&id) else {
            return false;
        };
        *self.gone.lock().unwrap_or_else(PoisonError::into_inner) += &entry.vm.stats().counts;
        true
    }

    /// Every VM, ascending by id.
    pub(crate) fn all(&self) -> Vec<Arc<VmEntry>> {
        let mut all: Vec<_> = self.vms.iter().map(|vm| Arc::clone(&vm)).collect();
        all.sort_unstable_by_key(|vm| vm.id);
        all
    }

    /// What VMs did that are gone.
    pub(crate) fn gone(&self) -> Counts {
        self.gone
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

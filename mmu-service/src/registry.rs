//! The VMs of the service, by id.
//!
//! Invariants
//! - R1  Ids start at 1 and are never used again, also not after a restart.
//! - R2  A VM counts against the limit from before it is built until its last user lets go.
//! - R3  Nobody sees a VM before all VMs of an earlier process are there again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use dashmap::DashMap;
use tdp_mmu::{Counts, Vm};
use tdx_defs::GpaLayout;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
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
pub(crate) struct Place(
    #[expect(dead_code, reason = "held, not used")] Option<OwnedSemaphorePermit>,
);

/// What the shell knows about a VM when it enters.
pub(crate) struct Origin {
    pub(crate) label: String,
    pub(crate) layout: GpaLayout,
    pub(crate) attachment: Arc<Attachment>,
}

/// All VMs.
pub(crate) struct Registry {
    vms: DashMap<u64, Arc<VmEntry>>,
    last_id: AtomicU64,
    /// R3.
    is_open: watch::Sender<bool>,
    places: Arc<Semaphore>,
    limit: u32,
    /// Operations of one VM at a time.
    share: usize,
    /// What VMs did that are gone.
    gone: Mutex<Counts>,
}

impl Registry {
    /// Up to `limit` VMs with `share` operations each at a time. Closed until [`Registry::open`]
    /// unless it `is_open`: VMs of an earlier process are to come.
    pub(crate) fn new(limit: u32, share: u32, is_open: bool) -> Self {
        Self {
            is_open: watch::Sender::new(is_open),
            vms: DashMap::new(),
            last_id: AtomicU64::new(0),
            places: Arc::new(Semaphore::new(size(limit))),
            limit,
            share: size(share),
            gone: Mutex::default(),
        }
    }

    /// The VMs of an earlier process are there.
    pub(crate) fn open(&self) {
        self.is_open.send_replace(true);
    }

    /// Whether they are, now and later.
    pub(crate) fn opening(&self) -> watch::Receiver<bool> {
        self.is_open.subscribe()
    }

    /// R3.
    pub(crate) fn check_open(&self) -> Result<(), Status> {
        match *self.is_open.borrow() {
            true => Ok(()),
            false => Err(status::recovering()),
        }
    }

    /// Takes a place for a VM that is going to be built.
    pub(crate) fn reserve(&self) -> Result<Place, Status> {
        self.check_open()?;
        let place = Arc::clone(&self.places).try_acquire_owned();
        place
            .map(|place| Place(Some(place)))
            .map_err(|_| status::too_many_vms(self.limit))
    }

    /// A new id.
    pub(crate) fn next_id(&self) -> u64 {
        self.last_id.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// New ids are above `last`.
    pub(crate) fn continue_after(&self, last: u64) {
        self.last_id.fetch_max(last, Ordering::Relaxed);
    }

    /// Enters a VM of an earlier process under its old id. It is there even if the limit was
    /// lowered meanwhile.
    pub(crate) fn restore(&self, id: u64, vm: Vm, origin: Origin) -> Arc<VmEntry> {
        let place = Arc::clone(&self.places).try_acquire_owned().ok();
        self.insert(id, Place(place), vm, origin)
    }

    /// Enters a VM.
    pub(crate) fn insert(&self, id: u64, place: Place, vm: Vm, origin: Origin) -> Arc<VmEntry> {
        let Origin {
            label,
            layout,
            attachment,
        } = origin;
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
        self.check_open()?;
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

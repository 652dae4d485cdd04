//! A module that lives on, a store that lives on, and processes that do not.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tdp_mmu::{
    Batch, Host, Ledger, LedgerError, Note, PoolLedger, Recovery, SeamError, SeamPort, Settled,
    Ticket, Vm, VmConfig, VmError, VmRecord,
};
use tdx_defs::{Leaf, Pfn, Seamcall, SeamcallResult};
use tdx_module::{LpId, Module};

use crate::common::{platform_config, platform_of};

/// What outlives a process: the module, and what was written down.
pub(crate) struct World {
    pub(crate) module: Arc<Module>,
    pub(crate) store: Arc<Mutex<Store>>,
}

/// What was written down.
#[derive(Default)]
pub(crate) struct Store {
    pub(crate) vms: BTreeMap<u64, VmRecord>,
    split: BTreeSet<Pfn>,
}

impl World {
    pub(crate) fn new() -> Self {
        Self {
            module: Arc::new(Module::new(platform_config()).unwrap()),
            store: Arc::default(),
        }
    }

    /// A process that dies instead of its step number `steps`.
    pub(crate) fn process(&self, steps: u64) -> Process {
        let life = Arc::new(Life {
            steps: AtomicU64::new(steps),
            is_over: AtomicBool::new(false),
        });
        let host = Host::new(platform_of(&platform_config())).unwrap();
        host.keep_in(Arc::new(Pool {
            life: Arc::clone(&life),
            store: Arc::clone(&self.store),
        }));
        let port = Arc::new(Port {
            life: Arc::clone(&life),
            module: Arc::clone(&self.module),
        });
        Process {
            life,
            host,
            port,
            store: Arc::clone(&self.store),
            unblocked: AtomicU64::new(0),
            removed: AtomicU64::new(0),
        }
    }

    /// Neither host nor module nor store holds anything.
    pub(crate) fn assert_nothing_left(&self, process: &Process, when: &str) {
        let usage = self.module.usage();
        assert_eq!(usage.hkids_in_use, 0, "{when}: key ids");
        assert!(
            usage.pages.iter().all(|(_, pages)| *pages == 0),
            "{when}: {:?}",
            usage.pages
        );
        assert_eq!(process.host.pages_in_use(), 0, "{when}: host pages");
        assert!(lock(&self.store).vms.is_empty(), "{when}: records");
    }
}

/// How long a process lives. A step is a call that changes the module's state, or a note: between
/// two of them nobody outside can tell one moment of death from another.
struct Life {
    steps: AtomicU64,
    is_over: AtomicBool,
}

impl Life {
    /// Whether the process lives to do one more thing that shows.
    fn step(&self) -> bool {
        let left = self
            .steps
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        if left.is_err() {
            self.is_over.store(true, Ordering::SeqCst);
        }
        left.is_ok()
    }

    fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }
}

/// One run of the host's side.
pub(crate) struct Process {
    life: Arc<Life>,
    pub(crate) host: Arc<Host>,
    pub(crate) port: Arc<dyn SeamPort>,
    store: Arc<Mutex<Store>>,
    /// Leaves that its recovery gave back to the guest, and took away.
    pub(crate) unblocked: AtomicU64,
    pub(crate) removed: AtomicU64,
}

impl Process {
    /// Whether it died. What it says from then on nobody hears.
    pub(crate) fn is_dead(&self) -> bool {
        self.life.is_over()
    }

    fn ledger(&self, id: u64) -> Arc<dyn Ledger> {
        Arc::new(Notes {
            life: Arc::clone(&self.life),
            store: Arc::clone(&self.store),
            id,
        })
    }

    /// CreateVm: the VM is written down as one to be taken down until it is there.
    pub(crate) fn create(&self, id: u64, config: VmConfig) -> Result<Vm, VmError> {
        self.write(|store| {
            let mut record = VmRecord::new(config.clone());
            record.going = true;
            store.vms.insert(id, record);
        })?;
        let vm = Vm::kept_in(
            Arc::clone(&self.host),
            Arc::clone(&self.port),
            config,
            self.ledger(id),
        );
        vm.init()?;
        self.write(|store| {
            if let Some(record) = store.vms.get_mut(&id) {
                record.going = false;
            }
        })?;
        Ok(vm)
    }

    /// DestroyVm.
    pub(crate) fn destroy(&self, id: u64, vm: &Vm) -> Result<u64, VmError> {
        let (_, leaked) = vm.destroy()?;
        if leaked == 0 {
            self.write(|store| drop(store.vms.remove(&id)))?;
        }
        Ok(leaked)
    }

    fn write(&self, change: impl FnOnce(&mut Store)) -> Result<(), LedgerError> {
        if !self.life.step() {
            return Err(died());
        }
        change(&mut lock(&self.store));
        Ok(())
    }

    /// Makes every VM again; ids of those that are there.
    pub(crate) fn recover(&self) -> Result<BTreeMap<u64, Vm>, VmError> {
        let (split, records): (Vec<Pfn>, Vec<(u64, VmRecord)>) = {
            let store = lock(&self.store);
            (
                store.split.iter().copied().collect(),
                store.vms.iter().map(|(&id, vm)| (id, vm.clone())).collect(),
            )
        };
        let recovery = Recovery::begin(Arc::clone(&self.host), Arc::clone(&self.port), &split)?;
        let mut vms = BTreeMap::new();
        for (id, record) in records {
            match recovery.vm(record, self.ledger(id))? {
                Settled::Vm(vm, report) => {
                    self.unblocked.fetch_add(report.unblocked, Ordering::SeqCst);
                    self.removed.fetch_add(report.removed, Ordering::SeqCst);
                    vms.insert(id, *vm);
                }
                Settled::Gone { leaked } => {
                    if !self.is_dead() {
                        assert_eq!(leaked, 0, "VM {id} leaves pages behind");
                    }
                    self.write(|store| drop(store.vms.remove(&id)))?;
                }
            }
        }
        Ok(vms)
    }
}

struct Notes {
    life: Arc<Life>,
    store: Arc<Mutex<Store>>,
    id: u64,
}

impl Ledger for Notes {
    fn note(&self, note: Note) -> Result<(), LedgerError> {
        if !self.life.step() {
            return Err(died());
        }
        if let Some(record) = lock(&self.store).vms.get_mut(&self.id) {
            record.apply(note);
        }
        Ok(())
    }
}

struct Pool {
    life: Arc<Life>,
    store: Arc<Mutex<Store>>,
}

impl PoolLedger for Pool {
    fn split(&self, first: Pfn) -> Result<(), LedgerError> {
        if !self.life.step() {
            return Err(died());
        }
        lock(&self.store).split.insert(first);
        Ok(())
    }
}

fn died() -> LedgerError {
    LedgerError {
        reason: "the process is dead".into(),
    }
}

/// Calls run one by one, so that the process can die between any two.
struct Port {
    life: Arc<Life>,
    module: Arc<Module>,
}

/// Leaves that change nothing.
const LOOKS: [Leaf; 5] = [
    Leaf::MEM_SEPT_RD,
    Leaf::PHYMEM_PAGE_RDMD,
    Leaf::MNG_RD,
    Leaf::VP_RD,
    Leaf::MEM_RD,
];

impl Port {
    fn run(&self, batch: &Batch) -> Result<Vec<SeamcallResult>, SeamError> {
        let mut results = Vec::with_capacity(batch.calls.len());
        for call in &batch.calls {
            let mut single = Seamcall {
                repeat: None,
                ..call.clone()
            };
            let mut stepping = call.clone();
            let mut completed = 0;
            let mut result = SeamcallResult::default();
            for _ in 0..call.count() {
                let lives = if LOOKS.contains(&call.leaf) {
                    !self.life.is_over()
                } else {
                    self.life.step()
                };
                if !lives {
                    let reason = "the process is dead".into();
                    return Err(SeamError::Unknown { reason });
                }
                (single.rcx, single.r8, single.r9) = (stepping.rcx, stepping.r8, stepping.r9);
                result = self.module.seamcall(LpId(batch.lp), &single);
                if result.rax != 0 {
                    break;
                }
                completed += 1;
                stepping.step();
            }
            let result = SeamcallResult {
                completed,
                ..result
            };
            results.push(result);
            if batch.stop_on_error && result.status().is_error() {
                break;
            }
        }
        Ok(results)
    }
}

impl SeamPort for Port {
    fn submit(&self, batch: Batch) -> Ticket {
        Ticket::ready(self.run(&batch))
    }
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

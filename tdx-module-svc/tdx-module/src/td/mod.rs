//! A TD: its root page (TDR) and its control structure (TDCS).
//!
//! Source: TDX module source, td_control_structures.h.
//!
//! Fields are atomics because readers hold the TDR shared; whoever changes one that others rely on
//! holds the TDR exclusively, or the lock that is named beside it.
//!
//! Invariants
//! - T1  CHLDCNT is the number of 4 KiB units that the PAMT assigns to this TD, the TDR not counted.
//! - T2  `config` is set exactly when OP_STATE is not UNINITIALIZED.

mod config;
mod epoch;
mod fields;
mod kot;
mod op_states;
mod registry;
mod vcpu;

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use tdx_defs::Hpa;

use crate::locks::Lock;
use crate::measure::{Measurement, Rtmrs};
use crate::sept::Sept;

pub(crate) use config::TdConfig;
pub(crate) use epoch::{Epochs, PreviousEpochBusy};
pub(crate) use fields::{FieldError, field_identity, next_field};
pub(crate) use kot::{HkidState, Kot};
pub use op_states::OpState;
pub(crate) use registry::Registry;
pub(crate) use vcpu::{Association, Vcpu, VcpuState};

/// TDR.LIFECYCLE_STATE.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Lifecycle {
    /// A key id, not programmed on every package.
    HkidAssigned = 0,
    /// Usable.
    KeysConfigured = 1,
    /// No vCPU enters any more; caches are to be written back.
    Blocked = 2,
    /// The key id is given back; pages can be reclaimed.
    Teardown = 3,
}

impl Lifecycle {
    const ALL: [Self; 4] = [
        Self::HkidAssigned,
        Self::KeysConfigured,
        Self::Blocked,
        Self::Teardown,
    ];

    /// The number in TDR.LIFECYCLE_STATE.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The ABI name.
    pub fn name(self) -> &'static str {
        match self {
            Self::HkidAssigned => "TD_HKID_ASSIGNED",
            Self::KeysConfigured => "TD_KEYS_CONFIGURED",
            Self::Blocked => "TD_BLOCKED",
            Self::Teardown => "TD_TEARDOWN",
        }
    }
}

/// A TD.
#[derive(Debug)]
pub(crate) struct Td {
    tdr: Hpa,
    hkid: u16,
    /// The TDR page was reclaimed: nobody may use this any more.
    retired: AtomicBool,
    fatal: AtomicBool,
    lifecycle: AtomicU8,
    packages: AtomicU32,
    children: AtomicU64,
    num_tdcx: AtomicU8,
    /// Page of the Secure EPT root, the fourth TDCX page.
    root_page: AtomicU64,

    op_state: AtomicU8,
    /// OP_STATE.
    pub(crate) op_state_lock: Lock,
    config: OnceLock<TdConfig>,
    num_vcpus: AtomicU32,
    num_assoc_vcpus: AtomicU32,
    x2apic_ids: Mutex<Vec<u32>>,
    epochs: Epochs,
    /// TDCS.HP_LOCK_TIMEOUT in microseconds.
    hp_lock_timeout: AtomicU64,
    /// SEPT_TREE.
    pub(crate) sept_lock: Lock,
    sept: Sept,
    /// The trees of L2 VMs 1 to 3.
    l2_septs: [Sept; 3],
    measurement: Mutex<Measurement>,
    rtmrs: Rtmrs,
}

impl Td {
    pub(crate) fn new(tdr: Hpa, hkid: u16) -> Self {
        Self {
            tdr,
            hkid,
            retired: AtomicBool::new(false),
            fatal: AtomicBool::new(false),
            lifecycle: AtomicU8::new(Lifecycle::HkidAssigned as u8),
            packages: AtomicU32::new(0),
            children: AtomicU64::new(0),
            num_tdcx: AtomicU8::new(0),
            root_page: AtomicU64::new(0),
            op_state: AtomicU8::new(OpState::Uninitialized as u8),
            op_state_lock: Lock::default(),
            config: OnceLock::new(),
            num_vcpus: AtomicU32::new(0),
            num_assoc_vcpus: AtomicU32::new(0),
            x2apic_ids: Mutex::default(),
            epochs: Epochs::default(),
            hp_lock_timeout: AtomicU64::new(fields::HP_LOCK_TIMEOUT),
            sept_lock: Lock::default(),
            sept: Sept::new(),
            l2_septs: [(), (), ()].map(|()| Sept::new()),
            measurement: Mutex::default(),
            rtmrs: Rtmrs::default(),
        }
    }

    /// Its root page.
    pub(crate) fn tdr(&self) -> Hpa {
        self.tdr
    }

    /// TDR.HKID.
    pub(crate) fn hkid(&self) -> u16 {
        self.hkid
    }

    /// Whether the TDR page was reclaimed since this was looked up.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Relaxed)
    }

    /// The TDR page is reclaimed. The caller holds it exclusively.
    pub(crate) fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// TDR.FATAL.
    pub(crate) fn is_fatal(&self) -> bool {
        self.fatal.load(Ordering::Relaxed)
    }

    /// The TD is lost: nearly every leaf refuses it from now on.
    pub(crate) fn set_fatal(&self) {
        self.fatal.store(true, Ordering::Relaxed);
    }

    /// TDR.LIFECYCLE_STATE.
    pub(crate) fn lifecycle(&self) -> Lifecycle {
        let number = usize::from(self.lifecycle.load(Ordering::Relaxed));
        Lifecycle::ALL
            .get(number)
            .copied()
            .unwrap_or(Lifecycle::Teardown)
    }

    /// Moves the life cycle on. The caller holds the TDR exclusively.
    pub(crate) fn set_lifecycle(&self, state: Lifecycle) {
        self.lifecycle.store(state as u8, Ordering::Relaxed);
    }

    /// TDR.PKG_CONFIG_BITMAP.
    pub(crate) fn configured_packages(&self) -> u32 {
        self.packages.load(Ordering::Relaxed)
    }

    /// The key is programmed on a package; answers the bitmap.
    pub(crate) fn configure_package(&self, package: u32) -> u32 {
        let bit = 1 << package;
        self.packages.fetch_or(bit, Ordering::Relaxed) | bit
    }

    /// TDR.CHLDCNT, in 4 KiB units.
    pub(crate) fn children(&self) -> u64 {
        self.children.load(Ordering::Relaxed)
    }

    /// Adds pages to CHLDCNT.
    pub(crate) fn add_children(&self, pages: u64) {
        self.children.fetch_add(pages, Ordering::Relaxed);
    }

    /// Takes pages from CHLDCNT.
    pub(crate) fn remove_children(&self, pages: u64) {
        self.children.fetch_sub(pages, Ordering::Relaxed);
    }

    /// TDR.NUM_TDCX.
    pub(crate) fn num_tdcx(&self) -> u8 {
        self.num_tdcx.load(Ordering::Relaxed)
    }

    /// One more TDCX page. The caller holds the TDR exclusively.
    pub(crate) fn add_tdcx(&self, page: Hpa) {
        /// Index of the page that holds the Secure EPT root.
        const ROOT: u8 = 3;
        if self.num_tdcx.fetch_add(1, Ordering::Relaxed) == ROOT {
            self.root_page.store(page.get(), Ordering::Relaxed);
        }
    }

    /// The page that holds the Secure EPT root.
    pub(crate) fn root_page(&self) -> Hpa {
        Hpa::new(self.root_page.load(Ordering::Relaxed))
    }

    /// TDCS.OP_STATE.
    pub(crate) fn op_state(&self) -> OpState {
        OpState::from_number(self.op_state.load(Ordering::Acquire))
    }

    /// TDH.MNG.INIT has succeeded. The caller holds the TDR exclusively.
    pub(crate) fn initialize(&self, config: TdConfig) {
        let l2_vms = usize::from(config.num_l2_vms);
        if self.config.set(config).is_ok() {
            self.sept.create_root();
            self.l2_septs
                .iter()
                .take(l2_vms)
                .for_each(Sept::create_root);
        }
        self.op_state
            .store(OpState::Initialized as u8, Ordering::Release);
    }

    /// TDH.MR.FINALIZE has succeeded. The caller holds the TDR exclusively.
    pub(crate) fn finalize(&self) {
        self.measurement().finalize();
        self.op_state
            .store(OpState::Runnable as u8, Ordering::Release);
    }

    /// What TDH.MNG.INIT fixed.
    pub(crate) fn config(&self) -> Option<&TdConfig> {
        self.config.get()
    }

    /// TDCS.NUM_VCPUS.
    pub(crate) fn num_vcpus(&self) -> u32 {
        self.num_vcpus.load(Ordering::Relaxed)
    }

    /// Takes the next vCPU index below `max`. It stays taken whatever comes after.
    pub(crate) fn take_vcpu_index(&self, max: u16) -> Option<u32> {
        self.num_vcpus
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| {
                (count < u32::from(max)).then_some(count + 1)
            })
            .ok()
    }

    /// Notes a virtual x2APIC id, unless `unique` is asked for and another vCPU has it.
    pub(crate) fn claim_x2apic_id(&self, id: u32, unique: bool) -> bool {
        let mut ids = self
            .x2apic_ids
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if unique && ids.contains(&id) {
            return false;
        }
        ids.push(id);
        true
    }

    /// TDCS.NUM_ASSOC_VCPUS.
    pub(crate) fn num_assoc_vcpus(&self) -> u32 {
        self.num_assoc_vcpus.load(Ordering::Relaxed)
    }

    /// A vCPU is associated with a logical processor.
    pub(crate) fn add_associated(&self) {
        self.num_assoc_vcpus.fetch_add(1, Ordering::Relaxed);
    }

    /// A vCPU left its logical processor.
    pub(crate) fn remove_associated(&self) {
        self.num_assoc_vcpus.fetch_sub(1, Ordering::Relaxed);
    }

    /// TDCS.HP_LOCK_TIMEOUT, in microseconds.
    fn hp_lock_timeout(&self) -> u64 {
        self.hp_lock_timeout.load(Ordering::Relaxed)
    }

    fn set_hp_lock_timeout(&self, microseconds: u64) {
        self.hp_lock_timeout.store(microseconds, Ordering::Relaxed);
    }

    /// TLB tracking.
    pub(crate) fn epochs(&self) -> &Epochs {
        &self.epochs
    }

    /// The Secure EPT.
    pub(crate) fn sept(&self) -> &Sept {
        &self.sept
    }

    /// The run-time measurements.
    pub(crate) fn rtmrs(&self) -> &Rtmrs {
        &self.rtmrs
    }

    /// The tree of an L2 VM (1 to 3).
    pub(crate) fn l2_sept(&self, vm: u8) -> Option<&Sept> {
        self.l2_septs.get(usize::from(vm.checked_sub(1)?))
    }

    /// The measurement. Leaves that add to it hold the TDR exclusively, so this never waits long.
    pub(crate) fn measurement(&self) -> MutexGuard<'_, Measurement> {
        self.measurement
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

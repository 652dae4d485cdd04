//! A guest as its host sees it: `struct kvm` and `struct kvm_tdx` in one. An ordinary VM has no
//! mirror root and makes no call.
//!
//! Each file is one group of entry points; the types that callers see are in `types`.
//!
//! Lock order: `slots_lock`, a vCPU's mutex, `gmem_lock`, `mmu_lock`, the attributes. Operations
//! on the whole VM take `slots_lock` first; faults take only their vCPU's mutex and the read side
//! of `mmu_lock`. Whoever waited for a lock looks again whether the VM is still alive.

mod audit;
mod convert;
mod create;
mod destroy;
mod dirty;
mod fault;
mod faulting;
mod hva;
mod image;
mod inspect;
mod level;
mod map;
pub(crate) mod map_gpa;
mod mmio;
mod prefault;
mod recover;
mod resolve;
mod roots;
mod run;
mod slots;
pub(crate) mod spans;
mod types;
mod vcpu;
mod wanted;

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::bugs::Bugs;
use crate::counts::Counts;
use crate::error::VmError;
use crate::host::Host;
use crate::ledger::{Ledger, LedgerError, Note};
use crate::memory::attributes::PrivateRanges;
use crate::memory::invalidate::Invalidation;
use crate::memory::slots::Slots;
use crate::mmu::Mmu;
use crate::seam::SeamPort;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use crate::sync::{Mutex, lock};
use crate::tdx::remove::Hooks;
use crate::tdx::seam::Seam;
use crate::tdx::td::{Td, TdState};
use level::WriteTracked;
pub use map::{Held, MAX_MAP_CELLS, Map, MapCell};
pub use recover::{Recovered, Recovery, Settled};
pub use run::{RunExit, RunReport, RunRequest};
pub use types::{
    AuditReport, DirtyLogMode, Fault, FaultOutcome, FaultReport, FaultsReport, InitRegion, Measure,
    Mismatch, Mode, RetPf, RootInfo, Stats, TreeEntry, VmConfig, VmInfo, Walk, WalkEntry,
};
use vcpu::Vcpu;

/// A TDX guest, or an ordinary one.
pub struct Vm {
    host: Arc<Host>,
    port: Arc<dyn SeamPort>,
    /// Where the notes go that another process must know.
    ledger: Arc<dyn Ledger>,
    config: VmConfig,
    pub(crate) mmu: Mmu,
    td: Td,
    slots: Slots,
    /// Changes of slots, attributes and vCPUs, one at a time.
    slots_lock: Mutex<()>,
    /// `mem_attr_array`. Changed under `slots_lock`; faults read it while they hold entries, so
    /// nobody waits for anything while this is locked.
    private: Mutex<PrivateRanges>,
    /// guest_memfd's invalidate_lock: population and holes exclude each other.
    gmem_lock: Mutex<()>,
    invalidation: Invalidation,
    vcpus: ArcSwap<Vec<Arc<Vcpu>>>,
    /// KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE.
    exit_hypercall: AtomicBool,
    /// What operations on the whole VM did.
    counts: Mutex<Counts>,
    /// Pages that never came back.
    leaked: AtomicU64,
    destroyed: AtomicBool,
    /// `nx_huge_pages` of this VM.
    nx_huge_pages: AtomicBool,
    /// Frames whose writes somebody tracks.
    tracked: WriteTracked,
    /// `mmu_valid_gen`, which a fast zap flips.
    valid_gen: AtomicU32,
}

impl Vm {
    /// Checks that failed so far.
    pub fn bugs(&self) -> &Bugs {
        &self.mmu.bugs
    }

    /// KVM_ENABLE_CAP of KVM_CAP_EXIT_HYPERCALL: whether a guest's MapGPA leaves to user space. It
    /// does unless switched off.
    pub fn set_exit_hypercall(&self, exits: bool) -> Result<(), VmError> {
        let _slots = lock(&self.slots_lock);
        self.note(Note::Settings {
            nx_huge_pages: self.nx_huge_pages.load(Ordering::Acquire),
            exit_hypercall: exits,
        })?;
        self.exit_hypercall.store(exits, Ordering::Release);
        Ok(())
    }

    /// Writes down what is about to happen.
    pub(crate) fn note(&self, note: Note) -> Result<(), LedgerError> {
        self.ledger.note(note)
    }

    fn exits_hypercall(&self) -> bool {
        self.exit_hypercall.load(Ordering::Acquire)
    }

    fn seam(&self, lp: u32) -> Seam<'_> {
        Seam::new(&*self.port, self.config.mode, lp)
    }

    fn hooks(&self) -> Hooks<'_> {
        Hooks {
            td: &self.td,
            bugs: &self.mmu.bugs,
            hkid_shift: self.host.platform().hkid_shift(),
        }
    }

    /// Whether the VM is a TD.
    fn is_td(&self) -> bool {
        self.mmu.layout.is_td()
    }

    /// EIO for every ioctl of a dead VM.
    fn alive(&self) -> Result<(), VmError> {
        if self.destroyed.load(Ordering::Acquire) {
            return Err(VmError::Dead {
                reason: "the VM is destroyed".into(),
            });
        }
        if self.mmu.bugs.is_dead() {
            let reason = self.mmu.bugs.reason().unwrap_or_default();
            return Err(VmError::Dead { reason });
        }
        Ok(())
    }

    fn needs(&self, operation: &'static str, needed: TdState) -> Result<(), VmError> {
        let state = self.td.state();
        if state == needed {
            return Ok(());
        }
        Err(VmError::State {
            operation,
            state: state.name(),
            needed: needed.name(),
        })
    }

    fn vcpu(&self, vcpu_id: u32) -> Result<Arc<Vcpu>, VmError> {
        self.vcpus
            .load()
            .get(vcpu_id as usize)
            .cloned()
            .ok_or(VmError::NoVcpu(vcpu_id))
    }

    /// Ends an operation on the whole VM: keeps and returns what it did.
    fn finish(&self, seam: Seam<'_>) -> Counts {
        *lock(&self.counts) += &seam.counts;
        seam.counts
    }
}

#[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
pub(crate) mod tests;

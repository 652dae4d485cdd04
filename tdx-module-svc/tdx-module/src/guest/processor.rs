//! What a logical processor keeps: the vCPU that is inside, and its TLB. The TD exit is here.
//!
//! Source: TDX module source, td_exit.c `td_vmexit_to_vmm`, the local data of a processor.
//!
//! Invariants
//! - G1  While a vCPU is inside, the PAMT entry of its TDR is held shared, that of its TDVPR and
//!   the entries above it, too, and REFCOUNT of its epoch counts it (unless the TD was lost).
//! - G2  A vCPU is inside on one processor at most: its state is ACTIVE meanwhile.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crossbeam_utils::CachePadded;
use tdx_defs::{Gpa, Hpa};

use super::cpu::{Cpu, Leaving};
use super::ops::GuestOp;
use super::step::{GuestError, GuestStep};
use super::tlb::{Tlb, Translation};
use crate::locks::LockMode;
use crate::pamt::PageSize;
use crate::td::{Td, TdConfig, Vcpu, VcpuState};
use crate::{LpId, Module};

/// The vCPU that is inside, with the TD that it belongs to.
#[derive(Debug)]
pub(crate) struct Inside {
    pub(crate) td: Arc<Td>,
    pub(crate) config: TdConfig,
    pub(crate) vcpu: Arc<Vcpu>,
    pub(crate) tdvpr: Hpa,
    /// Bound of GPAs that the platform sets, in bits.
    pub(crate) platform_maxpa: Option<u8>,
}

impl Inside {
    /// GPA-VALID: private, and within the address width.
    pub(super) fn is_private(&self, gpa: Gpa) -> bool {
        gpa.get() & self.config.not_private(self.platform_maxpa) == 0
    }

    /// Whether an address has bits that the TD does not have.
    pub(super) fn is_too_wide(&self, gpa: Gpa) -> bool {
        gpa.get() & self.config.missing_bits(self.platform_maxpa) != 0
    }
}

/// A logical processor.
#[derive(Debug, Default)]
pub(crate) struct Processor {
    inside: Option<Inside>,
    last_tdvpr: Option<Hpa>,
    tlb: Tlb,
}

impl Processor {
    /// Whether a vCPU runs here.
    pub(crate) fn is_inside(&self) -> bool {
        self.inside.is_some()
    }

    /// TDR and TDVPR of the vCPU that runs here.
    pub(super) fn inside(&self) -> Option<(Hpa, Hpa)> {
        let inside = self.inside.as_ref()?;
        Some((inside.td.tdr(), inside.tdvpr))
    }

    /// Everything in the TLB.
    pub(super) fn translations(&self) -> Vec<Translation> {
        self.tlb.all()
    }

    /// Flushes a TD's translations.
    pub(crate) fn flush(&mut self, module: &Module, tdr: Hpa) {
        if !module.conditions.leaves_out_flushes() {
            self.tlb.flush(tdr);
        }
    }

    /// A vCPU goes inside. The caller has taken the locks and counted the epoch.
    ///
    /// Translations are not told apart by vCPU, so another vCPU than the last one here starts
    /// without any of its TD.
    pub(crate) fn enter(&mut self, module: &Module, inside: Inside) {
        if self.last_tdvpr != Some(inside.tdvpr) {
            self.flush(module, inside.td.tdr());
            self.last_tdvpr = Some(inside.tdvpr);
        }
        inside.vcpu.set_state(VcpuState::Active);
        self.inside = Some(inside);
    }

    /// One event of the guest.
    pub(crate) fn step(&mut self, module: &Module, lp: LpId, op: &GuestOp) -> GuestStep {
        let Some(inside) = &self.inside else {
            return GuestStep::Impossible(GuestError::NotInside { lp });
        };
        let outcome = Cpu::new(module, inside, &mut self.tlb).run(op);
        match outcome {
            Ok(step) => step,
            Err(leave) => {
                if let Some(inside) = self.inside.take() {
                    exit(module, &inside, &leave);
                }
                GuestStep::Exited(leave.exit)
            }
        }
    }
}

/// The TD exit: state first, then the epoch, then the locks.
fn exit(module: &Module, inside: &Inside, leave: &Leaving) {
    let epoch = {
        let mut state = inside.vcpu.guest();
        state.last_exit = leave.last_exit;
        state.vcpu_epoch
    };
    inside.vcpu.set_state(if leave.is_lost {
        VcpuState::Disabled
    } else {
        VcpuState::Ready
    });
    // A TD whose memory is lost is not touched any more, its epochs neither.
    if !leave.is_lost {
        inside.td.epochs().leave(epoch);
    }
    if let Some(tdr) = module.pamt.entry(inside.td.tdr(), PageSize::Small) {
        tdr.release(LockMode::Shared);
    }
    module.pamt.release_kept(inside.tdvpr);
}

/// The logical processors of the platform.
#[derive(Debug)]
pub(crate) struct Processors {
    all: Box<[CachePadded<Mutex<Processor>>]>,
}

impl Processors {
    pub(crate) fn new(count: u32) -> Self {
        Self {
            all: (0..count).map(|_| CachePadded::default()).collect(),
        }
    }

    /// A processor, for one step of what it does: one event, one entry or one flush. `None` when
    /// the platform does not have it.
    pub(crate) fn lock(&self, lp: LpId) -> Option<MutexGuard<'_, Processor>> {
        let processor = self.all.get(usize::try_from(lp.0).ok()?)?;
        Some(processor.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// The numbers of all.
    pub(super) fn all(&self) -> impl Iterator<Item = LpId> {
        (0u32..).zip(&self.all).map(|(number, _)| LpId(number))
    }
}

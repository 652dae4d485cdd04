//! Accesses of frames without a slot: what happens the second time.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `handle_mmio_page_fault()`, `check_mmio_spte()`; x86.h,
//! `vcpu_cache_mmio_info()`, `vcpu_match_mmio_gpa()`. In a TD a valid MMIO entry raises #VE in the
//! guest, and KVM does not hear of it. In an ordinary VM it is an EPT misconfiguration.

use tdx_defs::{Gfn, Level};

use super::Vm;
use super::vcpu::Vcpu;
use crate::mmu::arena::TableId;
use crate::mmu::spte;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::trace::Event;

/// `mmio_gfn` and `mmio_gen` of a vCPU; only the thread that runs it touches them.
#[derive(Default)]
pub(crate) struct MmioCache {
    /// Frame 0 means none, as in the kernel.
    gfn: AtomicU64,
    generation: AtomicU64,
}

impl MmioCache {
    /// vcpu_cache_mmio_info.
    pub(super) fn set(&self, gfn: Gfn, generation: u32) {
        self.gfn.store(gfn.get(), Ordering::Relaxed);
        self.generation.store(generation.into(), Ordering::Relaxed);
    }

    fn matches(&self, gfn: Gfn, generation: u32) -> bool {
        let cached = self.gfn.load(Ordering::Relaxed);
        cached != 0
            && cached == gfn.get()
            && self.generation.load(Ordering::Relaxed) == u64::from(generation)
    }
}

/// What the processor made of an access to a frame that may have an MMIO entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Mmio {
    /// There is none, or an old one: the fault takes its way.
    Fault,
    /// #VE in the guest: no exit.
    Raised,
    /// Emulated at once.
    Emulated,
}

impl Vm {
    /// make_mmio_spte.
    pub(super) fn mmio_spte(&self, gfn: Gfn, generation: u32) -> u64 {
        spte::mmio(gfn.base().get(), generation, self.is_td())
    }

    /// Asks the tables of shared memory, as the processor does before anybody else.
    pub(super) fn meet_mmio(&self, vcpu: &Vcpu, root: TableId, gfn: Gfn) -> Mmio {
        let found = {
            let _rcu = crossbeam_epoch::pin();
            self.mmu.last(root, gfn)
        };
        let Some(at) = found.filter(|at| at.level == Level::L4K && spte::is_mmio(at.spte)) else {
            return Mmio::Fault;
        };
        let kvm_gen = self.slots.generation();
        if self.is_td() {
            return match at.spte == self.mmio_spte(gfn, kvm_gen) {
                true => Mmio::Raised,
                // Model: the processor raises #VE for an old entry, too; the guest then asks the
                // host to emulate, which finds the slot.
                false => Mmio::Fault,
            };
        }
        if vcpu.mmio.matches(gfn, kvm_gen) {
            return Mmio::Emulated;
        }
        let spte_gen = spte::mmio_generation(at.spte);
        let valid = kvm_gen == spte_gen;
        self.mmu.tracer.emit(|| Event::CheckMmioSpte {
            spte: at.spte,
            kvm_gen,
            spte_gen,
            valid,
        });
        if !valid {
            return Mmio::Fault;
        }
        self.mmu.tracer.emit(|| Event::HandleMmioPageFault {
            addr: 0,
            gfn,
            // VMX keeps no access rights in the entry.
            access: 0,
        });
        vcpu.mmio.set(gfn, kvm_gen);
        Mmio::Emulated
    }
}

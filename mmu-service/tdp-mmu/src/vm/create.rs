//! KVM_CREATE_VM and KVM_TDX_INIT_VM, KVM_TDX_FINALIZE_VM.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_td_init()`, `setup_tdparams()`, `tdx_td_finalize()`.

use std::sync::Arc;

use tdx_defs::{Gpaw, Leaf, PageType, Pfn, SeamcallResult, TdParams, field};

use super::{Vm, VmConfig};
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::host::Host;
use crate::ledger::{Forgetful, Ledger, Note, TdRecord};
use crate::mmu::Mmu;
use crate::mmu::layout::{Layout, VmKind};
use crate::seam::{Batch, SeamError, SeamPort, Ticket};
use crate::sync::{Mutex, lock};
use crate::tdx::calls::{self, Step};
use crate::tdx::lifecycle::{self, expect, out_of_memory};
use crate::tdx::lost::{LOST_TRIES, page_type};
use crate::tdx::seam::Seam;
use crate::tdx::td::{Td, TdState};

/// CONFIG_FLAGS bit 2: RBP is preserved across TDVMCALLs, which KVM always asks for.
const CONFIG_FLAGS_PRESERVE_RBP: u64 = 1 << 2;
/// TDCS.OP_STATE of a TD that is finalised.
pub(super) const OP_STATE_RUNNABLE: u64 = 2;
/// Guest TSC frequency in units of 25 MHz.
const TSC_25MHZ: u16 = 100;

impl Vm {
    /// An ordinary VM, whatever `config.kind` says: no module is needed.
    pub fn create_ordinary(host: Arc<Host>, config: VmConfig) -> Result<Self, VmError> {
        if config.max_vcpus == 0 {
            return Err(VmError::invalid("max_vcpus", "a VM needs at least one"));
        }
        let config = VmConfig {
            kind: VmKind::Ordinary,
            ..config
        };
        Ok(Self::new(host, Arc::new(NoModule), config))
    }

    /// KVM_CREATE_VM and, for a TD, KVM_TDX_INIT_VM in one.
    pub fn create(
        host: Arc<Host>,
        port: Arc<dyn SeamPort>,
        config: VmConfig,
    ) -> Result<(Self, Counts), VmError> {
        let vm = Self::new(host, port, config);
        let counts = match vm.is_td() {
            true => vm.init()?,
            false => Counts::default(),
        };
        Ok((vm, counts))
    }

    /// KVM_CREATE_VM: an ordinary VM, or one that is to be a TD. The module does not hear of it.
    pub fn new(host: Arc<Host>, port: Arc<dyn SeamPort>, config: VmConfig) -> Self {
        Self::kept_in(host, port, config, Arc::new(Forgetful))
    }

    /// The same, for a VM whose notes go to `ledger`, so that [`Recovery`](crate::Recovery) can
    /// make it again.
    pub fn kept_in(
        host: Arc<Host>,
        port: Arc<dyn SeamPort>,
        config: VmConfig,
        ledger: Arc<dyn Ledger>,
    ) -> Self {
        // A VM with private memory has no SMM address space.
        let (td, address_spaces) = match config.kind {
            VmKind::Td => (Td::new(), 1),
            VmKind::Ordinary => (Td::none(), 2),
        };
        let mmu = Mmu::new(Layout::new(config.gpaw, config.kind));
        mmu.bugs.keep_in(Arc::clone(&ledger));
        Self {
            td,
            // Model: the guest's address width comes with the VM, not with KVM_TDX_INIT_VM, so
            // that one description says all there is to know of it.
            mmu,
            host,
            port,
            ledger,
            nx_huge_pages: super::AtomicBool::new(config.nx_huge_pages),
            config,
            slots: super::Slots::new(address_spaces),
            slots_lock: Mutex::default(),
            private: Mutex::default(),
            gmem_lock: Mutex::default(),
            invalidation: super::Invalidation::default(),
            vcpus: super::ArcSwap::default(),
            exit_hypercall: super::AtomicBool::new(true),
            counts: Mutex::default(),
            leaked: super::AtomicU64::new(0),
            destroyed: super::AtomicBool::new(false),
            tracked: super::WriteTracked::default(),
            valid_gen: super::AtomicU32::new(0),
        }
    }

    /// KVM_TDX_INIT_VM: makes the VM a TD. What fails is undone; a VM whose key id came back can
    /// be initialised again.
    pub fn init(&self) -> Result<Counts, VmError> {
        let _slots = lock(&self.slots_lock);
        self.alive()?;
        self.needs("KVM_TDX_INIT_VM", TdState::Uninitialized)?;
        if self.config.pml {
            return Err(VmError::invalid("pml", "a TD has no page modification log"));
        }
        let params = td_params(&self.host, &self.config)?;
        if self.td.hkid().is_some() {
            return Err(VmError::Dead {
                reason: "an earlier KVM_TDX_INIT_VM left its key id assigned".into(),
            });
        }
        let hkid = self.host.hkids.alloc().ok_or(VmError::Exhausted {
            what: "private key ids",
            limit: self.host.hkids.limit(),
        })?;
        let Some(mut pages) = self.host.memory.pages(self.host.platform().tdcs_pages + 1) else {
            self.host.hkids.free(hkid);
            return Err(out_of_memory(&self.host));
        };
        let record = TdRecord {
            tdr: pages[0],
            hkid,
            pages: pages[1..].to_vec(),
        };
        if let Err(error) = self.note(Note::Td(record)) {
            pages
                .into_iter()
                .for_each(|page| self.host.memory.free_page(page));
            self.host.hkids.free(hkid);
            return Err(error.into());
        }
        self.td.assign(pages.remove(0), hkid);
        let mut seam = self.seam(0);
        match lifecycle::init_td(&self.host, &mut seam, &self.td, &params, &pages) {
            Ok(()) => {
                self.td.set_initialized();
                Ok(self.finish(seam))
            }
            Err(error) => {
                self.undo_init(&mut seam, &pages, &error);
                self.finish(seam);
                Err(error)
            }
        }
    }

    /// The normal key release and reclaim, for a TD that did not get through INIT_VM.
    fn undo_init(&self, seam: &mut Seam<'_>, pages: &[Pfn], error: &VmError) {
        let is_lost = matches!(error, VmError::Seam(SeamError::Unknown { .. }));
        let made = is_lost.then(|| self.find_made(seam, pages));
        if let Some(Err(error)) = &made {
            // The pages and the key id stay out of use: the module may have them.
            self.mmu.bugs.kill(Check::Unsettled, || error.to_string());
            return;
        }
        let nothing_found = matches!(made, Some(Ok(false)));
        let added = lock(&self.td.tdcs).clone();
        pages
            .iter()
            .filter(|page| !added.contains(page))
            .for_each(|&page| {
                self.host.memory.free_page(page);
            });
        let nothing_made = nothing_found
            || matches!(
                error,
                VmError::Refused {
                    leaf: Leaf::MNG_CREATE,
                    ..
                } | VmError::Busy {
                    leaf: Leaf::MNG_CREATE,
                    ..
                } | VmError::Seam(SeamError::NotSent { .. } | SeamError::Restarted { .. })
            );
        if nothing_made {
            self.host.memory.free_page(self.td.tdr());
            self.td.forget_tdr();
            if let Some(hkid) = self.td.release_hkid() {
                self.host.hkids.free(hkid);
            }
            self.note_end_of_td();
            return;
        }
        let released = lifecycle::release_hkid(&self.host, seam, &self.td, &self.mmu.bugs, &[]);
        if released.is_ok() && self.td.hkid().is_none() {
            // What does not come back stays out of use: the module may still hold it.
            let leaked = lifecycle::reclaim_control_pages(&self.host, seam, &self.td).unwrap_or(1);
            self.leaked.fetch_add(leaked, super::Ordering::Relaxed);
            self.td.forget_tdr();
            if leaked == 0 {
                self.note_end_of_td();
            }
        }
    }

    /// What TDH.MNG.CREATE and TDH.MNG.ADDCX did whose answers were lost. Whether there is a TD.
    fn find_made(&self, seam: &mut Seam<'_>, pages: &[Pfn]) -> Result<bool, SeamError> {
        let is_td = page_type(seam, self.td.tdr())? == PageType::TDR;
        let mut added = Vec::new();
        for &page in pages {
            if page_type(seam, page)? == PageType::TDCX {
                added.push(page);
            }
        }
        *lock(&self.td.tdcs) = added;
        Ok(is_td)
    }

    /// Should the note be lost, the module itself shows that the TD is gone.
    pub(crate) fn note_end_of_td(&self) {
        if let Err(error) = self.note(Note::NoTd) {
            tracing::warn!(%error, "the end of a TD is not written down");
        }
    }

    /// Closes the initial image: the TD can run, MRTD is final.
    pub fn finalize(&self) -> Result<([u8; 48], Counts), VmError> {
        let _slots = lock(&self.slots_lock);
        let vcpus = self.vcpus.load_full();
        let _stopped: Vec<_> = vcpus.iter().map(|vcpu| lock(&vcpu.run)).collect();
        self.alive()?;
        self.needs("KVM_TDX_FINALIZE_VM", TdState::Initialized)?;
        let mut seam = self.seam(0);
        let finalized = self.make_final(&mut seam);
        if let Err(VmError::Refused { status, .. }) = &finalized {
            // Without a vCPU the module refuses, and nothing is broken.
            if !status.is(tdx_defs::CompletionStatus::NO_VCPUS) {
                self.mmu.bugs.bug(Check::Seamcall, || {
                    format!("SEAMCALL {} failed: {status}", Leaf::MR_FINALIZE)
                });
            }
        }
        let mrtd = match finalized {
            Ok(()) => {
                // The digest is read for people; the kernel leaves that to the guest.
                self.read_mrtd(&mut Seam::new(&*self.port, self.config.mode, 0))?
            }
            Err(error) => {
                self.finish(seam);
                return Err(error);
            }
        };
        self.td.set_runnable(mrtd);
        Ok((mrtd, self.finish(seam)))
    }

    /// A call that changes nothing is made again when its answer is lost.
    fn look(&self, seam: &mut Seam<'_>, step: &Step) -> Result<SeamcallResult, SeamError> {
        let mut lost = 0;
        loop {
            match seam.call(step) {
                Err(SeamError::Unknown { .. }) if lost < LOST_TRIES => lost += 1,
                outcome => return outcome,
            }
        }
    }

    /// TDH.MR.FINALIZE. Where its answer is lost, TDCS.OP_STATE tells.
    fn make_final(&self, seam: &mut Seam<'_>) -> Result<(), VmError> {
        let mut lost = 0;
        loop {
            match seam.call(&calls::mr_finalize(self.td.tdr())) {
                Ok(result) => return expect(Leaf::MR_FINALIZE, &result),
                Err(SeamError::Unknown { .. }) if lost < LOST_TRIES => lost += 1,
                Err(error) => return Err(error.into()),
            }
            let state = seam.call(&calls::mng_rd(self.td.tdr(), field::TDCS_OP_STATE))?;
            expect(Leaf::MNG_RD, &state)?;
            if state.r8 == OP_STATE_RUNNABLE {
                return Ok(());
            }
        }
    }

    pub(super) fn read_mrtd(&self, seam: &mut Seam<'_>) -> Result<[u8; 48], VmError> {
        let steps: Vec<_> = (0..6)
            .map(|word| calls::mng_rd(self.td.tdr(), field::TDCS_MRTD + word))
            .collect();
        let mut mrtd = [0; 48];
        for (step, word) in steps.iter().zip(mrtd.chunks_exact_mut(8)) {
            let result = self.look(seam, step)?;
            expect(Leaf::MNG_RD, &result)?;
            word.copy_from_slice(&result.r8.to_le_bytes());
        }
        Ok(mrtd)
    }
}

/// An ordinary VM has nothing to tell a module.
struct NoModule;

impl SeamPort for NoModule {
    fn submit(&self, _batch: Batch) -> Ticket {
        Ticket::ready(Err(SeamError::NotSent {
            reason: "an ordinary VM has no module".into(),
        }))
    }
}

/// setup_tdparams.
fn td_params(host: &Host, config: &VmConfig) -> Result<TdParams, VmError> {
    let platform = host.platform();
    if config.gpaw == Gpaw::W52 && !platform.five_level {
        return Err(VmError::invalid(
            "gpaw",
            "52 needs 5-level tables, the platform has 4",
        ));
    }
    let beyond = config.attributes.bits() & !platform.attributes_fixed0;
    if beyond != 0 {
        return Err(VmError::invalid(
            "attributes",
            format!("bits {beyond:#x} are not supported"),
        ));
    }
    let beyond = config.xfam & !platform.xfam_fixed0;
    if beyond != 0 {
        return Err(VmError::invalid(
            "xfam",
            format!("bits {beyond:#x} are not supported"),
        ));
    }
    if config.max_vcpus == 0 {
        return Err(VmError::invalid("max_vcpus", "a TD needs at least one"));
    }
    let (eptp_controls, gpaw_flag) = match config.gpaw {
        Gpaw::W48 => (0x1E, 0),
        Gpaw::W52 => (0x26, 1),
    };
    Ok(TdParams::default()
        .with_attributes(config.attributes.bits() | platform.attributes_fixed1)
        .with_xfam(config.xfam | platform.xfam_fixed1)
        .with_max_vcpus(config.max_vcpus)
        .with_eptp_controls(eptp_controls)
        .with_config_flags(gpaw_flag | CONFIG_FLAGS_PRESERVE_RBP)
        .with_tsc_frequency(TSC_25MHZ))
}

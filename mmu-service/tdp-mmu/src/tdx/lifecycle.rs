//! From TD_CREATE to the last page that comes back.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `__tdx_td_init()`, `tdx_td_vcpu_init()`,
//! `tdx_mmu_release_hkid()`, `tdx_reclaim_td_control_pages()`, `tdx_vcpu_free()`.

use tdx_defs::{CompletionStatus, Leaf, PAGE_SIZE, Pfn, SeamcallResult, TdParams, field};

use super::calls::{self, Step};
use super::lost::surely;
use super::remove::reclaim;
use super::seam::{Seam, Verdict};
use super::td::Td;
use crate::bugs::{Bugs, Check};
use crate::error::VmError;
use crate::host::Host;
use crate::seam::SeamError;
use crate::sync::lock;

/// Bound of the cache write-back loop of one package.
const CACHE_WB_TRIES: u32 = 10_000;
/// POSTED_INTR_NV.
const POSTED_INTR_VECTOR: u64 = 0xF2;
/// Process-posted-interrupts bit of the pin-based controls.
const PIN_BASED_POSTED_INTR: u64 = 0x80;

/// What every command of KVM_MEMORY_ENCRYPT_OP is checked for first: its `hw_error` is for the
/// answer, and must come as 0. EINVAL otherwise.
///
/// Source: arch/x86/kvm/vmx/tdx.c, `tdx_get_cmd()`.
pub fn check_hw_error(hw_error: u64) -> Result<(), VmError> {
    if hw_error == 0 {
        return Ok(());
    }
    Err(VmError::Invalid {
        field: "hw_error",
        reason: format!("{hw_error:#x} is not 0"),
    })
}

/// The page where the host puts TD_PARAMS or the source of an added page; given back on drop.
pub(crate) struct SourcePage<'a> {
    host: &'a Host,
    pub(crate) page: Pfn,
}

impl<'a> SourcePage<'a> {
    pub(crate) fn new(host: &'a Host) -> Result<Self, VmError> {
        let page = host.memory.page().ok_or_else(|| out_of_memory(host))?;
        Ok(Self { host, page })
    }
}

impl Drop for SourcePage<'_> {
    fn drop(&mut self) {
        self.host.memory.free_page(self.page);
    }
}

/// ENOMEM, with how much there is.
pub(crate) fn out_of_memory(host: &Host) -> VmError {
    let bytes: u64 = host.platform().tdmrs.iter().map(|range| range.size).sum();
    VmError::Exhausted {
        what: "host pages",
        limit: bytes / PAGE_SIZE,
    }
}

/// TDH.MNG.CREATE … TDH.MNG.INIT and the two reads behind it. A TD of which something was built
/// when this fails must go through [`release_hkid`] and [`reclaim_control_pages`].
pub(crate) fn init_td(
    host: &Host,
    seam: &mut Seam<'_>,
    td: &Td,
    params: &TdParams,
    control_pages: &[Pfn],
) -> Result<(), VmError> {
    let tdr = td.tdr();
    let hkid = td.hkid().unwrap_or(0);
    {
        let _tdx = lock(&host.tdx_lock);
        let result = seam.call(&calls::mng_create(tdr, hkid))?;
        expect(Leaf::MNG_CREATE, &result)?;
    }
    let source = SourcePage::new(host)?;
    let mut steps: Vec<Step> = (0..host.platform().packages)
        .map(|package| calls::mng_key_config(tdr).on(host.platform().package_lp(package)))
        .collect();
    let adds_from = steps.len();
    steps.extend(
        control_pages
            .iter()
            .map(|&page| calls::mng_addcx(tdr, page)),
    );
    steps.push(calls::mng_init(tdr, source.page, params.as_bytes()));
    steps.push(calls::mng_rd(tdr, field::TD_TSC_OFFSET));
    steps.push(calls::mng_rd(tdr, field::TD_TSC_MULTIPLIER));
    let failed = run_all(seam, &steps)?;
    let added = match &failed {
        Some((at, ..)) => at.saturating_sub(adds_from).min(control_pages.len()),
        None => control_pages.len(),
    };
    lock(&td.tdcs).extend_from_slice(&control_pages[..added]);
    match failed {
        None => Ok(()),
        Some((at, result)) => expect(steps[at].leaf, &result),
    }
}

/// TDH.VP.CREATE, ADDCX for each page, INIT, and the three VMCS fields KVM sets. The caller holds
/// the write side of mmu_lock: INIT takes the TDR exclusively. Returns how many pages the module
/// took, the TDVPR first, and what failed.
pub(crate) fn init_vcpu(
    seam: &mut Seam<'_>,
    tdr: Pfn,
    pages: &[Pfn],
    x2apic_id: u32,
) -> Result<(usize, Option<(Leaf, SeamcallResult)>), SeamError> {
    let tdvpr = pages[0];
    let mut steps = vec![calls::vp_create(tdr, tdvpr)];
    steps.extend(pages[1..].iter().map(|&page| calls::vp_addcx(tdvpr, page)));
    steps.push(calls::vp_init(tdvpr, 0, x2apic_id));
    steps.extend(vcpu_settings(tdvpr));
    let failed = run_all(seam, &steps)?;
    let taken = failed
        .as_ref()
        .map_or(pages.len(), |(at, _)| (*at).min(pages.len()));
    Ok((taken, failed.map(|(at, result)| (steps[at].leaf, result))))
}

/// The three VMCS fields that KVM sets of a new vCPU.
pub(crate) fn vcpu_settings(tdvpr: Pfn) -> [Step; 3] {
    let descriptor = tdvpr.base().get();
    [
        calls::vp_wr(tdvpr, field::POSTED_INTR_NV, POSTED_INTR_VECTOR, 0xFFFF),
        calls::vp_wr(tdvpr, field::POSTED_INTR_DESC_ADDR, descriptor, u64::MAX),
        calls::vp_wr(
            tdvpr,
            field::PIN_BASED_VM_EXEC_CONTROL,
            PIN_BASED_POSTED_INTR,
            PIN_BASED_POSTED_INTR,
        ),
    ]
}

/// tdx_mmu_release_hkid: afterwards the key id is free, or stays assigned for good.
/// `vcpus` are the TDVPRs that are associated with a logical processor.
pub(crate) fn release_hkid(
    host: &Host,
    seam: &mut Seam<'_>,
    td: &Td,
    bugs: &Bugs,
    vcpus: &[(Pfn, u32)],
) -> Result<(), SeamError> {
    let bug = |leaf: Leaf, status: CompletionStatus| {
        bugs.bug(Check::Seamcall, || {
            format!("SEAMCALL {leaf} failed: {status}")
        });
    };
    for &(tdvpr, lp) in vcpus {
        let status = surely(seam, &calls::vp_flush(tdvpr).on(lp), None)?;
        if !status.is_success() && !status.is(CompletionStatus::VCPU_NOT_ASSOCIATED) {
            bug(Leaf::VP_FLUSH, status);
        }
    }
    let _tdx = lock(&host.tdx_lock);
    // What TDH.MNG.VPFLUSHDONE and TDH.MNG.KEY.FREEID answer when they are made again.
    let done = Some(CompletionStatus::LIFECYCLE_STATE_INCORRECT);
    let status = surely(seam, &calls::mng_vpflushdone(td.tdr()), done)?;
    if status.is(CompletionStatus::FLUSHVP_NOT_DONE) {
        return Ok(());
    }
    if !status.is_success() {
        bug(Leaf::MNG_VPFLUSHDONE, status);
        return Ok(());
    }
    for package in 0..host.platform().packages {
        let status = write_back_caches(seam, host.platform().package_lp(package))?;
        if !status.is_success() && !status.is(CompletionStatus::NO_HKID_READY_TO_WBCACHE) {
            bug(Leaf::PHYMEM_CACHE_WB, status);
        }
    }
    let status = surely(seam, &calls::mng_key_freeid(td.tdr()), done)?;
    if !status.is_success() {
        bug(Leaf::MNG_KEY_FREEID, status);
        return Ok(());
    }
    if let Some(hkid) = td.release_hkid() {
        host.hkids.free(hkid);
    }
    Ok(())
}

/// wbinvd_cpu: from the start, then resumed while a host interrupt stops it.
pub(crate) fn write_back_caches(
    seam: &mut Seam<'_>,
    lp: u32,
) -> Result<CompletionStatus, SeamError> {
    let mut resume = false;
    let mut tries = 0;
    loop {
        let resumed = Some(CompletionStatus::WBCACHE_RESUME_ERROR).filter(|_| resume);
        let status = surely(seam, &calls::phymem_cache_wb(resume).on(lp), resumed)?;
        tries += 1;
        if !status.is(CompletionStatus::INTERRUPTED_RESUMABLE) || tries == CACHE_WB_TRIES {
            return Ok(status);
        }
        resume = true;
    }
}

/// TDH.PHYMEM.PAGE.RECLAIM of every page in order. Pages that come back go to the host; returns
/// how many did not.
pub(crate) fn reclaim_pages(
    host: &Host,
    seam: &mut Seam<'_>,
    pages: &[Pfn],
) -> Result<u64, SeamError> {
    let leaked = reclaim(seam, pages)?;
    pages
        .iter()
        .filter(|page| !leaked.contains(page))
        .for_each(|&page| host.memory.free_page(page));
    Ok(leaked.len() as u64)
}

/// tdx_reclaim_td_control_pages: TDCS pages, then the TDR, whose cache lines go under the
/// module's own key. Returns how many pages did not come back.
pub(crate) fn reclaim_control_pages(
    host: &Host,
    seam: &mut Seam<'_>,
    td: &Td,
) -> Result<u64, SeamError> {
    let tdcs = std::mem::take(&mut *lock(&td.tdcs));
    let leaked = reclaim_pages(host, seam, &tdcs)?;
    if !reclaim(seam, &[td.tdr()])?.is_empty() {
        return Ok(leaked + 1);
    }
    let platform = host.platform();
    let write_back =
        calls::phymem_page_wbinvd(td.tdr(), platform.global_hkid, platform.hkid_shift());
    let written = surely(seam, &write_back, None)?.is_success();
    if written {
        host.memory.free_page(td.tdr());
    }
    Ok(leaked + u64::from(!written))
}

/// Runs `steps` until one fails: which, and how. Informational statuses pass.
pub(crate) fn run_all(
    seam: &mut Seam<'_>,
    steps: &[Step],
) -> Result<Option<(usize, SeamcallResult)>, SeamError> {
    let mut failed = None;
    seam.script(steps, &mut |_, at, result| {
        if result.status().is_error() {
            failed = Some((at, *result));
            Verdict::Stop
        } else {
            Verdict::Next
        }
    })?;
    Ok(failed)
}

/// A status that KVM turns into an errno of the ioctl.
pub(crate) fn expect(leaf: Leaf, result: &SeamcallResult) -> Result<(), VmError> {
    let status = result.status();
    if !status.is_error() {
        Ok(())
    } else if status.is_busy() || status.is(CompletionStatus::RND_NO_ENTROPY) {
        Err(VmError::Busy {
            leaf,
            status,
            tries: 1,
        })
    } else {
        Err(VmError::Refused { leaf, status })
    }
}

//! The end of a TD that is not initialised, or was torn down in part.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_mmu_release_hkid()`, `tdx_reclaim_td_control_pages()`.
//! Where in that sequence the earlier process stopped need not be known: a step that was done
//! already is refused and changes nothing.

use std::collections::BTreeMap;

use tdx_defs::{Leaf, PageType, Pfn};

use super::{Recovery, patiently};
use crate::error::VmError;
use crate::host::BLOCK_PAGES;
use crate::ledger::VmRecord;
use crate::sync::lock;
use crate::tdx::calls;
use crate::tdx::lifecycle::write_back_caches;
use crate::tdx::remove::reclaim;
use crate::tdx::seam::Seam;

impl Recovery {
    /// Takes down what there is of the record's TD. Returns how many pages did not come back.
    pub(super) fn take_down(&self, seam: &mut Seam<'_>, record: &VmRecord) -> Result<u64, VmError> {
        let Some(td) = &record.td else { return Ok(0) };
        let platform = self.host.platform();
        for (&vcpu_id, vcpu) in &record.vcpus {
            if let Some(&tdvpr) = vcpu.pages.first()
                && self.pages.is_owned(tdvpr, PageType::TDVPR, td.tdr)
            {
                let lp = vcpu_id % platform.logical_processors;
                patiently(seam, &calls::vp_flush(tdvpr).on(lp))?;
            }
        }
        let freed = {
            let _tdx = lock(&self.host.tdx_lock);
            patiently(seam, &calls::mng_vpflushdone(td.tdr))?;
            for package in 0..platform.packages {
                write_back_caches(seam, platform.package_lp(package))?;
            }
            patiently(seam, &calls::mng_key_freeid(td.tdr))?.status()
        };
        let mut leaked = self.reclaim_guest_pages(seam, record)?;
        let mut pages = Vec::new();
        for page_type in [PageType::EPT, PageType::TDVPR, PageType::TDCX] {
            pages.extend(self.pages.of(page_type, td.tdr));
        }
        let kept = reclaim(seam, &pages)?;
        leaked += kept.len() as u64;
        for page in pages.into_iter().filter(|page| !kept.contains(page)) {
            self.host.memory.free_page(page);
        }
        let came_back = reclaim(seam, &[td.tdr])?.is_empty();
        if came_back {
            let write_back =
                calls::phymem_page_wbinvd(td.tdr, platform.global_hkid, platform.hkid_shift());
            seam.call(&write_back)?;
            self.host.memory.free_page(td.tdr);
        } else {
            leaked += 1;
        }
        if came_back || freed.is_success() {
            self.host.hkids.free(td.hkid);
        } else {
            tracing::warn!(tdr = %td.tdr, status = %freed, "{} does not free the key id", Leaf::MNG_KEY_FREEID);
        }
        Ok(leaked)
    }

    /// Pages of guest memory that the module had not let go of. Their blocks go back whole, or
    /// stay out of use.
    fn reclaim_guest_pages(&self, seam: &mut Seam<'_>, record: &VmRecord) -> Result<u64, VmError> {
        let pages: Vec<Pfn> = record.kept.iter().copied().collect();
        let mut blocks: BTreeMap<Pfn, bool> = BTreeMap::new();
        for page in &pages {
            let block = page.align_down(BLOCK_PAGES);
            blocks
                .entry(block)
                .or_insert_with(|| self.host.memory.reserve(block));
        }
        let mut kept = reclaim(seam, &pages)?;
        // A page that the module has given up long ago is free.
        let mut still_used = std::collections::BTreeSet::new();
        for page in std::mem::take(&mut kept) {
            let shown = patiently(seam, &calls::phymem_page_rdmd(page))?;
            if shown.rcx != u64::from(PageType::NDA.0) {
                still_used.insert(page);
            }
        }
        for (block, reserved) in blocks {
            let end = block.offset(BLOCK_PAGES);
            if reserved && still_used.range(block..end).next().is_none() {
                self.host.memory.free_block(block);
            }
        }
        Ok(still_used.len() as u64)
    }
}

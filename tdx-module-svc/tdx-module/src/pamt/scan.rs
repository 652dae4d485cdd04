//! Looking over the whole PAMT, for audits and tests. Takes no locks: meant for a quiet module.

use tdx_defs::{Hpa, PAGE_SHIFT, PageType};

use super::{GIB_SHIFT, LARGE_SHIFT, PageSize, Pamt, PamtEntry, TdmrPamt};

/// A page in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageInfo {
    /// Its address.
    pub hpa: Hpa,
    /// What it is used for.
    pub page_type: PageType,
    /// The TDR of its TD; zero for a TDR.
    pub owner: Hpa,
    /// The size at which it lives.
    pub size: PageSize,
    /// TLB epoch of its last block.
    pub bepoch: u64,
}

impl Pamt {
    /// Calls `visit` for every page that is neither free nor reserved, ascending by TDMR and size.
    pub(crate) fn for_each_used(&self, mut visit: impl FnMut(PageInfo)) {
        for tdmr in &self.tdmrs {
            scan_tdmr(tdmr, &mut visit);
        }
    }
}

fn scan_tdmr(tdmr: &TdmrPamt, visit: &mut impl FnMut(PageInfo)) {
    for ((number, giant), arrays) in (0u64..).zip(&tdmr.giant).zip(&tdmr.gibs) {
        let base = tdmr.base + (number << GIB_SHIFT);
        report(giant, base, PageSize::Giant, visit);
        let Some(arrays) = arrays.get() else { continue };
        for ((number, large), block) in (0u64..).zip(&arrays.large).zip(&arrays.small) {
            let base = base + (number << LARGE_SHIFT);
            report(large, base, PageSize::Large, visit);
            for (number, small) in (0u64..).zip(block.get().into_iter().flatten()) {
                report(small, base + (number << PAGE_SHIFT), PageSize::Small, visit);
            }
        }
    }
}

fn report(entry: &PamtEntry, hpa: u64, size: PageSize, visit: &mut impl FnMut(PageInfo)) {
    let page_type = entry.page_type();
    if page_type == PageType::NDA || page_type == PageType::RSVD {
        return;
    }
    visit(PageInfo {
        hpa: Hpa::new(hpa),
        page_type,
        owner: entry.owner(),
        size,
        bepoch: entry.bepoch(),
    });
}

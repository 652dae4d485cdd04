//! One function for each SEAMCALL that KVM makes.
//!
//! Source: arch/x86/virt/vmx/tdx/tdx.c, the `tdh_*()` wrappers. A Secure EPT operand is
//! GPA bits 51:12 with the TDX level in bits 2:0.

use bytes::Bytes;
use tdx_defs::{Gfn, Leaf, Level, PAGE_SIZE, Pfn, Seamcall};

/// Bytes that one TDH.MR.EXTEND measures.
pub(crate) const EXTEND_CHUNK: u64 = 256;
/// TDH.MR.EXTENDs of a page.
pub(crate) const EXTENDS_A_PAGE: u32 = 16;
const _: () = assert!(EXTENDS_A_PAGE as u64 * EXTEND_CHUNK == PAGE_SIZE);

/// One call: a [`Seamcall`] without the registers that KVM never sets, so that thousands of them
/// are cheap to keep.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Step {
    pub(crate) leaf: Leaf,
    pub(crate) version: u8,
    /// Logical processor, when the caller's own will not do.
    pub(crate) lp: Option<u32>,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) data: Option<Bytes>,
}

impl Step {
    fn new(leaf: Leaf, rcx: u64, rdx: u64) -> Self {
        Self {
            leaf,
            version: 0,
            lp: None,
            rcx,
            rdx,
            r8: 0,
            r9: 0,
            data: None,
        }
    }

    pub(crate) fn on(self, lp: u32) -> Self {
        Self {
            lp: Some(lp),
            ..self
        }
    }

    pub(crate) fn into_seamcall(self) -> Seamcall {
        Seamcall {
            version: self.version,
            rcx: self.rcx,
            rdx: self.rdx,
            r8: self.r8,
            r9: self.r9,
            data: self.data.unwrap_or_default(),
            ..Seamcall::new(self.leaf)
        }
    }
}

fn hpa(page: Pfn) -> u64 {
    page.base().get()
}

fn sept(gfn: Gfn, level: Level) -> u64 {
    gfn.base().get() | u64::from(level.to_tdx().get())
}

pub(crate) fn mng_create(tdr: Pfn, hkid: u32) -> Step {
    Step::new(Leaf::MNG_CREATE, hpa(tdr), hkid.into())
}

pub(crate) fn mng_key_config(tdr: Pfn) -> Step {
    Step::new(Leaf::MNG_KEY_CONFIG, hpa(tdr), 0)
}

pub(crate) fn mng_addcx(tdr: Pfn, page: Pfn) -> Step {
    Step::new(Leaf::MNG_ADDCX, hpa(page), hpa(tdr))
}

pub(crate) fn mng_init(tdr: Pfn, params_page: Pfn, params: &[u8]) -> Step {
    let data = Some(Bytes::copy_from_slice(params));
    Step {
        data,
        ..Step::new(Leaf::MNG_INIT, hpa(tdr), hpa(params_page))
    }
}

pub(crate) fn mng_rd(tdr: Pfn, field: u64) -> Step {
    Step::new(Leaf::MNG_RD, hpa(tdr), field)
}

pub(crate) fn mng_vpflushdone(tdr: Pfn) -> Step {
    Step::new(Leaf::MNG_VPFLUSHDONE, hpa(tdr), 0)
}

pub(crate) fn mng_key_freeid(tdr: Pfn) -> Step {
    Step::new(Leaf::MNG_KEY_FREEID, hpa(tdr), 0)
}

pub(crate) fn vp_create(tdr: Pfn, tdvpr: Pfn) -> Step {
    Step::new(Leaf::VP_CREATE, hpa(tdvpr), hpa(tdr))
}

pub(crate) fn vp_addcx(tdvpr: Pfn, page: Pfn) -> Step {
    Step::new(Leaf::VP_ADDCX, hpa(page), hpa(tdvpr))
}

/// Version 1: the vCPU id is the x2APIC id.
pub(crate) fn vp_init(tdvpr: Pfn, guest_rcx: u64, x2apic_id: u32) -> Step {
    let step = Step::new(Leaf::VP_INIT, hpa(tdvpr), guest_rcx);
    Step {
        version: 1,
        r8: x2apic_id.into(),
        ..step
    }
}

pub(crate) fn vp_wr(tdvpr: Pfn, field: u64, value: u64, mask: u64) -> Step {
    Step {
        r8: value,
        r9: mask,
        ..Step::new(Leaf::VP_WR, hpa(tdvpr), field)
    }
}

pub(crate) fn vp_flush(tdvpr: Pfn) -> Step {
    Step::new(Leaf::VP_FLUSH, hpa(tdvpr), 0)
}

/// `level` is the level of the entry that will point to the new table.
pub(crate) fn mem_sept_add(tdr: Pfn, gfn: Gfn, level: Level, table: Pfn) -> Step {
    Step {
        r8: hpa(table),
        ..Step::new(Leaf::MEM_SEPT_ADD, sept(gfn, level), hpa(tdr))
    }
}

pub(crate) fn mem_page_aug(tdr: Pfn, gfn: Gfn, page: Pfn) -> Step {
    Step {
        r8: hpa(page),
        ..Step::new(Leaf::MEM_PAGE_AUG, sept(gfn, Level::L4K), hpa(tdr))
    }
}

pub(crate) fn mem_page_add(tdr: Pfn, gfn: Gfn, page: Pfn, source: Pfn, data: Bytes) -> Step {
    let step = Step::new(Leaf::MEM_PAGE_ADD, sept(gfn, Level::L4K), hpa(tdr));
    Step {
        r8: hpa(page),
        r9: hpa(source),
        data: Some(data),
        ..step
    }
}

pub(crate) fn mr_extend(tdr: Pfn, gpa: u64) -> Step {
    Step::new(Leaf::MR_EXTEND, gpa, hpa(tdr))
}

pub(crate) fn mr_finalize(tdr: Pfn) -> Step {
    Step::new(Leaf::MR_FINALIZE, hpa(tdr), 0)
}

pub(crate) fn mem_range_block(tdr: Pfn, gfn: Gfn, level: Level) -> Step {
    Step::new(Leaf::MEM_RANGE_BLOCK, sept(gfn, level), hpa(tdr))
}

pub(crate) fn mem_range_unblock(tdr: Pfn, gfn: Gfn, level: Level) -> Step {
    Step::new(Leaf::MEM_RANGE_UNBLOCK, sept(gfn, level), hpa(tdr))
}

pub(crate) fn mem_track(tdr: Pfn) -> Step {
    Step::new(Leaf::MEM_TRACK, hpa(tdr), 0)
}

pub(crate) fn mem_page_remove(tdr: Pfn, gfn: Gfn, level: Level) -> Step {
    Step::new(Leaf::MEM_PAGE_REMOVE, sept(gfn, level), hpa(tdr))
}

pub(crate) fn mem_sept_rd(tdr: Pfn, gfn: Gfn, level: Level) -> Step {
    Step::new(Leaf::MEM_SEPT_RD, sept(gfn, level), hpa(tdr))
}

pub(crate) fn phymem_page_wbinvd(page: Pfn, hkid: u32, hkid_shift: u32) -> Step {
    let address = hpa(page) | u64::from(hkid) << hkid_shift;
    Step::new(Leaf::PHYMEM_PAGE_WBINVD, address, 0)
}

pub(crate) fn phymem_page_reclaim(page: Pfn) -> Step {
    Step::new(Leaf::PHYMEM_PAGE_RECLAIM, hpa(page), 0)
}

pub(crate) fn phymem_page_rdmd(page: Pfn) -> Step {
    Step::new(Leaf::PHYMEM_PAGE_RDMD, hpa(page), 0)
}

pub(crate) fn phymem_cache_wb(resume: bool) -> Step {
    Step::new(Leaf::PHYMEM_CACHE_WB, resume.into(), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operands_lie_where_the_abi_wants_them() {
        let (tdr, page) = (Pfn::new(0x40000), Pfn::new(0x40020));
        for (case, step, leaf, rcx, rdx, r8) in [
            (
                "table of gfn 0x200 under a 2M entry",
                mem_sept_add(tdr, Gfn::new(0x200), Level::L2M, page),
                3,
                0x20_0001,
                0x4000_0000,
                0x4002_0000,
            ),
            (
                "aug",
                mem_page_aug(tdr, Gfn::new(1), page),
                6,
                0x1000,
                0x4000_0000,
                0x4002_0000,
            ),
            (
                "wbinvd",
                phymem_page_wbinvd(page, 33, 46),
                41,
                0x0008_4000_4002_0000,
                0,
                0,
            ),
            ("vp.init", vp_init(page, 7, 3), 22, 0x4002_0000, 7, 3),
            (
                "mng.addcx",
                mng_addcx(tdr, page),
                1,
                0x4002_0000,
                0x4000_0000,
                0,
            ),
        ] {
            let call = step.into_seamcall();
            assert_eq!(
                (call.leaf.0, call.rcx, call.rdx, call.r8),
                (leaf, rcx, rdx, r8),
                "{case}"
            );
        }
    }
}

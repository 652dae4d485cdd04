//! A host that builds TDs, for tests of the module's public face.
#![allow(dead_code, reason = "each test uses the part that it needs")]

use tdx_defs::{CompletionStatus, Leaf, PageType, Repeat, Seamcall, SeamcallResult, TdParams};
use tdx_module::{LpId, Module, PageSize};

/// A page, in bytes.
pub(crate) const PAGE: u64 = 4096;
/// TD_PARAMS in host memory.
const PARAMS_AT: u64 = 0x10_0000;

/// Parameters of a plain 4-level TD.
pub(crate) fn td_params() -> TdParams {
    TdParams::default()
        .with_xfam(3)
        .with_max_vcpus(4)
        .with_eptp_controls(0x1E)
        .with_tsc_frequency(100)
}

/// A host with a range of pages to hand out.
pub(crate) struct Host<'m> {
    pub(crate) module: &'m Module,
    pub(crate) lp: LpId,
    next_page: u64,
}

impl<'m> Host<'m> {
    /// A host that hands out pages from `first_page` on.
    pub(crate) fn new(module: &'m Module, lp: u32, first_page: u64) -> Self {
        Self {
            module,
            lp: LpId(lp),
            next_page: first_page,
        }
    }

    /// The next page.
    pub(crate) fn page(&mut self) -> u64 {
        let page = self.next_page;
        self.next_page += PAGE;
        page
    }

    /// One call.
    pub(crate) fn call(&self, call: &Seamcall) -> SeamcallResult {
        self.module.seamcall(self.lp, call)
    }

    /// A call that has to succeed.
    pub(crate) fn must(&self, call: Seamcall) -> SeamcallResult {
        let result = self.call(&call);
        assert_eq!(result.status(), CompletionStatus::SUCCESS, "{call:?}");
        result
    }

    /// An initialised TD; answers its TDR.
    pub(crate) fn build_td(&mut self, hkid: u64) -> u64 {
        self.build_td_with(hkid, &td_params())
    }

    /// An initialised TD of given parameters.
    pub(crate) fn build_td_with(&mut self, hkid: u64, params: &TdParams) -> u64 {
        let tdr = self.page();
        self.must(Seamcall::new(Leaf::MNG_CREATE).rcx(tdr).rdx(hkid));
        self.must(Seamcall::new(Leaf::MNG_KEY_CONFIG).rcx(tdr));
        for _ in 0..6 {
            let page = self.page();
            self.must(Seamcall::new(Leaf::MNG_ADDCX).rcx(page).rdx(tdr));
        }
        let data = params.as_bytes().to_vec();
        self.must(
            Seamcall::new(Leaf::MNG_INIT)
                .rcx(tdr)
                .rdx(PARAMS_AT)
                .data(data),
        );
        tdr
    }

    /// An initialised vCPU; answers its TDVPR.
    pub(crate) fn build_vcpu(&mut self, tdr: u64) -> u64 {
        let tdvpr = self.page();
        self.must(Seamcall::new(Leaf::VP_CREATE).rcx(tdvpr).rdx(tdr));
        for _ in 0..5 {
            let page = self.page();
            self.must(Seamcall::new(Leaf::VP_ADDCX).rcx(page).rdx(tdvpr));
        }
        self.must(Seamcall::new(Leaf::VP_INIT).rcx(tdvpr));
        tdvpr
    }

    /// Links the tables for `gpa` down to 4 KiB entries where they are missing.
    pub(crate) fn link(&mut self, tdr: u64, gpa: u64) {
        for level in (1..=3u64).rev() {
            let page = self.page();
            let span = PAGE << (9 * level);
            let rcx = (gpa / span * span) | level;
            self.must(
                Seamcall::new(Leaf::MEM_SEPT_ADD)
                    .rcx(rcx)
                    .rdx(tdr | 1)
                    .r8(page),
            );
        }
    }

    /// Gives a contiguous range of pages to the TD in one run.
    pub(crate) fn aug(&self, tdr: u64, gpa: u64, hpa: u64, count: u32) -> SeamcallResult {
        let stride = PAGE.cast_signed();
        let repeat = Repeat {
            count,
            rcx_stride: stride,
            r8_stride: stride,
            r9_stride: 0,
        };
        self.call(
            &Seamcall::new(Leaf::MEM_PAGE_AUG)
                .rcx(gpa)
                .rdx(tdr)
                .r8(hpa)
                .repeated(repeat),
        )
    }
}

/// Asserts what holds in every quiet module: counters equal a scan, each page is the property of
/// one TD at most and mapped once at most, and CHLDCNT is what the PAMT says.
pub(crate) fn check_invariants(module: &Module) {
    let mut pages = Vec::new();
    module.inspect_pamt(|page| pages.push(page));
    for (page_type, counted) in module.usage().pages {
        let of_type = pages.iter().filter(|page| page.page_type == page_type);
        let found: u64 = of_type.map(|page| page.size.pages()).sum();
        assert_eq!(counted, found, "pages of {page_type}");
    }

    let mut ranges: Vec<_> = pages
        .iter()
        .map(|p| (p.hpa.get(), p.hpa.get() + p.size.bytes()))
        .collect();
    ranges.sort_unstable();
    for pair in ranges.windows(2) {
        assert!(
            pair[0].1 <= pair[1].0,
            "{:#x} lives at two sizes",
            pair[1].0
        );
    }

    let tds = module.inspect_tds();
    for td in &tds {
        let owned = pages
            .iter()
            .filter(|p| p.owner == td.tdr && p.page_type != PageType::TDR);
        let owned: u64 = owned.map(|page| page.size.pages()).sum();
        assert_eq!(td.children, owned, "CHLDCNT of {}", td.tdr);
        check_tree(module, td.tdr, &pages);
    }
    let owned_by_none = pages
        .iter()
        .find(|page| page.page_type != PageType::TDR && !tds.iter().any(|td| td.tdr == page.owner));
    assert!(
        owned_by_none.is_none(),
        "{owned_by_none:?} belongs to no TD"
    );
}

/// Every entry of a tree names a page of the TD, of the entry's size and type, and no other does.
fn check_tree(module: &Module, tdr: tdx_defs::Hpa, pages: &[tdx_module::PageInfo]) {
    let reclaiming = module
        .inspect_tds()
        .iter()
        .any(|td| td.tdr == tdr && td.lifecycle == tdx_module::Lifecycle::Teardown);
    if reclaiming {
        // Pages leave the TD in any order, and its tree is out of use.
        return;
    }
    let mut seen = std::collections::BTreeSet::new();
    for entry in module.inspect_sept(tdr) {
        let size = match (entry.state.is_leaf(), entry.level) {
            (false, _) | (true, 0) => PageSize::Small,
            (true, 1) => PageSize::Large,
            (true, _) => PageSize::Giant,
        };
        let page_type = if entry.state.is_leaf() {
            PageType::REG
        } else {
            PageType::EPT
        };
        let behind = pages
            .iter()
            .find(|page| page.hpa == entry.page && page.size == size);
        let behind = behind.unwrap_or_else(|| panic!("nothing behind {entry:?}"));
        assert_eq!(
            (behind.page_type, behind.owner),
            (page_type, tdr),
            "{entry:?}"
        );
        assert!(seen.insert(entry.page), "{} is mapped twice", entry.page);
    }
    let mapped = pages.iter().filter(|page| {
        page.owner == tdr && [PageType::REG, PageType::EPT].contains(&page.page_type)
    });
    assert_eq!(
        mapped.count(),
        seen.len(),
        "every private page of {tdr} is mapped"
    );
}

/// The calls that a run stands for, one by one, until the first that does not succeed.
pub(crate) fn one_by_one(module: &Module, lp: LpId, call: &Seamcall) -> SeamcallResult {
    let mut last = SeamcallResult::default();
    let mut single = Seamcall {
        repeat: None,
        ..call.clone()
    };
    let mut completed = 0;
    for _ in 0..call.count() {
        last = module.seamcall(lp, &single);
        completed += last.completed;
        if last.rax != 0 {
            break;
        }
        single.repeat = call.repeat;
        single.step();
        single.repeat = None;
    }
    SeamcallResult { completed, ..last }
}

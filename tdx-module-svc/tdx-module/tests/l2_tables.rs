//! Tables in the trees of L2 VMs: linked beside those of the TD, and taken away with them.

mod common;

use common::Host;
use tdx_defs::{ALL_ONES_HPA, CompletionStatus as Status, Leaf, OperandId, PageType, Seamcall};
use tdx_module::{Module, PlatformConfig};

const TDR: u64 = 0x4000_0000;
const PARAMS: u64 = 0x10_0000;
const NONE: u64 = ALL_ONES_HPA;
const NOT_NEEDED: u64 = 1 << 63;

/// A TD with one L2 VM.
fn host(module: &Module) -> Host<'_> {
    let mut host = Host::new(module, 0, TDR);
    let tdr = host.page();
    host.must(Seamcall::new(Leaf::MNG_CREATE).rcx(tdr).rdx(0x21));
    host.must(Seamcall::new(Leaf::MNG_KEY_CONFIG).rcx(tdr));
    for _ in 0..7 {
        let page = host.page();
        host.must(Seamcall::new(Leaf::MNG_ADDCX).rcx(page).rdx(tdr));
    }
    let params = common::td_params().with_num_l2_vms(1);
    let init = Seamcall::new(Leaf::MNG_INIT).rcx(tdr).rdx(PARAMS);
    host.must(init.data(params.as_bytes().to_vec()));
    host
}

fn add(level: u64, own: u64, l2: u64) -> Seamcall {
    Seamcall {
        r10: NONE,
        r11: NONE,
        ..Seamcall::new(Leaf::MEM_SEPT_ADD)
            .rcx(level)
            .rdx(TDR)
            .r8(own)
            .r9(l2)
            .version(1)
    }
}

#[test]
fn l2_tables_come_and_go_with_the_tables_of_the_td() {
    let module = Module::new(PlatformConfig::conformance()).unwrap();
    let mut host = host(&module);
    let pages: Vec<_> = (0..8).map(|_| host.page()).collect();

    let done = host.must(add(3, pages[0], pages[1]));
    assert_eq!(
        (done.r8, done.r9, done.r10),
        (NONE, NONE, NONE),
        "both are used"
    );
    // A level further down has a table of the TD, but none of the VM yet.
    host.must(add(2, pages[2], NONE));
    let refused = host.call(&add(1, pages[3], pages[4]));
    let walk_failed = Status::L2_SEPT_WALK_FAILED.with_details(1 << 16 | 2);
    assert_eq!(refused.status(), walk_failed);
    assert_eq!((refused.rcx, refused.rdx), (1 << 63, 0x1_4002));
    assert_eq!(
        (refused.r8, refused.r9),
        (pages[3], pages[4]),
        "neither is used"
    );

    let done = host.must(add(2, NONE, pages[4]));
    assert_eq!((done.r8, done.r9), (NONE, NONE));
    let refused = host.call(&add(2, NONE, pages[5] | NOT_NEEDED));
    let not_free = Status::L2_SEPT_ENTRY_NOT_FREE.with_details(1 << 16 | 2);
    assert_eq!((refused.status(), refused.r9), (not_free, pages[5]));
    let existing = add(2, pages[3], pages[5]).rdx(TDR | 1);
    let done = host.must(existing);
    assert_eq!(
        (done.r8, done.r9),
        (pages[3] | NOT_NEEDED, pages[5] | NOT_NEEDED)
    );
    assert_eq!(module.inspect_tds()[0].children, 7 + 4);

    // Blocking hides the table of the VM, too, and the link back brings it back.
    let on = |leaf, rcx| Seamcall::new(leaf).rcx(rcx).rdx(TDR);
    host.must(on(Leaf::MEM_RANGE_BLOCK, 3));
    host.must(on(Leaf::MEM_RANGE_UNBLOCK, 3));
    let other_vm = Seamcall {
        r10: pages[5],
        ..add(2, NONE, NONE)
    };
    let invalid = Status::OPERAND_INVALID.with(OperandId::R10);
    assert_eq!(host.call(&other_vm).status(), invalid);

    let removed = host.must(on(Leaf::MEM_SEPT_REMOVE, 2).version(1));
    assert_eq!(
        (removed.rcx, removed.r9, removed.r10),
        (pages[2], pages[4], NONE)
    );
    let removed = host.must(on(Leaf::MEM_SEPT_REMOVE, 3).version(1));
    assert_eq!((removed.rcx, removed.r9), (pages[0], pages[1]));
    assert_eq!(module.inspect_tds()[0].children, 7);
    common::check_invariants(&module);
}

#[test]
fn an_interrupt_between_two_tables_keeps_the_first() {
    let module = Module::new(PlatformConfig::conformance()).unwrap();
    let mut host = host(&module);
    let (own, l2) = (host.page(), host.page());
    module.set_interrupt_pending(true, 0);
    let stopped = host.call(&add(3, own, l2));
    assert_eq!(stopped.status(), Status::INTERRUPTED_RESUMABLE);
    assert_eq!((stopped.rcx, stopped.rdx), (3, TDR));
    assert_eq!((stopped.r8, stopped.r9), (NONE, l2));
    module.set_interrupt_pending(false, 0);
    let done = host.must(add(3, stopped.r8, stopped.r9));
    assert_eq!((done.r8, done.r9), (NONE, NONE));
    assert_eq!(module.inspect_tds()[0].children, 7 + 2);
}

#[test]
fn a_split_page_gets_its_l2_table_and_loses_it_when_merged() {
    let module = Module::new(PlatformConfig::conformance()).unwrap();
    let mut host = host(&module);
    for level in [3, 2] {
        let (own, l2) = (host.page(), host.page());
        host.must(add(level, own, l2));
    }
    let (own, l2) = (host.page(), host.page());
    let on = |leaf| Seamcall::new(leaf).rcx(1).rdx(TDR);
    host.must(on(Leaf::MEM_PAGE_AUG).r8(0x4020_0000));
    let demote = Seamcall {
        r10: NONE,
        r11: NONE,
        ..on(Leaf::MEM_PAGE_DEMOTE).r8(own).r9(l2)
    };
    let sparse = host.must(demote.clone().rdx(TDR | 1));
    assert_eq!(sparse.r9, l2 | NOT_NEEDED);
    assert_eq!(host.must(on(Leaf::MEM_PAGE_PROMOTE).version(1)).r9, NONE);
    assert_eq!(host.must(demote).r9, l2);
    let tables = |module: &Module| {
        let mut tables = 0;
        module.inspect_pamt(|page| tables += u32::from(page.page_type == PageType::EPT));
        tables
    };
    assert_eq!(tables(&module), 6);
    let merged = host.must(on(Leaf::MEM_PAGE_PROMOTE).version(1));
    assert_eq!((merged.rcx, merged.r9), (own, l2));
    assert_eq!(tables(&module), 4);
    let counted = module
        .usage()
        .pages
        .into_iter()
        .find(|(kind, _)| *kind == PageType::EPT);
    assert_eq!(counted, Some((PageType::EPT, 4)));
}

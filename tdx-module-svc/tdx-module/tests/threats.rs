//! What a host tries that wants into a TD, one attempt each: `docs/security.md` has the whole list.

mod common;

use common::{Host, PAGE, check_invariants};
use tdx_defs::{CompletionStatus as Status, Leaf, Repeat, Seamcall};
use tdx_module::{Module, PlatformConfig, SeptState};

const FIRST: u64 = 0x4000_0000;
/// Key ids of the two TDs.
const KEYS: [u64; 2] = [0x21, 0x22];

fn module() -> Module {
    Module::new(PlatformConfig::conformance()).unwrap()
}

/// A finished TD with tables for its first 2 MiB.
fn runnable_td(host: &mut Host<'_>, hkid: u64) -> u64 {
    let tdr = host.build_td(hkid);
    host.link(tdr, 0);
    host.build_vcpu(tdr);
    host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr));
    tdr
}

/// The call is refused with a status of this class, and nothing has changed.
#[track_caller]
fn refused(host: &Host<'_>, call: Seamcall, status: Status) {
    let before = host.module.usage();
    let answer = host.call(&call).status();
    assert!(answer.is(status), "{call:?}: {answer}");
    assert_eq!(host.module.usage(), before, "{call:?}");
    check_invariants(host.module);
}

fn aug(tdr: u64, gpa: u64, page: u64) -> Seamcall {
    Seamcall::new(Leaf::MEM_PAGE_AUG).rcx(gpa).rdx(tdr).r8(page)
}

#[test]
fn a_page_has_one_owner_and_one_place() {
    let module = module();
    let mut host = Host::new(&module, 0, FIRST);
    let [mine, other] = KEYS.map(|hkid| runnable_td(&mut host, hkid));
    let page = host.page();
    host.must(aug(mine, 0, page));

    let taken = Status::PAGE_METADATA_INCORRECT;
    refused(&host, aug(other, 0, page), taken);
    refused(&host, aug(mine, PAGE, page), taken);
    let table = Seamcall::new(Leaf::MEM_SEPT_ADD)
        .rcx(1 << 30 | 2)
        .rdx(other | 1);
    refused(&host, table.r8(page), taken);
    let control = Seamcall::new(Leaf::MNG_CREATE).rcx(page).rdx(KEYS[0] + 2);
    refused(&host, control, taken);
    // Control pages of the one are no memory for the other, nor for itself: there the call itself
    // holds the page.
    refused(&host, aug(other, PAGE, mine), taken);
    refused(&host, aug(mine, PAGE, mine), Status::OPERAND_BUSY);
    // What belongs to a TD that lives cannot be had back.
    let reclaim = Seamcall::new(Leaf::PHYMEM_PAGE_RECLAIM).rcx(page);
    refused(&host, reclaim, Status::LIFECYCLE_STATE_INCORRECT);
}

#[test]
fn a_page_cannot_be_put_in_the_place_of_another() {
    let module = module();
    let mut host = Host::new(&module, 0, FIRST);
    let tdr = runnable_td(&mut host, KEYS[0]);
    let (page, evil) = (host.page(), host.page());
    host.must(aug(tdr, 0, page));
    let on = |leaf| Seamcall::new(leaf).rcx(0).rdx(tdr);

    refused(&host, aug(tdr, 0, evil), Status::EPT_ENTRY_STATE_INCORRECT);
    // Blocked and tracked, the entry still names its page.
    refused(
        &host,
        on(Leaf::MEM_PAGE_REMOVE),
        Status::GPA_RANGE_NOT_BLOCKED,
    );
    host.must(on(Leaf::MEM_RANGE_BLOCK));
    refused(
        &host,
        on(Leaf::MEM_PAGE_REMOVE),
        Status::TLB_TRACKING_NOT_DONE,
    );
    refused(&host, aug(tdr, 0, evil), Status::EPT_ENTRY_STATE_INCORRECT);
    host.must(Seamcall::new(Leaf::MEM_TRACK).rcx(tdr));
    refused(&host, aug(tdr, 0, evil), Status::EPT_ENTRY_STATE_INCORRECT);
    host.must(on(Leaf::MEM_PAGE_REMOVE));
    host.must(aug(tdr, 0, evil));
    // The new page waits for the guest to accept it: nothing is read from it before.
    let entries = module.inspect_sept(tdx_defs::Hpa::new(tdr));
    let leaf = entries.iter().find(|entry| entry.state.is_leaf()).unwrap();
    assert_eq!(leaf.state, SeptState::PENDING);
    assert_eq!(leaf.page.get(), evil);
}

#[test]
fn a_key_is_not_used_again_before_it_is_free() {
    let module = module();
    let mut host = Host::new(&module, 0, FIRST);
    let tdr = host.build_td(KEYS[0]);
    let spare = host.page();
    let again = Seamcall::new(Leaf::MNG_CREATE).rcx(spare).rdx(KEYS[0]);
    let on = |leaf| Seamcall::new(leaf).rcx(tdr);

    refused(&host, again.clone(), Status::HKID_NOT_FREE);
    let vcpu = host.build_vcpu(tdr);
    // A vCPU is still at home on its processor.
    let flush = on(Leaf::MNG_VPFLUSHDONE);
    refused(&host, flush.clone(), Status::FLUSHVP_NOT_DONE);
    host.must(Seamcall::new(Leaf::VP_FLUSH).rcx(vcpu));
    host.must(flush);
    refused(&host, again.clone(), Status::HKID_NOT_FREE);
    // The caches still hold its lines.
    refused(
        &host,
        on(Leaf::MNG_KEY_FREEID),
        Status::WBCACHE_NOT_COMPLETE,
    );
    host.must(Seamcall::new(Leaf::PHYMEM_CACHE_WB));
    refused(&host, again.clone(), Status::HKID_NOT_FREE);
    host.must(on(Leaf::MNG_KEY_FREEID));
    host.must(again);
}

#[test]
fn a_finished_measurement_takes_nothing_more() {
    let module = module();
    let mut host = Host::new(&module, 0, FIRST);
    let tdr = runnable_td(&mut host, KEYS[0]);
    let (page, source) = (host.page(), 0x20_0000);
    let add = Seamcall::new(Leaf::MEM_PAGE_ADD).rdx(tdr).r8(page);
    let add = Seamcall {
        r9: source,
        data: vec![7; 4096].into(),
        ..add
    };
    refused(&host, add, Status::OP_STATE_INCORRECT);
    host.must(aug(tdr, 0, page));
    let extend = Seamcall::new(Leaf::MR_EXTEND).rdx(tdr);
    let all = Repeat {
        count: 16,
        rcx_stride: 256,
        ..Repeat::default()
    };
    refused(&host, extend.clone(), Status::OP_STATE_INCORRECT);
    refused(&host, extend.repeated(all), Status::OP_STATE_INCORRECT);
    let finish = Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr);
    refused(&host, finish, Status::OP_STATE_INCORRECT);
}

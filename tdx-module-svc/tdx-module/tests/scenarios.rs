//! Scenarios whose precondition no sequence of calls reaches, where a hook makes it; and leaves that
//! no recording covers.

mod common;

use common::Host;
use tdx_defs::{CompletionStatus as Status, Gpa, Hpa, Leaf, OperandId, Seamcall, TdxLevel, field};
use tdx_module::hooks::{LockObject, SystemState};
use tdx_module::{LockMode, Module, PlatformConfig, Release};

const TDR: u64 = 0x4000_0000;

fn modules() -> [Module; 2] {
    [Release::R1_5_05, Release::R1_5_34].map(|release| {
        Module::new(PlatformConfig {
            release,
            ..PlatformConfig::conformance()
        })
        .unwrap()
    })
}

#[test]
fn sa_21_a_fatal_td_is_refused() {
    for module in modules() {
        let mut host = Host::new(&module, 0, TDR);
        host.build_td(0x21);
        assert!(module.mark_fatal(Hpa::new(TDR)));
        let call = Seamcall::new(Leaf::MEM_SEPT_ADD)
            .rcx(3)
            .rdx(TDR)
            .r8(0x4001_0000);
        let result = host.call(&call);
        assert_eq!(
            (result.status(), result.rcx, result.rdx),
            (Status::TD_FATAL, 0, 0)
        );
        let tds = module.inspect_tds();
        assert!(tds[0].is_fatal && tds[0].children == 6, "{tds:?}");
    }
}

#[test]
fn td_23_no_td_is_made_before_the_module_is_ready() {
    for module in modules() {
        let host = Host::new(&module, 0, TDR);
        module.set_system_state(SystemState::InitDone);
        let call = Seamcall::new(Leaf::MNG_CREATE).rcx(TDR).rdx(0x21);
        assert_eq!(host.call(&call).status(), Status::SYS_NOT_READY);
        assert!(module.inspect_tds().is_empty());
        module.set_system_state(SystemState::Ready);
        host.must(call);
    }
}

#[test]
fn every_published_host_leaf_exists_unless_it_is_left_out() {
    // Dynamic PAMT is off, as in the plain configuration of the module.
    let left_out = ["TDH.PHYMEM.PAMT.ADD", "TDH.PHYMEM.PAMT.REMOVE"];
    let [module, _] = modules();
    let host = Host::new(&module, 0, TDR);
    let no_such_leaf = Status::OPERAND_INVALID.with(OperandId::RAX);
    let mut leaves = 0;
    for line in include_str!("data/leaf-functions.csv").lines().skip(1) {
        let mut cells = line.split(',');
        let (name, number) = (cells.next().unwrap(), cells.next().unwrap());
        if cells.next() != Some("host") || name == "TDH.SYS.LP.SHUTDOWN" {
            continue;
        }
        let leaf = Leaf(number.parse().unwrap());
        assert_eq!(leaf.name(), Some(name));
        let exists = host.call(&Seamcall::new(leaf)).status() != no_such_leaf;
        assert_eq!(exists, !left_out.contains(&name), "{name}");
        leaves += 1;
    }
    assert_eq!(leaves, 46);
}

#[test]
fn after_shutdown_nothing_is_answered_any_more() {
    for module in modules() {
        let mut host = Host::new(&module, 0, TDR);
        let tdr = host.build_td(0x21);
        host.must(Seamcall::new(Leaf::SYS_LP_SHUTDOWN));
        let track = Seamcall::new(Leaf::MEM_TRACK).rcx(tdr);
        assert_eq!(host.call(&track).status(), Status::SYS_SHUTDOWN);
    }
}

#[test]
fn the_module_describes_itself_field_by_field_and_as_a_list() {
    let [module, _] = modules();
    let host = Host::new(&module, 0, TDR);
    let mut next = host.call(&Seamcall::new(Leaf::SYS_RD).rdx(u64::MAX)).rdx;
    let mut fields = Vec::new();
    while next != u64::MAX {
        let read = host.must(Seamcall::new(Leaf::SYS_RD).rdx(next));
        fields.push((next, read.r8));
        next = read.rdx;
    }
    for (id, value) in [
        (0x0800_0001_0000_0005, 5),
        (0x9100_0001_0000_0008, 64),
        (0x9800_0001_0000_0100, 6 * 4096),
        (0x1900_0003_0000_0002, 0x0006_DBE7),
        (0x9900_0001_0000_0008, 576),
    ] {
        assert!(fields.contains(&(id, value)), "{id:#x}");
    }
    let list = 0x20_0000;
    let all = host.must(Seamcall::new(Leaf::SYS_RDALL).rdx(list).r8(u64::MAX));
    assert_eq!(all.r8, u64::MAX);
    let bytes = module.read_host_memory(Hpa::new(list), 4096);
    let words: Vec<_> = bytes
        .as_chunks::<8>()
        .0
        .iter()
        .map(|w| u64::from_le_bytes(*w))
        .collect();
    let count = fields.len() as u64;
    assert_eq!(words[0], (8 + 16 * count) | count << 16);
    let listed: Vec<_> = words[1..]
        .as_chunks::<2>()
        .0
        .iter()
        .map(|[id, value]| (*id, *value))
        .collect();
    assert_eq!(listed[..fields.len()], fields[..]);

    let info = Seamcall::new(Leaf::SYS_INFO)
        .rcx(0x30_0000)
        .rdx(1024)
        .r8(0x40_0000)
        .r9(32);
    let done = host.must(info.clone());
    assert_eq!((done.rdx, done.r9), (1024, 32));
    let cmr = module.read_host_memory(Hpa::new(0x40_0000), 16);
    assert_eq!(cmr[..8], 0x4000_0000u64.to_le_bytes());
    for (call, operand) in [
        (info.clone().rcx(0x30_0200), OperandId::RCX),
        (info.clone().rdx(1023), OperandId::RDX),
        (info.clone().r8(0x40_0100), OperandId::R8),
        (info.clone().r9(31), OperandId::R9),
    ] {
        assert_eq!(
            host.call(&call).status(),
            Status::OPERAND_INVALID.with(operand)
        );
    }
}

#[test]
fn the_host_may_change_one_field_of_a_td_within_its_limits() {
    let [module, _] = modules();
    let mut host = Host::new(&module, 0, TDR);
    let tdr = host.build_td(0x21);
    let write = |id, value| {
        Seamcall::new(Leaf::MNG_WR)
            .rcx(tdr)
            .rdx(id)
            .r8(value)
            .r9(u64::MAX)
    };
    let timeout = field::TDCS_HP_LOCK_TIMEOUT;
    assert_eq!(host.must(write(timeout, 20_000)).r8, 1_000_000);
    for (call, status) in [
        (
            write(timeout, 9_999),
            Status::METADATA_FIELD_VALUE_NOT_VALID,
        ),
        (
            write(field::TDCS_EPTP, 0),
            Status::METADATA_FIELD_NOT_WRITABLE,
        ),
        (write(0x1234, 0), Status::METADATA_FIELD_ID_INCORRECT),
        (
            Seamcall::new(Leaf::MNG_RD).rcx(tdr).rdx(field::TDCS_RTMR),
            Status::METADATA_FIELD_NOT_READABLE,
        ),
    ] {
        assert_eq!(host.call(&call).status(), status, "{call:?}");
    }
    let read = Seamcall::new(Leaf::MNG_RD).rcx(tdr).rdx(timeout).version(1);
    let read = host.must(read);
    assert_eq!((read.r8, read.rdx), (20_000, field::TDCS_CONFIG_FLAGS));
}

/// 512 pages from the start of a large range, which can be merged.
fn mergeable(module: &Module) -> Host<'_> {
    let mut host = Host::new(module, 0, TDR);
    let tdr = host.build_td(0x21);
    host.link(tdr, 0);
    assert_eq!(host.aug(tdr, 0, 0x4020_0000, 512).completed, 512);
    host
}

#[test]
fn merging_shares_the_tree_in_the_older_release_only() {
    let tree = LockObject::SeptTree { tdr: Hpa::new(TDR) };
    for (module, status) in modules().into_iter().zip([
        Status::SUCCESS,
        Status::OPERAND_BUSY.with(OperandId::SEPT_TREE),
    ]) {
        let host = mergeable(&module);
        assert!(module.hold_lock(tree, LockMode::Shared));
        let promote = Seamcall::new(Leaf::MEM_PAGE_PROMOTE).rcx(1).rdx(TDR);
        assert_eq!(host.call(&promote).status(), status);
        assert!(module.release_lock(tree, LockMode::Shared));
        common::check_invariants(&module);
    }
}

#[test]
fn a_locked_page_cannot_be_merged() {
    for (module, status) in modules().into_iter().zip([
        Status::OPERAND_BUSY.with(OperandId::RCX),
        Status::EPT_INVALID_PROMOTE_CONDITIONS.with(OperandId::RCX),
    ]) {
        let host = mergeable(&module);
        let level = TdxLevel::new(0).unwrap();
        let (tdr, gpa) = (Hpa::new(TDR), Gpa::new(0x7000));
        let entry = LockObject::SeptEntry { tdr, gpa, level };
        assert!(module.hold_lock_as_guest(entry, LockMode::Exclusive));
        let promote = Seamcall::new(Leaf::MEM_PAGE_PROMOTE).rcx(1).rdx(TDR);
        let refused = host.call(&promote);
        assert_eq!((refused.status(), refused.rdx), (status, 0x8401));
        assert!(module.release_lock(entry, LockMode::Exclusive));
        host.must(Seamcall::new(Leaf::MEM_SEPT_RD).rcx(0x7000).rdx(TDR));
        host.must(promote);
        common::check_invariants(&module);
    }
}

#[test]
fn a_merged_table_is_used_again() {
    for module in modules() {
        let mut host = mergeable(&module);
        for _ in 0..20 {
            let promote = Seamcall::new(Leaf::MEM_PAGE_PROMOTE).rcx(1).rdx(TDR);
            let table = host.must(promote).rcx;
            host.must(
                Seamcall::new(Leaf::MEM_PAGE_DEMOTE)
                    .rcx(1)
                    .rdx(TDR)
                    .r8(table),
            );
            host.must(Seamcall::new(Leaf::MEM_RANGE_BLOCK).rcx(0x3000).rdx(TDR));
            host.must(Seamcall::new(Leaf::MEM_RANGE_UNBLOCK).rcx(0x3000).rdx(TDR));
        }
        common::check_invariants(&module);
        assert!(host.page() > TDR);
    }
}

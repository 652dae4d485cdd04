//! Random calls by a host that obeys no rule. Nothing may panic, no page may have two owners, and
//! the counters have to stay right.

mod common;

use common::{Host, PAGE, check_invariants, one_by_one};
use proptest::prelude::*;
use tdx_defs::{ALL_ONES_HPA, Leaf, Repeat, Seamcall};
use tdx_module::{LpId, Module, PlatformConfig};

const POOL: u64 = 0x4000_0000;

/// Mostly pages of a small pool, sometimes large ranges and nonsense.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0..40u64).prop_map(|page| POOL + page * PAGE),
        3 => (1..4u64).prop_map(|range| POOL + range * (2 << 20)),
        1 => (0..1024u64).prop_map(|page| POOL + (2 << 20) + page * PAGE),
        1 => Just(ALL_ONES_HPA),
        1 => Just(0x7000_0000),
        1 => Just(0x20_0000),
        1 => any::<u64>(),
    ]
}

/// Mostly valid Secure EPT operands of a small space.
fn sept_operand() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0..6u64).prop_map(|page| page * PAGE),
        4 => (0..3u64).prop_map(|range| range << 21 | 1),
        2 => 2..5u64,
        1 => any::<u64>(),
    ]
}

/// Mostly a page, sometimes what a sane host would never say.
fn stride() -> impl Strategy<Value = i64> {
    let page = PAGE.cast_signed();
    prop_oneof![6 => Just(page), 1 => prop::sample::select(vec![0, 1, -page, 512 * page])]
}

fn call() -> impl Strategy<Value = (u32, Seamcall)> {
    let leaf = prop_oneof![
        6 => prop::sample::select(vec![
            Leaf::MEM_SEPT_ADD, Leaf::MEM_PAGE_AUG, Leaf::MEM_PAGE_ADD, Leaf::MEM_RANGE_BLOCK,
            Leaf::MEM_TRACK, Leaf::MEM_PAGE_REMOVE, Leaf::MEM_SEPT_REMOVE,
            Leaf::MEM_RANGE_UNBLOCK, Leaf::MEM_PAGE_DEMOTE, Leaf::MEM_PAGE_PROMOTE,
            Leaf::MEM_PAGE_RELOCATE, Leaf::MEM_WR,
        ]),
        // All but TDH.SYS.LP.SHUTDOWN, after which there is nothing to see.
        2 => (0..63u16).prop_map(|leaf| Leaf(if leaf < 44 { leaf } else { leaf + 1 })),
    ];
    let rcx = prop_oneof![3 => sept_operand(), 1 => address()];
    let rdx = prop_oneof![8 => Just(POOL), 1 => address(), 1 => 33..36u64];
    let registers = (rcx, rdx, address(), address());
    let run = (any::<bool>(), 1..5u32, stride(), stride());
    (0..4u32, leaf, 0..3u8, registers, run).prop_map(
        |(lp, leaf, version, (rcx, rdx, r8, r9), (runs, count, rcx_stride, r8_stride))| {
            // Leaves that name the TD in RCX should find it there now and then.
            let names_td = [Leaf::MEM_TRACK, Leaf::MR_FINALIZE, Leaf::MNG_VPFLUSHDONE];
            let rcx = if names_td.contains(&leaf) { POOL } else { rcx };
            let version = version.saturating_sub(1);
            let call = Seamcall {
                leaf,
                version,
                rcx,
                rdx,
                r8,
                r9,
                ..Seamcall::default()
            };
            let repeat = Repeat {
                count,
                rcx_stride,
                r8_stride,
                r9_stride: 0,
            };
            (
                lp,
                Seamcall {
                    repeat: runs.then_some(repeat),
                    ..call
                },
            )
        },
    )
}

/// A debuggable TD with a vCPU, tables for its first 2 MiB and 512 pages above them that could
/// be one large page.
fn td(module: &Module) -> u64 {
    let mut host = Host::new(module, 0, POOL);
    let tdr = host.build_td_with(33, &common::td_params().with_attributes(1));
    host.link(tdr, 0);
    host.build_vcpu(tdr);
    let range = 2 << 20;
    host.link(tdr, range);
    assert_eq!(host.aug(tdr, range, POOL + range, 512).completed, 512);
    tdr
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_calls_break_nothing(calls in prop::collection::vec(call(), 1..120)) {
        let module = Module::new(PlatformConfig::conformance()).unwrap();
        td(&module);
        for (lp, call) in &calls {
            let result = module.seamcall(LpId(*lp), call);
            prop_assert!(result.completed <= call.count());
        }
        check_invariants(&module);
    }

    #[test]
    fn a_refused_call_changes_nothing(calls in prop::collection::vec(call(), 1..60)) {
        let module = Module::new(PlatformConfig::conformance()).unwrap();
        let tdr = tdx_defs::Hpa::new(td(&module));
        for (lp, call) in &calls {
            let before = (module.inspect_sept(tdr), module.usage());
            let result = module.seamcall(LpId(*lp), call);
            if result.completed == 0 {
                prop_assert_eq!(before, (module.inspect_sept(tdr), module.usage()), "{:?}", call);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_run_answers_as_its_calls_one_by_one(calls in prop::collection::vec(call(), 1..60)) {
        let [runs, singles] =
            [(), ()].map(|()| Module::new(PlatformConfig::conformance()).unwrap());
        let tdr = tdx_defs::Hpa::new(td(&runs));
        td(&singles);
        for (lp, call) in &calls {
            let lp = LpId(*lp);
            prop_assert_eq!(runs.seamcall(lp, call), one_by_one(&singles, lp, call), "{:?}", call);
        }
        prop_assert_eq!(runs.inspect_sept(tdr), singles.inspect_sept(tdr));
        prop_assert_eq!(runs.usage(), singles.usage());
        prop_assert_eq!(runs.inspect_tds(), singles.inspect_tds());
    }
}

#[test]
fn two_hostile_processors_break_nothing() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut calls = || -> Vec<_> {
        let strategy = prop::collection::vec(call(), 4000);
        strategy.new_tree(&mut runner).unwrap().current()
    };
    let (first, second) = (calls(), calls());
    for round in 0..4 {
        let module = Module::new(PlatformConfig::conformance()).unwrap();
        td(&module);
        let run = |calls: &[(u32, Seamcall)]| {
            for (lp, call) in calls {
                module.seamcall(LpId(*lp), call);
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| run(&first[round * 1000..][..1000]));
            scope.spawn(|| run(&second[round * 1000..][..1000]));
        });
        check_invariants(&module);
    }
}

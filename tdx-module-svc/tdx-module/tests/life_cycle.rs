//! Whole lives of TDs through the public face, on the default platform.

mod common;

use common::{Host, PAGE, check_invariants};
use tdx_defs::{CompletionStatus as Status, Leaf, OperandId, Repeat, Seamcall, field};
use tdx_module::{Module, PlatformConfig, Release};

const GIB: u64 = 1 << 30;
const FIRST: u64 = 4 * GIB;

fn roomy() -> Module {
    Module::new(PlatformConfig::default()).unwrap()
}

/// Reclaims every page of a TD in teardown, its root last.
fn reclaim_all(host: &Host<'_>, tdr: u64) {
    let mut pages = Vec::new();
    host.module.inspect_pamt(|page| pages.push(page.hpa.get()));
    for page in pages.into_iter().filter(|page| *page != tdr).chain([tdr]) {
        host.must(Seamcall::new(Leaf::PHYMEM_PAGE_RECLAIM).rcx(page));
        host.must(Seamcall::new(Leaf::PHYMEM_PAGE_WBINVD).rcx(page));
    }
}

fn tear_down(host: &Host<'_>, tdr: u64) {
    host.must(Seamcall::new(Leaf::MNG_VPFLUSHDONE).rcx(tdr));
    host.must(Seamcall::new(Leaf::PHYMEM_CACHE_WB));
    host.must(Seamcall::new(Leaf::MNG_KEY_FREEID).rcx(tdr));
    reclaim_all(host, tdr);
}

#[test]
fn a_td_is_built_run_down_and_leaves_nothing_behind() {
    let module = roomy();
    let mut host = Host::new(&module, 3, FIRST);
    let idle = module.usage();
    for round in 0..3 {
        let tdr = host.build_td(1025);
        assert_eq!(module.usage().hkids_in_use, 1);
        host.link(tdr, 0);
        let page = host.page();
        let add = Seamcall {
            r9: 0x20_0000,
            data: vec![7; 4096].into(),
            ..Seamcall::default()
        };
        host.must(Seamcall {
            leaf: Leaf::MEM_PAGE_ADD,
            rdx: tdr,
            r8: page,
            ..add
        });
        let repeat = Repeat {
            count: 16,
            rcx_stride: 256,
            ..Repeat::default()
        };
        host.must(Seamcall::new(Leaf::MR_EXTEND).rdx(tdr).repeated(repeat));
        let tdvpr = host.build_vcpu(tdr);
        host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr));
        let first = host.page();
        assert_eq!(
            host.aug(tdr, PAGE, first, 1).status(),
            Status::SUCCESS,
            "round {round}"
        );
        check_invariants(&module);
        host.must(Seamcall::new(Leaf::VP_FLUSH).rcx(tdvpr));
        tear_down(&host, tdr);
        assert_eq!(module.usage(), idle, "round {round}");
    }
}

#[test]
fn a_thousand_small_tds_live_side_by_side() {
    let module = roomy();
    let mut host = Host::new(&module, 0, FIRST);
    for hkid in 1025..2025 {
        let tdr = host.build_td(hkid);
        host.link(tdr, 0);
        host.must(Seamcall::new(Leaf::MEM_TRACK).rcx(tdr));
    }
    assert_eq!(module.usage().hkids_in_use, 1000);
    let page = host.page();
    let taken = Seamcall::new(Leaf::MNG_CREATE).rcx(page).rdx(1025);
    assert_eq!(host.call(&taken).status(), Status::HKID_NOT_FREE);
}

#[test]
fn a_run_stops_at_the_first_refusal_and_equals_single_calls() {
    let run = roomy();
    let single = roomy();
    let mut hosts = [Host::new(&run, 0, FIRST), Host::new(&single, 0, FIRST)];
    for host in &mut hosts {
        let tdr = host.build_td(1025);
        assert_eq!(tdr, FIRST);
        host.link(tdr, 0);
        // The fourth page of the run is in use.
        assert_eq!(
            host.aug(tdr, 400 * PAGE, 8 * GIB + 3 * PAGE, 1).completed,
            1
        );
    }
    let result = hosts[0].aug(FIRST, 0, 8 * GIB, 512);
    assert_eq!(result.completed, 3);
    assert_eq!(
        result.status(),
        Status::PAGE_METADATA_INCORRECT.with(OperandId::R8)
    );
    for at in 0..4 {
        let call = hosts[1].aug(FIRST, at * PAGE, 8 * GIB + at * PAGE, 1);
        assert_eq!(call.completed, u32::from(at < 3));
    }
    let td = tdx_defs::Hpa::new(FIRST);
    assert_eq!(run.inspect_sept(td), single.inspect_sept(td));
    assert_eq!(
        hosts[0].aug(FIRST, 0, 0, 0),
        tdx_defs::SeamcallResult::default()
    );
}

#[test]
fn a_run_of_page_add_may_bring_a_page_for_each_call() {
    let module = roomy();
    let mut host = Host::new(&module, 0, FIRST);
    let params = common::td_params().with_attributes(1);
    let tdr = host.build_td_with(1025, &params);
    host.link(tdr, 0);
    let stride = PAGE.cast_signed();
    let repeat = Repeat {
        count: 3,
        rcx_stride: stride,
        r8_stride: stride,
        r9_stride: stride,
    };
    let mut data = vec![0; 3 * 4096];
    for (page, byte) in data.chunks_mut(4096).zip(1..) {
        page.fill(byte);
    }
    let add = Seamcall::new(Leaf::MEM_PAGE_ADD)
        .rdx(tdr)
        .r8(8 * GIB)
        .data(data);
    host.must(
        Seamcall {
            r9: 0x20_0000,
            ..add
        }
        .repeated(repeat),
    );
    for page in 0..3u64 {
        let read = host.must(Seamcall::new(Leaf::MEM_RD).rcx(page * PAGE + 8).rdx(tdr));
        assert_eq!(read.r8, (page + 1) * 0x0101_0101_0101_0101);
    }
    // Without data the call reads what was written to the same address before.
    let again = Seamcall::new(Leaf::MEM_PAGE_ADD)
        .rcx(8 * PAGE)
        .rdx(tdr)
        .r8(9 * GIB);
    host.must(Seamcall {
        r9: 0x20_1000,
        ..again
    });
    let read = host.must(Seamcall::new(Leaf::MEM_RD).rcx(8 * PAGE).rdx(tdr));
    assert_eq!(read.r8, 0x0202_0202_0202_0202);
}

#[test]
fn metadata_fields_show_the_td_and_its_vcpus() {
    let module = roomy();
    let mut host = Host::new(&module, 0, FIRST);
    let tdr = host.build_td(1025);
    let tdvpr = host.build_vcpu(tdr);
    host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr));
    for (id, value) in [
        (field::TDR_CHLDCNT, 12),
        (field::TDR_LIFECYCLE_STATE, 1),
        (field::TDR_NUM_TDCX, 6),
        (field::TDCS_OP_STATE, 2),
        (field::TDCS_NUM_VCPUS, 1),
        (field::TDCS_NUM_ASSOC_VCPUS, 1),
        (field::TDCS_EPTP, (FIRST + 4 * PAGE) | 0x1E),
        (field::TDCS_TD_EPOCH, 1),
        (field::TDCS_MRTD, 0x3896_ac51_a760_b038),
        (field::TDCS_MRTD + 5, 0x5bb9_9848_f1d2_1ad5),
    ] {
        let read = host.must(Seamcall::new(Leaf::MNG_RD).rcx(tdr).rdx(id));
        assert_eq!(read.r8, value, "{id:#x}");
    }
    let unknown = Seamcall::new(Leaf::MNG_RD).rcx(tdr).rdx(0x1234);
    assert_eq!(
        host.call(&unknown).status(),
        Status::METADATA_FIELD_ID_INCORRECT
    );

    let write = Seamcall::new(Leaf::VP_WR)
        .rcx(tdvpr)
        .rdx(field::SHARED_EPT_POINTER)
        .r8(0x5000);
    assert_eq!(
        host.must(Seamcall {
            r9: u64::MAX,
            ..write
        })
        .r8,
        0
    );
    let read = Seamcall::new(Leaf::VP_RD)
        .rcx(tdvpr)
        .rdx(field::SHARED_EPT_POINTER);
    assert_eq!(host.must(read).r8, 0x5000);
}

#[test]
fn a_later_release_shows_other_entries_and_states() {
    let config = PlatformConfig {
        release: Release::R1_5_34,
        ..PlatformConfig::default()
    };
    let module = Module::new(config).unwrap();
    let mut host = Host::new(&module, 0, FIRST);
    let tdr = host.build_td(1025);
    host.link(tdr, 0);
    let link = host.must(Seamcall::new(Leaf::MEM_SEPT_RD).rcx(1).rdx(tdr));
    assert_eq!((link.rcx, link.rdx), (0x407, 0x8401));
    host.must(Seamcall::new(Leaf::MEM_PAGE_ADD).rdx(tdr).r8(8 * GIB));
    let page = host.must(Seamcall::new(Leaf::MEM_SEPT_RD).rdx(tdr));
    assert_eq!(
        (page.rcx, page.rdx),
        (0x8000_0000_0000_04F7 + 8 * GIB, 0x400)
    );
    let init = host.call(&Seamcall::new(Leaf::MNG_INIT).rcx(tdr));
    assert_eq!(init.status(), Status::OP_STATE_INCORRECT.with_details(1));
}

#[test]
fn keys_are_programmed_and_caches_written_back_on_every_package() {
    let config = PlatformConfig {
        packages: 2,
        logical_processors: 4,
        ..PlatformConfig::default()
    };
    let module = Module::new(config).unwrap();
    let on = |lp| Host::new(&module, lp, FIRST);
    on(0).must(Seamcall::new(Leaf::MNG_CREATE).rcx(FIRST).rdx(1030));
    let configure = Seamcall::new(Leaf::MNG_KEY_CONFIG).rcx(FIRST);
    on(0).must(configure.clone());
    assert_eq!(on(1).call(&configure).status(), Status::KEY_CONFIGURED);
    let add = Seamcall::new(Leaf::MNG_ADDCX).rcx(FIRST + PAGE).rdx(FIRST);
    assert_eq!(on(0).call(&add).status(), Status::TD_KEYS_NOT_CONFIGURED);
    on(2).must(configure);
    on(0).must(add);
    on(0).must(Seamcall::new(Leaf::MNG_VPFLUSHDONE).rcx(FIRST));
    on(0).must(Seamcall::new(Leaf::PHYMEM_CACHE_WB));
    let free = Seamcall::new(Leaf::MNG_KEY_FREEID).rcx(FIRST);
    assert_eq!(on(0).call(&free).status(), Status::WBCACHE_NOT_COMPLETE);
    on(3).must(Seamcall::new(Leaf::PHYMEM_CACHE_WB));
    on(0).must(free);
    reclaim_all(&on(0), FIRST);
}

#[test]
fn a_tdmr_becomes_usable_by_whole_gigabytes() {
    let module = Module::new(PlatformConfig::conformance()).unwrap();
    let host = Host::new(&module, 0, 0);
    let init = Seamcall::new(Leaf::SYS_TDMR_INIT).rcx(0x1_8000_0000);
    for step in 1..=256u64 {
        let end = if step == 256 {
            0x1_C000_0000
        } else {
            0x1_8000_0000
        };
        assert_eq!(host.must(init.clone()).rdx, end, "step {step}");
    }
    assert_eq!(host.call(&init).status(), Status::TDMR_ALREADY_INITIALIZED);
    host.must(Seamcall::new(Leaf::MNG_CREATE).rcx(0x1_8000_0000).rdx(33));
}

#[test]
fn calls_without_a_leaf_are_refused_by_the_dispatcher() {
    let module = roomy();
    let host = Host::new(&module, 0, FIRST);
    let refused = Status::OPERAND_INVALID.with(OperandId::RAX);
    for (leaf, version) in [(46, 0), (63, 0), (u16::MAX, 0), (Leaf::MEM_PAGE_AUG.0, 1)] {
        let call = Seamcall {
            leaf: Leaf(leaf),
            version,
            ..Seamcall::default()
        };
        assert_eq!(
            host.call(&call).status(),
            refused,
            "{leaf} version {version}"
        );
    }
}

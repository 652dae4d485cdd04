//! Private memory through both services: faults, populate, conversion, the initial image, and
//! everything given back at the end.

use crate::stack;
use crate::stack::{MIB, PAGE, PRIVATE, SHARED, Stack, WRITE, all_calls, calls, pages};
use mirror_proto::mmu::{self as wire, Mode, RetPf, Root};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

const ADD_TABLE: &str = "TDH.MEM.SEPT.ADD";
const AUG: &str = "TDH.MEM.PAGE.AUG";
const BLOCK: &str = "TDH.MEM.RANGE.BLOCK";
const TRACK: &str = "TDH.MEM.TRACK";
const REMOVE: &str = "TDH.MEM.PAGE.REMOVE";
const WRITE_BACK: &str = "TDH.PHYMEM.PAGE.WBINVD";

const MODES: [Mode; 2] = [Mode::Batched, Mode::Kernel];

#[tokio::test]
async fn a_cold_private_fault_adds_the_tables_and_the_page() {
    let mut stack = Stack::start().await;
    for (mode, rpcs) in [(Mode::Batched, 1), (Mode::Kernel, 4)] {
        let vm = stack.running_vm(mode, 1, 8 * MIB).await;
        let fault = stack.fault(vm, 0, 5 * PAGE + 0x123).await.unwrap();
        assert_eq!((fault.ret_pf(), fault.root()), (RetPf::Fixed, Root::Mirror));
        assert_eq!((fault.level, fault.rpcs), (1, rpcs), "{mode:?}");
        let made: Vec<_> = fault.seamcalls.iter().map(|call| &*call.name).collect();
        assert_eq!(made, [ADD_TABLE, ADD_TABLE, ADD_TABLE, AUG], "{mode:?}");
        assert!(fault.seamcalls.iter().all(|call| call.status == 0));
        assert_ne!(fault.hpa, 0);

        let again = stack.fault(vm, 0, 5 * PAGE).await.unwrap();
        assert_eq!(again.ret_pf(), RetPf::Spurious);
        assert_eq!((again.rpcs, again.counts.unwrap().mirror_hits), (0, 1));

        let neighbour = stack.fault(vm, 0, 6 * PAGE).await.unwrap();
        assert_eq!(neighbour.seamcalls.len(), 1, "the tables are there");
        stack.assert_clean(vm).await;
    }
}

#[tokio::test]
async fn a_shared_fault_stays_in_the_direct_root() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.convert(vm, MIB, PAGE, 0).await.unwrap();
    let fault = stack.fault(vm, 0, MIB | SHARED).await.unwrap();
    assert_eq!((fault.ret_pf(), fault.root()), (RetPf::Fixed, Root::Direct));
    assert_eq!((fault.rpcs, fault.seamcalls.len()), (0, 0));
}

#[tokio::test]
async fn a_private_fault_on_shared_memory_leaves_with_the_exit_record() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.convert(vm, MIB, PAGE, 0).await.unwrap();
    let status = stack.fault(vm, 0, MIB).await.unwrap_err();
    stack::assert_refused::<()>(
        Err(status.clone()),
        tonic::Code::FailedPrecondition,
        "MEMORY_FAULT",
    );
    let details = tonic_types::StatusExt::get_error_details(&status);
    let metadata = &details.error_info().unwrap().metadata;
    for (key, value) in [
        ("gpa", "0x100000"),
        ("size", "0x1000"),
        ("flags", "0x8"),
        ("errno", "14"),
    ] {
        assert_eq!(metadata.get(key).map(String::as_str), Some(value), "{key}");
    }
}

#[tokio::test]
async fn batches_on_one_stream_are_answered_in_order_and_streams_run_side_by_side() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Batched, 2, 16 * MIB).await;
    let mut streams = Vec::new();
    for vcpu_id in 0..2 {
        let (send, batches) = tokio::sync::mpsc::channel(64);
        for tag in 0..32 {
            let first = (u64::from(vcpu_id) * 8 * MIB) / PAGE + tag * 16;
            let faults = (first..first + 16)
                .map(|page| wire::Fault {
                    gpa: page * PAGE,
                    qualification: WRITE,
                    ..Default::default()
                })
                .collect();
            let batch = wire::HandleFaultsRequest {
                vm_id,
                vcpu_id,
                faults,
                tag,
                ..Default::default()
            };
            send.send(batch).await.unwrap();
        }
        let mut client = stack.client.clone();
        streams.push(tokio::spawn(async move {
            let answers = client
                .handle_faults(ReceiverStream::new(batches))
                .await
                .unwrap();
            let mut answers = answers.into_inner();
            for tag in 0..32 {
                let answer = answers.message().await.unwrap().unwrap();
                assert_eq!(
                    (answer.tag, answer.fixed, answer.others_count),
                    (tag, 16, 0)
                );
            }
            drop(send);
            assert!(
                answers.message().await.unwrap().is_none(),
                "the stream ends with its input"
            );
        }));
    }
    for stream in streams {
        stream.await.unwrap();
    }
    let stats = stack.stats(vm_id).await;
    assert_eq!(stats.pages_4k, 1024);
    assert_eq!(calls(&stats.counts.unwrap(), AUG), 1024);
    stack.assert_clean(vm_id).await;
}

#[tokio::test]
async fn four_mebibytes_are_populated_with_one_call_a_page_and_table() {
    let mut stack = Stack::start().await;
    for mode in MODES {
        let vm = stack.running_vm(mode, 1, 8 * MIB).await;
        let before = stack.platform().await;
        let done = stack.prefault(vm, 0, 4 * MIB).await.unwrap();
        assert!(done.finished);
        assert_eq!(done.done, 4 * MIB);
        let counts = done.counts.unwrap();
        // Levels 3 and 2 once, level 1 once for each 2 MiB.
        assert_eq!(
            (calls(&counts, ADD_TABLE), calls(&counts, AUG)),
            (4, 1024),
            "{mode:?}"
        );
        assert_eq!(counts.pages_mapped, 1024);
        match mode {
            Mode::Kernel => assert_eq!(counts.rpcs, all_calls(&counts), "one message a call"),
            _ => assert!(counts.rpcs <= 8, "{} messages", counts.rpcs),
        }
        let after = stack.platform().await;
        assert_eq!(pages(&after, "PT_REG") - pages(&before, "PT_REG"), 1024);
        assert_eq!(pages(&after, "PT_EPT") - pages(&before, "PT_EPT"), 4);
        stack.assert_clean(vm).await;
    }
}

#[tokio::test]
async fn conversion_to_shared_costs_four_calls_a_page_in_the_kernel_and_one_round_in_batches() {
    const PAGES: u64 = 1024;
    let mut stack = Stack::start().await;
    for mode in MODES {
        let vm = stack.running_vm(mode, 1, 8 * MIB).await;
        stack.prefault(vm, 0, PAGES * PAGE).await.unwrap();
        let held = stack.platform().await;
        let counts = stack.convert(vm, 0, PAGES * PAGE, 0).await.unwrap();
        for leaf in [BLOCK, REMOVE, WRITE_BACK] {
            assert_eq!(calls(&counts, leaf), PAGES, "{mode:?} {leaf}");
        }
        if mode == Mode::Kernel {
            assert_eq!(calls(&counts, TRACK), PAGES);
            assert_eq!(counts.rpcs, all_calls(&counts), "one message a call");
            assert_eq!(all_calls(&counts), 4 * PAGES);
        } else {
            assert_eq!((calls(&counts, TRACK), counts.kicks), (1, 1));
            // Blocks with TRACK, removals, write-backs: however many the pages.
            assert!(counts.rpcs <= 3, "{} messages", counts.rpcs);
        }
        assert_eq!(counts.pages_zapped, PAGES);
        let left = stack.platform().await;
        assert_eq!(pages(&held, "PT_REG") - pages(&left, "PT_REG"), PAGES);
        stack.assert_clean(vm).await;
    }
}

#[tokio::test]
async fn the_initial_image_is_measured_as_the_module_does_it() {
    const EMPTY: &str = "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da\
                         274edebfe76f65fbd51ad2f14898b95b";
    const TWO_PAGES: &str = "d88b05f52648c041e7f0321f3905ec848a2d2654cf8c2158f67bc25ecd8a1a99\
                             9f5f65f5350db0f732b59cfc66d6da3b";
    const ZERO_PAGE: &str = "236f0efa607ff8843f1855d7ef80dc3dda8fb455787a186b8787212951eab009\
                             6e3193bb26f817c2b63c21f5e10f9938";
    const COUNTING_PAGE: &str = "b8f496520bb48e5284695ec1605cf17a5f9495329ba0b381d7c1966410e6de61\
                                 a9cf0dc98de4fb52c7a47b0bcb56ea72";
    let counting: Vec<u8> = (0..PAGE)
        .map(|at| u8::try_from(at % 256).unwrap())
        .collect();
    let mut stack = Stack::start().await;
    for mode in MODES {
        for (case, size, data, measure, mrtd) in [
            ("nothing", 0, vec![], false, EMPTY),
            (
                "two pages without contents",
                2 * PAGE,
                vec![],
                false,
                TWO_PAGES,
            ),
            ("a page of zeros", PAGE, vec![], true, ZERO_PAGE),
            (
                "a page that counts",
                PAGE,
                counting.clone(),
                true,
                COUNTING_PAGE,
            ),
        ] {
            let vm_id = stack.vm(mode, 1, 8 * MIB).await;
            if size != 0 {
                let request = wire::InitMemRegionRequest {
                    vm_id,
                    size,
                    data: data.into(),
                    measure,
                    ..Default::default()
                };
                let done = stack
                    .client
                    .init_mem_region(request)
                    .await
                    .unwrap()
                    .into_inner();
                assert_eq!(done.done, size, "{case}");
                let counts = done.counts.unwrap();
                assert_eq!(calls(&counts, "TDH.MEM.PAGE.ADD"), size / PAGE, "{case}");
                let extends = if measure { 16 * size / PAGE } else { 0 };
                assert_eq!(calls(&counts, "TDH.MR.EXTEND"), extends, "{case}");
            }
            let request = wire::FinalizeVmRequest { vm_id, hw_error: 0 };
            let finalized = stack
                .client
                .finalize_vm(request)
                .await
                .unwrap()
                .into_inner();
            assert_eq!(finalized.mrtd, mrtd, "{mode:?}: {case}");
            let listed = stack
                .list()
                .await
                .into_iter()
                .find(|vm| vm.vm_id == vm_id)
                .unwrap();
            assert_eq!(
                (&*listed.mrtd, &*listed.state),
                (mrtd, "runnable"),
                "{mode:?}: {case}"
            );
            stack.assert_clean(vm_id).await;
            stack.destroy(vm_id).await;
        }
    }
}

#[tokio::test]
async fn adding_first_and_extending_later_gives_another_measurement_than_page_by_page() {
    let mut stack = Stack::start().await;
    let mut measurements = Vec::new();
    for later in [false, true] {
        let vm_id = stack.vm(Mode::Batched, 1, 8 * MIB).await;
        let region = wire::InitMemRegionRequest {
            vm_id,
            size: 2 * PAGE,
            ..Default::default()
        };
        let add = wire::InitMemRegionRequest {
            measure: !later,
            ..region.clone()
        };
        stack.client.init_mem_region(add).await.unwrap();
        if later {
            let extend = wire::InitMemRegionRequest {
                extend_only: true,
                ..region
            };
            let counts = stack
                .client
                .init_mem_region(extend)
                .await
                .unwrap()
                .into_inner()
                .counts;
            assert_eq!(calls(&counts.unwrap(), "TDH.MR.EXTEND"), 32);
        }
        let request = wire::FinalizeVmRequest { vm_id, hw_error: 0 };
        measurements.push(
            stack
                .client
                .finalize_vm(request)
                .await
                .unwrap()
                .into_inner()
                .mrtd,
        );
    }
    assert_ne!(measurements[0], measurements[1]);
}

#[tokio::test]
async fn a_hole_gives_its_pages_back_and_can_be_filled_again() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.prefault(vm_id, 0, 4 * MIB).await.unwrap();
    let held = stack.platform().await;
    let request = wire::PunchHoleRequest {
        vm_id,
        slot_id: 1,
        offset: MIB,
        size: MIB,
    };
    let hole = stack.client.punch_hole(request).await.unwrap().into_inner();
    assert_eq!(
        (hole.pages_freed, hole.counts.unwrap().pages_zapped),
        (256, 256)
    );
    let left = stack.platform().await;
    assert_eq!(pages(&held, "PT_REG") - pages(&left, "PT_REG"), 256);
    stack.assert_clean(vm_id).await;
    let refill = stack
        .prefault(vm_id, 0, 4 * MIB)
        .await
        .unwrap()
        .counts
        .unwrap();
    assert_eq!((calls(&refill, ADD_TABLE), calls(&refill, AUG)), (0, 256));
    stack.assert_clean(vm_id).await;
}

#[tokio::test]
async fn the_hosts_notifier_reaches_shared_mappings_only() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.convert(vm_id, 4 * MIB, MIB, 0).await.unwrap();
    stack.fault(vm_id, 0, 0).await.unwrap();
    stack.fault(vm_id, 0, (4 * MIB) | SHARED).await.unwrap();
    let start = 0x7f00_0000_0000;
    let request = wire::UnmapHvaRequest {
        vm_id,
        start,
        end: start + 8 * MIB,
    };
    let counts = stack
        .client
        .unmap_hva(request)
        .await
        .unwrap()
        .into_inner()
        .counts
        .unwrap();
    assert_eq!((all_calls(&counts), counts.rpcs), (0, 0));
    assert_eq!(
        stack.fault(vm_id, 0, 0).await.unwrap().ret_pf(),
        RetPf::Spurious
    );
    assert_eq!(
        stack
            .fault(vm_id, 0, (4 * MIB) | SHARED)
            .await
            .unwrap()
            .ret_pf(),
        RetPf::Fixed,
        "it was unmapped"
    );
}

#[tokio::test]
async fn a_walk_shows_the_mirror_beside_what_the_module_has() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.fault(vm_id, 0, 3 * PAGE).await.unwrap();
    let request = wire::GetWalkRequest {
        vm_id,
        gpa: 3 * PAGE,
        module: true,
    };
    let walk = stack.client.get_walk(request).await.unwrap().into_inner();
    assert!(walk.mapped && walk.private_attribute);
    assert_eq!(walk.root(), Root::Mirror);
    let levels: Vec<_> = walk
        .entries
        .iter()
        .map(|entry| (entry.level, &*entry.kind))
        .collect();
    assert_eq!(
        levels,
        [(4, "table"), (3, "table"), (2, "table"), (1, "leaf")]
    );
    for table in &walk.entries[..3] {
        assert!(table.sept_entry.is_some() && table.sept_level_state.is_some());
        assert_eq!(&*table.sept_state, "NL_MAPPED", "{table:?}");
        assert_ne!(table.external_hpa, 0, "{table:?}");
    }
    let leaf = walk.entries.last().unwrap();
    assert!(
        leaf.sept_state.contains("PENDING"),
        "not accepted yet: {}",
        leaf.sept_state
    );

    let request = wire::DumpTreeRequest {
        vm_id,
        root: Root::Mirror.into(),
        min_level: 0,
    };
    let mut tree = stack.client.dump_tree(request).await.unwrap().into_inner();
    let mut leaves = Vec::new();
    while let Some(part) = tree.message().await.unwrap() {
        leaves.extend(
            part.entries
                .into_iter()
                .filter(|entry| entry.kind == "leaf"),
        );
    }
    assert_eq!(leaves.len(), 1);
    assert_eq!((leaves[0].gpa, leaves[0].hpa), (3 * PAGE, leaf.hpa));
}

#[tokio::test]
async fn destruction_gives_everything_back() {
    let mut stack = Stack::start().await;
    for mode in MODES {
        let vm = stack.running_vm(mode, 2, 8 * MIB).await;
        stack.prefault(vm, 0, 4 * MIB).await.unwrap();
        stack.convert(vm, 4 * MIB, MIB, 0).await.unwrap();
        stack.fault(vm, 1, (4 * MIB) | SHARED).await.unwrap();
        let half_built = stack.vm(mode, 1, 8 * MIB).await;
        assert_eq!(stack.platform().await.hkids_in_use, 2);
        for vm in [vm, half_built] {
            assert_eq!(stack.destroy(vm).await.pages_leaked, 0, "{mode:?}");
        }
        stack.assert_all_given_back().await;
        assert!(stack.list().await.is_empty());
    }
    let stats = stack.stats(0).await;
    assert_eq!(
        (stats.vms, stats.host_pages_in_use, stats.page_table_bytes),
        (0, 0, 0)
    );
    let counts = stats.counts.unwrap();
    assert_eq!(calls(&counts, AUG), 2 * 1024, "totals keep what is gone");
}

#[tokio::test]
async fn both_modes_end_in_the_same_state() {
    let mut stack = Stack::start().await;
    let mut ends = Vec::new();
    for mode in MODES {
        let vm_id = stack.running_vm(mode, 1, 8 * MIB).await;
        stack.prefault(vm_id, 0, 4 * MIB).await.unwrap();
        stack.convert(vm_id, MIB, MIB, 0).await.unwrap();
        stack.convert(vm_id, MIB, MIB / 2, PRIVATE).await.unwrap();
        stack.prefault(vm_id, MIB, MIB / 2).await.unwrap();
        stack.assert_clean(vm_id).await;
        let audit = stack.audit(vm_id).await.unwrap();
        let stats = stack.stats(vm_id).await;
        ends.push((audit.leaves, audit.tables, audit.entries, stats.pages_4k));
    }
    assert_eq!(ends[0], ends[1]);
}

#[tokio::test]
async fn regions_in_one_call_are_measured_as_one_after_the_other() {
    const REGIONS: u64 = 3;
    let mut stack = Stack::start().await;
    let region = |vm_id, at: u64| wire::InitMemRegionRequest {
        vm_id,
        gpa: at * MIB,
        size: MIB,
        data: (0..MIB)
            .map(|byte| ((byte >> 8) + at).to_le_bytes()[0])
            .collect(),
        measure: true,
        ..Default::default()
    };
    let mut measurements = Vec::new();
    for mode in [Mode::Kernel, Mode::Batched] {
        let vm_id = stack.vm(mode, 1, 8 * MIB).await;
        let counts = if mode == Mode::Kernel {
            for at in 0..REGIONS {
                let done = stack.client.init_mem_region(region(vm_id, at)).await;
                assert_eq!(done.unwrap().into_inner().done, MIB);
            }
            None
        } else {
            let regions = tokio_stream::iter((0..REGIONS).map(move |at| region(vm_id, at)));
            let done = stack.client.init_mem_regions(regions).await.unwrap();
            let done = done.into_inner();
            assert_eq!(done.done, REGIONS * MIB);
            done.counts
        };
        if let Some(counts) = counts {
            let added = REGIONS * MIB / PAGE;
            assert_eq!(calls(&counts, "TDH.MEM.PAGE.ADD"), added);
            assert_eq!(calls(&counts, "TDH.MR.EXTEND"), 16 * added);
            // 64 pages a message, and no message that the chain breaks at.
            assert_eq!(counts.rpcs, added / 64);
        }
        let request = wire::FinalizeVmRequest { vm_id, hw_error: 0 };
        let finalized = stack.client.finalize_vm(request).await.unwrap();
        measurements.push(finalized.into_inner().mrtd);
        stack.assert_clean(vm_id).await;
        stack.destroy(vm_id).await;
    }
    assert_eq!(measurements[0], measurements[1]);
}

#[tokio::test]
async fn a_region_that_cannot_be_ends_the_call_behind_those_before_it() {
    let mut stack = Stack::start().await;
    let vm_id = stack.vm(Mode::Batched, 1, 8 * MIB).await;
    let region = |gpa| wire::InitMemRegionRequest {
        vm_id,
        gpa,
        size: MIB,
        ..Default::default()
    };
    let regions = tokio_stream::iter([region(0), region(MIB + 1), region(2 * MIB)]);
    let refusal = stack.client.init_mem_regions(regions).await.unwrap_err();
    assert_eq!(refusal.code(), Code::InvalidArgument);
    assert!(refusal.message().starts_with("gpa"), "{refusal}");
    let counts = stack.stats(vm_id).await.counts.unwrap();
    assert_eq!(calls(&counts, "TDH.MEM.PAGE.ADD"), MIB / PAGE);
    stack.assert_clean(vm_id).await;
    stack.destroy(vm_id).await;
}

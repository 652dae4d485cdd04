//! A subset of the scenario tables through both processes: the calls that the module answers, in
//! order where the answer names each, by number elsewhere. Ids are those of the tables, which play
//! every row on both cores in one process.

use mirror_proto::mmu::{self as wire, Mode, RetPf};
use mirror_proto::module::fault_rule::{Action, When};
use mirror_proto::module::tdx_fault_service_client::TdxFaultServiceClient;
use mirror_proto::module::{FaultRule, FaultStatus, SetFaultRulesRequest};
use tdx_defs::Leaf;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::stack::{self, MIB, PAGE, PRIVATE, SHARED, Stack, all_calls, calls, reason_of};

const ADD_TABLE: &str = "TDH.MEM.SEPT.ADD";
const AUG: &str = "TDH.MEM.PAGE.AUG";
const ADD: &str = "TDH.MEM.PAGE.ADD";
const EXTEND: &str = "TDH.MR.EXTEND";
const BLOCK: &str = "TDH.MEM.RANGE.BLOCK";
const TRACK: &str = "TDH.MEM.TRACK";
const REMOVE: &str = "TDH.MEM.PAGE.REMOVE";
const WRITE_BACK: &str = "TDH.PHYMEM.PAGE.WBINVD";
const RECLAIM: &str = "TDH.PHYMEM.PAGE.RECLAIM";

const MODES: [Mode; 2] = [Mode::Kernel, Mode::Batched];
const SIZE: u64 = 8 * MIB;

/// The next calls of a leaf are busy.
async fn busy(stack: &Stack, leaf: Leaf, times: u64) {
    let url = stack.module_address().to_string();
    let mut faults = TdxFaultServiceClient::new(transport::connect(&url).await.unwrap());
    let rule = FaultRule {
        leaf: Some(leaf.0.into()),
        when: Some(When::Nth(1)),
        times,
        action: Some(Action::Status(FaultStatus { rax: 0 })),
        ..Default::default()
    };
    let rules = SetFaultRulesRequest {
        rules: vec![rule],
        replace: true,
    };
    faults.set_fault_rules(rules).await.unwrap();
}

/// Names of the calls of a fault, `(busy)` behind those that were.
fn made(fault: &wire::HandleFaultResponse) -> Vec<String> {
    let calls = fault.seamcalls.iter();
    calls
        .map(|call| match call.status {
            0 => call.name.clone(),
            _ => format!("{} (busy)", call.name),
        })
        .collect()
}

fn assert_memory_fault(outcome: Result<wire::HandleFaultResponse, Status>, flags: &str, id: &str) {
    let status = outcome.unwrap_err();
    let (reason, errno) = reason_of(&status);
    assert_eq!((&*reason, &*errno), ("MEMORY_FAULT", "14"), "{id}");
    let metadata = status.get_details_error_info().unwrap().metadata;
    assert_eq!(
        (&*metadata["flags"], &*metadata["size"]),
        (flags, "0x1000"),
        "{id}"
    );
}

/// How often each was called, and what else the operation took.
fn assert_counts(
    counts: &wire::Counts,
    expected: &[(&str, u64)],
    kicks: u64,
    flushes: u64,
    id: &str,
) {
    for (leaf, times) in expected {
        assert_eq!(calls(counts, leaf), *times, "{id} {leaf}");
    }
    let all: u64 = expected.iter().map(|(_, times)| times).sum();
    assert_eq!(all_calls(counts), all, "{id}: nothing else");
    assert_eq!(
        (counts.kicks, counts.flushes),
        (kicks, flushes),
        "{id}: kicks, flushes"
    );
}

#[tokio::test]
async fn private_faults_make_the_calls_of_p01_to_p23() {
    let mut stack = Stack::start().await;
    for mode in MODES {
        let vm = stack.running_vm(mode, 1, SIZE).await;
        let path = [ADD_TABLE, ADD_TABLE, ADD_TABLE, AUG];
        for (id, gfn, ret_pf, expected) in [
            ("P01", 1, RetPf::Fixed, &path[..]),
            ("P02", 2, RetPf::Fixed, &path[3..]),
            ("P03", 0x200, RetPf::Fixed, &path[2..]),
            ("P07", 1, RetPf::Spurious, &[]),
        ] {
            let fault = stack.fault(vm, 0, gfn * PAGE).await.unwrap();
            assert_eq!(
                (fault.ret_pf(), made(&fault)),
                (ret_pf, expected.iter().map(ToString::to_string).collect()),
                "{id} {mode:?}"
            );
        }
        stack.convert(vm, 3 * PAGE, PAGE, 0).await.unwrap();
        assert_memory_fault(stack.fault(vm, 0, 3 * PAGE).await, "0x8", "P08");
        assert_memory_fault(stack.fault(vm, 0, SHARED | (2 * PAGE)).await, "0x0", "D09");
        let done = stack.prefault(vm, 4 * PAGE, PAGE).await.unwrap();
        assert_counts(&done.counts.unwrap(), &[(AUG, 1)], 0, 0, "P17");
        let done = stack.prefault(vm, 4 * PAGE, PAGE).await.unwrap();
        assert_counts(&done.counts.unwrap(), &[], 0, 0, "P18");
        let refused = stack.prefault(vm, SHARED | PAGE, PAGE).await.unwrap_err();
        assert_eq!(reason_of(&refused).1, "22", "P20");

        busy(&stack, Leaf::MEM_PAGE_AUG, 1).await;
        let fault = stack.fault(vm, 0, 5 * PAGE).await.unwrap();
        assert_eq!(fault.ret_pf(), RetPf::Fixed, "P12");
        assert_eq!(
            made(&fault),
            [&format!("{AUG} (busy)"), AUG],
            "P12 {mode:?}"
        );
        assert_eq!(fault.counts.unwrap().pf_taken, 2, "P12");
        busy(&stack, Leaf::MEM_SEPT_ADD, 1).await;
        let fault = stack.fault(vm, 0, 0x400 * PAGE).await.unwrap();
        assert_eq!(fault.ret_pf(), RetPf::Fixed, "P13");
        let again = format!("{ADD_TABLE} (busy)");
        assert_eq!(made(&fault), [&again, ADD_TABLE, AUG], "P13 {mode:?}");
        stack.assert_clean(vm).await;
        assert_eq!(stack.destroy(vm).await.pages_leaked, 0);
        stack.assert_all_given_back().await;
    }
}

#[tokio::test]
async fn conversions_make_the_calls_of_z01_to_z13() {
    let mut stack = Stack::start().await;
    for mode in MODES {
        let vm = stack.running_vm(mode, 1, SIZE).await;
        let removal = [(BLOCK, 1), (TRACK, 1), (REMOVE, 1), (WRITE_BACK, 1)];
        stack.fault(vm, 0, PAGE).await.unwrap();
        let counts = stack.convert(vm, PAGE, PAGE, 0).await.unwrap();
        assert_counts(&counts, &removal, 1, 1, "Z01");
        let counts = stack.convert(vm, PAGE, PAGE, PRIVATE).await.unwrap();
        assert_counts(&counts, &[], 0, 0, "Z04, nothing mapped");
        let fault = stack.fault(vm, 0, PAGE).await.unwrap();
        assert_eq!(made(&fault), [AUG], "Z09");

        stack.prefault(vm, 2 * MIB, 2 * MIB).await.unwrap();
        let counts = stack.convert(vm, 2 * MIB, 2 * MIB, 0).await.unwrap();
        let rounds = if mode == Mode::Kernel { 512 } else { 1 };
        let all = [
            (BLOCK, 512),
            (TRACK, rounds),
            (REMOVE, 512),
            (WRITE_BACK, 512),
        ];
        assert_counts(&counts, &all, rounds, 1, "Z02");

        for (id, leaf, name) in [
            ("Z10", Leaf::MEM_RANGE_BLOCK, BLOCK),
            ("Z11", Leaf::MEM_TRACK, TRACK),
            ("Z12", Leaf::MEM_PAGE_REMOVE, REMOVE),
        ] {
            busy(&stack, leaf, 1).await;
            let counts = stack.convert(vm, PAGE, PAGE, 0).await.unwrap();
            let twice = removal.map(|(leaf, times)| (leaf, times + u64::from(leaf == name)));
            assert_counts(&counts, &twice, 2, 1, id);
            stack.convert(vm, PAGE, PAGE, PRIVATE).await.unwrap();
            stack.fault(vm, 0, PAGE).await.unwrap();
        }
        stack.assert_clean(vm).await;

        // Busy twice bugs the VM; the operation itself is answered as if nothing had been.
        busy(&stack, Leaf::MEM_RANGE_BLOCK, 2).await;
        let counts = stack.convert(vm, PAGE, PAGE, 0).await.unwrap();
        assert_eq!(
            (calls(&counts, BLOCK), calls(&counts, REMOVE)),
            (2, 0),
            "Z13"
        );
        let later = stack.fault(vm, 0, PAGE).await;
        stack::assert_refused(later, Code::FailedPrecondition, "VM_DEAD");
        stack.destroy(vm).await;
    }
}

#[tokio::test]
async fn an_image_and_the_end_make_the_calls_of_i09_i16_and_t01() {
    let mut stack = Stack::start().await;
    for mode in MODES {
        let vm = stack.vm(mode, 1, SIZE).await;
        let page = |gpa, measure| wire::InitMemRegionRequest {
            vm_id: vm,
            vcpu_id: 0,
            gpa,
            size: PAGE,
            data: vec![7; 64].into(),
            measure,
            ..Default::default()
        };
        let answer = stack
            .client
            .init_mem_region(page(PAGE, true))
            .await
            .unwrap();
        let counts = answer.into_inner().counts.unwrap();
        let first = [(ADD_TABLE, 3), (ADD, 1), (EXTEND, 16)];
        for (leaf, times) in first {
            assert_eq!(calls(&counts, leaf), times, "I09 {leaf}");
        }
        let answer = stack.client.init_mem_region(page(2 * PAGE, false)).await;
        let counts = answer.unwrap().into_inner().counts.unwrap();
        assert_counts(&counts, &[(ADD, 1)], 0, 0, "I10");
        let again = stack.client.init_mem_region(page(PAGE, false)).await;
        assert_eq!(reason_of(&again.unwrap_err()).1, "5", "I11");
        let finalize = wire::FinalizeVmRequest {
            vm_id: vm,
            hw_error: 0,
        };
        stack.client.finalize_vm(finalize).await.unwrap();
        let late = stack.client.init_mem_region(page(3 * PAGE, false)).await;
        assert_eq!(reason_of(&late.unwrap_err()).1, "22", "I16");

        let platform = stack.platform().await;
        let counts = stack.destroy(vm).await.counts.unwrap();
        let (leaves, tables) = (2, 3);
        assert_eq!(calls(&counts, REMOVE), leaves, "T01");
        let control = u64::from(platform.tdcs_pages) + 1;
        let vcpu = u64::from(platform.tdvps_pages);
        assert_eq!(calls(&counts, RECLAIM), vcpu + tables + control, "T01");
        assert_eq!(calls(&counts, "TDH.MNG.KEY.FREEID"), 1, "T01");
        stack.assert_all_given_back().await;
    }
}

#[tokio::test]
async fn two_vcpus_on_one_frame_make_the_calls_of_c01() {
    let mut stack = Stack::start().await;
    for mode in MODES {
        let vm = stack.running_vm(mode, 2, SIZE).await;
        let faults = [0, 1].map(|vcpu_id| {
            let mut client = stack.client.clone();
            let fault = wire::HandleFaultRequest {
                vm_id: vm,
                vcpu_id,
                fault: Some(wire::Fault {
                    gpa: PAGE,
                    qualification: stack::WRITE,
                    ..Default::default()
                }),
                ..Default::default()
            };
            tokio::spawn(async move { client.handle_fault(fault).await })
        });
        let mut answers = Vec::new();
        for fault in faults {
            answers.push(fault.await.unwrap().unwrap().into_inner().ret_pf());
        }
        let fixed = answers.iter().filter(|&&answer| answer == RetPf::Fixed);
        assert_eq!(fixed.count(), 1, "{mode:?}: {answers:?}");
        let counts = stack.stats(vm).await.counts.unwrap();
        assert_eq!(
            (calls(&counts, ADD_TABLE), calls(&counts, AUG)),
            (3, 1),
            "C01 {mode:?}"
        );
        stack.assert_clean(vm).await;
        stack.destroy(vm).await;
    }
}

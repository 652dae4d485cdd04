//! The stream of tracepoints.

use mirror_proto::mmu as wire;
use tonic::{Code, Streaming};

use crate::stack::{MIB, PAGE, Stack, assert_refused};

async fn ordinary(stack: &mut Stack) -> u64 {
    let vm_id = stack.ordinary(wire::CreateVmRequest::default()).await;
    let slot = wire::Slot {
        size: 16 * MIB,
        userspace_addr: 0x7f00_0000_0000,
        ..Default::default()
    };
    stack.set_slot(vm_id, slot).await.unwrap();
    vm_id
}

/// A reader, from the moment on that it watches.
async fn watch(stack: &mut Stack, vm_id: u64, buffer: u32) -> Streaming<wire::WatchEventsResponse> {
    let request = wire::WatchEventsRequest { vm_id, buffer };
    let answers = stack.client.watch_events(request).await.unwrap();
    let mut answers = answers.into_inner();
    let first = answers.message().await.unwrap().unwrap();
    assert_eq!(first, wire::WatchEventsResponse::default());
    answers
}

/// Everything up to a record, and how many were lost.
async fn read_to(
    answers: &mut Streaming<wire::WatchEventsResponse>,
    last: u64,
) -> (Vec<wire::TraceRecord>, u64) {
    let (mut records, mut lost) = (Vec::<wire::TraceRecord>::new(), 0);
    while records.last().is_none_or(|record| record.sequence < last) {
        let message = answers.message().await.unwrap().expect("more records");
        assert!(message.records.len() <= 512);
        let before = records.last().map_or(0, |record| record.sequence);
        assert_eq!(message.records[0].sequence, before + message.lost + 1);
        lost += message.lost;
        records.extend(message.records);
    }
    (records, lost)
}

#[tokio::test]
async fn a_fault_is_seen_as_the_kernel_prints_it() {
    let mut stack = Stack::start().await;
    let vm_id = ordinary(&mut stack).await;
    let mut answers = watch(&mut stack, vm_id, 0).await;
    let mut other = watch(&mut stack, vm_id, 0).await;
    stack.fault(vm_id, 0, 0x1234).await.unwrap();
    let last = stack.stats(vm_id).await.last_event;
    let (records, lost) = read_to(&mut answers, last).await;
    assert_eq!(lost, 0);
    let names: Vec<&str> = records.iter().map(|record| &*record.name).collect();
    let (table, entry) = ("kvm_mmu_get_page", "kvm_tdp_mmu_spte_changed");
    let expected = [
        table,
        "kvm_page_fault",
        "kvm_mmu_spte_requested",
        table,
        entry,
        table,
        entry,
        table,
        entry,
        entry,
        "kvm_mmu_set_spte",
    ];
    assert_eq!(names, expected);
    assert_eq!(
        records[1].text,
        "vcpu 0 rip 0x0 address 0x0000000000001234 error_code 0x2"
    );
    assert!(records.is_sorted_by_key(|record| record.time_ns));
    assert_eq!(read_to(&mut other, last).await.0, records);

    // The end of the VM is seen, too, and then the stream ends.
    stack.destroy(vm_id).await;
    let mut names = Vec::new();
    while let Some(message) = answers.message().await.unwrap() {
        names.extend(message.records.into_iter().map(|record| record.name));
    }
    assert!(
        names.contains(&"kvm_mmu_prepare_zap_page".to_owned()),
        "{names:?}"
    );
}

#[tokio::test]
async fn a_reader_that_does_not_keep_up_is_told_what_it_lost() {
    let mut stack = Stack::start().await;
    let vm_id = ordinary(&mut stack).await;
    let mut slow = watch(&mut stack, vm_id, 8).await;
    let mut whole = watch(&mut stack, vm_id, 1 << 20).await;
    // One operation of many events, and more behind it.
    stack.prefault(vm_id, 0, 8 * MIB).await.unwrap();
    stack.fault(vm_id, 0, 9 * MIB).await.unwrap();
    let last = stack.stats(vm_id).await.last_event;
    let (all, none_lost) = read_to(&mut whole, last).await;
    let (kept, lost) = read_to(&mut slow, last).await;
    assert_eq!((all.len() as u64, none_lost), (last, 0));
    assert_eq!(kept.len() as u64 + lost, last);
    assert!(lost > 2 * (8 * MIB / PAGE) - 512, "{lost} of {last}");
    assert_eq!(kept.last(), all.last());
}

#[tokio::test]
async fn nothing_is_kept_while_nobody_watches() {
    let mut stack = Stack::start().await;
    let vm_id = ordinary(&mut stack).await;
    stack.fault(vm_id, 0, 0).await.unwrap();
    assert_eq!(stack.stats(vm_id).await.last_event, 0);
    let mut readers = Vec::new();
    for _ in 0..16 {
        readers.push(watch(&mut stack, vm_id, 0).await);
    }
    let request = wire::WatchEventsRequest { vm_id, buffer: 0 };
    let one_more = stack.client.watch_events(request).await.map(drop);
    assert_refused(one_more, Code::ResourceExhausted, "EXHAUSTED");
    stack.fault(vm_id, 0, PAGE).await.unwrap();
    for reader in &mut readers {
        let (records, _) = read_to(reader, 4).await;
        assert_eq!(records[0].name, "kvm_page_fault");
    }
}

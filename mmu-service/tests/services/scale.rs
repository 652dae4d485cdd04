//! Many TDs at once, and many vCPUs in one.

use std::collections::BTreeSet;
use std::sync::Arc;

use mirror_proto::mmu as wire;
use mirror_proto::mmu::mmu_service_client::MmuServiceClient;
use tokio::sync::{Mutex, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::stack::{MIB, PAGE, PRIVATE, Stack, WRITE, calls, last, pages, region};

/// TDs that live at the same time.
const TDS: usize = 1000;
/// Who makes them.
const MAKERS: usize = 16;
/// Guest memory of each.
const SIZE: u64 = 16 * PAGE;
const VCPUS: u32 = 64;

/// A TD that can run, with private memory from address 0.
async fn make(client: &mut MmuServiceClient<Channel>, vcpus: u32, size: u64) -> u64 {
    let request = wire::CreateVmRequest {
        max_vcpus: vcpus,
        ..Default::default()
    };
    let vm_id = client.create_vm(request).await.unwrap().into_inner().vm_id;
    for _ in 0..vcpus {
        let vcpu = wire::CreateVcpuRequest {
            vm_id,
            create_only: false,
        };
        client.create_vcpu(vcpu).await.unwrap();
    }
    client
        .set_user_memory_region(region(vm_id, 0, size))
        .await
        .unwrap();
    let private = wire::SetMemoryAttributesRequest {
        vm_id,
        gpa: 0,
        size,
        attributes: PRIVATE,
    };
    client.set_memory_attributes(private).await.unwrap();
    let finalize = wire::FinalizeVmRequest { vm_id, hw_error: 0 };
    client.finalize_vm(finalize).await.unwrap();
    vm_id
}

/// A TD with one vCPU and all of its memory mapped.
async fn make_mapped(client: &mut MmuServiceClient<Channel>) -> u64 {
    let vm_id = make(client, 1, SIZE).await;
    let all = wire::PreFaultMemoryRequest {
        vm_id,
        vcpu_id: 0,
        gpa: 0,
        size: SIZE,
    };
    let answers = client.pre_fault_memory(all).await.unwrap().into_inner();
    let done = last(answers).await.unwrap().expect("a last message");
    assert!(done.finished);
    vm_id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_tds_are_alive_at_once_and_all_go() {
    let mut stack = Stack::start().await;
    let mut makers = JoinSet::new();
    for maker in 0..MAKERS {
        let mut client = stack.client.clone();
        makers.spawn(async move {
            let mut made = Vec::new();
            for _ in (maker..TDS).step_by(MAKERS) {
                made.push(make_mapped(&mut client).await);
            }
            made
        });
    }
    let alive: Vec<u64> = makers.join_all().await.into_iter().flatten().collect();
    let different: BTreeSet<u64> = alive.iter().copied().collect();
    assert_eq!(different.len(), TDS);
    assert_eq!(stack.list().await.len(), TDS);
    let platform = stack.platform().await;
    assert_eq!(platform.hkids_in_use as usize, TDS);
    assert_eq!(pages(&platform, "PT_REG"), TDS as u64 * SIZE / PAGE);

    let rest = Arc::new(Mutex::new(alive));
    let mut enders = JoinSet::new();
    for _ in 0..MAKERS {
        let (mut client, rest) = (stack.client.clone(), Arc::clone(&rest));
        enders.spawn(async move {
            loop {
                let Some(vm_id) = rest.lock().await.pop() else {
                    return;
                };
                let audit = client.audit(wire::AuditRequest { vm_id }).await.unwrap();
                let audit = last(audit.into_inner()).await.unwrap().expect("an end");
                assert!(audit.finished && audit.entries != 0, "{audit:?}");
                assert_eq!((audit.mismatches, audit.frozen), (0, 0), "{audit:?}");
                let end = wire::DestroyVmRequest { vm_id, mode: 0 };
                client.destroy_vm(end).await.unwrap();
            }
        });
    }
    enders.join_all().await;
    assert!(stack.list().await.is_empty());
    stack.assert_all_given_back().await;
}

/// Every vCPU faults on its own part and on one part that all of them want.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_vcpus_fault_at_once_and_each_page_is_added_once() {
    const OWN: u64 = 64;
    const COMMON: u64 = 256;
    let mut stack = Stack::start().await;
    let vm_id = make(&mut stack.client, VCPUS, 32 * MIB).await;
    let mut vcpus = JoinSet::new();
    for vcpu_id in 0..VCPUS {
        let mut client = stack.client.clone();
        vcpus.spawn(async move {
            let own = COMMON + u64::from(vcpu_id) * OWN;
            let frames = (own..own + OWN).chain(0..COMMON);
            let faults = frames.map(|frame| wire::Fault {
                gpa: frame * PAGE,
                qualification: WRITE,
                ..Default::default()
            });
            let request = wire::HandleFaultsRequest {
                vm_id,
                vcpu_id,
                faults: faults.collect(),
                ..Default::default()
            };
            let (asks, requests) = mpsc::channel(1);
            asks.send(request).await.unwrap();
            drop(asks);
            let answers = client.handle_faults(ReceiverStream::new(requests)).await;
            let answer = last(answers.unwrap().into_inner()).await.unwrap();
            let answer = answer.expect("an answer");
            assert_eq!(
                u64::from(answer.fixed + answer.spurious),
                OWN + COMMON,
                "{answer:?}"
            );
            u64::from(answer.fixed)
        });
    }
    let fixed: u64 = vcpus.join_all().await.into_iter().sum();
    let frames = COMMON + u64::from(VCPUS) * OWN;
    assert_eq!(fixed, frames);
    let stats = stack.stats(vm_id).await;
    let counts = stats.counts.expect("counts");
    assert_eq!(counts.pages_mapped, frames);
    let platform = stack.platform().await;
    assert_eq!(pages(&platform, "PT_REG"), frames);
    assert!(calls(&counts, "TDH.MEM.PAGE.AUG") >= frames);
    stack.assert_clean(vm_id).await;
    stack.destroy(vm_id).await;
    stack.assert_all_given_back().await;
}

//! VMs that cannot be created, and the two steps in which one can.

use mirror_proto::mmu as wire;

use crate::stack::{Stack, field_of};
use crate::table::{Table, check};

#[tokio::test]
async fn a_vm_that_cannot_be_is_not_created() {
    let mut table = Table::new(true).await;
    let empty = wire::CreateVmRequest::default();
    let ordinary = wire::CreateVmRequest {
        kind: wire::VmKind::Ordinary.into(),
        ..Default::default()
    };
    for (case, request, field) in [
        (
            "width 50",
            wire::CreateVmRequest {
                gpaw: 50,
                ..empty.clone()
            },
            "gpaw",
        ),
        (
            "mode 3",
            wire::CreateVmRequest {
                mode: 3,
                ..empty.clone()
            },
            "mode",
        ),
        (
            "mode -1",
            wire::CreateVmRequest {
                mode: -1,
                ..empty.clone()
            },
            "mode",
        ),
        (
            "577 vCPUs",
            wire::CreateVmRequest {
                max_vcpus: 577,
                ..empty.clone()
            },
            "max_vcpus",
        ),
        (
            "label",
            wire::CreateVmRequest {
                label: "x".repeat(65),
                ..empty.clone()
            },
            "label",
        ),
        (
            "reserved attributes",
            wire::CreateVmRequest {
                attributes: Some(1 << 5),
                ..empty.clone()
            },
            "attributes",
        ),
        (
            "kind 3",
            wire::CreateVmRequest {
                kind: 3,
                ..empty.clone()
            },
            "kind",
        ),
        (
            "dirty log 4",
            wire::CreateVmRequest {
                dirty_log: 4,
                ..empty.clone()
            },
            "dirty_log",
        ),
        (
            "PML of a TD",
            wire::CreateVmRequest {
                pml: true,
                ..empty.clone()
            },
            "pml",
        ),
        (
            "a quirk of a TD",
            wire::CreateVmRequest {
                slot_zap_all: Some(true),
                ..empty.clone()
            },
            "slot_zap_all",
        ),
        (
            "attributes of an ordinary VM",
            wire::CreateVmRequest {
                attributes: Some(0),
                ..ordinary.clone()
            },
            "attributes",
        ),
        (
            "XFAM of an ordinary VM",
            wire::CreateVmRequest {
                xfam: 3,
                ..ordinary.clone()
            },
            "xfam",
        ),
        (
            "two steps of an ordinary VM",
            wire::CreateVmRequest {
                create_only: true,
                ..ordinary.clone()
            },
            "create_only",
        ),
        (
            "XFAM of no processor",
            wire::CreateVmRequest {
                xfam: 1 << 40,
                ..empty.clone()
            },
            "xfam",
        ),
    ] {
        check!(
            table,
            case,
            create_vm,
            request,
            InvalidArgument,
            Some(field)
        );
    }
}

#[tokio::test]
async fn creation_and_initialisation_can_be_two_steps() {
    let mut stack = Stack::start().await;
    let request = wire::CreateVmRequest {
        create_only: true,
        ..Default::default()
    };
    let created = stack.client.create_vm(request).await.unwrap().into_inner();
    let vm_id = created.vm_id;
    assert_eq!((created.hkid, created.tdr), (0, 0));
    let vcpu = wire::CreateVcpuRequest {
        vm_id,
        create_only: true,
    };
    let early = stack.client.create_vcpu(vcpu).await.unwrap_err();
    assert_eq!(early.code(), tonic::Code::FailedPrecondition);
    let init = wire::InitVmRequest { vm_id, hw_error: 0 };
    let td = stack.client.init_vm(init).await.unwrap().into_inner();
    assert_ne!((td.hkid, td.tdr), (0, 0));
    let again = stack.client.init_vm(init).await.unwrap_err();
    assert_eq!(again.code(), tonic::Code::FailedPrecondition);
    stack.client.create_vcpu(vcpu).await.unwrap();
    let init = wire::InitVcpuRequest {
        vm_id,
        vcpu_id: 0,
        hw_error: 0,
    };
    let made = stack.client.init_vcpu(init).await.unwrap().into_inner();
    let names: Vec<_> = made
        .counts
        .unwrap()
        .seamcalls
        .into_iter()
        .map(|c| c.name)
        .collect();
    assert!(names.contains(&"TDH.VP.INIT".to_owned()), "{names:?}");
    let again = stack.client.init_vcpu(init).await.unwrap_err();
    assert_eq!(field_of(&again).as_deref(), Some("vcpu_id"));
}

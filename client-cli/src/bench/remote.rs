//! VMs behind the two services.

use mirror_proto::mmu::{
    CreateVcpuRequest, CreateVmRequest, FinalizeVmRequest, Mode, PreFaultMemoryRequest,
    SetMemoryAttributesRequest, SetUserMemoryRegionRequest, Slot,
};

use crate::args::Visibility;
use crate::client::Client;
use crate::error::Error;
use crate::replay::{VmSpec, with_vm};
use crate::tally::Tally;

/// Lets `work` use a TD with one vCPU and `size` bytes of private memory, nothing mapped; `ready`
/// says whether it is finalised before.
pub(super) async fn with_td<T>(
    client: &Client,
    mode: Mode,
    size: u64,
    ready: bool,
    work: impl AsyncFnOnce(u64) -> Result<T, Error>,
) -> Result<T, Error> {
    let spec = VmSpec {
        mode,
        gpaw: 48,
        label: "bench",
    };
    with_vm(client, spec, 1, async |vm_id| {
        furnish(client, vm_id, size).await?;
        if ready {
            finalize(client, vm_id).await?;
        }
        work(vm_id).await
    })
    .await
}

/// A running TD whose memory is populated, for services that go with the command.
pub(super) async fn populated_td(client: &Client, size: u64) -> Result<u64, Error> {
    let message = CreateVmRequest {
        max_vcpus: 1,
        label: "bench".to_owned(),
        ..CreateVmRequest::default()
    };
    let created = client
        .short("CreateVm", message, async |mut mmu, request| {
            mmu.create_vm(request).await
        })
        .await?;
    furnish(client, created.vm_id, size).await?;
    finalize(client, created.vm_id).await?;
    prefault(client, created.vm_id, size).await?;
    Ok(created.vm_id)
}

/// One vCPU and private memory.
async fn furnish(client: &Client, vm_id: u64, size: u64) -> Result<(), Error> {
    let vcpu = CreateVcpuRequest {
        vm_id,
        create_only: false,
    };
    client
        .short("CreateVcpu", vcpu, async |mut mmu, request| {
            mmu.create_vcpu(request).await
        })
        .await?;
    let slot = Slot {
        size,
        userspace_addr: 0x7F00_0000_0000,
        guest_memfd: true,
        ..Slot::default()
    };
    let region = SetUserMemoryRegionRequest {
        vm_id,
        slot: Some(slot),
    };
    client
        .short("SetUserMemoryRegion", region, async |mut mmu, request| {
            mmu.set_user_memory_region(request).await
        })
        .await?;
    convert(client, vm_id, size, Visibility::Private).await?;
    Ok(())
}

/// KVM_TDX_FINALIZE_VM.
pub(super) async fn finalize(client: &Client, vm_id: u64) -> Result<(), Error> {
    let message = FinalizeVmRequest { vm_id, hw_error: 0 };
    client
        .long("FinalizeVm", message, async |mut mmu, request| {
            mmu.finalize_vm(request).await
        })
        .await
        .map(drop)
}

/// KVM_SET_MEMORY_ATTRIBUTES of everything.
pub(super) async fn convert(
    client: &Client,
    vm_id: u64,
    size: u64,
    to: Visibility,
) -> Result<Tally, Error> {
    let message = SetMemoryAttributesRequest {
        vm_id,
        gpa: 0,
        size,
        attributes: to.attributes(),
    };
    let answer = client
        .long("SetMemoryAttributes", message, async |mut mmu, request| {
            mmu.set_memory_attributes(request).await
        })
        .await?;
    Ok(Tally::of(answer.counts.as_ref()))
}

/// KVM_PRE_FAULT_MEMORY of the first `size` bytes.
pub(super) async fn prefault(client: &Client, vm_id: u64, size: u64) -> Result<Tally, Error> {
    const CALL: &str = "PreFaultMemory";
    let message = PreFaultMemoryRequest {
        vm_id,
        vcpu_id: 0,
        gpa: 0,
        size,
    };
    let mut stream = client
        .long(CALL, message, async |mut mmu, request| {
            mmu.pre_fault_memory(request).await
        })
        .await?;
    let mut last = None;
    while let Some(answer) = client.next(CALL, &mut stream).await? {
        last = Some(answer);
    }
    let last = last
        .filter(|last| last.finished)
        .ok_or(Error::Truncated { call: CALL })?;
    Ok(Tally::of(last.counts.as_ref()))
}

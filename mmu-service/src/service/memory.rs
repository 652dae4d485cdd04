//! What the VM's memory is: slots, attributes, holes and the host's notifier.

use std::sync::Arc;

use mirror_proto::mmu as wire;
use tonic::Status;
use tracing::info_span;

use crate::convert::{counts_to_wire, required, slot_from_wire};
use crate::shell::Shell;
use crate::status;

pub(super) async fn set_user_memory_region(
    shell: &Arc<Shell>,
    request: wire::SetUserMemoryRegionRequest,
) -> Result<wire::SetUserMemoryRegionResponse, Status> {
    let slot = required(request.slot, "slot")
        .and_then(slot_from_wire)
        .map_err(status::of_field)?;
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!(
        "set_user_memory_region",
        kvm.vm = entry.id,
        kvm.slot = slot.slot_id
    );
    let counts = shell
        .operate(&entry, span, move |vm| vm.set_user_memory_region(slot))
        .await?;
    Ok(wire::SetUserMemoryRegionResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(crate) async fn set_memory_attributes(
    shell: &Arc<Shell>,
    request: wire::SetMemoryAttributesRequest,
) -> Result<wire::SetMemoryAttributesResponse, Status> {
    let wire::SetMemoryAttributesRequest {
        vm_id,
        gpa,
        size,
        attributes,
    } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "set_memory_attributes",
        kvm.vm = vm_id,
        kvm.gpa = gpa,
        kvm.size = size,
        kvm.attributes = attributes
    );
    let counts = shell
        .operate(&entry, span, move |vm| {
            vm.set_memory_attributes(gpa, size, attributes)
        })
        .await?;
    Ok(wire::SetMemoryAttributesResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn punch_hole(
    shell: &Arc<Shell>,
    request: wire::PunchHoleRequest,
) -> Result<wire::PunchHoleResponse, Status> {
    let wire::PunchHoleRequest {
        vm_id,
        slot_id,
        offset,
        size,
    } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "punch_hole",
        kvm.vm = vm_id,
        kvm.slot = slot_id,
        kvm.offset = offset,
        kvm.size = size
    );
    let (counts, pages_freed) = shell
        .operate(&entry, span, move |vm| vm.punch_hole(slot_id, offset, size))
        .await?;
    Ok(wire::PunchHoleResponse {
        counts: Some(counts_to_wire(&counts)),
        pages_freed,
    })
}

pub(super) async fn unmap_hva(
    shell: &Arc<Shell>,
    request: wire::UnmapHvaRequest,
) -> Result<wire::UnmapHvaResponse, Status> {
    let wire::UnmapHvaRequest { vm_id, start, end } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "unmap_hva",
        kvm.vm = vm_id,
        kvm.start = start,
        kvm.end = end
    );
    let counts = shell
        .operate(&entry, span, move |vm| vm.unmap_hva(start, end))
        .await?;
    Ok(wire::UnmapHvaResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

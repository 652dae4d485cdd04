//! VMs and vCPUs come and go: CreateVm, DestroyVm, ListVms, CreateVcpu, FinalizeVm.

use std::sync::Arc;
use std::time::Duration;

use mirror_proto::{InvalidField, mmu as wire};
use tdp_mmu::{Counts, Vm, VmConfig, VmKind, VmRecord};
use tdx_defs::{GpaLayout, TdAttributes};
use tonic::Status;
use tracing::info_span;

use crate::convert::{
    counts_to_wire, dirty_log_from_wire, gpaw_from_wire, hex, kind_from_wire, mode_from_wire,
    vm_info_to_wire,
};
use crate::registry::{Origin, VmEntry};
use crate::shell::Shell;
use crate::status;
use crate::store::Store;

/// Longest label, in bytes.
const MAX_LABEL: usize = 64;
/// Highest MAX_VCPUS of a TD.
const MAX_VCPUS: u16 = 576;
/// MAX_VCPUS when the request leaves it open.
const DEFAULT_MAX_VCPUS: u16 = 16;
/// XFAM when the request leaves it open: x87 and SSE.
const DEFAULT_XFAM: u64 = 3;
/// How long CreateVm waits for a module that is on its way up.
const MODULE_PATIENCE: Duration = Duration::from_secs(2);

pub(super) async fn create_vm(
    shell: &Arc<Shell>,
    request: wire::CreateVmRequest,
) -> Result<wire::CreateVmResponse, Status> {
    let config = vm_config(&request).map_err(status::of_field)?;
    // There is nothing to tell a module about an ordinary VM.
    let init = !request.create_only && config.kind == VmKind::Td;
    let (entry, counts) = match build_vm(shell, &config, init, &request).await? {
        Built::Vm(entry, counts) => (entry, counts),
        // The module restarted meanwhile, and nothing was lost but this attempt.
        Built::OnOldRun(_) => match build_vm(shell, &config, init, &request).await? {
            Built::Vm(entry, counts) => (entry, counts),
            Built::OnOldRun(refusal) => return Err(refusal),
        },
    };
    let info = entry.vm.info();
    tracing::info!(
        vm = entry.id,
        label = entry.label,
        hkid = info.hkid,
        "VM created"
    );
    Ok(wire::CreateVmResponse {
        vm_id: entry.id,
        hkid: info.hkid.unwrap_or(0),
        tdr: info.tdr.get(),
        counts: Some(counts),
    })
}

enum Built {
    Vm(Arc<VmEntry>, wire::Counts),
    /// Refused because the run of the module that it was built on ended.
    OnOldRun(Status),
}

async fn build_vm(
    shell: &Arc<Shell>,
    config: &VmConfig,
    init: bool,
    request: &wire::CreateVmRequest,
) -> Result<Built, Status> {
    let place = shell.vms.reserve()?;
    let attachment = shell
        .link
        .attach(MODULE_PATIENCE)
        .await
        .map_err(|error| status::module_unreachable(&error.chain()))?;
    let layout = GpaLayout::new(config.gpaw);
    let (shell_there, config, request) = (Arc::clone(shell), config.clone(), request.clone());
    let span = info_span!(
        "create_vm",
        kvm.vm = tracing::field::Empty,
        kvm.label = request.label
    );
    let work = move || {
        let port = shell_there.link.port(&attachment);
        let host = Arc::clone(attachment.host());
        let (id, vm) = match &shell_there.store {
            None => (shell_there.vms.next_id(), Vm::new(host, port, config)),
            Some(store) => {
                host.keep_in(store.pool(attachment.instance()));
                let record = VmRecord::new(config.clone());
                let id = store.create(&request, &record, attachment.instance());
                let id = id.map_err(|error| status::of_vm(&error.into()))?;
                (id, Vm::kept_in(host, port, config, store.ledger(id)))
            }
        };
        let built = if init {
            vm.init()
        } else {
            Ok(Counts::default())
        };
        let built = match (&shell_there.store, built) {
            (Some(store), Ok(counts)) => match store.created(id) {
                Ok(()) => Ok(counts),
                Err(error) => {
                    // Nobody will know of it: it must not stay.
                    vm.destroy().map_err(|error| status::of_vm(&error))?;
                    Err(error.into())
                }
            },
            (_, built) => built,
        };
        if let (Some(store), Err(_)) = (&shell_there.store, &built)
            && vm.info().tdr.get() == 0
        {
            // What is left of a TD stays written down, and goes when the service starts again.
            forget(store, id);
        }
        match built {
            Ok(counts) => {
                shell_there.metrics.did(&counts);
                // Entered here and not by the caller: a VM whose caller hung up is still listed.
                let origin = Origin {
                    label: request.label,
                    layout,
                    attachment,
                };
                let entry = shell_there.vms.insert(id, place, vm, origin);
                tracing::Span::current().record("kvm.vm", entry.id);
                Ok(Built::Vm(entry, counts_to_wire(&counts)))
            }
            Err(error) if attachment.is_retired() => Ok(Built::OnOldRun(status::of_vm(&error))),
            Err(error) => Err(status::of_vm(&error)),
        }
    };
    shell.run(span, work).await?
}

pub(crate) fn vm_config(request: &wire::CreateVmRequest) -> Result<VmConfig, InvalidField> {
    if request.label.len() > MAX_LABEL {
        let reason = format!("{} bytes, the limit is {MAX_LABEL}", request.label.len());
        return Err(InvalidField::new("label", reason));
    }
    let max_vcpus = match request.max_vcpus {
        0 => DEFAULT_MAX_VCPUS,
        given => u16::try_from(given)
            .ok()
            .filter(|max| *max <= MAX_VCPUS)
            .ok_or_else(|| {
                InvalidField::new("max_vcpus", format!("{given} is outside 1..={MAX_VCPUS}"))
            })?,
    };
    let kind = kind_from_wire(request.kind)?;
    let only_of =
        |other: VmKind, given: bool, field: &str, whose: &str| match given && kind != other {
            true => Err(InvalidField::new(field, format!("only {whose} has it"))),
            false => Ok(()),
        };
    for (given, field) in [
        (request.attributes.is_some(), "attributes"),
        (request.xfam != 0, "xfam"),
        (request.create_only, "create_only"),
    ] {
        only_of(VmKind::Td, given, field, "a TD")?;
    }
    for (given, field) in [
        (request.pml, "pml"),
        (request.slot_zap_all == Some(true), "slot_zap_all"),
    ] {
        only_of(VmKind::Ordinary, given, field, "an ordinary VM")?;
    }
    Ok(VmConfig {
        kind,
        eager_page_split: request.eager_page_split.unwrap_or(true),
        dirty_log: dirty_log_from_wire(request.dirty_log)?,
        pml: request.pml,
        nx_huge_pages: request.nx_huge_pages,
        slot_zap_all: request.slot_zap_all.unwrap_or(true),
        gpaw: gpaw_from_wire(request.gpaw)?,
        mode: mode_from_wire(request.mode)?,
        attributes: request.attributes.map_or(
            TdAttributes::SEPT_VE_DISABLE,
            TdAttributes::from_bits_retain,
        ),
        xfam: if request.xfam == 0 {
            DEFAULT_XFAM
        } else {
            request.xfam
        },
        max_vcpus,
    })
}

pub(super) async fn init_vm(
    shell: &Arc<Shell>,
    request: wire::InitVmRequest,
) -> Result<wire::InitVmResponse, Status> {
    tdp_mmu::check_hw_error(request.hw_error).map_err(|error| status::of_vm(&error))?;
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!("init_vm", kvm.vm = entry.id);
    let counts = shell.operate(&entry, span, Vm::init).await?;
    let info = entry.vm.info();
    Ok(wire::InitVmResponse {
        hkid: info.hkid.unwrap_or(0),
        tdr: info.tdr.get(),
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn destroy_vm(
    shell: &Arc<Shell>,
    request: wire::DestroyVmRequest,
) -> Result<wire::DestroyVmResponse, Status> {
    // A VM whose module has restarted can go as well: there is nothing left to give back.
    let entry = shell.vms.get(request.vm_id)?;
    let mode = match request.mode {
        0 => entry.vm.info().mode,
        mode => mode_from_wire(mode).map_err(status::of_field)?,
    };
    let (shell_there, entry_there) = (Arc::clone(shell), Arc::clone(&entry));
    let span = info_span!("destroy_vm", kvm.vm = entry.id);
    let (counts, pages_leaked) = shell
        .run(span, move || {
            let destroyed = match entry_there.vm.destroy_in(mode) {
                Ok(destroyed) => {
                    shell_there.metrics.did(&destroyed.0);
                    destroyed
                }
                Err(_) if entry_there.lost().is_some() => (Counts::default(), 0),
                Err(error) => return Err(status::of_vm(&error)),
            };
            entry_there.events.collect(&entry_there.vm);
            entry_there.events.close();
            if let Some(store) = &shell_there.store
                && (destroyed.1 == 0 || entry_there.lost().is_some())
            {
                forget(store, entry_there.id);
            }
            // Of two callers at a time one has destroyed it; for the other it is gone.
            if !shell_there.vms.remove(entry_there.id) {
                return Err(status::unknown_vm(entry_there.id));
            }
            Ok(destroyed)
        })
        .await??;
    tracing::info!(vm = entry.id, pages_leaked, "VM destroyed");
    Ok(wire::DestroyVmResponse {
        counts: Some(counts_to_wire(&counts)),
        pages_leaked,
    })
}

/// The record of a VM that is gone. Should it stay: the next run finds out by itself.
fn forget(store: &Store, id: u64) {
    if let Err(error) = store.remove(id) {
        tracing::warn!(vm = id, %error, "the end of a VM is not written down");
    }
}

pub(super) async fn list_vms(
    shell: &Arc<Shell>,
    _: wire::ListVmsRequest,
) -> Result<wire::ListVmsResponse, Status> {
    shell.vms.check_open()?;
    let shell_there = Arc::clone(shell);
    let span = info_span!("list_vms");
    let vms = shell
        .run(span, move || {
            shell_there
                .vms
                .all()
                .iter()
                .map(|vm| vm_info_to_wire(vm))
                .collect()
        })
        .await?;
    Ok(wire::ListVmsResponse { vms })
}

pub(super) async fn create_vcpu(
    shell: &Arc<Shell>,
    request: wire::CreateVcpuRequest,
) -> Result<wire::CreateVcpuResponse, Status> {
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!("create_vcpu", kvm.vm = entry.id);
    let create = |vm: &Vm| vm.create_vcpu().map(|id| (id, Counts::default()));
    let (vcpu_id, counts) = if request.create_only {
        shell.operate(&entry, span, create).await?
    } else {
        shell.operate(&entry, span, Vm::add_vcpu).await?
    };
    Ok(wire::CreateVcpuResponse {
        vcpu_id,
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn init_vcpu(
    shell: &Arc<Shell>,
    request: wire::InitVcpuRequest,
) -> Result<wire::InitVcpuResponse, Status> {
    tdp_mmu::check_hw_error(request.hw_error).map_err(|error| status::of_vm(&error))?;
    let entry = shell.live_vm(request.vm_id)?;
    let vcpu = request.vcpu_id;
    let span = info_span!("init_vcpu", kvm.vm = entry.id, kvm.vcpu = vcpu);
    let counts = shell
        .operate(&entry, span, move |vm| vm.init_vcpu(vcpu))
        .await?;
    Ok(wire::InitVcpuResponse {
        counts: Some(counts_to_wire(&counts)),
    })
}

pub(super) async fn finalize_vm(
    shell: &Arc<Shell>,
    request: wire::FinalizeVmRequest,
) -> Result<wire::FinalizeVmResponse, Status> {
    tdp_mmu::check_hw_error(request.hw_error).map_err(|error| status::of_vm(&error))?;
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!("finalize_vm", kvm.vm = entry.id);
    let (mrtd, counts) = shell.operate(&entry, span, Vm::finalize).await?;
    Ok(wire::FinalizeVmResponse {
        mrtd: hex(&mrtd),
        counts: Some(counts_to_wire(&counts)),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_beyond_a_limit_is_refused_by_its_field() {
        for (request, field) in [
            (
                wire::CreateVmRequest {
                    label: "x".repeat(65),
                    ..Default::default()
                },
                "label",
            ),
            (
                wire::CreateVmRequest {
                    max_vcpus: 577,
                    ..Default::default()
                },
                "max_vcpus",
            ),
            (
                wire::CreateVmRequest {
                    max_vcpus: u32::MAX,
                    ..Default::default()
                },
                "max_vcpus",
            ),
            (
                wire::CreateVmRequest {
                    gpaw: 50,
                    ..Default::default()
                },
                "gpaw",
            ),
            (
                wire::CreateVmRequest {
                    mode: 7,
                    ..Default::default()
                },
                "mode",
            ),
        ] {
            assert_eq!(vm_config(&request).unwrap_err().field, field);
        }
    }

    #[test]
    fn an_empty_request_gets_the_defaults_of_the_contract() {
        let config = vm_config(&wire::CreateVmRequest::default()).unwrap();
        assert_eq!(config.attributes, TdAttributes::SEPT_VE_DISABLE);
        assert_eq!((config.xfam, config.max_vcpus), (3, 16));
        let none = wire::CreateVmRequest {
            attributes: Some(0),
            ..Default::default()
        };
        assert_eq!(vm_config(&none).unwrap().attributes, TdAttributes::empty());
    }
}

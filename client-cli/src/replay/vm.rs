//! The VM of a replay: built for a plan, audited, and destroyed whatever happens.

use std::time::Duration;

use mirror_proto::mmu::{
    AuditRequest, CreateVcpuRequest, CreateVmRequest, DestroyVmRequest, FinalizeVmRequest,
    InitMemRegionRequest, Mode, SetMemoryAttributesRequest, SetUserMemoryRegionRequest, Slot,
};
use mirror_proto::module::GetPlatformRequest;

use super::plan::Plan;
use super::report::{AfterDestroy, AuditResult};
use crate::args::Visibility;
use crate::client::{Client, wait, with_deadline};
use crate::error::Error;
use crate::progress::Progress;
use crate::stop::Stop;
use crate::tally::Tally;
use crate::tdvf::Tdvf;

/// How long the clean-up behind an error may take.
const CLEANUP_LIMIT: Duration = Duration::from_secs(20);

/// What kind of VM to make.
#[derive(Debug, Clone, Copy)]
pub struct VmSpec {
    /// How changes reach the module.
    pub mode: Mode,
    /// Guest physical address width in bits.
    pub gpaw: u32,
    /// A name for people.
    pub label: &'static str,
}

/// A VM that can run.
#[derive(Debug)]
pub struct TdVm {
    /// Its number.
    pub vm_id: u64,
    /// 96 hex digits.
    pub mrtd: String,
    /// What building it cost.
    pub built: Tally,
    vcpu_ids: Vec<u32>,
}

impl TdVm {
    /// The service's number for a vCPU of the plan.
    pub fn vcpu_id(&self, vcpu: usize) -> u32 {
        // The plan made one vCPU for each; an unknown one is refused by the service.
        self.vcpu_ids.get(vcpu).copied().unwrap_or(u32::MAX)
    }

    /// A VM whose vCPUs have these numbers at the service.
    #[cfg(test)]
    pub(super) fn with_vcpus(vm_id: u64, vcpu_ids: Vec<u32>) -> Self {
        Self {
            vm_id,
            mrtd: String::new(),
            built: Tally::default(),
            vcpu_ids,
        }
    }

    /// Builds an existing, empty VM: vCPUs, slots, private memory, the initial image, finalise.
    pub async fn build(
        client: &Client,
        vm_id: u64,
        plan: &Plan,
        image: Option<&Tdvf<'_>>,
    ) -> Result<Self, Error> {
        let mut built = Tally::default();
        let mut vcpu_ids = Vec::with_capacity(plan.vcpus.len());
        for _ in &plan.vcpus {
            let message = CreateVcpuRequest {
                vm_id,
                create_only: false,
            };
            let answer = client
                .short("CreateVcpu", message, async |mut mmu, request| {
                    mmu.create_vcpu(request).await
                })
                .await?;
            built.add(answer.counts.as_ref());
            vcpu_ids.push(answer.vcpu_id);
        }
        for slot in &plan.slots {
            let slot = Slot {
                slot_id: slot.id,
                gpa: slot.range.start,
                size: slot.range.size(),
                userspace_addr: plan.hva.base.wrapping_add(slot.range.start),
                guest_memfd: true,
                ..Default::default()
            };
            let message = SetUserMemoryRegionRequest {
                vm_id,
                slot: Some(slot),
            };
            let answer = client
                .short("SetUserMemoryRegion", message, async |mut mmu, request| {
                    mmu.set_user_memory_region(request).await
                })
                .await?;
            built.add(answer.counts.as_ref());
        }
        for range in &plan.private {
            let message = SetMemoryAttributesRequest {
                vm_id,
                gpa: range.start,
                size: range.size(),
                attributes: Visibility::Private.attributes(),
            };
            let answer = client
                .long("SetMemoryAttributes", message, async |mut mmu, request| {
                    mmu.set_memory_attributes(request).await
                })
                .await?;
            built.add(answer.counts.as_ref());
        }
        if let Some(image) = image {
            let vcpu_id = vcpu_ids.first().copied().unwrap_or(0);
            add_image(client, vm_id, vcpu_id, image, &mut built).await?;
        }
        let message = FinalizeVmRequest { vm_id, hw_error: 0 };
        let answer = client
            .long("FinalizeVm", message, async |mut mmu, request| {
                mmu.finalize_vm(request).await
            })
            .await?;
        built.add(answer.counts.as_ref());
        Ok(Self {
            vm_id,
            mrtd: answer.mrtd,
            built,
            vcpu_ids,
        })
    }
}

async fn add_image(
    client: &Client,
    vm_id: u64,
    vcpu_id: u32,
    image: &Tdvf<'_>,
    built: &mut Tally,
) -> Result<(), Error> {
    for section in image.sections().iter().filter(|section| section.is_added()) {
        let message = InitMemRegionRequest {
            vm_id,
            vcpu_id,
            gpa: section.memory.start,
            size: section.memory.size(),
            data: image.contents(section).to_vec().into(),
            measure: section.is_measured(),
            ..InitMemRegionRequest::default()
        };
        let answer = client
            .long("InitMemRegion", message, async |mut mmu, request| {
                mmu.init_mem_region(request).await
            })
            .await?;
        built.add(answer.counts.as_ref());
    }
    Ok(())
}

/// Creates a VM, lets `work` use it, and destroys it, also when `work` fails or a signal comes.
pub async fn with_vm<T>(
    client: &Client,
    spec: VmSpec,
    vcpus: usize,
    work: impl AsyncFnOnce(u64) -> Result<T, Error>,
) -> Result<T, Error> {
    let destroy_it = true;
    let (value, _) = with_vm_or_keep(client, spec, vcpus, destroy_it, work).await?;
    Ok(value)
}

/// [`with_vm`]; one that has done its work stays with `destroy_it` false. With its number.
pub async fn with_vm_or_keep<T>(
    client: &Client,
    spec: VmSpec,
    vcpus: usize,
    destroy_it: bool,
    work: impl AsyncFnOnce(u64) -> Result<T, Error>,
) -> Result<(T, u64), Error> {
    let message = CreateVmRequest {
        gpaw: spec.gpaw,
        mode: spec.mode.into(),
        max_vcpus: u32::try_from(vcpus.max(1)).unwrap_or(u32::MAX),
        label: spec.label.to_owned(),
        ..Default::default()
    };
    let created = client
        .short("CreateVm", message, async |mut mmu, request| {
            mmu.create_vm(request).await
        })
        .await?;
    let result = work(created.vm_id).await;
    let last = match &result {
        Ok(_) if !destroy_it => Ok(()),
        Ok(_) => destroy(client, created.vm_id).await,
        Err(_) => destroy(&client.for_cleanup(CLEANUP_LIMIT), created.vm_id).await,
    };
    match (result, last) {
        (Ok(value), Ok(())) => Ok((value, created.vm_id)),
        (Ok(_), Err(error)) => Err(error),
        (Err(error), last) => {
            if let Err(also) = last {
                tracing::warn!(vm = created.vm_id, "not destroyed: {}", also.chain());
            }
            Err(error)
        }
    }
}

async fn destroy(client: &Client, vm_id: u64) -> Result<(), Error> {
    // The end is not part of the report: it need not take four messages a page in mode `kernel`.
    let message = DestroyVmRequest {
        vm_id,
        mode: Mode::Batched.into(),
    };
    client
        .long("DestroyVm", message, async |mut mmu, request| {
            mmu.destroy_vm(request).await
        })
        .await?;
    Ok(())
}

/// Compares the trees of a VM.
pub async fn audit(client: &Client, vm_id: u64) -> Result<AuditResult, Error> {
    let progress = Progress::new("audit", 0);
    let message = AuditRequest { vm_id };
    let mut stream = client
        .long("Audit", message, async |mut mmu, request| {
            mmu.audit(request).await
        })
        .await?;
    let mut last = None;
    while let Some(answer) = client.next("Audit", &mut stream).await? {
        progress.set(answer.entries);
        last = Some(answer);
    }
    let last = last
        .filter(|last| last.finished)
        .ok_or(Error::Truncated { call: "Audit" })?;
    Ok(AuditResult {
        entries: last.entries,
        mismatches: last.mismatches,
        frozen: last.frozen,
        leaves: last.leaves,
        tables: last.tables,
        first: last.first_mismatches,
    })
}

/// What the module holds now; `None` without a connection to it.
pub async fn platform_use(client: &Client) -> Result<Option<AfterDestroy>, Error> {
    let Some(mut module) = client.module.clone() else {
        return Ok(None);
    };
    let limit = client.limits.short;
    let request = with_deadline(GetPlatformRequest {}, limit);
    let platform = wait(
        "GetPlatform",
        limit,
        &Stop::never(),
        module.get_platform(request),
    )
    .await?;
    Ok(Some(AfterDestroy {
        hkids_in_use: platform.hkids_in_use,
        pages_in_use: platform.pages.iter().map(|pages| pages.pages_4k).sum(),
    }))
}

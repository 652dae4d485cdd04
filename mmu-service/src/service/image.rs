//! The initial image: InitMemRegion, and InitMemRegions for a stream of them.

use std::pin::pin;
use std::sync::Arc;

use mirror_proto::{InvalidField, mmu as wire};
use tdp_mmu::{Counts, InitRegion, Measure};
use tokio::sync::mpsc;
use tonic::{Status, Streaming};
use tracing::{Span, field, info_span};

use crate::convert::counts_to_wire;
use crate::shell::Shell;
use crate::status;

/// Regions of a stream that are read while others are added.
const AHEAD: usize = 2;

pub(super) async fn init_mem_region(
    shell: &Arc<Shell>,
    request: wire::InitMemRegionRequest,
) -> Result<wire::InitMemRegionResponse, Status> {
    let region = Region::check(request)?;
    let done = region.part.size;
    let (_, nothing) = mpsc::channel(1);
    let (counts, _) = add(shell, region, Arrivals::of(nothing)).await?;
    Ok(wire::InitMemRegionResponse {
        counts: Some(counts_to_wire(&counts)),
        done,
    })
}

/// In the order of the stream. Those that arrive in time go behind the one before them without a
/// pause of the module.
pub(super) async fn init_mem_regions(
    shell: &Arc<Shell>,
    mut requests: Streaming<wire::InitMemRegionRequest>,
) -> Result<wire::InitMemRegionResponse, Status> {
    let (read, arrived) = mpsc::channel(AHEAD);
    let mut reading = pin!(async move {
        loop {
            let region = match requests.message().await {
                Ok(Some(request)) => Region::check(request),
                Ok(None) => return,
                Err(status) => Err(status),
            };
            let ends = region.is_err();
            if read.send(region).await.is_err() || ends {
                return;
            }
        }
    });
    let mut adding = pin!(add_all(shell, Arrivals::of(arrived)));
    let (counts, done) = tokio::select! {
        outcome = &mut adding => outcome?,
        () = &mut reading => adding.await?,
    };
    Ok(wire::InitMemRegionResponse {
        counts: Some(counts_to_wire(&counts)),
        done,
    })
}

/// What was done, and the bytes of all regions.
async fn add_all(shell: &Arc<Shell>, mut arrivals: Arrivals) -> Result<(Counts, u64), Status> {
    let mut counts = Counts::default();
    while let Some(region) = arrivals.wait().await {
        let region = region?;
        arrivals.bytes = arrivals.bytes.saturating_add(region.part.size);
        let (added, rest) = add(shell, region, arrivals).await?;
        counts += &added;
        arrivals = rest;
    }
    Ok((counts, arrivals.bytes))
}

/// Adds a region, and those that have arrived behind it by then.
async fn add(
    shell: &Arc<Shell>,
    region: Region,
    mut arrivals: Arrivals,
) -> Result<(Counts, Arrivals), Status> {
    let Region {
        vm_id,
        vcpu_id,
        part,
    } = region;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "init_mem_region",
        kvm.vm = vm_id,
        kvm.vcpu = vcpu_id,
        kvm.gpa = part.gpa,
        kvm.size = field::Empty,
    );
    shell
        .operate(&entry, span, move |vm| {
            let mut size = part.size;
            let mut more = |measure| {
                let next = arrivals.like(vm_id, vcpu_id, measure)?;
                size = size.saturating_add(next.size);
                Some(next)
            };
            let counts = vm.init_mem_regions(vcpu_id, part, &mut more)?;
            Span::current().record("kvm.size", size);
            Ok((counts, arrivals))
        })
        .await
}

/// A request that was looked at.
struct Region {
    vm_id: u64,
    vcpu_id: u32,
    part: InitRegion,
}

impl Region {
    fn check(request: wire::InitMemRegionRequest) -> Result<Self, Status> {
        let wire::InitMemRegionRequest {
            vm_id,
            vcpu_id,
            gpa,
            size,
            data,
            measure,
            extend_only,
            hw_error,
        } = request;
        tdp_mmu::check_hw_error(hw_error).map_err(|error| status::of_vm(&error))?;
        if u64::try_from(data.len()).is_ok_and(|given| given > size) {
            let reason = format!("{} bytes of contents, the region has {size}", data.len());
            return Err(status::of_field(InvalidField::new("data", reason)));
        }
        let measure = match (extend_only, measure) {
            (true, _) => Measure::ExtendOnly,
            (false, true) => Measure::Extend,
            (false, false) => Measure::No,
        };
        Ok(Self {
            vm_id,
            vcpu_id,
            part: InitRegion {
                gpa,
                size,
                data,
                measure,
            },
        })
    }
}

/// Regions of a stream as they arrive.
struct Arrivals {
    queue: mpsc::Receiver<Result<Region, Status>>,
    /// Taken from the queue, and not wanted yet.
    next: Option<Result<Region, Status>>,
    /// Bytes of the regions that were handed out.
    bytes: u64,
}

impl Arrivals {
    fn of(queue: mpsc::Receiver<Result<Region, Status>>) -> Self {
        Self {
            queue,
            next: None,
            bytes: 0,
        }
    }

    /// Waits for the next one; `None` behind the last.
    async fn wait(&mut self) -> Option<Result<Region, Status>> {
        match self.next.take() {
            Some(next) => Some(next),
            None => self.queue.recv().await,
        }
    }

    /// The next one, if it is here, for the same vCPU and measured in this way.
    fn like(&mut self, vm_id: u64, vcpu_id: u32, measure: Measure) -> Option<InitRegion> {
        if self.next.is_none() {
            self.next = self.queue.try_recv().ok();
        }
        let fits = matches!(&self.next, Some(Ok(next)) if
            (next.vm_id, next.vcpu_id, next.part.measure) == (vm_id, vcpu_id, measure));
        let part = self.next.take_if(|_| fits)?.ok()?.part;
        self.bytes = self.bytes.saturating_add(part.size);
        Some(part)
    }
}

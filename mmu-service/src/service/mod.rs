//! The RPCs of kvm.mmu.v1.MmuService, by group. A handler converts, has the core work on a thread
//! of its own, and converts back.

mod events;
pub(crate) mod faults;
mod image;
mod lifecycle;
pub(crate) mod look;
pub(crate) mod memory;
mod run;
mod stream;
mod tables;
mod traced;

use std::sync::Arc;

use mirror_proto::mmu as wire;
use mirror_proto::mmu::mmu_service_server::MmuService;
use telemetry::propagate::traceparent_of;
use tonic::{Request, Response, Status, Streaming};

use crate::shell::Shell;
pub(crate) use lifecycle::vm_config;
use stream::Answers;

/// Path of HandleFault.
pub(crate) const FAULT_PATH: &str = "/kvm.mmu.v1.MmuService/HandleFault";
/// Path of HandleFaults.
pub(crate) const FAULT_STREAM_PATH: &str = "/kvm.mmu.v1.MmuService/HandleFaults";
/// Path of the method that runs vCPUs.
pub(crate) const RUN_PATH: &str = "/kvm.mmu.v1.MmuService/RunVcpu";

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Service(Arc<Shell>);

impl Service {
    pub(crate) fn new(shell: Arc<Shell>) -> Self {
        Self(shell)
    }

    /// Counts a refusal and passes it on.
    fn answered<T>(&self, outcome: Result<T, Status>) -> Result<Response<T>, Status> {
        outcome
            .map(Response::new)
            .inspect_err(|refusal| self.0.metrics.refused(refusal))
    }
}

/// Unary RPCs: one line each, `name: Request => Response, file`.
macro_rules! mmu_service {
    ($($name:ident: $request:ident => $response:ident, $file:ident;)*) => {
        #[tonic::async_trait]
        impl MmuService for Service {
            $(async fn $name(
                &self,
                request: Request<wire::$request>,
            ) -> Result<Response<wire::$response>, Status> {
                self.answered($file::$name(&self.0, request.into_inner()).await)
            })*

            async fn handle_fault(
                &self,
                request: Request<wire::HandleFaultRequest>,
            ) -> Result<Response<wire::HandleFaultResponse>, Status> {
                let caller = traceparent_of(request.metadata().as_ref());
                let request = request.into_inner();
                self.answered(faults::handle_fault(&self.0, &caller, request).await)
            }

            async fn init_mem_regions(
                &self,
                request: Request<Streaming<wire::InitMemRegionRequest>>,
            ) -> Result<Response<wire::InitMemRegionResponse>, Status> {
                self.answered(image::init_mem_regions(&self.0, request.into_inner()).await)
            }

            type HandleFaultsStream = Answers<wire::HandleFaultsResponse>;

            async fn handle_faults(
                &self,
                request: Request<Streaming<wire::HandleFaultsRequest>>,
            ) -> Result<Response<Self::HandleFaultsStream>, Status> {
                let caller = traceparent_of(request.metadata().as_ref());
                Ok(Response::new(faults::handle_faults(&self.0, caller, request.into_inner())))
            }

            type RunVcpuStream = Answers<wire::RunVcpuResponse>;

            async fn run_vcpu(
                &self,
                request: Request<Streaming<wire::RunVcpuRequest>>,
            ) -> Result<Response<Self::RunVcpuStream>, Status> {
                Ok(Response::new(run::run_vcpu(&self.0, request.into_inner())))
            }

            type PreFaultMemoryStream = Answers<wire::PreFaultMemoryResponse>;

            async fn pre_fault_memory(
                &self,
                request: Request<wire::PreFaultMemoryRequest>,
            ) -> Result<Response<Self::PreFaultMemoryStream>, Status> {
                self.answered(faults::pre_fault_memory(&self.0, request.into_inner()))
            }

            type DumpTreeStream = Answers<wire::DumpTreeResponse>;

            async fn dump_tree(
                &self,
                request: Request<wire::DumpTreeRequest>,
            ) -> Result<Response<Self::DumpTreeStream>, Status> {
                self.answered(look::dump_tree(&self.0, request.into_inner()))
            }

            type AuditStream = Answers<wire::AuditResponse>;

            async fn audit(
                &self,
                request: Request<wire::AuditRequest>,
            ) -> Result<Response<Self::AuditStream>, Status> {
                self.answered(look::audit(&self.0, request.into_inner()))
            }

            type WatchEventsStream = Answers<wire::WatchEventsResponse>;

            async fn watch_events(
                &self,
                request: Request<wire::WatchEventsRequest>,
            ) -> Result<Response<Self::WatchEventsStream>, Status> {
                self.answered(events::watch_events(&self.0, request.into_inner()))
            }
        }
    };
}

mmu_service! {
    create_vm: CreateVmRequest => CreateVmResponse, lifecycle;
    init_vm: InitVmRequest => InitVmResponse, lifecycle;
    destroy_vm: DestroyVmRequest => DestroyVmResponse, lifecycle;
    list_vms: ListVmsRequest => ListVmsResponse, lifecycle;
    create_vcpu: CreateVcpuRequest => CreateVcpuResponse, lifecycle;
    init_vcpu: InitVcpuRequest => InitVcpuResponse, lifecycle;
    finalize_vm: FinalizeVmRequest => FinalizeVmResponse, lifecycle;
    set_user_memory_region: SetUserMemoryRegionRequest => SetUserMemoryRegionResponse, memory;
    set_memory_attributes: SetMemoryAttributesRequest => SetMemoryAttributesResponse, memory;
    init_mem_region: InitMemRegionRequest => InitMemRegionResponse, image;
    punch_hole: PunchHoleRequest => PunchHoleResponse, memory;
    unmap_hva: UnmapHvaRequest => UnmapHvaResponse, memory;
    get_walk: GetWalkRequest => GetWalkResponse, look;
    get_stats: GetStatsRequest => GetStatsResponse, look;
    set_dirty_log: SetDirtyLogRequest => SetDirtyLogResponse, tables;
    get_dirty_log: GetDirtyLogRequest => GetDirtyLogResponse, tables;
    clear_dirty_log: ClearDirtyLogRequest => ClearDirtyLogResponse, tables;
    age_range: AgeRangeRequest => AgeRangeResponse, tables;
    touch_memory: TouchMemoryRequest => TouchMemoryResponse, tables;
    zap_all_fast: ZapAllFastRequest => ZapAllFastResponse, tables;
    zap_all: ZapAllRequest => ZapAllResponse, tables;
    zap_range: ZapRangeRequest => ZapRangeResponse, tables;
    write_protect: WriteProtectRequest => WriteProtectResponse, tables;
    change_host_mapping: ChangeHostMappingRequest => ChangeHostMappingResponse, tables;
    set_nx_huge_pages: SetNxHugePagesRequest => SetNxHugePagesResponse, tables;
    recover_nx_huge_pages: RecoverNxHugePagesRequest => RecoverNxHugePagesResponse, tables;
}

#[cfg(test)]
mod cancelled;

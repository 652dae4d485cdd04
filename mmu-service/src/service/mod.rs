//! The RPCs of kvm.mmu.v1.MmuService, by group. A handler converts, has the core work on a thread
//! of its own, and converts back.

mod events;
mod faults;
mod lifecycle;
mod look;
mod memory;
mod stream;
mod tables;

use std::sync::Arc;

use mirror_proto::mmu as wire;
use mirror_proto::mmu::mmu_service_server::MmuService;
use tonic::{Request, Response, Status, Streaming};

use crate::shell::Shell;
use stream::Answers;

/// The service. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Service(Arc<Shell>);

impl Service {
    pub(crate) fn new(shell: Arc<Shell>) -> Self {
        Self(shell)
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
                $file::$name(&self.0, request.into_inner()).await.map(Response::new)
            })*

            type HandleFaultsStream = Answers<wire::HandleFaultsResponse>;

            async fn handle_faults(
                &self,
                request: Request<Streaming<wire::HandleFaultsRequest>>,
            ) -> Result<Response<Self::HandleFaultsStream>, Status> {
                Ok(Response::new(faults::handle_faults(&self.0, request.into_inner())))
            }

            type PreFaultMemoryStream = Answers<wire::PreFaultMemoryResponse>;

            async fn pre_fault_memory(
                &self,
                request: Request<wire::PreFaultMemoryRequest>,
            ) -> Result<Response<Self::PreFaultMemoryStream>, Status> {
                faults::pre_fault_memory(&self.0, request.into_inner()).map(Response::new)
            }

            type DumpTreeStream = Answers<wire::DumpTreeResponse>;

            async fn dump_tree(
                &self,
                request: Request<wire::DumpTreeRequest>,
            ) -> Result<Response<Self::DumpTreeStream>, Status> {
                look::dump_tree(&self.0, request.into_inner()).map(Response::new)
            }

            type AuditStream = Answers<wire::AuditResponse>;

            async fn audit(
                &self,
                request: Request<wire::AuditRequest>,
            ) -> Result<Response<Self::AuditStream>, Status> {
                look::audit(&self.0, request.into_inner()).map(Response::new)
            }

            type WatchEventsStream = Answers<wire::WatchEventsResponse>;

            async fn watch_events(
                &self,
                request: Request<wire::WatchEventsRequest>,
            ) -> Result<Response<Self::WatchEventsStream>, Status> {
                events::watch_events(&self.0, request.into_inner()).map(Response::new)
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
    init_mem_region: InitMemRegionRequest => InitMemRegionResponse, memory;
    punch_hole: PunchHoleRequest => PunchHoleResponse, memory;
    unmap_hva: UnmapHvaRequest => UnmapHvaResponse, memory;
    handle_fault: HandleFaultRequest => HandleFaultResponse, faults;
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

//! An MMU service for tests: it keeps what it was asked, in order, and answers by a script.

use std::cmp;
use std::collections::HashMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use mirror_proto::mmu::mmu_service_server::{MmuService, MmuServiceServer};
use mirror_proto::mmu::*;
use tdx_defs::{CompletionStatus, OperandId};
use tempfile::TempDir;
use tokio::net::UnixListener;
use tokio_stream::wrappers::{ReceiverStream, UnixListenerStream};
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::client::{Client, Limits};
use crate::stop::Stop;

/// One thing the service was asked.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Asked {
    Create,
    Destroy(u64),
    Faults { vcpu_id: u32, gpas: Vec<u64> },
    Accepts { vcpu_id: u32, pages: Vec<u64> },
    Unmap(u64, u64),
    Hole(u32, u64, u64),
}

/// Answers one fault: its outcome and how often it was asked before.
pub(super) type Script = fn(gpa: u64, before: usize) -> Scripted;

/// What the service says to a fault.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Scripted {
    Fixed,
    Spurious,
    Other(RetPf),
    Errno(i32),
    /// Counted and not listed.
    Unlisted,
    /// The stream ends with an error.
    Fail,
}

/// The service, listening until dropped.
pub(super) struct Fake {
    pub(super) client: Client,
    asked: Arc<Mutex<Vec<Asked>>>,
    messages: Arc<AtomicUsize>,
    _directory: TempDir,
}

impl Fake {
    pub(super) async fn start(script: Script) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fake.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let service = Service {
            script,
            asked: asked.clone(),
            times: Arc::default(),
            messages: Arc::default(),
            accepted: Arc::default(),
        };
        let messages = Arc::clone(&service.messages);
        tokio::spawn(
            tonic::transport::Server::builder()
                .add_service(MmuServiceServer::new(service))
                .serve_with_incoming(UnixListenerStream::new(listener)),
        );
        let url = format!("unix://{}", path.display());
        let client = Client::connect(&url, None, None, Limits::new(None), Stop::never())
            .await
            .unwrap();
        Self {
            client,
            asked,
            messages,
            _directory: directory,
        }
    }

    pub(super) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    /// Messages of faults so far.
    pub(super) fn messages(&self) -> usize {
        self.messages.load(Ordering::Relaxed)
    }
}

#[derive(Clone)]
struct Service {
    script: Script,
    asked: Arc<Mutex<Vec<Asked>>>,
    times: Arc<Mutex<HashMap<u64, usize>>>,
    messages: Arc<AtomicUsize>,
    accepted: Arc<Mutex<HashMap<u64, u64>>>,
}

/// The module is busy with this page when the guest accepts it first.
pub(super) const BUSY_PAGE: u64 = 0xB000;

impl Service {
    fn note(&self, asked: Asked) {
        self.asked.lock().unwrap().push(asked);
    }

    fn faults(&self, message: HandleFaultsRequest) -> Result<HandleFaultsResponse, Status> {
        let mut answer = HandleFaultsResponse {
            tag: message.tag,
            ..Default::default()
        };
        let first = FaultRun {
            vcpu_id: message.vcpu_id,
            faults: message.faults,
        };
        let runs: Vec<(u32, Vec<u64>)> = std::iter::once(first)
            .chain(message.more)
            .map(|run| {
                (
                    run.vcpu_id,
                    run.faults.iter().map(|fault| fault.gpa).collect(),
                )
            })
            .collect();
        for (index, gpa) in (0..).zip(runs.iter().flat_map(|(_, gpas)| gpas)) {
            let other = |ret_pf: RetPf, errno| FaultOutcome {
                index,
                ret_pf: ret_pf.into(),
                errno,
                reason: format!("because of {gpa:#x}"),
            };
            match (self.script)(*gpa, self.before(*gpa)) {
                Scripted::Fixed => answer.fixed += 1,
                Scripted::Spurious => answer.spurious += 1,
                Scripted::Other(ret_pf) => answer.others.push(other(ret_pf, 0)),
                Scripted::Errno(errno) => {
                    answer.others.push(other(RetPf::Unspecified, errno));
                }
                Scripted::Unlisted => answer.others_count += 1,
                Scripted::Fail => return Err(Status::failed_precondition("the VM is bugged")),
            }
        }
        answer.others_count += u32::try_from(answer.others.len()).unwrap();
        answer.counts = Some(Counts {
            rpcs: runs.len() as u64,
            ..Default::default()
        });
        self.messages.fetch_add(1, Ordering::Relaxed);
        for (vcpu_id, gpas) in runs {
            self.note(Asked::Faults { vcpu_id, gpas });
        }
        Ok(answer)
    }

    /// Every page is there; a guest accepts it, and then again.
    fn run(&self, message: RunVcpuRequest) -> RunVcpuResponse {
        let pages: Vec<u64> = message
            .ops
            .iter()
            .map(|op| match &op.op {
                Some(run_op::Op::Accept(accept)) => accept.gpa,
                other => panic!("a guest that accepts does {other:?}"),
            })
            .collect();
        let mut accepted = self.accepted.lock().unwrap();
        let results = pages.iter().map(|&page| {
            let times = accepted.entry(page).or_insert(0);
            *times += 1;
            let first = if page == BUSY_PAGE { 2 } else { 1 };
            let status = match (*times).cmp(&first) {
                cmp::Ordering::Less => CompletionStatus::OPERAND_BUSY.with(OperandId::RCX),
                cmp::Ordering::Equal => CompletionStatus::SUCCESS,
                cmp::Ordering::Greater => CompletionStatus::PAGE_ALREADY_ACCEPTED,
            };
            let resumed = RunResumed {
                regs: Some(RunRegs {
                    regs: vec![status.0],
                }),
                ..Default::default()
            };
            RunResult {
                result: Some(run_result::Result::Resumed(resumed)),
            }
        });
        let results = results.collect();
        self.note(Asked::Accepts {
            vcpu_id: message.vcpu_id,
            pages,
        });
        RunVcpuResponse {
            results,
            exit: Some(run_vcpu_response::Exit::Done(true)),
            entries: 1,
            ..Default::default()
        }
    }

    /// How often a fault was asked, and counts it.
    fn before(&self, gpa: u64) -> usize {
        let mut times = self.times.lock().unwrap();
        let times = times.entry(gpa).or_default();
        *times += 1;
        *times - 1
    }
}

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Methods that no test needs.
macro_rules! unimplemented_methods {
    ($($method:ident: $request:ty => $response:ty;)*) => {
        $(
            fn $method<'life, 'future>(
                &'life self,
                _: Request<$request>,
            ) -> Pin<Box<dyn Future<Output = Result<Response<$response>, Status>> + Send + 'future>>
            where
                'life: 'future,
                Self: 'future,
            {
                Box::pin(async { Err(Status::unimplemented("not in this test")) })
            }
        )*
    };
}

#[tonic::async_trait]
impl MmuService for Service {
    type HandleFaultsStream = Answers<HandleFaultsResponse>;
    type RunVcpuStream = Answers<RunVcpuResponse>;
    type PreFaultMemoryStream = Answers<PreFaultMemoryResponse>;
    type DumpTreeStream = Answers<DumpTreeResponse>;
    type AuditStream = Answers<AuditResponse>;
    type WatchEventsStream = Answers<WatchEventsResponse>;

    async fn create_vm(
        &self,
        _: Request<CreateVmRequest>,
    ) -> Result<Response<CreateVmResponse>, Status> {
        self.note(Asked::Create);
        Ok(Response::new(CreateVmResponse {
            vm_id: 7,
            ..Default::default()
        }))
    }

    async fn destroy_vm(
        &self,
        request: Request<DestroyVmRequest>,
    ) -> Result<Response<DestroyVmResponse>, Status> {
        self.note(Asked::Destroy(request.get_ref().vm_id));
        Ok(Response::new(Default::default()))
    }

    async fn handle_faults(
        &self,
        request: Request<Streaming<HandleFaultsRequest>>,
    ) -> Result<Response<Self::HandleFaultsStream>, Status> {
        let mut messages = request.into_inner();
        let service = self.clone();
        let (send, answers) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            while let Some(Ok(message)) = messages.next().await {
                let answer = service.faults(message);
                let failed = answer.is_err();
                if send.send(answer).await.is_err() || failed {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn run_vcpu(
        &self,
        request: Request<Streaming<RunVcpuRequest>>,
    ) -> Result<Response<Self::RunVcpuStream>, Status> {
        let service = self.clone();
        let answers = request.into_inner();
        let answers = answers.map(move |message| message.map(|message| service.run(message)));
        Ok(Response::new(Box::pin(answers)))
    }

    async fn init_mem_regions(
        &self,
        _: Request<Streaming<InitMemRegionRequest>>,
    ) -> Result<Response<InitMemRegionResponse>, Status> {
        Err(Status::unimplemented("not in this test"))
    }

    async fn punch_hole(
        &self,
        request: Request<PunchHoleRequest>,
    ) -> Result<Response<PunchHoleResponse>, Status> {
        let hole = request.get_ref();
        self.note(Asked::Hole(hole.slot_id, hole.offset, hole.size));
        Ok(Response::new(Default::default()))
    }

    async fn unmap_hva(
        &self,
        request: Request<UnmapHvaRequest>,
    ) -> Result<Response<UnmapHvaResponse>, Status> {
        self.note(Asked::Unmap(request.get_ref().start, request.get_ref().end));
        Ok(Response::new(Default::default()))
    }

    unimplemented_methods! {
        list_vms: ListVmsRequest => ListVmsResponse;
        init_vm: InitVmRequest => InitVmResponse;
        init_vcpu: InitVcpuRequest => InitVcpuResponse;
        create_vcpu: CreateVcpuRequest => CreateVcpuResponse;
        set_user_memory_region: SetUserMemoryRegionRequest => SetUserMemoryRegionResponse;
        set_memory_attributes: SetMemoryAttributesRequest => SetMemoryAttributesResponse;
        init_mem_region: InitMemRegionRequest => InitMemRegionResponse;
        finalize_vm: FinalizeVmRequest => FinalizeVmResponse;
        handle_fault: HandleFaultRequest => HandleFaultResponse;
        pre_fault_memory: PreFaultMemoryRequest => Self::PreFaultMemoryStream;
        get_walk: GetWalkRequest => GetWalkResponse;
        dump_tree: DumpTreeRequest => Self::DumpTreeStream;
        audit: AuditRequest => Self::AuditStream;
        get_stats: GetStatsRequest => GetStatsResponse;
        set_dirty_log: SetDirtyLogRequest => SetDirtyLogResponse;
        get_dirty_log: GetDirtyLogRequest => GetDirtyLogResponse;
        clear_dirty_log: ClearDirtyLogRequest => ClearDirtyLogResponse;
        age_range: AgeRangeRequest => AgeRangeResponse;
        touch_memory: TouchMemoryRequest => TouchMemoryResponse;
        zap_all_fast: ZapAllFastRequest => ZapAllFastResponse;
        zap_all: ZapAllRequest => ZapAllResponse;
        zap_range: ZapRangeRequest => ZapRangeResponse;
        write_protect: WriteProtectRequest => WriteProtectResponse;
        change_host_mapping: ChangeHostMappingRequest => ChangeHostMappingResponse;
        set_nx_huge_pages: SetNxHugePagesRequest => SetNxHugePagesResponse;
        recover_nx_huge_pages: RecoverNxHugePagesRequest => RecoverNxHugePagesResponse;
        watch_events: WatchEventsRequest => Self::WatchEventsStream;
    }
}

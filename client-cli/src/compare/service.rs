//! The VM that a recording is played on, and the events that it makes.

use mirror_proto::mmu::{
    ChangeHostMappingRequest, CreateVcpuRequest, CreateVmRequest, DestroyVmRequest,
    GetStatsRequest, GetStatsResponse, HostChange, HostPageSize, TraceRecord, VmKind,
    WatchEventsRequest, WatchEventsResponse,
};
use tonic::{Code, Streaming};

use super::settings::Settings;
use crate::client::Client;
use crate::error::Error;

/// Events of one step that are kept: the service's own limit.
const BUFFER: u32 = 1 << 20;
/// vCPUs that a recording may have.
pub(super) const MAX_VCPUS: u32 = 576;
const WATCH: &str = "WatchEvents";

/// The answer of a service, or the errno of its refusal. What is wrong with the service itself ends
/// the command.
pub(super) fn answered<T>(result: Result<T, Error>) -> Result<Result<T, i32>, Error> {
    match result {
        Ok(answer) => Ok(Ok(answer)),
        Err(Error::Refused { call, source }) => match (source.code(), source.errno()) {
            (Code::Unavailable | Code::Unimplemented, _) | (_, None) => {
                Err(Error::Refused { call, source })
            }
            (_, Some(errno)) => Ok(Err(errno)),
        },
        Err(error) => Err(error),
    }
}

/// `call!(client, "Name", method, message)`: one call with its refusal as an errno.
macro_rules! call {
    ($client:expr, $name:literal, $method:ident, $message:expr) => {
        $crate::compare::service::answered(
            $client
                .long($name, $message, async |mut mmu, request| {
                    mmu.$method(request).await
                })
                .await,
        )
    };
}
pub(super) use call;

/// What a step did.
#[derive(Debug, Default)]
pub(super) struct Happened {
    pub(super) records: Vec<TraceRecord>,
    pub(super) lost: u64,
    pub(super) stats: Option<GetStatsResponse>,
}

/// One VM.
pub(super) struct RecordedVm {
    pub(super) client: Client,
    pub(super) vm_id: u64,
    pub(super) vcpus: u32,
    stream: Streaming<WatchEventsResponse>,
    /// Sequence number up to which events are read.
    read: u64,
    /// Events that were read before their step ended.
    early: Happened,
}

impl RecordedVm {
    /// An ordinary VM with these settings, watched from its beginning.
    pub(super) async fn create(
        client: &Client,
        settings: &Settings,
    ) -> Result<Result<Self, i32>, Error> {
        let message = CreateVmRequest {
            gpaw: settings.gpaw,
            max_vcpus: MAX_VCPUS,
            label: "compare".into(),
            kind: VmKind::Ordinary.into(),
            eager_page_split: Some(settings.eager_page_split),
            dirty_log: settings.dirty_log.into(),
            nx_huge_pages: settings.nx_huge_pages,
            slot_zap_all: Some(settings.slot_zap_all),
            ..Default::default()
        };
        let created = match call!(client, "CreateVm", create_vm, message)? {
            Ok(created) => created,
            Err(errno) => return Ok(Err(errno)),
        };
        let message = WatchEventsRequest {
            vm_id: created.vm_id,
            buffer: BUFFER,
        };
        let stream = client
            .open(WATCH, message, async |mut mmu, request| {
                mmu.watch_events(request).await
            })
            .await?;
        Ok(Ok(Self {
            client: client.clone(),
            vm_id: created.vm_id,
            vcpus: 0,
            stream,
            read: 0,
            early: Happened::default(),
        }))
    }

    /// Sees to it that there are so many vCPUs.
    pub(super) async fn need_vcpus(&mut self, count: u32) -> Result<Result<(), i32>, Error> {
        while self.vcpus < count.min(MAX_VCPUS) {
            let message = CreateVcpuRequest {
                vm_id: self.vm_id,
                create_only: false,
            };
            if let Err(errno) = call!(self.client, "CreateVcpu", create_vcpu, message)? {
                return Ok(Err(errno));
            }
            self.vcpus += 1;
        }
        Ok(Ok(()))
    }

    /// The host changes how it maps a range, without a notifier.
    pub(super) async fn set_host(
        &self,
        start: u64,
        end: u64,
        change: HostChange,
        page_size: HostPageSize,
    ) -> Result<Result<(), i32>, Error> {
        self.host(start, end, change, page_size, true).await
    }

    /// Only the notifier.
    pub(super) async fn notify(&self, start: u64, end: u64) -> Result<Result<(), i32>, Error> {
        let none = HostPageSize::Unspecified;
        self.host(start, end, HostChange::Unspecified, none, false)
            .await
    }

    async fn host(
        &self,
        start: u64,
        end: u64,
        change: HostChange,
        page_size: HostPageSize,
        silent: bool,
    ) -> Result<Result<(), i32>, Error> {
        let message = ChangeHostMappingRequest {
            vm_id: self.vm_id,
            start,
            end,
            change: change.into(),
            page_size: page_size.into(),
            silent,
        };
        let answer = call!(
            self.client,
            "ChangeHostMapping",
            change_host_mapping,
            message
        )?;
        Ok(answer.map(drop))
    }

    /// Reads the events of everything that was answered so far. They stay with the step.
    pub(super) async fn look(&mut self) -> Result<&[TraceRecord], Error> {
        let message = GetStatsRequest { vm_id: self.vm_id };
        let stats = self
            .client
            .long("GetStats", message, async |mut mmu, request| {
                mmu.get_stats(request).await
            })
            .await?;
        while self.read < stats.last_event {
            let Some(message) = self.client.next(WATCH, &mut self.stream).await? else {
                return Err(Error::Truncated { call: WATCH });
            };
            self.take(message);
        }
        self.early.stats = Some(stats);
        Ok(&self.early.records)
    }

    /// Events of the step that are read.
    pub(super) fn look_len(&self) -> usize {
        self.early.records.len()
    }

    fn take(&mut self, message: WatchEventsResponse) {
        self.early.lost += message.lost;
        self.read = message
            .records
            .last()
            .map_or(self.read, |record| record.sequence);
        self.early.records.extend(message.records);
    }

    /// What the step did that ends here.
    pub(super) async fn end_step(&mut self) -> Result<Happened, Error> {
        self.look().await?;
        Ok(std::mem::take(&mut self.early))
    }

    /// Destroys the VM, and reads its events to their end.
    pub(super) async fn destroy(mut self) -> Result<(i32, Happened), Error> {
        let message = DestroyVmRequest {
            vm_id: self.vm_id,
            mode: 0,
        };
        if let Err(errno) = call!(self.client, "DestroyVm", destroy_vm, message)? {
            return Ok((errno, std::mem::take(&mut self.early)));
        }
        while let Some(message) = self.client.next(WATCH, &mut self.stream).await? {
            self.take(message);
        }
        Ok((0, std::mem::take(&mut self.early)))
    }
}

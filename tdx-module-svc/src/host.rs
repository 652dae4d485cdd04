//! `tdx.module.v1.TdxPlatformService`: physical memory, the module's state, and conditions that no
//! call brings about.
//!
//! Conditions change what every caller meets, so they are refused unless the service was started
//! with `--allow-injection`.

mod state;

use std::pin::Pin;
use std::sync::Arc;

use mirror_proto::InvalidField;
use mirror_proto::module::lock::Object;
use mirror_proto::module::tdx_platform_service_server::TdxPlatformService;
use mirror_proto::module::{
    GetStateRequest, GetStateResponse, HoldLockRequest, HoldLockResponse, KeyProgramResult, Lock,
    LockMode, ReadMemoryRequest, ReadMemoryResponse, ReleaseLockRequest, ReleaseLockResponse,
    ResetRequest, ResetResponse, SetConditionsRequest, SetConditionsResponse, WriteMemoryRequest,
    WriteMemoryResponse,
};
use tdx_defs::{Gpa, Hpa, PAGE_SIZE, TdxLevel};
use tdx_module::hooks::{self, LockObject};
use tdx_module::{Module, PageSize};
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::running::Running;
use crate::status::Refusal;

/// Most bytes of one access to physical memory.
const MAX_MEMORY: usize = 2 << 20;
/// Answers of GetState that may wait for their reader.
const STATE_AHEAD: usize = 256;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct HostService {
    running: Arc<Running>,
    injection: bool,
}

impl HostService {
    /// Serves what is `running`; conditions may be changed with `injection`.
    pub(crate) fn new(running: Arc<Running>, injection: bool) -> Self {
        Self { running, injection }
    }

    fn module(&self) -> Arc<Module> {
        Arc::clone(&self.running.now().module)
    }

    fn may_inject(&self) -> Result<(), Refusal> {
        if self.injection {
            Ok(())
        } else {
            Err(Refusal::InjectionOff)
        }
    }
}

/// A range of physical memory of the platform.
fn physical(module: &Module, hpa: u64, len: usize, field: &str) -> Result<Hpa, InvalidField> {
    if len == 0 || len > MAX_MEMORY {
        let reason = format!("{len} bytes, allowed are 1 to {MAX_MEMORY}");
        return Err(InvalidField::new(field, reason));
    }
    let config = module.config();
    let limit = 1u64 << (config.maxpa - config.hkid_bits);
    if hpa >= limit || limit - hpa < len as u64 {
        let reason = format!("{len} bytes at {hpa:#x} end above physical memory ({limit:#x})");
        return Err(InvalidField::new("hpa", reason));
    }
    Ok(Hpa::new(hpa))
}

fn page_size(number: u32, field: &str) -> Result<PageSize, InvalidField> {
    match number {
        0 => Ok(PageSize::Small),
        1 => Ok(PageSize::Large),
        2 => Ok(PageSize::Giant),
        other => {
            let reason = format!("{other} is neither 0 (4 KiB), 1 (2 MiB) nor 2 (1 GiB)");
            Err(InvalidField::new(field, reason))
        }
    }
}

fn lock_from_wire(lock: Option<Lock>) -> Result<LockObject, InvalidField> {
    let object = lock
        .and_then(|lock| lock.object)
        .ok_or_else(|| InvalidField::new("lock", "missing"))?;
    Ok(match object {
        Object::Pamt(page) => LockObject::Pamt {
            hpa: Hpa::new(page.hpa),
            size: page_size(page.size, "lock.pamt.size")?,
        },
        Object::SeptTree(tdr) => LockObject::SeptTree { tdr: Hpa::new(tdr) },
        Object::OpState(tdr) => LockObject::OpState { tdr: Hpa::new(tdr) },
        Object::TdEpoch(tdr) => LockObject::TdEpoch { tdr: Hpa::new(tdr) },
        Object::Rtmr(tdr) => LockObject::Rtmr { tdr: Hpa::new(tdr) },
        Object::Kot(_) => LockObject::Kot,
        Object::SeptEntry(entry) => {
            let level = u8::try_from(entry.level)
                .ok()
                .and_then(|level| TdxLevel::new(level).ok())
                .ok_or_else(|| {
                    let reason = format!("{} is not a TDX level", entry.level);
                    InvalidField::new("lock.sept_entry.level", reason)
                })?;
            LockObject::SeptEntry {
                tdr: Hpa::new(entry.tdr),
                gpa: Gpa::new(entry.gpa),
                level,
            }
        }
    })
}

fn lock_mode(mode: i32) -> Result<tdx_module::LockMode, InvalidField> {
    match LockMode::try_from(mode) {
        Ok(LockMode::Shared) => Ok(tdx_module::LockMode::Shared),
        Ok(LockMode::Unspecified | LockMode::Exclusive) => Ok(tdx_module::LockMode::Exclusive),
        Err(_) => Err(InvalidField::new("mode", format!("{mode} is not a mode"))),
    }
}

fn key_program(result: i32) -> Result<hooks::KeyProgramResult, InvalidField> {
    match KeyProgramResult::try_from(result) {
        Ok(KeyProgramResult::Unspecified | KeyProgramResult::Ok) => Ok(hooks::KeyProgramResult::Ok),
        Ok(KeyProgramResult::DeviceBusy) => Ok(hooks::KeyProgramResult::DeviceBusy),
        Ok(KeyProgramResult::EntropyError) => Ok(hooks::KeyProgramResult::EntropyError),
        Err(_) => {
            let reason = format!("{result} is no result");
            Err(InvalidField::new("key_program", reason))
        }
    }
}

#[tonic::async_trait]
impl TdxPlatformService for HostService {
    async fn read_memory(
        &self,
        request: Request<ReadMemoryRequest>,
    ) -> Result<Response<ReadMemoryResponse>, Status> {
        let ReadMemoryRequest { hpa, length } = request.into_inner();
        let module = self.module();
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let hpa = physical(&module, hpa, length, "length").map_err(Refusal::from)?;
        let data = module.read_host_memory(hpa, length);
        Ok(Response::new(ReadMemoryResponse {
            private_bytes: private_bytes(&module, hpa, length),
            data,
        }))
    }

    async fn write_memory(
        &self,
        request: Request<WriteMemoryRequest>,
    ) -> Result<Response<WriteMemoryResponse>, Status> {
        let WriteMemoryRequest { hpa, data } = request.into_inner();
        let module = self.module();
        let hpa = physical(&module, hpa, data.len(), "data").map_err(Refusal::from)?;
        module.write_host_memory(hpa, &data);
        Ok(Response::new(WriteMemoryResponse {}))
    }

    type GetStateStream =
        Pin<Box<dyn Stream<Item = Result<GetStateResponse, Status>> + Send + 'static>>;

    async fn get_state(
        &self,
        _: Request<GetStateRequest>,
    ) -> Result<Response<Self::GetStateStream>, Status> {
        let module = self.module();
        let (sender, items) = mpsc::channel(STATE_AHEAD);
        // A scan of all metadata: on a thread that may wait for its reader.
        tokio::task::spawn_blocking(move || {
            state::tell(&module, &mut |item| {
                sender
                    .blocking_send(Ok(GetStateResponse { item: Some(item) }))
                    .is_ok()
            });
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(items))))
    }

    async fn reset(&self, _: Request<ResetRequest>) -> Result<Response<ResetResponse>, Status> {
        self.may_inject()?;
        let instance = self.running.reset().map_err(|_| Refusal::ModuleFailed)?;
        tracing::info!(instance, "the module was reset");
        Ok(Response::new(ResetResponse { instance }))
    }

    async fn set_conditions(
        &self,
        request: Request<SetConditionsRequest>,
    ) -> Result<Response<SetConditionsResponse>, Status> {
        self.may_inject()?;
        let request = request.into_inner();
        let key_program = request
            .key_program
            .map(key_program)
            .transpose()
            .map_err(Refusal::from)?;
        let module = self.module();
        if let Some(available) = request.entropy {
            module.set_entropy(available);
        }
        if let Some(value) = request.tsc_adjust {
            module.set_tsc_adjust(value);
        }
        if let Some(interrupt) = request.host_interrupt {
            module.set_interrupt_pending(interrupt.pending, interrupt.after_checks);
        }
        if let Some(result) = key_program {
            module.set_key_program_result(result);
        }
        Ok(Response::new(SetConditionsResponse {}))
    }

    async fn hold_lock(
        &self,
        request: Request<HoldLockRequest>,
    ) -> Result<Response<HoldLockResponse>, Status> {
        self.may_inject()?;
        let request = request.into_inner();
        let object = lock_from_wire(request.lock).map_err(Refusal::from)?;
        let mode = lock_mode(request.mode).map_err(Refusal::from)?;
        if !self.running.now().hold_lock(object, mode, request.as_guest) {
            return Err(Refusal::LockNotFree.into());
        }
        Ok(Response::new(HoldLockResponse {}))
    }

    async fn release_lock(
        &self,
        request: Request<ReleaseLockRequest>,
    ) -> Result<Response<ReleaseLockResponse>, Status> {
        self.may_inject()?;
        let request = request.into_inner();
        let object = lock_from_wire(request.lock).map_err(Refusal::from)?;
        let mode = lock_mode(request.mode).map_err(Refusal::from)?;
        if !self.running.now().release_lock(object, mode) {
            return Err(Refusal::LockNotFree.into());
        }
        Ok(Response::new(ReleaseLockResponse {}))
    }
}

/// How many bytes of a range belong to pages of TDs.
fn private_bytes(module: &Module, hpa: Hpa, length: usize) -> u32 {
    let end = hpa.get() + length as u64;
    let mut at = hpa.get();
    let mut bytes = 0;
    while at < end {
        let next = (at / PAGE_SIZE + 1) * PAGE_SIZE;
        let part = next.min(end) - at;
        if module.is_private(Hpa::new(at)) {
            bytes += part;
        }
        at = next;
    }
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

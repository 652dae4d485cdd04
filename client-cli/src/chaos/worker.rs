//! One VM of a run: does what the plan says, whatever becomes of it.
//!
//! Invariant W1: every request ends in success, in a typed error, or in a connection that broke
//! because the MMU service was killed; anything else is a failure of the run.

use std::sync::Arc;
use std::time::Duration;

use mirror_proto::mmu::{
    CreateVcpuRequest, CreateVmRequest, DestroyVmRequest, Fault, FinalizeVmRequest,
    GetDirtyLogRequest, HandleFaultRequest, InitMemRegionRequest, PreFaultMemoryRequest,
    PunchHoleRequest, SetMemoryAttributesRequest, SetUserMemoryRegionRequest, Slot,
    ZapAllFastRequest, ZapAllRequest,
};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::plan::{IMAGE_END, Op, PRIVATE_BYTES, Phase, SHARED_BYTES, SHARED_GPA};
use super::stack::READY_LIMIT;
use super::tally::Tally;
use crate::args::Visibility;
use crate::client::Client;
use crate::error::Error;

/// Labels of the VMs of a run begin with it.
pub(super) const LABEL: &str = "chaos-";
/// The SHARED bit of a VM with 48 address bits.
const SHARED_BIT: u64 = 1 << 47;
/// Exit qualification of a write.
const WRITE: u64 = 2;
/// Pages of the initial image.
const IMAGE_PAGES: u64 = 16;
/// Host addresses of a VM's memory.
const HVA: u64 = 0x7F00_0000_0000;

/// Asks for the strike to be armed; answered when it is.
pub(super) type Arm = mpsc::Sender<oneshot::Sender<()>>;

/// The user of one VM.
pub(super) struct Worker {
    index: usize,
    client: Client,
    tally: Arc<Tally>,
    vm: Option<u64>,
    built: u64,
}

/// What became of a request.
enum End<T> {
    Done(T),
    /// The VM is of no use any more.
    VmGone,
    Failed,
}

impl Worker {
    pub(super) fn new(index: usize, client: Client, tally: Arc<Tally>) -> Self {
        Self {
            index,
            client,
            tally,
            vm: None,
            built: 0,
        }
    }

    /// The VM that it uses.
    pub(super) fn vm(&self) -> Option<u64> {
        self.vm
    }

    /// Lets go of a VM that is gone.
    pub(super) fn forget(&mut self) {
        self.vm = None;
    }

    /// Does its operations; asks for the strike before the one that it is meant for.
    pub(super) async fn play(&mut self, ops: &[Op], strike: Option<(usize, Arm)>) {
        for (at, op) in ops.iter().enumerate() {
            if self.client.stop().is_asked() {
                return;
            }
            if self.vm.is_none() {
                self.build().await;
            }
            if let Some((due, arm)) = &strike
                && *due == at
            {
                let (armed, is_armed) = oneshot::channel();
                if arm.send(armed).await.is_ok() {
                    let _ = is_armed.await;
                }
            }
            self.one(*op).await;
        }
    }

    async fn one(&mut self, op: Op) {
        let Some(vm_id) = self.vm else { return };
        let end = match op {
            Op::Populate { gpa, size } => {
                let message = PreFaultMemoryRequest {
                    vm_id,
                    vcpu_id: 0,
                    gpa,
                    size,
                };
                let client = self.client.clone();
                let populated = async {
                    let mut progress = client
                        .long("PreFaultMemory", message, async |mut mmu, request| {
                            mmu.pre_fault_memory(request).await
                        })
                        .await?;
                    while client
                        .next("PreFaultMemory", &mut progress)
                        .await?
                        .is_some()
                    {}
                    Ok(())
                };
                self.request(Phase::Populate, populated).await
            }
            Op::Fault { gpa } => self.fault(vm_id, gpa, 0).await,
            Op::Write { page } => match self
                .fault(vm_id, SHARED_BIT | (SHARED_GPA + (page << 12)), WRITE)
                .await
            {
                End::Done(()) => {
                    let message = GetDirtyLogRequest { vm_id, slot_id: 1 };
                    let client = self.client.clone();
                    let log = client.short("GetDirtyLog", message, async |mut mmu, request| {
                        mmu.get_dirty_log(request).await
                    });
                    self.request(Phase::Other, log).await.map(|_| ())
                }
                other => other,
            },
            Op::Convert { gpa, size, private } => {
                self.convert(vm_id, gpa, size, private, Phase::Convert)
                    .await
            }
            Op::PunchHole { offset, size } => {
                let message = PunchHoleRequest {
                    vm_id,
                    slot_id: 0,
                    offset,
                    size,
                };
                let client = self.client.clone();
                let hole = client.long("PunchHole", message, async |mut mmu, request| {
                    mmu.punch_hole(request).await
                });
                self.request(Phase::Zap, hole).await.map(|_| ())
            }
            Op::ZapDirect { fast } => {
                let client = self.client.clone();
                let zap = async {
                    if fast {
                        let message = ZapAllFastRequest { vm_id };
                        let zapped =
                            client.long("ZapAllFast", message, async |mut mmu, request| {
                                mmu.zap_all_fast(request).await
                            });
                        zapped.await.map(|_| ())
                    } else {
                        let message = ZapAllRequest { vm_id };
                        let zapped = client.long("ZapAll", message, async |mut mmu, request| {
                            mmu.zap_all(request).await
                        });
                        zapped.await.map(|_| ())
                    }
                };
                self.request(Phase::Zap, zap).await
            }
            Op::Rebuild => {
                self.destroy(vm_id).await;
                self.build().await;
                return;
            }
        };
        if matches!(end, End::VmGone) {
            self.destroy(vm_id).await;
        }
    }

    async fn fault(&self, vm_id: u64, gpa: u64, qualification: u64) -> End<()> {
        let message = HandleFaultRequest {
            vm_id,
            vcpu_id: 0,
            fault: Some(Fault {
                gpa,
                qualification,
                ..Fault::default()
            }),
            ..HandleFaultRequest::default()
        };
        let fault = self
            .client
            .short("HandleFault", message, async |mut mmu, request| {
                mmu.handle_fault(request).await
            });
        self.request(Phase::Other, fault).await.map(|_| ())
    }

    async fn convert(
        &self,
        vm_id: u64,
        gpa: u64,
        size: u64,
        private: bool,
        phase: Phase,
    ) -> End<()> {
        let visibility = if private {
            Visibility::Private
        } else {
            Visibility::Shared
        };
        let message = SetMemoryAttributesRequest {
            vm_id,
            gpa,
            size,
            attributes: visibility.attributes(),
        };
        let converted =
            self.client
                .long("SetMemoryAttributes", message, async |mut mmu, request| {
                    mmu.set_memory_attributes(request).await
                });
        self.request(phase, converted).await.map(|_| ())
    }

    /// Destroys a VM; one whose end is not known is left to the end of the round.
    pub(super) async fn destroy(&mut self, vm_id: u64) {
        if self.vm == Some(vm_id) {
            self.vm = None;
        }
        let message = DestroyVmRequest { vm_id, mode: 0 };
        let destroyed = self
            .client
            .long("DestroyVm", message, async |mut mmu, request| {
                mmu.destroy_vm(request).await
            });
        let _ = self.request(Phase::Destroy, destroyed).await;
    }

    /// Builds a VM with memory, a vCPU and a measured image. What is left of one that fails is
    /// found by its label.
    async fn build(&mut self) {
        self.built += 1;
        let message = CreateVmRequest {
            label: format!("{LABEL}{}-{}", self.index, self.built),
            max_vcpus: 1,
            ..CreateVmRequest::default()
        };
        let created = self
            .client
            .short("CreateVm", message, async |mut mmu, request| {
                mmu.create_vm(request).await
            });
        if let End::Done(created) = self.request(Phase::Build, created).await {
            self.vm = Some(created.vm_id);
            if !self.furnish(created.vm_id).await {
                self.destroy(created.vm_id).await;
            }
        }
    }

    /// Whether the VM has all that it needs.
    async fn furnish(&self, vm_id: u64) -> bool {
        let client = &self.client;
        let private = Slot {
            slot_id: 0,
            size: PRIVATE_BYTES,
            userspace_addr: HVA,
            guest_memfd: true,
            ..Slot::default()
        };
        let shared = Slot {
            slot_id: 1,
            gpa: SHARED_GPA,
            size: SHARED_BYTES,
            userspace_addr: HVA + SHARED_GPA,
            log_dirty: true,
            ..Slot::default()
        };
        for slot in [private, shared] {
            let message = SetUserMemoryRegionRequest {
                vm_id,
                slot: Some(slot),
            };
            let set = client.short("SetUserMemoryRegion", message, async |mut mmu, request| {
                mmu.set_user_memory_region(request).await
            });
            if !self.request(Phase::Build, set).await.is_done() {
                return false;
            }
        }
        let private = self.convert(vm_id, 0, PRIVATE_BYTES, true, Phase::Build);
        if !private.await.is_done() {
            return false;
        }
        let message = CreateVcpuRequest {
            vm_id,
            create_only: false,
        };
        let vcpu = client.short("CreateVcpu", message, async |mut mmu, request| {
            mmu.create_vcpu(request).await
        });
        if !self.request(Phase::Build, vcpu).await.is_done() {
            return false;
        }
        let size = IMAGE_PAGES << 12;
        debug_assert!(size <= IMAGE_END);
        let message = InitMemRegionRequest {
            vm_id,
            vcpu_id: 0,
            gpa: 0,
            size,
            data: vec![0xC4; 4096].into(),
            measure: true,
            ..InitMemRegionRequest::default()
        };
        let image = client.long("InitMemRegion", message, async |mut mmu, request| {
            mmu.init_mem_region(request).await
        });
        if !self.request(Phase::Build, image).await.is_done() {
            return false;
        }
        let message = FinalizeVmRequest { vm_id, hw_error: 0 };
        let finalized = client.long("FinalizeVm", message, async |mut mmu, request| {
            mmu.finalize_vm(request).await
        });
        self.request(Phase::Build, finalized).await.is_done()
    }

    /// Makes one request and counts what becomes of it.
    async fn request<T>(
        &self,
        phase: Phase,
        answer: impl Future<Output = Result<T, Error>>,
    ) -> End<T> {
        let era = self.tally.era();
        self.tally.set_phase(self.index, Some(phase));
        let result = answer.await;
        self.tally.set_phase(self.index, None);
        let error = match result {
            Ok(value) => {
                let mut counts = self.tally.counts();
                counts.operations += 1;
                counts.succeeded += 1;
                return End::Done(value);
            }
            Err(Error::Interrupted) => return End::Failed,
            Err(error) => error,
        };
        let gone = self.judge(&error, era);
        if timeout(READY_LIMIT + Duration::from_secs(30), self.tally.there())
            .await
            .is_err()
        {
            let mut counts = self.tally.counts();
            counts.hung += 1;
            counts.fail("the services did not come back".to_owned());
        }
        if gone { End::VmGone } else { End::Failed }
    }

    /// Counts an error of a request that was made in `era`. Whether its VM is of no use any more.
    fn judge(&self, error: &Error, era: u64) -> bool {
        let mut counts = self.tally.counts();
        counts.operations += 1;
        let reason = match error {
            Error::Refused { source, .. } => source.reason(),
            _ => None,
        };
        let mut gone = false;
        match (error, reason) {
            (Error::Refused { .. }, Some(reason)) => {
                gone = reason == "VM_DEAD" || reason == "NOT_FOUND";
                if reason == "INTERNAL" {
                    counts.broken += 1;
                    counts.fail(error.chain());
                }
                *counts.refused.entry(reason).or_default() += 1;
            }
            (Error::NoAnswer { .. }, _) => {
                counts.hung += 1;
                counts.fail(error.chain());
            }
            // A connection that broke: that of a service that was killed.
            _ if era != self.tally.era() || era % 2 == 1 => counts.disconnected += 1,
            _ => {
                counts.broken += 1;
                counts.fail(error.chain());
            }
        }
        gone
    }
}

impl<T> End<T> {
    fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }

    fn map<U>(self, map: impl FnOnce(T) -> U) -> End<U> {
        match self {
            Self::Done(value) => End::Done(map(value)),
            Self::VmGone => End::VmGone,
            Self::Failed => End::Failed,
        }
    }
}

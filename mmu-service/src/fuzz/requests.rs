//! Every RPC of `kvm.mmu.v1`, from the body of its request to the status of its answer.
//!
//! A script (`transport::ScriptedCall`) is played on a service of its own, so that its VMs have the
//! ids from 1. What all scripts share is the link to one module and the host's memory.
//!
//! What holds for every input
//! - V1  Nothing panics: each call is answered or refused with a reason, and none breaks off or
//!   hangs.
//! - V2  A call that is refused for what it says leaves VMs and memory as they were. A stream may
//!   have done what it was asked before it was asked the impossible.
//! - V3  No VM is bugged but by what its guest does or its owner asks of the module, and after the
//!   script each agrees with the module, entry by entry.
//! - V4  In the end everything is given back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::Parser as _;
use mirror_proto::mmu as wire;
use mirror_proto::mmu::mmu_service_server::MmuServiceServer;
use prost::Message;
use tdp_mmu::Host;
use telemetry::Gate;
use tokio::runtime::Runtime;
use tokio::time::{Instant, timeout};
use tonic::service::Routes;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use transport::ScriptedCall;

use crate::RULES;
use crate::config::{Config, Limits};
use crate::convert::vm_info_to_wire;
use crate::link::ModuleLink;
use crate::linked::LinkedError;
use crate::metrics::Metrics;
use crate::service::Service;
use crate::shell::Shell;

/// Longest script: with more, an input is no longer a matter of milliseconds.
const MAX_SCRIPT_BYTES: usize = 1 << 16;
/// Largest slot that stays. A larger one is made and taken away again: work on it would take time
/// and find nothing.
const MAX_SLOT_BYTES: u64 = 16 << 20;
/// How long one call may take before it counts as hung.
const HUNG: Duration = Duration::from_secs(60);

const SET_SLOT: &str = "/kvm.mmu.v1.MmuService/SetUserMemoryRegion";
/// Answers without an end.
const WATCH: &str = "/kvm.mmu.v1.MmuService/WatchEvents";

/// A link to a module, for scripts one after the other.
pub struct Requests {
    runtime: Runtime,
    limits: Limits,
    gate: Gate,
    link: Arc<ModuleLink>,
    host: Arc<Host>,
    /// Memory is compared, so one at a time.
    one: Mutex<()>,
}

impl Requests {
    /// Links to the module at a URL, which nobody else may use.
    pub fn on(module: &str) -> Result<Self, LinkedError> {
        let args = ["mmu-service", "--module", module];
        let config = Config::try_parse_from(args).map_err(LinkedError::Address)?;
        let link_config = config
            .link_config()
            .map_err(|error| LinkedError::Tls(Box::new(error)))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(LinkedError::Start)?;
        let link = ModuleLink::start(link_config, Arc::clone(&Metrics::new().link))
            .map_err(LinkedError::Start)?;
        let attached = runtime.block_on(link.attach(HUNG));
        let attachment = attached.map_err(|error| LinkedError::Unreachable {
            reason: error.chain(),
        })?;
        Ok(Self {
            limits: Limits {
                max_vms: 4,
                ..config.limits
            },
            gate: config.tracing.gate(),
            host: Arc::clone(attachment.host()),
            runtime,
            link,
            one: Mutex::default(),
        })
    }

    /// Plays a script of calls, given as bytes.
    ///
    /// # Panics
    ///
    /// When the service does something that it must not do, see the module.
    pub fn play(&self, script: &[u8]) {
        if script.len() > MAX_SCRIPT_BYTES {
            return;
        }
        let _one = self.one.lock().unwrap_or_else(PoisonError::into_inner);
        let calls = ScriptedCall::read(script, RULES);
        self.runtime.block_on(self.play_all(calls));
    }

    async fn play_all(&self, calls: Vec<ScriptedCall>) {
        let shell = Shell::new(
            self.limits,
            self.gate.clone(),
            Arc::clone(&self.link),
            Metrics::new(),
            None,
        );
        let routes = Routes::new(MmuServiceServer::new(Service::new(Arc::clone(&shell))));
        let mut module_refused = false;
        for call in calls {
            let path = call.path;
            let before = self.state(&shell);
            let slot = (path == SET_SLOT)
                .then(|| large_slot(call.message.as_deref()))
                .flatten();
            let made = timeout(HUNG, call.make(routes.clone(), path == WATCH)).await;
            let Ok(outcome) = made else {
                panic!("V1: {path} hangs");
            };
            if let Err(refusal) = &outcome {
                assert_is_refusal(path, refusal);
                module_refused |= refusal.code() == Code::Internal;
                if speaks_of_the_request(refusal.code()) && !is_stream(path) {
                    assert_eq!(self.state(&shell), before, "V2: {path}: {refusal}");
                }
            } else if let Some(removal) = slot {
                let removed = removal.make(routes.clone(), false).await;
                assert!(removed.is_ok(), "V1: a large slot is removed: {removed:?}");
            }
        }
        for entry in shell.vms.all() {
            let audited = Arc::clone(&entry);
            let audit = move || audited.vm.audit(&mut |_, _| {});
            let audit = tokio::task::spawn_blocking(audit).await;
            let Ok(Ok(audit)) = audit else {
                panic!("V3: VM {} cannot be audited: {audit:?}", entry.id);
            };
            let found = (audit.mismatches, audit.frozen);
            assert_eq!(found, (0, 0), "V3: {:?}", audit.first_mismatches);
            let bug = entry.vm.bugs().reason();
            let is_asked_for = module_refused
                || bug
                    .as_deref()
                    .is_none_or(|bug| bug.starts_with("PendingAccess: the guest"));
            assert!(is_asked_for, "V3: {bug:?}");
        }
        shell.start_draining();
        shell.finish(Instant::now() + HUNG).await;
        assert!(shell.vms.all().is_empty(), "V4: a VM is left");
        assert_eq!(self.host.pages_in_use(), 0, "V4: pages are left");
    }

    /// What there is, as callers can see it.
    fn state(&self, shell: &Shell) -> (Vec<wire::VmInfo>, u64) {
        let vms = shell.vms.all();
        let vms = vms.iter().map(|entry| vm_info_to_wire(entry)).collect();
        (vms, self.host.pages_in_use())
    }
}

/// V1. What tonic itself refuses, it refuses without a reason of ours. What the module refuses where
/// KVM expects no refusal (a TD that is finalised without a vCPU, say) is EIO, as KVM has it.
fn assert_is_refusal(path: &str, refusal: &Status) {
    let is_ours = refusal.get_details_error_info().is_some();
    let broke_off = match refusal.code() {
        Code::Unknown | Code::DataLoss => true,
        Code::Internal => is_ours && !refusal.message().starts_with("the module refused"),
        _ => false,
    };
    assert!(!broke_off, "V1: {path}: {refusal}");
}

/// Whether a code says that the request can never be granted as it is.
fn speaks_of_the_request(code: Code) -> bool {
    matches!(
        code,
        Code::InvalidArgument | Code::NotFound | Code::OutOfRange | Code::Unimplemented
    )
}

fn is_stream(path: &str) -> bool {
    ["/HandleFaults", "/InitMemRegions", "/RunVcpu"]
        .iter()
        .any(|name| path.ends_with(name))
}

/// The call that takes a large slot away again.
fn large_slot(message: Option<&[u8]>) -> Option<ScriptedCall> {
    let request = wire::SetUserMemoryRegionRequest::decode(message?).ok()?;
    let slot = request.slot?;
    (slot.size > MAX_SLOT_BYTES).then(|| {
        let removal = wire::SetUserMemoryRegionRequest {
            vm_id: request.vm_id,
            slot: Some(wire::Slot {
                slot_id: slot.slot_id,
                ..wire::Slot::default()
            }),
        };
        ScriptedCall::new(SET_SLOT, removal.encode_to_vec().into())
    })
}

/// Scripts that use every RPC, for a fuzzer to begin with.
pub fn request_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let slot = |slot_id, gpa, guest_memfd| {
        of(
            "SetUserMemoryRegion",
            &wire::SetUserMemoryRegionRequest {
                vm_id: 1,
                slot: Some(wire::Slot {
                    slot_id,
                    gpa,
                    size: 4 << 20,
                    userspace_addr: 0x7000_0000_0000 + gpa,
                    guest_memfd,
                    host_page_size: 2,
                    ..wire::Slot::default()
                }),
            },
        )
    };
    let convert = |gpa, size, attributes| {
        of(
            "SetMemoryAttributes",
            &wire::SetMemoryAttributesRequest {
                vm_id: 1,
                gpa,
                size,
                attributes,
            },
        )
    };
    let fault = |gpa, qualification| wire::Fault {
        gpa,
        qualification,
        extended_qualification: 0,
    };
    let create = |request: wire::CreateVmRequest| of("CreateVm", &request);
    let vcpu = of(
        "CreateVcpu",
        &wire::CreateVcpuRequest {
            vm_id: 1,
            create_only: false,
        },
    );
    let prefault = |gpa, size| {
        of(
            "PreFaultMemory",
            &wire::PreFaultMemoryRequest {
                vm_id: 1,
                gpa,
                size,
                ..Default::default()
            },
        )
    };
    let finalize = of(
        "FinalizeVm",
        &wire::FinalizeVmRequest {
            vm_id: 1,
            hw_error: 0,
        },
    );
    let td = vec![
        create(wire::CreateVmRequest::default()),
        vcpu.clone(),
        slot(1, 0, true),
        convert(0, 4 << 20, 8),
        of(
            "InitMemRegion",
            &wire::InitMemRegionRequest {
                vm_id: 1,
                gpa: 0,
                size: 8192,
                data: vec![0xA5; 8192].into(),
                measure: true,
                ..Default::default()
            },
        ),
        of(
            "InitMemRegions",
            &wire::InitMemRegionRequest {
                vm_id: 1,
                gpa: 8192,
                size: 4096,
                ..Default::default()
            },
        ),
        finalize.clone(),
    ];
    let by_steps = vec![
        create(wire::CreateVmRequest {
            create_only: true,
            mode: 2,
            max_vcpus: 2,
            ..Default::default()
        }),
        of(
            "InitVm",
            &wire::InitVmRequest {
                vm_id: 1,
                hw_error: 0,
            },
        ),
        of(
            "CreateVcpu",
            &wire::CreateVcpuRequest {
                vm_id: 1,
                create_only: true,
            },
        ),
        of(
            "InitVcpu",
            &wire::InitVcpuRequest {
                vm_id: 1,
                ..Default::default()
            },
        ),
        slot(1, 0, true),
        convert(0, 1 << 20, 8),
        finalize,
        prefault(0, 64 << 10),
        of("ListVms", &wire::ListVmsRequest {}),
        of("GetStats", &wire::GetStatsRequest { vm_id: 1 }),
        of("DestroyVm", &wire::DestroyVmRequest { vm_id: 1, mode: 0 }),
    ];
    let mut private = td.clone();
    private.extend([
        of(
            "HandleFault",
            &wire::HandleFaultRequest {
                vm_id: 1,
                vcpu_id: 0,
                fault: Some(fault(0x3000, 2)),
                explain: false,
            },
        ),
        of(
            "HandleFaults",
            &wire::HandleFaultsRequest {
                vm_id: 1,
                faults: vec![fault(0x4000, 2), fault(0x1_0000, 1), fault(1 << 47, 2)],
                tag: 7,
                ..Default::default()
            },
        ),
        prefault(0x2_0000, 2 << 20),
        convert(0x2_0000, 64 << 10, 0),
        convert(0x2_0000, 64 << 10, 8),
        of(
            "PunchHole",
            &wire::PunchHoleRequest {
                vm_id: 1,
                slot_id: 1,
                offset: 0x3000,
                size: 0x2000,
            },
        ),
        of(
            "ZapRange",
            &wire::ZapRangeRequest {
                vm_id: 1,
                gpa: 0x10_0000,
                size: 0x1_0000,
            },
        ),
        of("ZapAllFast", &wire::ZapAllFastRequest { vm_id: 1 }),
        of(
            "GetWalk",
            &wire::GetWalkRequest {
                vm_id: 1,
                gpa: 0x3000,
                module: true,
            },
        ),
        of(
            "DumpTree",
            &wire::DumpTreeRequest {
                vm_id: 1,
                ..Default::default()
            },
        ),
        of("Audit", &wire::AuditRequest { vm_id: 1 }),
        of(
            "WatchEvents",
            &wire::WatchEventsRequest {
                vm_id: 1,
                ..Default::default()
            },
        ),
    ]);
    let mut run = td;
    let op = |op| wire::RunOp { op: Some(op) };
    run.extend([of(
        "RunVcpu",
        &wire::RunVcpuRequest {
            vm_id: 1,
            ops: vec![
                op(wire::run_op::Op::Read(wire::RunRead { gpa: 0, length: 16 })),
                op(wire::run_op::Op::Accept(wire::RunAccept {
                    gpa: 0x8000,
                    level: 1,
                })),
                op(wire::run_op::Op::Write(wire::RunWrite {
                    gpa: 0x8000,
                    data: vec![1, 2, 3],
                })),
                op(wire::run_op::Op::MapGpa(wire::RunMapGpa {
                    gpa: (1 << 47) | 0x8000,
                    size: 4096,
                })),
            ],
            ..Default::default()
        },
    )]);
    let ordinary = vec![
        create(wire::CreateVmRequest {
            kind: 2,
            nx_huge_pages: true,
            pml: true,
            ..Default::default()
        }),
        vcpu,
        slot(1, 0, false),
        of(
            "HandleFault",
            &wire::HandleFaultRequest {
                vm_id: 1,
                fault: Some(fault(0x20_0000, 4)),
                ..Default::default()
            },
        ),
        prefault(0, 4 << 20),
        of(
            "SetDirtyLog",
            &wire::SetDirtyLogRequest {
                vm_id: 1,
                slot_id: 1,
                on: true,
            },
        ),
        of(
            "TouchMemory",
            &wire::TouchMemoryRequest {
                vm_id: 1,
                gpa: 0,
                count: 8,
                stride: 4096,
                write: true,
            },
        ),
        of(
            "GetDirtyLog",
            &wire::GetDirtyLogRequest {
                vm_id: 1,
                slot_id: 1,
            },
        ),
        of(
            "ClearDirtyLog",
            &wire::ClearDirtyLogRequest {
                vm_id: 1,
                slot_id: 1,
                first_page: 0,
                bitmap: vec![u64::MAX],
                num_pages: 64,
            },
        ),
        of(
            "AgeRange",
            &wire::AgeRangeRequest {
                vm_id: 1,
                start: 0x7000_0000_0000,
                end: 0x7000_0010_0000,
                test: false,
            },
        ),
        of(
            "WriteProtect",
            &wire::WriteProtectRequest {
                vm_id: 1,
                target: Some(wire::write_protect_request::Target::Gpa(0x5000)),
                track: Some(true),
            },
        ),
        of(
            "ChangeHostMapping",
            &wire::ChangeHostMappingRequest {
                vm_id: 1,
                start: 0x7000_0000_0000,
                end: 0x7000_0000_4000,
                change: 1,
                ..Default::default()
            },
        ),
        of(
            "UnmapHva",
            &wire::UnmapHvaRequest {
                vm_id: 1,
                start: 0x7000_0020_0000,
                end: 0x7000_0030_0000,
            },
        ),
        of(
            "SetNxHugePages",
            &wire::SetNxHugePagesRequest {
                vm_id: 1,
                ..Default::default()
            },
        ),
        of(
            "RecoverNxHugePages",
            &wire::RecoverNxHugePagesRequest { vm_id: 1, most: 4 },
        ),
        of("ZapAll", &wire::ZapAllRequest { vm_id: 1 }),
    ];
    [
        ("private", private),
        ("run", run),
        ("by-steps", by_steps),
        ("ordinary", ordinary),
    ]
    .map(|(name, calls)| (name, ScriptedCall::write(&calls, RULES)))
    .into()
}

fn of(method: &str, message: &impl Message) -> ScriptedCall {
    let path = format!("/kvm.mmu.v1.MmuService/{method}");
    let rule = RULES.iter().find(|(known, _)| *known == path);
    let Some((path, _)) = rule else {
        unreachable!("{path} has a rule");
    };
    ScriptedCall::new(path, message.encode_to_vec().into())
}

#[cfg(test)]
#[path = "requests_tests.rs"]
mod tests;

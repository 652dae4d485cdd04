//! All RPCs of the service as a fuzzer sees them: a script of calls in, answers and refusals out.
//!
//! [`fuzz_requests`] plays the script of `transport::ScriptedCall` on a module of its own, with
//! everything switched on that can be.
//!
//! What holds for every input
//! - Y1  Nothing panics: each call is answered or refused with a reason, and none breaks off.
//! - Y2  A call that is refused as such leaves what is in use as it was (S1). A stream may have done
//!   what it was asked before it was asked the impossible.

use std::sync::Arc;

use mirror_proto::module::tdx_fault_service_server::TdxFaultServiceServer;
use mirror_proto::module::tdx_guest_service_server::TdxGuestServiceServer;
use mirror_proto::module::tdx_module_service_server::TdxModuleServiceServer;
use mirror_proto::module::tdx_platform_service_server::TdxPlatformServiceServer;
use mirror_proto::module::{
    ClearFaultRulesRequest, EndSessionsRequest, EnterVcpuRequest, FaultRule, FaultStatus,
    GetPlatformRequest, GetStateRequest, GuestOp, GuestOps, HoldLockRequest, ListFaultRulesRequest,
    Lock, PamtLock, PendingInterrupt, ReadMemoryRequest, ReleaseLockRequest, ResetRequest,
    SetConditionsRequest, SetFaultRulesRequest, VpEnter, WriteMemoryRequest, enter_vcpu_request,
    fault_rule, guest_op, lock,
};
use prost::Message;
use tdx_defs::Leaf;
use tokio_util::sync::CancellationToken;
use tonic::service::Routes;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;
use transport::ScriptedCall;

use super::{HKID, LIMITS, PAGE, SHARED, TDR, TDVPR, in_use, platform};
use crate::RULES;
use crate::faults::Faults;
use crate::guest::GuestService;
use crate::host::HostService;
use crate::running::Running;
use crate::service::ModuleService;

/// Longest script: with more, an input is no longer a matter of milliseconds.
const MAX_SCRIPT_BYTES: usize = 1 << 16;
const EXECUTE: &str = "/tdx.module.v1.TdxModuleService/Execute";
const SET_RULES: &str = "/tdx.module.v1.TdxFaultService/SetFaultRules";
const CLEAR_RULES: &str = "/tdx.module.v1.TdxFaultService/ClearFaultRules";

/// Plays a script of calls, given as bytes, on a module of its own.
///
/// # Panics
///
/// When the service does something that it must not do, see the module.
pub fn fuzz_requests(bytes: &[u8]) {
    if bytes.len() > MAX_SCRIPT_BYTES {
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build();
    let Ok(runtime) = runtime else {
        unreachable!("a runtime without I/O needs nothing");
    };
    runtime.block_on(play(ScriptedCall::read(bytes, RULES)));
}

async fn play(calls: Vec<ScriptedCall>) {
    let Ok(running) = Running::start(platform(), &LIMITS) else {
        unreachable!("the platform above is possible");
    };
    let running = Arc::new(running);
    let draining = CancellationToken::new();
    let faults = Faults::enabled();
    let module = ModuleService::new(
        Arc::clone(&running),
        &LIMITS,
        faults.clone(),
        draining.clone(),
    );
    let guests = GuestService::new(Arc::clone(&running), &LIMITS, draining);
    let host = HostService::new(running, true);
    let routes = routes(module.clone(), guests, host, &faults);
    for call in calls {
        let (path, before) = (call.path, in_use(&module));
        let sets_rules = path == SET_RULES && !is_harmless(&call);
        let outcome = call.make(routes.clone(), false).await;
        if sets_rules {
            clear_rules(&routes).await;
        }
        let Err(refusal) = outcome else {
            continue;
        };
        assert_is_refusal(path, &refusal);
        let is_stream = path.ends_with("Stream") || path.ends_with("EnterVcpu");
        if !is_stream {
            assert_eq!(in_use(&module), before, "Y2: {path}: {refusal}");
        }
    }
}

fn routes(
    module: ModuleService,
    guests: GuestService,
    host: HostService,
    faults: &Faults,
) -> Routes {
    let Some(faults) = faults.service() else {
        unreachable!("faults are enabled");
    };
    Routes::new(TdxModuleServiceServer::new(module))
        .add_service(TdxGuestServiceServer::new(guests))
        .add_service(TdxPlatformServiceServer::new(host))
        .add_service(TdxFaultServiceServer::new(faults))
}

/// Y1. What tonic itself refuses, it refuses without a reason of ours.
fn assert_is_refusal(path: &str, refusal: &Status) {
    let is_ours = refusal.get_details_error_info().is_some();
    let broke_off = match refusal.code() {
        Code::Unknown | Code::DataLoss => true,
        Code::Internal => is_ours,
        _ => false,
    };
    assert!(!broke_off, "Y1: {path}: {refusal}");
}

/// Whether rules neither end this process nor make it wait. The others are set and taken away.
fn is_harmless(call: &ScriptedCall) -> bool {
    let Some(message) = &call.message else {
        return false;
    };
    let Ok(request) = SetFaultRulesRequest::decode(message.clone()) else {
        return true;
    };
    request.rules.iter().all(|rule| {
        !matches!(
            rule.action,
            Some(fault_rule::Action::Abort(_) | fault_rule::Action::Delay(_))
        )
    })
}

async fn clear_rules(routes: &Routes) {
    let all = ClearFaultRulesRequest::default().encode_to_vec();
    let cleared = ScriptedCall::new(CLEAR_RULES, all.into())
        .make(routes.clone(), false)
        .await;
    assert!(cleared.is_ok(), "Y1: {cleared:?}");
}

/// Scripts that use every method, for a fuzzer to begin with.
pub fn request_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let stages = super::seeds();
    let stage = |name: &str| {
        let found = stages.iter().find(|(stage, _)| *stage == name);
        let request = found.map(|(_, request)| request.encode_to_vec());
        ScriptedCall::new(EXECUTE, request.unwrap_or_default().into())
    };
    let whole = vec![
        stage("teardown"),
        of("Module", "GetPlatform", &GetPlatformRequest {}),
    ];
    let enter = EnterVcpuRequest {
        message: Some(enter_vcpu_request::Message::Enter(VpEnter {
            call: Some(super::call(Leaf::VP_ENTER, TDVPR, 0)),
            ..VpEnter::default()
        })),
    };
    let event = |event| GuestOp { op: Some(event) };
    let read = mirror_proto::module::GuestRead { gpa: 0, length: 16 };
    let write = mirror_proto::module::GuestWrite {
        gpa: 8,
        data: vec![1, 2, 3],
    };
    let ops = EnterVcpuRequest {
        message: Some(enter_vcpu_request::Message::Ops(GuestOps {
            ops: vec![
                event(guest_op::Op::Read(read)),
                event(guest_op::Op::Write(write)),
            ],
        })),
    };
    let mut stream = ScriptedCall::new(
        "/tdx.module.v1.TdxGuestService/EnterVcpu",
        enter.encode_to_vec().into(),
    );
    let more = ScriptedCall::new(stream.path, ops.encode_to_vec().into());
    stream.message = None;
    stream.body = [stream.body, more.body].concat().into();
    let guest = vec![stage("finalize"), stream];
    let memory = vec![
        of(
            "Platform",
            "WriteMemory",
            &WriteMemoryRequest {
                hpa: SHARED,
                data: vec![7; 32],
            },
        ),
        of(
            "Platform",
            "ReadMemory",
            &ReadMemoryRequest {
                hpa: SHARED,
                length: 64,
            },
        ),
        stage("image"),
        of(
            "Platform",
            "ReadMemory",
            &ReadMemoryRequest {
                hpa: PAGE,
                length: 64,
            },
        ),
        of("Platform", "GetState", &GetStateRequest {}),
    ];
    let lock = |object| {
        Some(Lock {
            object: Some(object),
        })
    };
    let pamt = lock(lock::Object::Pamt(PamtLock { hpa: PAGE, size: 0 }));
    let locks = vec![
        stage("tables"),
        of(
            "Platform",
            "HoldLock",
            &HoldLockRequest {
                lock: pamt,
                mode: 2,
                as_guest: false,
            },
        ),
        stage("image"),
        of(
            "Platform",
            "ReleaseLock",
            &ReleaseLockRequest {
                lock: pamt,
                mode: 2,
            },
        ),
        of(
            "Platform",
            "HoldLock",
            &HoldLockRequest {
                lock: lock(lock::Object::SeptTree(TDR)),
                mode: 1,
                as_guest: true,
            },
        ),
    ];
    let conditions = vec![
        of(
            "Platform",
            "SetConditions",
            &SetConditionsRequest {
                entropy: Some(false),
                tsc_adjust: Some(HKID),
                host_interrupt: Some(PendingInterrupt {
                    pending: true,
                    after_checks: 3,
                }),
                key_program: Some(2),
            },
        ),
        stage("create"),
        of("Platform", "Reset", &ResetRequest {}),
        stage("create"),
    ];
    let rule = FaultRule {
        leaf: Some(2),
        when: Some(fault_rule::When::Nth(1)),
        action: Some(fault_rule::Action::Status(FaultStatus {
            rax: 0x8000_0200_0000_0002,
        })),
        ..FaultRule::default()
    };
    let rules = vec![
        of(
            "Fault",
            "SetFaultRules",
            &SetFaultRulesRequest {
                rules: vec![rule],
                replace: true,
            },
        ),
        stage("memory"),
        of("Fault", "ListFaultRules", &ListFaultRulesRequest {}),
        of(
            "Fault",
            "ClearFaultRules",
            &ClearFaultRulesRequest::default(),
        ),
        of(
            "Module",
            "EndSessions",
            &EndSessionsRequest {
                prefix: "s-and-more".to_owned(),
            },
        ),
    ];
    [
        ("whole", whole),
        ("guest", guest),
        ("memory", memory),
        ("locks", locks),
        ("conditions", conditions),
        ("rules", rules),
    ]
    .map(|(name, calls)| (name, ScriptedCall::write(&calls, RULES)))
    .into()
}

fn of(service: &str, method: &str, message: &impl Message) -> ScriptedCall {
    let path = format!("/tdx.module.v1.Tdx{service}Service/{method}");
    let rule = RULES.iter().find(|(known, _)| *known == path);
    let Some((path, _)) = rule else {
        unreachable!("{path} has a rule");
    };
    ScriptedCall::new(path, message.encode_to_vec().into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn seeds_use_every_method_but_the_stream_and_pass() {
        let mut used = std::collections::BTreeSet::new();
        for (_, script) in request_seeds() {
            used.extend(
                ScriptedCall::read(&script, RULES)
                    .iter()
                    .map(|call| call.path),
            );
            fuzz_requests(&script);
        }
        let missing: Vec<_> = RULES
            .iter()
            .map(|(path, _)| *path)
            .filter(|path| !used.contains(path))
            .collect();
        assert_eq!(missing, ["/tdx.module.v1.TdxModuleService/ExecuteStream"]);
    }

    #[tokio::test]
    async fn seeds_are_answered() {
        for (name, script) in request_seeds() {
            let Ok(running) = Running::start(platform(), &LIMITS) else {
                unreachable!("the platform is possible");
            };
            let running = Arc::new(running);
            let draining = CancellationToken::new();
            let faults = Faults::enabled();
            let routes = routes(
                ModuleService::new(
                    Arc::clone(&running),
                    &LIMITS,
                    faults.clone(),
                    draining.clone(),
                ),
                GuestService::new(Arc::clone(&running), &LIMITS, draining),
                HostService::new(running, true),
                &faults,
            );
            for call in ScriptedCall::read(&script, RULES) {
                let path = call.path;
                let outcome = call.make(routes.clone(), false).await;
                assert!(outcome.is_ok(), "{name}: {path}: {outcome:?}");
            }
        }
    }

    #[test]
    fn kept_scripts_pass() {
        super::super::tests::each_kept("requests", fuzz_requests);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn damaged_scripts_get_answers_or_refusals(
            seed in 0..request_seeds().len(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
            cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        ) {
            let mut bytes = request_seeds().swap_remove(seed).1;
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            fuzz_requests(&bytes);
        }
    }
}

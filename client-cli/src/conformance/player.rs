//! Plays a sequence: each step a request, on a module with nothing in it.

use std::collections::BTreeMap;

use mirror_proto::module::enter_vcpu_request::Message as Ask;
use mirror_proto::module::enter_vcpu_response::Message as Answer;
use mirror_proto::module::guest_op::Op;
use mirror_proto::module::lock::Object;
use mirror_proto::module::tdx_guest_service_client::TdxGuestServiceClient;
use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use mirror_proto::module::tdx_platform_service_client::TdxPlatformServiceClient;
use mirror_proto::module::{
    EnterVcpuRequest, EnterVcpuResponse, EptViolation, ExecuteRequest, GetStateRequest, Gprs,
    GuestOp, GuestOps, HoldLockRequest, KeyProgramResult, Lock, LockMode, PamtLock,
    PendingInterrupt, ReleaseLockRequest, Repeat, ResetRequest, Seamcall, SeptEntryLock,
    SetConditionsRequest, Tdcall, VpEnter, WriteMemoryRequest,
};
use serde_json::Value;
use tdx_defs::{Gpr, GuestLeaf, Leaf};
use telemetry::propagate::TracedChannel;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Response, Status, Streaming};

use super::compare::{self, Mismatch, State};
use super::report::Difference;
use super::sequence::{Sequence, Step};
use crate::client::{Limits, wait, with_deadline};
use crate::error::Error;
use crate::stop::Stop;

/// Number of TDH.VP.ENTER.
const VP_ENTER: u32 = 0;

/// The three services of a module.
#[derive(Debug)]
pub struct Player {
    module: TdxModuleServiceClient<TracedChannel>,
    guest: TdxGuestServiceClient<TracedChannel>,
    platform: TdxPlatformServiceClient<TracedChannel>,
    limits: Limits,
    stop: Stop,
    /// The stream on each logical processor that a vCPU was entered on.
    streams: BTreeMap<u32, GuestStream>,
}

#[derive(Debug)]
struct GuestStream {
    asks: mpsc::Sender<EnterVcpuRequest>,
    answers: Streaming<EnterVcpuResponse>,
}

/// How a step can end a sequence.
enum Stopped {
    Differs(Mismatch),
    Failed(Error),
}

impl From<Mismatch> for Stopped {
    fn from(mismatch: Mismatch) -> Self {
        Self::Differs(mismatch)
    }
}

impl From<Error> for Stopped {
    fn from(error: Error) -> Self {
        Self::Failed(error)
    }
}

type Played = Result<(), Stopped>;

impl Player {
    /// A player over one connection.
    pub fn new(channel: TracedChannel, limits: Limits, stop: Stop) -> Self {
        Self {
            module: TdxModuleServiceClient::new(channel.clone()),
            guest: TdxGuestServiceClient::new(channel.clone()),
            platform: TdxPlatformServiceClient::new(channel),
            limits,
            stop,
            streams: BTreeMap::new(),
        }
    }

    /// Plays a sequence on a fresh module; answers the first difference. An error is one of the
    /// connection or of the service, not of an answer.
    pub async fn play(
        &mut self,
        sequence: &Sequence,
    ) -> Result<(usize, Result<(), Difference>), Error> {
        self.streams.clear();
        let request = with_deadline(ResetRequest {}, self.limits.short);
        self.wait("Reset", self.platform.clone().reset(request))
            .await?;
        let difference = |step: usize, leaf: &str, mismatch: Mismatch| Difference {
            id: sequence.id.clone(),
            step,
            leaf: leaf.to_owned(),
            field: mismatch.field,
            expected: mismatch.expected,
            got: mismatch.got,
        };
        for (at, step) in sequence.steps.iter().enumerate() {
            match self.step(step).await {
                Ok(()) => {}
                Err(Stopped::Differs(mismatch)) => {
                    return Ok((at + 1, Err(difference(at, step.name(), mismatch))));
                }
                Err(Stopped::Failed(error)) => return Err(error),
            }
        }
        let steps = sequence.steps.len();
        let outcome = self
            .state()
            .await?
            .compare(&sequence.end)
            .map_err(|mismatch| difference(steps, "final", mismatch));
        Ok((steps, outcome))
    }

    async fn wait<T>(
        &self,
        call: &'static str,
        answer: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Error> {
        wait(call, self.limits.short, &self.stop, answer).await
    }

    async fn step(&mut self, step: &Step) -> Played {
        if let Some(hook) = &step.hook {
            return self.hook(hook, step).await;
        }
        if let Some(event) = &step.guest {
            return self.guest_event(event, step).await;
        }
        let call = self.call_of(step).await?;
        if call.leaf == VP_ENTER {
            return self.enter(call, step).await;
        }
        let request = ExecuteRequest {
            calls: vec![call],
            lp: step.lp,
            ..Default::default()
        };
        let request = with_deadline(request, self.limits.short);
        let answer = self
            .wait("Execute", self.module.clone().execute(request))
            .await?;
        let result = answer
            .results
            .first()
            .ok_or(Error::Truncated { call: "Execute" })?;
        Ok(compare::host_call(step, result)?)
    }

    /// Memory that the leaf's operand names travels with the call, other memory is written before.
    async fn call_of(&self, step: &Step) -> Result<Seamcall, Error> {
        let leaf = step.leaf_number.unwrap_or_default();
        let mut call = Seamcall {
            leaf,
            version: step.version,
            rcx: step.input("rcx"),
            rdx: step.input("rdx"),
            r8: step.input("r8"),
            r9: step.input("r9"),
            r10: step.input("r10"),
            r11: step.input("r11"),
            r12: step.input("r12"),
            r13: step.input("r13"),
            ..Default::default()
        };
        let operand = match u16::try_from(leaf).map(Leaf) {
            Ok(Leaf::MNG_INIT) => Some(call.rdx),
            Ok(Leaf::MEM_PAGE_ADD) => Some(call.r9),
            _ => None,
        };
        for write in &step.data {
            if operand == Some(write.hpa.0) {
                call.data = write.contents().into();
                continue;
            }
            let request = WriteMemoryRequest {
                hpa: write.hpa.0,
                data: write.contents(),
            };
            let request = with_deadline(request, self.limits.short);
            self.wait("WriteMemory", self.platform.clone().write_memory(request))
                .await?;
        }
        if let Some(count) = step.repeat {
            let stride = |register: &str| {
                let stride = step.stride.get(register).copied().unwrap_or_default();
                stride.0.cast_signed()
            };
            call.repeat = Some(Repeat {
                // Bounded when the sequence was read.
                count: u32::try_from(count.0).unwrap_or(u32::MAX),
                rcx_stride: stride("rcx"),
                r8_stride: stride("r8"),
                r9_stride: stride("r9"),
            });
        }
        Ok(call)
    }

    async fn enter(&mut self, call: Seamcall, step: &Step) -> Played {
        let enter = VpEnter {
            lp: step.lp,
            call: Some(call),
            session: String::new(),
        };
        let answer = match self.ask(step.lp, Ask::Enter(enter)).await? {
            Some(answer) => answer,
            None => return Err(Error::Truncated { call: "EnterVcpu" }.into()),
        };
        match (answer, compare::is_entered(step)) {
            (Answer::Entered(_), true) => Ok(()),
            (Answer::Refused(result), false) => Ok(compare::host_call(step, &result)?),
            (Answer::Entered(_), false) => {
                Err(Mismatch::new("entered", "refused", "entered").into())
            }
            (Answer::Refused(result), true) => {
                let status = tdx_defs::CompletionStatus(result.rax);
                Err(Mismatch::new("entered", "entered", status).into())
            }
            (Answer::Results(_), _) => Err(Error::Truncated { call: "EnterVcpu" }.into()),
        }
    }

    async fn guest_event(&mut self, event: &str, step: &Step) -> Played {
        let op = match (event, GuestLeaf::by_name(event)) {
            ("EPT_VIOLATION", _) => Op::EptViolation(EptViolation {
                gpa: step.input("gpa"),
                qualification: step.input("qualification"),
                same_rip: step.input.get("same_rip") == Some(&Value::Bool(true)),
            }),
            (_, Some(leaf)) => Op::Tdcall(Tdcall {
                leaf: leaf.0.into(),
                version: step.version,
                regs: Some(registers(step)),
            }),
            (other, None) => {
                return Err(Mismatch::new("guest", other, "no such event").into());
            }
        };
        let ops = GuestOps {
            ops: vec![GuestOp { op: Some(op) }],
        };
        match self.ask(step.lp, Ask::Ops(ops)).await? {
            Some(Answer::Results(results)) if !results.results.is_empty() => {
                Ok(compare::guest_event(step, &results.results[0])?)
            }
            _ => Err(Mismatch::new("result", "one", "none").into()),
        }
    }

    /// Sends one message on the stream of a processor and waits for its answer.
    async fn ask(&mut self, lp: u32, message: Ask) -> Result<Option<Answer>, Error> {
        const CALL: &str = "EnterVcpu";
        if !self.streams.contains_key(&lp) {
            let (asks, requests) = mpsc::channel(1);
            let requests = ReceiverStream::new(requests);
            let mut guest = self.guest.clone();
            let answers = self.wait(CALL, guest.enter_vcpu(requests)).await?;
            self.streams.insert(lp, GuestStream { asks, answers });
        }
        let Some(stream) = self.streams.get_mut(&lp) else {
            return Ok(None);
        };
        let request = EnterVcpuRequest {
            message: Some(message),
        };
        // A stream that takes nothing has ended, and its last message says why.
        let _ = stream.asks.send(request).await;
        let next = async { stream.answers.message().await.map(Response::new) };
        let answer = wait(CALL, self.limits.short, &self.stop, next).await?;
        Ok(answer.and_then(|answer| answer.message))
    }

    async fn hook(&mut self, hook: &str, step: &Step) -> Played {
        let flag = |name: &str| step.input.get(name) == Some(&Value::Bool(true));
        let text = |name: &str| step.input.get(name).and_then(Value::as_str);
        let conditions = match hook {
            "ENTROPY" => SetConditionsRequest {
                entropy: Some(flag("available")),
                ..Default::default()
            },
            "TSC_ADJUST" => SetConditionsRequest {
                tsc_adjust: Some(step.input("value")),
                ..Default::default()
            },
            "HOST_INTERRUPT_PENDING" => SetConditionsRequest {
                host_interrupt: Some(PendingInterrupt {
                    pending: flag("pending"),
                    after_checks: u32::try_from(step.input("after_checks")).unwrap_or(u32::MAX),
                }),
                ..Default::default()
            },
            "KEY_PROGRAM_RESULT" => {
                let result = match text("result") {
                    Some("DEVICE_BUSY") => KeyProgramResult::DeviceBusy,
                    Some("ENTROPY_ERROR") => KeyProgramResult::EntropyError,
                    _ => KeyProgramResult::Ok,
                };
                SetConditionsRequest {
                    key_program: Some(result.into()),
                    ..Default::default()
                }
            }
            "HOLD_LOCK" | "RELEASE_LOCK" => return self.lock(hook, step).await,
            other => return Err(Mismatch::new("hook", other, "not known").into()),
        };
        let request = with_deadline(conditions, self.limits.short);
        let mut platform = self.platform.clone();
        self.wait("SetConditions", platform.set_conditions(request))
            .await?;
        Ok(())
    }

    async fn lock(&mut self, hook: &str, step: &Step) -> Played {
        let text = |name: &str| {
            step.input
                .get(name)
                .and_then(Value::as_str)
                .unwrap_or_default()
        };
        let tdr = step.input("tdr");
        let object = match text("object") {
            "PAMT" => Object::Pamt(PamtLock {
                hpa: step.input("hpa"),
                size: match text("size") {
                    "2M" => 1,
                    "1G" => 2,
                    _ => 0,
                },
            }),
            "SEPT_TREE" => Object::SeptTree(tdr),
            "OP_STATE" => Object::OpState(tdr),
            "TD_EPOCH" => Object::TdEpoch(tdr),
            "RTMR" => Object::Rtmr(tdr),
            "KOT" => Object::Kot(true),
            "SEPT_ENTRY" => Object::SeptEntry(SeptEntryLock {
                tdr,
                gpa: step.input("gpa"),
                level: u32::try_from(step.input("level")).unwrap_or(u32::MAX),
            }),
            other => return Err(Mismatch::new("object", other, "not known").into()),
        };
        let lock = Some(Lock {
            object: Some(object),
        });
        let mode = if text("mode") == "shared" {
            LockMode::Shared
        } else {
            LockMode::Exclusive
        };
        let mut platform = self.platform.clone();
        if hook == "HOLD_LOCK" {
            let request = HoldLockRequest {
                lock,
                mode: mode.into(),
                as_guest: text("mode") == "guest",
            };
            let request = with_deadline(request, self.limits.short);
            self.wait("HoldLock", platform.hold_lock(request)).await?;
        } else {
            let request = ReleaseLockRequest {
                lock,
                mode: mode.into(),
            };
            let request = with_deadline(request, self.limits.short);
            self.wait("ReleaseLock", platform.release_lock(request))
                .await?;
        }
        Ok(())
    }

    async fn state(&self) -> Result<State, Error> {
        const CALL: &str = "GetState";
        let request = with_deadline(GetStateRequest {}, self.limits.short);
        let mut platform = self.platform.clone();
        let mut items = self.wait(CALL, platform.get_state(request)).await?;
        let mut state = State::default();
        loop {
            let next = async { items.message().await.map(Response::new) };
            match self.wait(CALL, next).await? {
                Some(response) => response.item.into_iter().for_each(|item| state.add(item)),
                None => return Ok(state),
            }
        }
    }
}

fn registers(step: &Step) -> Gprs {
    let mut regs = tdx_defs::Gprs::default();
    for register in Gpr::ALL {
        regs[register] = step.input(register.name());
    }
    regs.into()
}

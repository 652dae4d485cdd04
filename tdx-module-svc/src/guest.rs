//! `tdx.module.v1.TdxGuestService`: whoever plays the guest enters a vCPU and hands over events.
//!
//! Invariant G1: a vCPU that a stream has entered is inside until its TD exit, and no longer than
//! the stream. When the caller hangs up, a host interrupt makes it leave.

mod convert;

use std::pin::Pin;
use std::sync::Arc;

use mirror_proto::InvalidField;
use mirror_proto::module::enter_vcpu_request::Message as Asked;
use mirror_proto::module::enter_vcpu_response::Message as Answer;
use mirror_proto::module::tdx_guest_service_server::TdxGuestService;
use mirror_proto::module::{
    EnterVcpuRequest, EnterVcpuResponse, Entered, GuestOps, GuestResults, VpEnter,
};
use tdx_defs::Seamcall;
use tdx_module::{Entry, GuestOp, GuestStep, LpId, Module};
use tokio::sync::{OwnedMutexGuard, mpsc};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::batch::MAX_SESSION_BYTES;
use crate::config::Limits;
use crate::replay::Window;
use crate::running::Running;
use crate::status::Refusal;

/// Path of the method.
pub(crate) const STREAM_PATH: &str = "/tdx.module.v1.TdxGuestService/EnterVcpu";
/// Most events in one message.
const MAX_OPS: usize = 4096;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct GuestService {
    running: Arc<Running>,
    in_flight: usize,
    draining: CancellationToken,
}

impl GuestService {
    /// Serves what is `running`; streams end when `draining` is cancelled.
    pub(crate) fn new(running: Arc<Running>, limits: &Limits, draining: CancellationToken) -> Self {
        Self {
            running,
            in_flight: limits.max_in_flight,
            draining,
        }
    }
}

/// What one stream has entered.
struct Inside {
    module: Arc<Module>,
    lp: LpId,
    /// Given back once the vCPU has left.
    _session: Option<OwnedMutexGuard<Window>>,
}

impl Inside {
    /// Events up to the TD exit. Says whether the vCPU is still inside.
    fn play(&self, ops: &[GuestOp]) -> (Vec<GuestStep>, bool) {
        let mut steps = Vec::with_capacity(ops.len());
        for op in ops {
            let step = self.module.guest(self.lp, op);
            let ends = matches!(step, GuestStep::Exited(_) | GuestStep::Impossible(_));
            steps.push(step);
            if ends {
                return (steps, false);
            }
        }
        (steps, true)
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // After a TD exit nobody of ours is inside, and the answer says so.
        let _ = self
            .module
            .guest(self.lp, &GuestOp::ExternalInterrupt { vector: 0 });
    }
}

/// One stream: what it has entered, if anything.
struct Player {
    running: Arc<Running>,
    inside: Option<Inside>,
}

impl Player {
    fn answer(&mut self, request: EnterVcpuRequest) -> Result<Answer, Refusal> {
        match request.message {
            Some(Asked::Enter(enter)) => self.enter(enter),
            Some(Asked::Ops(ops)) => self.play(ops),
            None => Err(InvalidField::new("message", "neither enter nor ops").into()),
        }
    }

    fn enter(&mut self, enter: VpEnter) -> Result<Answer, Refusal> {
        if self.inside.is_some() {
            let reason = "the vCPU that this stream has entered is inside";
            return Err(InvalidField::new("enter", reason).into());
        }
        let run = self.running.now();
        let module = Arc::clone(&run.module);
        let processors = module.config().logical_processors;
        if enter.lp >= processors {
            let reason = format!("{}, the platform has {processors}", enter.lp);
            return Err(InvalidField::new("enter.lp", reason).into());
        }
        let call = enter
            .call
            .ok_or_else(|| InvalidField::new("enter.call", "missing"))?;
        let call = Seamcall::try_from(call).map_err(|error| error.within("enter.call"))?;
        let lp = LpId(enter.lp);
        let session = match &*enter.session {
            "" => None,
            name if name.len() > MAX_SESSION_BYTES => {
                let reason = format!("{} bytes, the limit is {MAX_SESSION_BYTES}", name.len());
                return Err(InvalidField::new("enter.session", reason).into());
            }
            name => Some(run.sessions.hold(name)?),
        };
        Ok(match module.enter_vcpu(lp, &call) {
            Entry::Entered { vmcall } => {
                self.inside = Some(Inside {
                    module,
                    lp,
                    _session: session,
                });
                Answer::Entered(Entered {
                    vmcall: vmcall.map(Into::into),
                })
            }
            Entry::Refused(result) => Answer::Refused(result.into()),
        })
    }

    fn play(&mut self, ops: GuestOps) -> Result<Answer, Refusal> {
        if ops.ops.len() > MAX_OPS {
            let reason = format!("{} events, the limit is {MAX_OPS}", ops.ops.len());
            return Err(InvalidField::new("ops.ops", reason).into());
        }
        let ops = ops
            .ops
            .into_iter()
            .enumerate()
            .map(|(at, op)| {
                convert::op_from_wire(op).map_err(|error| error.within(&format!("ops.ops[{at}]")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let Some(inside) = &self.inside else {
            let reason = "no vCPU is inside, enter one first";
            return Err(InvalidField::new("ops", reason).into());
        };
        let (steps, still_inside) = inside.play(&ops);
        if !still_inside {
            // Has left already: what drop does then is nothing.
            self.inside = None;
        }
        let results = steps.into_iter().filter_map(convert::step_to_wire);
        Ok(Answer::Results(GuestResults {
            results: results.collect(),
        }))
    }
}

async fn serve_stream(
    service: GuestService,
    mut requests: Streaming<EnterVcpuRequest>,
    answers: mpsc::Sender<Result<EnterVcpuResponse, Status>>,
) {
    let mut player = Player {
        running: service.running,
        inside: None,
    };
    loop {
        let Ok(room) = answers.reserve().await else {
            return;
        };
        let request = tokio::select! {
            biased;
            () = service.draining.cancelled() => return room.send(Err(Refusal::Draining.into())),
            request = requests.message() => request,
        };
        match request {
            Ok(Some(request)) => match player.answer(request) {
                Ok(message) => room.send(Ok(EnterVcpuResponse {
                    message: Some(message),
                })),
                Err(refusal) => return room.send(Err(refusal.into())),
            },
            Ok(None) => return,
            Err(status) => return room.send(Err(status)),
        }
    }
}

#[tonic::async_trait]
impl TdxGuestService for GuestService {
    type EnterVcpuStream =
        Pin<Box<dyn Stream<Item = Result<EnterVcpuResponse, Status>> + Send + 'static>>;

    async fn enter_vcpu(
        &self,
        request: Request<Streaming<EnterVcpuRequest>>,
    ) -> Result<Response<Self::EnterVcpuStream>, Status> {
        let (sender, answers) = mpsc::channel(self.in_flight);
        tokio::spawn(serve_stream(self.clone(), request.into_inner(), sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }
}

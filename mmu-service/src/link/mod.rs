//! The module link: how the core's batches reach the TDX module and its answers come back.
//!
//! The core blocks, the transport does not: all I/O is on one single-threaded runtime, driven by
//! the callers that wait ([`io`](self::io)). A batch takes one of two ways. `Via::Stream` goes to
//! the lane of its logical processor, one long-lived stream with many batches under way ([`lane`]);
//! `Via::Rpc` is a call of its own ([`unary`]).
//!
//! Invariants
//! - K1  A batch runs at most once, whatever is lost on the way: it is sent again only under the
//!   same session and number, and the module replays those that it knows.
//! - K2  A batch for one run of the module never reaches another ([`connection`]).
//! - K3  A caller waits for a bounded time: the budget of [`retry`] ends with
//!   [`SeamError::NotSent`] where that is certain, else with [`SeamError::Unknown`].

mod attachment;
mod connection;
mod guest;
mod io;
mod lane;
mod monitor;
mod retry;
mod spans;
mod unary;
mod window;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use mirror_proto::module::{Chain, EndSessionsRequest, ExecuteRequest, ExecuteResponse};
use mirror_proto::seamcall_to_wire;
use tdp_mmu::{Batch, HostError, SeamError, SeamPort, Ticket, Via};
use tdx_defs::SeamcallResult;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{Notify, mpsc, oneshot, watch};
use transport::{Address, ClientTls};

pub(crate) use attachment::{Attachment, LinkState};
pub(crate) use guest::GuestLine;
pub(crate) use retry::Budget;
pub(crate) use spans::operation;

use self::io::{Io, StandIn};
use crate::metrics::{Flight, LinkMetrics, Summary};
use attachment::Instances;
use connection::dial;
use lane::Lane;
use spans::MessageSpan;
use unary::Calls;
use window::{Permit, Window};

/// Room for everything in a batch that is not page contents, in bytes a call.
const CALL_BYTES: usize = 160;

/// How the link behaves.
#[derive(Debug, Clone)]
pub(crate) struct LinkConfig {
    /// Where the module listens.
    pub(crate) module: Address,
    /// Certificates, for a module at https://.
    pub(crate) tls: Option<ClientTls>,
    /// Streams for `Via::Stream`.
    pub(crate) streams: usize,
    /// Batches under way on each stream.
    pub(crate) window: usize,
    /// Calls under way for `Via::Rpc`.
    pub(crate) calls: usize,
    /// How long the module may take for a batch.
    pub(crate) rpc_deadline: Duration,
    /// What is spent on reaching a lost module.
    pub(crate) budget: Budget,
    /// Bytes.
    pub(crate) message_limit: usize,
}

/// Why there is no connection to the module.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LinkError {
    /// The URL is not usable.
    #[error("module: the address cannot be used")]
    Address(#[source] transport::ConnectError),
    /// Nobody answers.
    #[error("no module answers at {module}")]
    Unreachable {
        /// Where.
        module: Address,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Somebody holds the socket and says nothing.
    #[error("the module at {module} does not answer within {limit:?}")]
    Silent {
        /// Where.
        module: Address,
        /// The deadline.
        limit: Duration,
    },
    /// The module does not describe its platform.
    #[error("the module does not describe its platform")]
    NoPlatform(#[source] Box<tonic::Status>),
    /// The platform cannot host a TD.
    #[error("the module's platform cannot be used")]
    Platform(#[source] HostError),
    /// An answer of a run that is over.
    #[error("instance {instance} of the module is over")]
    Stale {
        /// That run.
        instance: String,
    },
    /// The module refuses something that it should know.
    #[error("the module refuses it")]
    Refused(#[source] Box<tonic::Status>),
    /// The link has no connection at the moment.
    #[error("the module is not reachable: {reason}")]
    Down {
        /// The last error.
        reason: String,
    },
}

impl LinkError {
    /// The error with its causes, in one line.
    pub(crate) fn chain(&self) -> String {
        crate::cli::chain(self)
    }
}

/// What the tasks of the I/O thread have in common.
#[derive(Debug)]
struct Shared {
    config: LinkConfig,
    instances: Instances,
    /// Asks the monitor to look at once.
    nudge: Notify,
    metrics: Arc<LinkMetrics>,
}

type Answer = Result<Vec<SeamcallResult>, SeamError>;

/// A batch on its way to a lane or to a call. Session and number are given there.
struct Job {
    request: ExecuteRequest,
    attachment: Arc<Attachment>,
    reply: Reply,
}

/// Where the answer goes. Holds the place in the window until then.
struct Reply {
    caller: oneshot::Sender<Answer>,
    permit: Permit,
    flight: Flight,
    span: MessageSpan,
}

impl Reply {
    fn resolve(self, answer: Answer) {
        self.flight.landed(&answer);
        drop(self.flight);
        drop(self.permit);
        // The caller may want its spans, and those end with the last one that holds them.
        drop(self.span);
        // A caller that does not wait any more has nothing to learn.
        let _ = self.caller.send(answer);
    }
}

struct LaneHandle {
    jobs: mpsc::UnboundedSender<Job>,
    window: Window,
}

/// The link to one module. What is under way when it is dropped is still answered to who waits.
pub(crate) struct ModuleLink {
    /// What the names of its sessions begin with.
    name: String,
    guests: AtomicU64,
    shared: Arc<Shared>,
    lanes: Vec<LaneHandle>,
    calls: Arc<Calls>,
    call_window: Window,
    /// The next chain of batches.
    chains: AtomicU64,
    io: Arc<Io>,
    _stand_in: StandIn,
}

impl ModuleLink {
    /// Starts the I/O. The module need not be there yet.
    pub(crate) fn start(
        config: LinkConfig,
        metrics: Arc<LinkMetrics>,
    ) -> std::io::Result<Arc<Self>> {
        let (io, stand_in) = Io::start()?;
        let name = format!("mmu-{}", uuid::Uuid::new_v4().simple());
        let shared = Arc::new(Shared {
            config,
            instances: Instances::new(),
            nudge: Notify::new(),
            metrics,
        });
        let mut lanes = Vec::new();
        for lane in 0..shared.config.streams.max(1) {
            let (jobs, queue) = mpsc::unbounded_channel();
            io.handle()
                .spawn(Lane::new(Arc::clone(&shared), queue, format!("{name}-s{lane}")).run());
            lanes.push(LaneHandle {
                jobs,
                window: Window::new(shared.config.window),
            });
        }
        io.handle().spawn(monitor::watch(Arc::clone(&shared)));
        let calls = Calls::new(Arc::clone(&shared), &name, shared.config.calls);
        let call_window = Window::new(shared.config.calls);
        Ok(Arc::new(Self {
            name,
            guests: AtomicU64::new(0),
            shared,
            lanes,
            calls,
            call_window,
            chains: AtomicU64::new(0),
            io,
            _stand_in: stand_in,
        }))
    }

    /// What the names of its sessions begin with; no other link has it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// A session for one vCPU that goes inside.
    fn guest_session(&self) -> String {
        let number = self.guests.fetch_add(1, Ordering::Relaxed);
        format!("{}-g{number}", self.name)
    }

    /// Ends the sessions of an earlier link: when this returns, the module has done all of theirs
    /// that it will ever do.
    pub(crate) async fn end_sessions(self: &Arc<Self>, prefix: &str) -> Result<(), LinkError> {
        let (link, prefix) = (Arc::clone(self), prefix.to_owned());
        let ended = self.io.handle().spawn(async move {
            let mut connection = dial(&link.shared).await?;
            let limit = link.shared.config.rpc_deadline;
            let asked = connection
                .client
                .end_sessions(EndSessionsRequest { prefix });
            match tokio::time::timeout(limit, asked).await {
                Ok(Ok(_)) => Ok(()),
                Ok(Err(status)) => Err(LinkError::Refused(Box::new(status))),
                Err(_) => Err(LinkError::Silent {
                    module: link.shared.config.module.clone(),
                    limit,
                }),
            }
        });
        ended.await.unwrap_or_else(|_| {
            let reason = ENDED.to_owned();
            Err(LinkError::Down { reason })
        })
    }

    /// Whether the module is there, now and later.
    pub(crate) fn state(&self) -> watch::Receiver<LinkState> {
        self.shared.instances.subscribe()
    }

    /// The current run of the module; waits for one for at most `patience`.
    pub(crate) async fn attach(&self, patience: Duration) -> Result<Arc<Attachment>, LinkError> {
        let mut state = self.state();
        if !matches!(&*state.borrow(), LinkState::Up(_)) {
            self.shared.nudge.notify_one();
        }
        let up = state.wait_for(|state| matches!(state, LinkState::Up(_)));
        if let Ok(Ok(state)) = tokio::time::timeout(patience, up).await
            && let LinkState::Up(attachment) = &*state
        {
            return Ok(Arc::clone(attachment));
        }
        let reason = match &*self.state().borrow() {
            LinkState::Down { reason, .. } => reason.to_string(),
            LinkState::Connecting | LinkState::Up(_) => "no answer yet".into(),
        };
        Err(LinkError::Down { reason })
    }

    /// The way to the module for a VM that is built on `attachment`.
    pub(crate) fn port(self: &Arc<Self>, attachment: &Arc<Attachment>) -> Arc<dyn SeamPort> {
        Arc::new(Port {
            link: Arc::clone(self),
            attachment: Arc::clone(attachment),
        })
    }

    fn submit(&self, attachment: &Arc<Attachment>, batch: Batch) -> Ticket {
        if attachment.is_retired() {
            return Ticket::ready(Err(restarted(attachment, "another one")));
        }
        let Batch {
            lp,
            via,
            stop_on_error,
            chain,
            calls,
        } = batch;
        let limit = self.shared.config.message_limit;
        let bytes = calls
            .iter()
            .map(|call| CALL_BYTES + call.data.len())
            .sum::<usize>();
        if bytes > limit {
            return Ticket::ready(Err(SeamError::NotSent {
                reason: format!("the batch takes {bytes} bytes, the limit is {limit}"),
            }));
        }
        let summary = Summary::of(&calls);
        let span = MessageSpan::open(&self.shared.config.module, lp, via, calls.len());
        let request = ExecuteRequest {
            session: String::new(),
            sequence: 0,
            acknowledged: 0,
            stop_on_error,
            calls: calls.into_iter().map(seamcall_to_wire).collect(),
            lp,
            return_spans: telemetry::watch::is_watched(span.traceparent()),
            traceparent: span.traceparent().to_owned(),
            chain: chain.map(|chain| Chain {
                id: chain.id,
                link: chain.link,
            }),
        };
        let (caller, mut answer) = oneshot::channel();
        // Timed from here on: the wait for a place is not the module's.
        let job = |permit| Job {
            request,
            attachment: Arc::clone(attachment),
            reply: Reply {
                caller,
                permit,
                flight: self.shared.metrics.started(via, summary),
                span: span.clone(),
            },
        };
        let handed = match via {
            Via::Rpc => {
                let job = job(self.call_window.acquire(&self.io));
                drop(self.io.handle().spawn(Arc::clone(&self.calls).run(job)));
                true
            }
            Via::Stream => {
                // At least one lane, so the remainder is of a number above zero.
                let lane = &self.lanes[lp as usize % self.lanes.len()];
                lane.jobs.send(job(lane.window.acquire(&self.io))).is_ok()
            }
        };
        if !handed {
            return Ticket::ready(Err(SeamError::NotSent {
                reason: ENDED.into(),
            }));
        }
        // On its way before the caller goes on: it may have more to send.
        self.io.pump();
        let io = Arc::clone(&self.io);
        Ticket::pending(move || {
            let answered = match answer.try_recv() {
                Ok(answer) => Some(answer),
                Err(TryRecvError::Empty) => io.drive(answer).ok(),
                Err(TryRecvError::Closed) => None,
            };
            let outcome = answered.unwrap_or_else(|| {
                Err(SeamError::Unknown {
                    reason: ENDED.into(),
                })
            });
            if let Err(error) = &outcome {
                span.gave_up(error);
            }
            span.answered();
            outcome
        })
    }
}

const ENDED: &str = "the module link has ended";

/// [`SeamPort`] of the VMs of one run of the module.
struct Port {
    link: Arc<ModuleLink>,
    attachment: Arc<Attachment>,
}

impl SeamPort for Port {
    fn submit(&self, batch: Batch) -> Ticket {
        self.link.submit(&self.attachment, batch)
    }

    fn chain(&self) -> Option<u64> {
        Some(self.link.chains.fetch_add(1, Ordering::Relaxed))
    }
}

fn restarted(old: &Attachment, new: &str) -> SeamError {
    SeamError::Restarted {
        reason: format!("instance {} is over, {new} runs now", old.instance()),
    }
}

/// The results in an answer, once their number makes sense.
fn results(request: &ExecuteRequest, answer: ExecuteResponse) -> Answer {
    telemetry::watch::offer(&request.traceparent, answer.spans);
    let (asked, given) = (request.calls.len(), answer.results.len());
    let stopped = request.stop_on_error
        && answer
            .results
            .last()
            .is_some_and(|last| SeamcallResult::from(*last).status().is_error());
    let left_out = given == 0 && request.chain.is_some_and(|chain| chain.link != 0);
    if given > asked || (given < asked && !stopped && !left_out) {
        return Err(SeamError::Unknown {
            reason: format!("the module answered {given} of {asked} calls"),
        });
    }
    Ok(answer
        .results
        .into_iter()
        .map(SeamcallResult::from)
        .collect())
}

#[cfg(test)]
mod tests;

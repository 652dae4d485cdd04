//! Batches that travel as calls of their own: propagation mode `kernel`.
//!
//! Calls may overtake each other on a connection, so a session has one call under way at a time:
//! a slot is a session, and as many calls run at once as there are slots. A call whose outcome is
//! unknown is made again with the same number, as on a stream.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use mirror_proto::module::{ExecuteRequest, ExecuteResponse};
use tdp_mmu::{SeamError, Via};
use tonic::{Request, Status};

use super::connection::{Connection, dial};
use super::retry::{Retry, Verdict, judge};
use super::spans::MessageSpan;
use super::{Answer, Attachment, Job, LinkError, Shared, restarted, results};

/// A session with one call under way at most.
#[derive(Debug)]
struct Slot {
    name: String,
    session: String,
    session_of: Option<Arc<Attachment>>,
    sessions: u64,
    next_sequence: u64,
}

impl Slot {
    /// The session for a run of the module, and the next number in it.
    fn number(&mut self, attachment: &Arc<Attachment>, request: &mut ExecuteRequest) {
        if self
            .session_of
            .as_ref()
            .is_none_or(|bound| !Arc::ptr_eq(bound, attachment))
        {
            self.sessions += 1;
            self.session = format!("{}.{}", self.name, self.sessions);
            self.session_of = Some(Arc::clone(attachment));
            self.next_sequence = 1;
        }
        request.session.clone_from(&self.session);
        request.sequence = self.next_sequence;
        // One at a time: the one before has its answer, or this is another session.
        request.acknowledged = self.next_sequence - 1;
        self.next_sequence += 1;
    }
}

/// The slots, and the connection that they share.
#[derive(Debug)]
pub(super) struct Calls {
    shared: Arc<Shared>,
    idle: Mutex<Vec<Slot>>,
    connection: tokio::sync::Mutex<Option<Arc<Connection>>>,
}

impl Calls {
    pub(super) fn new(shared: Arc<Shared>, name: &str, slots: usize) -> Arc<Self> {
        let idle = (0..slots.max(1))
            .map(|slot| Slot {
                name: format!("{name}-c{slot}"),
                session: String::new(),
                session_of: None,
                sessions: 0,
                next_sequence: 1,
            })
            .collect();
        Arc::new(Self {
            shared,
            idle: Mutex::new(idle),
            connection: tokio::sync::Mutex::default(),
        })
    }

    /// Runs one batch to its end. There are as many permits as slots, so one is idle.
    pub(super) async fn run(self: Arc<Self>, job: Job) {
        let Job {
            mut request,
            attachment,
            reply,
        } = job;
        let slot = self
            .idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .pop();
        let Some(mut slot) = slot else {
            reply.resolve(Err(SeamError::NotSent {
                reason: "no session is idle".into(),
            }));
            return;
        };
        let outcome = self
            .call(&mut slot, &mut request, &attachment, &reply.span)
            .await;
        if outcome.is_err() {
            // The number given up may still be on its way to the module.
            slot.session_of = None;
        }
        // Before the reply: it holds the permit that stands for the slot.
        self.idle
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(slot);
        reply.resolve(outcome);
    }

    async fn call(
        &self,
        slot: &mut Slot,
        request: &mut ExecuteRequest,
        attachment: &Arc<Attachment>,
        span: &MessageSpan,
    ) -> Answer {
        slot.number(attachment, request);
        let budget = self.shared.config.budget;
        let mut retry = Retry::new(budget);
        if self
            .shared
            .instances
            .down_for()
            .is_some_and(|down| down >= budget.time)
        {
            // Others have waited for it already.
            retry.spend();
        }
        let mut doubt = false;
        loop {
            let reason = match self.attempt(request, attachment).await {
                Ok(answer) => return results(request, answer),
                Err(Failure::Restarted { now }) => return Err(restarted(attachment, &now)),
                Err(Failure::Refused(reason)) => return Err(give_up(doubt, reason)),
                Err(Failure::NoSession(reason)) if doubt => return Err(give_up(doubt, reason)),
                Err(Failure::NoSession(reason)) => {
                    slot.session_of = None;
                    slot.number(attachment, request);
                    reason
                }
                Err(Failure::NotSent(reason)) => reason,
                Err(Failure::Lost(reason)) => {
                    doubt = true;
                    reason
                }
            };
            self.shared.nudge.notify_one();
            span.failed(&reason);
            match retry.failed(Instant::now()) {
                Some(pause) => {
                    self.shared.metrics.retried(Via::Rpc, 1);
                    tokio::time::sleep(pause).await;
                    span.sent_again();
                }
                None => return Err(give_up(doubt, reason)),
            }
        }
    }

    async fn attempt(
        &self,
        request: &ExecuteRequest,
        attachment: &Arc<Attachment>,
    ) -> Result<ExecuteResponse, Failure> {
        let connection = self
            .connect()
            .await
            .map_err(|error| Failure::NotSent(error.chain()))?;
        if !Arc::ptr_eq(&connection.attachment, attachment) {
            if attachment.is_retired() {
                let now = connection.attachment.instance().to_owned();
                return Err(Failure::Restarted { now });
            }
            self.drop_connection(&connection).await;
            return Err(Failure::NotSent("the module restarted".into()));
        }
        let mut timed = Request::new(request.clone());
        timed.set_timeout(self.shared.config.rpc_deadline);
        match connection
            .client
            .clone()
            .execute(timed)
            .await
            .map(tonic::Response::into_inner)
        {
            Ok(answer)
                if answer.instance == attachment.instance()
                    && answer.sequence == request.sequence =>
            {
                Ok(answer)
            }
            Ok(answer) => {
                self.drop_connection(&connection).await;
                Err(Failure::Lost(format!(
                    "instance {} answered {} where {} was due",
                    answer.instance, answer.sequence, request.sequence
                )))
            }
            Err(status) => {
                let failure = failed(&status);
                if matches!(failure, Failure::Lost(_)) {
                    self.drop_connection(&connection).await;
                }
                Err(failure)
            }
        }
    }

    async fn connect(&self) -> Result<Arc<Connection>, LinkError> {
        let mut current = self.connection.lock().await;
        if let Some(connection) = &*current {
            return Ok(Arc::clone(connection));
        }
        let connection = Arc::new(dial(&self.shared).await?);
        *current = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// Forgets a connection that failed, unless another caller has replaced it already.
    async fn drop_connection(&self, failed: &Arc<Connection>) {
        let mut current = self.connection.lock().await;
        if current
            .as_ref()
            .is_some_and(|current| Arc::ptr_eq(current, failed))
        {
            *current = None;
        }
    }
}

/// Why an attempt brought no answer.
enum Failure {
    /// Nothing ran; worth another attempt.
    NotSent(String),
    /// It may have run.
    Lost(String),
    /// The module does not know the session.
    NoSession(String),
    /// Nothing ran, and nothing will.
    Refused(String),
    /// The run that the batch was meant for is over.
    Restarted {
        /// The run that answers now.
        now: String,
    },
}

fn failed(status: &Status) -> Failure {
    let reason = format!("{}: {}", status.code(), status.message());
    match judge(status) {
        Verdict::Lost => Failure::Lost(reason),
        Verdict::Overloaded => Failure::NotSent(reason),
        Verdict::NoSession => Failure::NoSession(reason),
        Verdict::Refused => Failure::Refused(reason),
    }
}

fn give_up(doubt: bool, reason: String) -> SeamError {
    if doubt {
        SeamError::Unknown { reason }
    } else {
        SeamError::NotSent { reason }
    }
}

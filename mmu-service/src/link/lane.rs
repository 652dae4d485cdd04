//! One stream to the module: a session, its numbered batches, and what was not answered yet.
//!
//! Batches leave in the order of their submission and are answered in that order. When the
//! stream is lost, all that was not answered is sent again under the same session and numbers:
//! the module replays what it had run already.
//!
//! Invariants
//! - L1  `unanswered` is ascending by sequence, and all of it belongs to the run that `session`
//!   was opened for.
//! - L2  No more than the module's replay window, less one, is unanswered at a time.
//! - L3  A batch gets another session only while it is certain that it has not run.
//! - L4  Each job is resolved once: with its answer, or with the most that is certain.

use std::collections::VecDeque;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use mirror_proto::module::{ExecuteRequest, ExecuteResponse};
use tdp_mmu::{SeamError, Via};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::connection::{Connection, dial};
use super::retry::{Retry, Verdict, judge};
use super::{Attachment, Job, Reply, Shared, restarted, results};

/// A batch that was handed to the transport.
struct Sent {
    request: ExecuteRequest,
    attachment: Arc<Attachment>,
    reply: Reply,
    at: Instant,
    /// It was lost once: it may have run.
    doubt: bool,
}

impl Sent {
    fn give_up(self, reason: &str) {
        let reason = reason.to_owned();
        self.reply.resolve(Err(if self.doubt {
            SeamError::Unknown { reason }
        } else {
            SeamError::NotSent { reason }
        }));
    }
}

/// Why a stream ended.
enum End {
    /// The link is shut down and everything is answered.
    Closed,
    /// The connection cannot be used any more; whether unanswered batches ran is open.
    Lost(String),
    /// The module takes nothing at the moment; nothing behind the last answer ran.
    Overloaded(String),
    /// The module does not know the session.
    NoSession(String),
    /// The module refused the oldest unanswered batch for good; nothing behind it ran.
    Refused(String),
}

/// The task behind one stream.
pub(super) struct Lane {
    shared: Arc<Shared>,
    jobs: mpsc::UnboundedReceiver<Job>,
    /// A job that was taken from `jobs` and is not sent yet.
    waiting: Option<Job>,
    name: String,
    session: String,
    session_of: Option<Arc<Attachment>>,
    sessions: u64,
    next_sequence: u64,
    unanswered: VecDeque<Sent>,
    retry: Retry,
    /// The budget is spent and the module was not reached since.
    given_up: bool,
}

impl Lane {
    pub(super) fn new(
        shared: Arc<Shared>,
        jobs: mpsc::UnboundedReceiver<Job>,
        name: String,
    ) -> Self {
        let retry = Retry::new(shared.config.budget);
        Self {
            shared,
            jobs,
            waiting: None,
            name,
            session: String::new(),
            session_of: None,
            sessions: 0,
            next_sequence: 1,
            unanswered: VecDeque::new(),
            retry,
            given_up: false,
        }
    }

    /// Runs until the link is dropped.
    pub(super) async fn run(mut self) {
        loop {
            if self.unanswered.is_empty() && self.waiting.is_none() {
                match self.jobs.recv().await {
                    Some(job) => self.waiting = Some(job),
                    None => return,
                }
            }
            let end = match dial(&self.shared).await {
                Ok(connection) => {
                    if std::mem::take(&mut self.given_up) {
                        self.retry.progress();
                    }
                    self.serve(connection).await
                }
                // Nothing more was sent, so nothing new is in doubt.
                Err(error) => End::Overloaded(error.chain()),
            };
            let reason = match end {
                End::Closed => return,
                End::Refused(reason) => {
                    self.refuse(&reason);
                    continue;
                }
                End::NoSession(reason) if self.unanswered.iter().any(|sent| sent.doubt) => {
                    self.refuse(&reason);
                    continue;
                }
                End::NoSession(reason) => {
                    self.session_of = None;
                    reason
                }
                End::Overloaded(reason) => reason,
                End::Lost(reason) => {
                    for sent in &mut self.unanswered {
                        sent.doubt = true;
                        sent.reply.span.failed(&reason);
                    }
                    reason
                }
            };
            self.shared.nudge.notify_one();
            tracing::debug!(lane = %self.name, reason, "module stream lost");
            if self.unanswered.is_empty() && self.waiting.is_none() {
                continue;
            }
            match self.retry.failed(Instant::now()) {
                Some(pause) => sleep(pause).await,
                None => self.give_up(&reason),
            }
        }
    }

    /// The oldest batch will not run. Nothing behind it ran either, so unless something was lost
    /// before, the others go on under a session without a gap.
    fn refuse(&mut self, reason: &str) {
        if let Some(refused) = self.unanswered.pop_front() {
            refused.give_up(reason);
        }
        if !self.unanswered.iter().any(|sent| sent.doubt) {
            self.session_of = None;
        }
    }

    /// The budget is spent: tells every caller what is certain.
    fn give_up(&mut self, reason: &str) {
        tracing::warn!(lane = %self.name, unanswered = self.unanswered.len(), reason, "the module is given up");
        for sent in self.unanswered.drain(..) {
            sent.give_up(reason);
        }
        // The numbers given up may still be in the module's window, or on their way to it.
        self.session_of = None;
        let waiting = self.waiting.take();
        for job in waiting
            .into_iter()
            .chain(std::iter::from_fn(|| self.jobs.try_recv().ok()))
        {
            job.reply.resolve(Err(SeamError::NotSent {
                reason: reason.to_owned(),
            }));
        }
        // One attempt for the next job, so that callers of a dead module are not held up.
        self.retry.spend();
        self.given_up = true;
    }

    /// Keeps to the run at the other end: what was sent to an older one is lost with it. Opens a
    /// session there unless one is open.
    fn bind(&mut self, attachment: &Arc<Attachment>) {
        if self
            .session_of
            .as_ref()
            .is_some_and(|bound| Arc::ptr_eq(bound, attachment))
        {
            return;
        }
        self.sessions += 1;
        self.session = format!("{}.{}", self.name, self.sessions);
        self.session_of = Some(Arc::clone(attachment));
        self.next_sequence = 1;
        for mut sent in std::mem::take(&mut self.unanswered) {
            if Arc::ptr_eq(&sent.attachment, attachment) {
                self.number(&mut sent.request);
                self.unanswered.push_back(sent);
            } else {
                sent.reply
                    .resolve(Err(restarted(&sent.attachment, attachment.instance())));
            }
        }
    }

    /// Gives a batch its place in the session.
    fn number(&mut self, request: &mut ExecuteRequest) {
        request.session.clone_from(&self.session);
        request.sequence = self.next_sequence;
        let oldest = self.unanswered.front();
        let oldest = oldest.map_or(self.next_sequence, |sent| sent.request.sequence);
        request.acknowledged = oldest - 1;
        self.next_sequence += 1;
    }

    /// Works on one connection until it ends.
    async fn serve(&mut self, connection: Connection) -> End {
        let Connection {
            mut client,
            attachment,
            ..
        } = connection;
        self.bind(&attachment);
        let deadline = self.shared.config.rpc_deadline;
        let window = attachment.window(self.shared.config.window);
        let (outbound, requests) = mpsc::channel(window);
        // All of them were handed to another connection before.
        let again = self.unanswered.len();
        self.shared.metrics.retried(Via::Stream, again);
        for sent in &mut self.unanswered {
            sent.at = Instant::now();
            sent.reply.span.sent_again();
            if outbound.try_send(sent.request.clone()).is_err() {
                return End::Lost("more is unanswered than the window holds".into());
            }
        }
        let opened = timeout(
            deadline,
            client.execute_stream(ReceiverStream::new(requests)),
        )
        .await;
        let mut answers = match opened {
            Ok(Ok(answers)) => answers.into_inner(),
            Ok(Err(status)) => return failed(&status),
            Err(_) => return End::Lost(format!("no stream within {deadline:?}")),
        };
        let mut closing = false;
        let mut alarm = pin!(sleep(deadline));
        loop {
            if closing && self.unanswered.is_empty() {
                return End::Closed;
            }
            let has_room = !closing && self.unanswered.len() < window;
            if has_room
                && let Some(job) = self.waiting.take()
                && let Err(end) = self.send(job, &attachment, &outbound)
            {
                return end;
            }
            tokio::select! {
                biased;
                answer = answers.message() => {
                    let settled = match answer {
                        Ok(Some(answer)) => self.settle(answer, &attachment),
                        Ok(None) => Err(End::Lost("the module ended the stream".into())),
                        Err(status) => Err(failed(&status)),
                    };
                    if let Err(end) = settled {
                        return end;
                    }
                }
                job = self.jobs.recv(), if has_room => match job {
                    None => closing = true,
                    Some(job) => if let Err(end) = self.send(job, &attachment, &outbound) {
                        return end;
                    },
                },
                // One timer for the oldest batch, set anew only when it fires.
                () = &mut alarm => {
                    let asked = self.unanswered.front().map_or_else(Instant::now, |sent| sent.at);
                    if asked.elapsed() >= deadline {
                        return End::Lost(format!("no answer within {deadline:?}"));
                    }
                    alarm.as_mut().reset((asked + deadline).into());
                }
            }
        }
    }

    /// Numbers a batch and hands it to the transport.
    fn send(
        &mut self,
        job: Job,
        attachment: &Arc<Attachment>,
        outbound: &mpsc::Sender<ExecuteRequest>,
    ) -> Result<(), End> {
        if !Arc::ptr_eq(&job.attachment, attachment) {
            if job.attachment.is_retired() {
                job.reply
                    .resolve(Err(restarted(&job.attachment, attachment.instance())));
                return Ok(());
            }
            // The job knows a newer run than this connection leads to.
            self.waiting = Some(job);
            return Err(End::Lost("the module restarted".into()));
        }
        let Job {
            mut request,
            attachment,
            reply,
        } = job;
        self.number(&mut request);
        let handed = outbound.try_send(request.clone()).is_ok();
        self.unanswered.push_back(Sent {
            request,
            attachment,
            reply,
            at: Instant::now(),
            doubt: false,
        });
        if handed {
            Ok(())
        } else {
            Err(End::Lost("the stream takes no more".into()))
        }
    }

    /// Gives an answer to the oldest unanswered batch.
    fn settle(&mut self, answer: ExecuteResponse, attachment: &Arc<Attachment>) -> Result<(), End> {
        let Some(front) = self.unanswered.front() else {
            return Err(End::Lost(format!(
                "answer {} was not asked for",
                answer.sequence
            )));
        };
        if answer.instance != attachment.instance() {
            // Only something in between that changed its mind can do this.
            return Err(End::Lost(format!("instance {} answered", answer.instance)));
        }
        if answer.sequence != front.request.sequence {
            return Err(End::Lost(format!(
                "answer {} came where {} was due",
                answer.sequence, front.request.sequence
            )));
        }
        if let Some(sent) = self.unanswered.pop_front() {
            let outcome = results(&sent.request, answer);
            sent.reply.resolve(outcome);
        }
        self.retry.progress();
        Ok(())
    }
}

fn failed(status: &Status) -> End {
    let reason = format!("{}: {}", status.code(), status.message());
    match judge(status) {
        Verdict::Lost => End::Lost(reason),
        Verdict::Overloaded => End::Overloaded(reason),
        Verdict::NoSession => End::NoSession(reason),
        Verdict::Refused => End::Refused(reason),
    }
}

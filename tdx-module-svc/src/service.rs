//! `tdx.module.v1.TdxModuleService`: convert, run, convert.

use std::pin::{Pin, pin};
use std::sync::Arc;

use mirror_proto::InvalidField;
use mirror_proto::module::tdx_module_service_server::TdxModuleService;
use mirror_proto::module::{
    EndSessionsRequest, EndSessionsResponse, ExecuteRequest, ExecuteResponse, GetPlatformRequest,
    GetPlatformResponse,
};
use tdx_defs::SeamcallResult;
use telemetry::watch::Watch;
use tokio::sync::mpsc;
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, Streaming};

use crate::batch::{Batch, Bounds, MAX_SESSION_BYTES, Ticket};
use crate::config::Limits;
use crate::execute::{self, Meter};
use crate::faults::Faults;
use crate::metrics::{Metrics, Via};
use crate::platform;
use crate::replay::Session;
use crate::running::{Run, Running};
use crate::status::Refusal;

/// Path of the data path's method.
pub(crate) const STREAM_PATH: &str = "/tdx.module.v1.TdxModuleService/ExecuteStream";

/// Length of a prefix of sessions: none that could be anybody's.
const PREFIX_BYTES: std::ops::RangeInclusive<usize> = 8..=MAX_SESSION_BYTES;

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct ModuleService {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    running: Arc<Running>,
    limits: Limits,
    bounds: Bounds,
    metrics: Arc<Metrics>,
    faults: Faults,
    draining: CancellationToken,
}

/// The session of a caller's last batch, and the run that it belongs to.
type Held = Option<(Arc<Run>, String, Session)>;

/// What a stream brought: a batch that may run or not, or its end.
type Next = Result<Option<Result<Batch, InvalidField>>, Status>;

impl ModuleService {
    /// Serves what is `running`; streams end when `draining` is cancelled. Calls meet `faults`.
    pub(crate) fn new(
        running: Arc<Running>,
        limits: &Limits,
        faults: Faults,
        draining: CancellationToken,
    ) -> Self {
        let bounds = Bounds {
            calls: limits.max_calls,
            runs: limits.max_repeat,
            logical_processors: running.now().module.config().logical_processors,
        };
        let metrics = Metrics::new(&running.now());
        Self {
            shared: Arc::new(Shared {
                running,
                limits: limits.clone(),
                bounds,
                metrics,
                faults,
                draining,
            }),
        }
    }

    /// One batch on its own, as `Execute` answers it.
    pub(crate) async fn answer(&self, request: ExecuteRequest) -> Result<ExecuteResponse, Status> {
        let batch = Batch::check(request, self.shared.bounds);
        Ok(self.shared.execute(batch, Via::Unary, &mut None).await?)
    }

    /// The platform and what of it is in use.
    pub(crate) fn describe(&self) -> GetPlatformResponse {
        let run = self.shared.running.now();
        platform::describe(&run.module, &self.shared.limits, &run.instance)
    }

    /// What is counted of the module.
    pub(crate) fn metrics(&self) -> Arc<Metrics> {
        self.shared.metrics.clone()
    }
}

impl Shared {
    /// Runs one batch that was checked. `held` is the session of the caller's last batch: a stream
    /// stays with its session, which is looked up once and not forgotten while the stream is open.
    async fn execute(
        &self,
        batch: Result<Batch, InvalidField>,
        via: Via,
        held: &mut Held,
    ) -> Result<ExecuteResponse, Refusal> {
        let outcome = match batch {
            Ok(batch) => self.execute_checked(batch, via, held).await,
            Err(error) => Err(error.into()),
        };
        if let Err(refusal) = &outcome {
            self.metrics.refused(refusal);
        }
        outcome
    }

    async fn execute_checked(
        &self,
        batch: Batch,
        via: Via,
        held: &mut Held,
    ) -> Result<ExecuteResponse, Refusal> {
        // Before the batch opens its span, so that the span is recorded even if none are exported.
        let watch = if batch.return_spans {
            Watch::begin(&batch.traceparent)
        } else {
            None
        };
        let run = self.running.now();
        let session = match &batch.ticket {
            None => None,
            Some(ticket) => Some(session_of(&run, ticket, held)?),
        };
        let (sequence, instance) = (batch.sequence, run.instance.clone());
        let meter = Meter {
            metrics: self.metrics.clone(),
            via,
        };
        let mut response = execute::perform(
            &run,
            &self.faults,
            meter,
            batch,
            session,
            move |results: &[SeamcallResult]| {
                let results = results.iter().map(|result| (*result).into()).collect();
                ExecuteResponse {
                    sequence,
                    instance,
                    results,
                    spans: Vec::new(),
                }
            },
        )
        .await?;
        if let Some(watch) = watch {
            response.spans = watch.take();
        }
        Ok(response)
    }

    /// Answers the batches of one stream in their order, until the caller or the service is done
    /// or a batch is refused. While a long one runs, the next is read and checked.
    async fn serve_stream(
        self: Arc<Self>,
        mut batches: Streaming<ExecuteRequest>,
        answers: mpsc::Sender<Result<ExecuteResponse, Status>>,
    ) {
        let mut held = None;
        let mut ahead = None;
        loop {
            // Room for the answer first: a caller that does not read stops being served, and the
            // flow control of HTTP/2 tells it so.
            let Ok(room) = answers.reserve().await else {
                return;
            };
            let next = match ahead.take() {
                Some(_) if self.draining.is_cancelled() => {
                    return room.send(Err(Refusal::Draining.into()));
                }
                Some(next) => next,
                None => tokio::select! {
                    biased;
                    () = self.draining.cancelled() => {
                        return room.send(Err(Refusal::Draining.into()));
                    }
                    next = self.read(&mut batches) => next,
                },
            };
            let batch = match next {
                Ok(Some(batch)) => batch,
                Ok(None) => return,
                Err(status) => return room.send(Err(status)),
            };
            let mut running = pin!(self.execute(batch, Via::Stream, &mut held));
            let outcome = loop {
                tokio::select! {
                    biased;
                    outcome = &mut running => break outcome,
                    next = self.read(&mut batches), if ahead.is_none() => ahead = Some(next),
                }
            };
            match outcome {
                Ok(answer) => room.send(Ok(answer)),
                Err(refusal) => return room.send(Err(refusal.into())),
            }
        }
    }
}

impl Shared {
    /// The next batch of a stream, checked; `None` behind the last.
    async fn read(&self, batches: &mut Streaming<ExecuteRequest>) -> Next {
        let request = batches.message().await?;
        Ok(request.map(|request| Batch::check(request, self.bounds)))
    }
}

fn session_of(run: &Arc<Run>, ticket: &Ticket, held: &mut Held) -> Result<Session, Refusal> {
    if let Some((of, name, session)) = held
        && Arc::ptr_eq(of, run)
        && *name == ticket.session
    {
        return Ok(session.clone());
    }
    let session = run.sessions.open(ticket)?;
    *held = Some((Arc::clone(run), ticket.session.clone(), session.clone()));
    Ok(session)
}

#[tonic::async_trait]
impl TdxModuleService for ModuleService {
    type ExecuteStreamStream =
        Pin<Box<dyn Stream<Item = Result<ExecuteResponse, Status>> + Send + 'static>>;

    async fn execute(
        &self,
        request: Request<ExecuteRequest>,
    ) -> Result<Response<ExecuteResponse>, Status> {
        let mut request = request.into_inner();
        if request.traceparent.is_empty() {
            // Here the headers speak for the one batch.
            request.traceparent = telemetry::traceparent_of_current_span().unwrap_or_default();
        }
        Ok(Response::new(self.answer(request).await?))
    }

    async fn execute_stream(
        &self,
        request: Request<Streaming<ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStreamStream>, Status> {
        let (sender, answers) = mpsc::channel(self.shared.limits.max_in_flight);
        // A task of its own: dropping the response stream must not stop it inside a batch.
        tokio::spawn(
            self.shared
                .clone()
                .serve_stream(request.into_inner(), sender),
        );
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn end_sessions(
        &self,
        request: Request<EndSessionsRequest>,
    ) -> Result<Response<EndSessionsResponse>, Status> {
        let prefix = request.into_inner().prefix;
        if !PREFIX_BYTES.contains(&prefix.len()) {
            let (least, most) = (PREFIX_BYTES.start(), PREFIX_BYTES.end());
            let reason = format!("{} bytes, allowed are {least} to {most}", prefix.len());
            return Err(Refusal::from(InvalidField::new("prefix", reason)).into());
        }
        let run = self.shared.running.now();
        let ended = run.sessions.end(&prefix).await;
        Ok(Response::new(EndSessionsResponse {
            sessions: u32::try_from(ended).unwrap_or(u32::MAX),
            instance: run.sessions.instance().to_owned(),
        }))
    }

    async fn get_platform(
        &self,
        _: Request<GetPlatformRequest>,
    ) -> Result<Response<GetPlatformResponse>, Status> {
        Ok(Response::new(self.describe()))
    }
}

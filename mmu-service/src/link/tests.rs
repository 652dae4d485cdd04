//! The link against a module that does as it is told: loses answers, refuses, restarts.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Mutex;

use mirror_proto::module::tdx_module_service_server::{TdxModuleService, TdxModuleServiceServer};
use mirror_proto::module::{
    EndSessionsRequest, EndSessionsResponse, GetPlatformRequest, GetPlatformResponse,
    SeamcallResult as WireResult, Tdmr,
};
use tdx_defs::{Leaf, Seamcall};
use tokio_stream::Stream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use transport::Listener;

use super::*;

/// A platform that a host can run on.
pub(super) fn platform(instance: &str) -> GetPlatformResponse {
    GetPlatformResponse {
        instance: instance.to_owned(),
        tdmrs: vec![Tdmr {
            base: 1 << 30,
            size: 1 << 30,
            reserved: Vec::new(),
            initialized: true,
        }],
        hkid_start: 32,
        hkid_count: 32,
        global_hkid: 32,
        maxpa: 52,
        hkid_bits: 6,
        logical_processors: 4,
        packages: 1,
        tdcs_pages: 6,
        tdvps_pages: 6,
        attributes_fixed0: u64::MAX,
        xfam_fixed0: u64::MAX,
        xfam_fixed1: 3,
        replay_window: 8,
        ..Default::default()
    }
}

/// What happens to the next batch.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// It runs and is answered.
    Answer,
    /// It runs, and the connection breaks before the answer.
    Lose,
    /// It does not run.
    Refuse(tonic::Code),
    /// It runs and is never answered.
    Silence,
}

#[derive(Default)]
struct Story {
    /// Acts to come; `Answer` when empty.
    acts: VecDeque<Act>,
    /// First RCX of each batch that ran, in order.
    ran: Vec<u64>,
    /// Answers by session and sequence: what ran once does not run again.
    recorded: HashMap<(String, u64), u64>,
    /// Sessions and numbers as they came in.
    seen: Vec<(String, u64)>,
    /// Up to which number of a session the answers have arrived; they are forgotten.
    acknowledged: HashMap<String, u64>,
    /// A number was sent again that was acknowledged before.
    acknowledged_too_early: bool,
}

/// A module that follows a story. Every call answers its RCX in RAX.
#[derive(Clone)]
struct Fake {
    instance: &'static str,
    story: Arc<Mutex<Story>>,
}

impl Fake {
    fn new(instance: &'static str, acts: impl IntoIterator<Item = Act>) -> Self {
        let story = Story {
            acts: acts.into_iter().collect(),
            ..Story::default()
        };
        Self {
            instance,
            story: Arc::new(Mutex::new(story)),
        }
    }

    /// `None`: no answer at all.
    fn execute_one(&self, request: &ExecuteRequest) -> Option<Result<ExecuteResponse, Status>> {
        let mut story = self.story.lock().unwrap();
        let key = (request.session.clone(), request.sequence);
        story.seen.push(key.clone());
        let known = story.acknowledged.entry(key.0.clone()).or_default();
        *known = request.acknowledged.max(*known);
        let known = *known;
        story.acknowledged_too_early |= key.1 <= known;
        story
            .recorded
            .retain(|(session, number), _| *session != key.0 || *number > known);
        let act = story.acts.pop_front().unwrap_or(Act::Answer);
        if let Act::Refuse(code) = act {
            return Some(Err(Status::new(code, "as told")));
        }
        let rcx = request.calls[0].rcx;
        if story.recorded.insert(key, rcx).is_none() {
            story.ran.push(rcx);
        }
        match act {
            Act::Silence => None,
            Act::Lose => Some(Err(Status::unavailable("connection reset"))),
            Act::Answer | Act::Refuse(_) => Some(Ok(ExecuteResponse {
                spans: Vec::new(),
                sequence: request.sequence,
                instance: self.instance.to_owned(),
                results: request
                    .calls
                    .iter()
                    .map(|call| WireResult {
                        rcx: call.rcx,
                        completed: 1,
                        ..Default::default()
                    })
                    .collect(),
            })),
        }
    }

    /// Serves at `address` until the process is killed or dropped.
    fn serve(&self, address: &Address) -> Process {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let (fake, address) = (self.clone(), address.clone());
        let (bound, is_bound) = std::sync::mpsc::channel();
        runtime.spawn(async move {
            let listener = Listener::bind(&address).await.unwrap();
            bound.send(()).unwrap();
            let router = transport::server().add_service(TdxModuleServiceServer::new(fake));
            let never = std::future::pending();
            transport::serve(router, vec![listener], never, Duration::ZERO).await
        });
        is_bound.recv().unwrap();
        Process(Some(runtime))
    }
}

/// A runtime of its own stands for a process: with it go its sockets.
struct Process(Option<tokio::runtime::Runtime>);

impl Process {
    fn kill(self) {
        drop(self);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(runtime) = self.0.take() else { return };
        // On another thread, since waiting is not allowed on one that runs a test.
        let end = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(30)));
        end.join().unwrap();
    }
}

#[tonic::async_trait]
impl TdxModuleService for Fake {
    type ExecuteStreamStream =
        Pin<Box<dyn Stream<Item = Result<ExecuteResponse, Status>> + Send + 'static>>;

    async fn execute(
        &self,
        request: Request<ExecuteRequest>,
    ) -> Result<Response<ExecuteResponse>, Status> {
        match self.execute_one(request.get_ref()) {
            Some(answer) => answer.map(Response::new),
            None => std::future::pending().await,
        }
    }

    async fn execute_stream(
        &self,
        request: Request<Streaming<ExecuteRequest>>,
    ) -> Result<Response<Self::ExecuteStreamStream>, Status> {
        let (out, answers) = mpsc::channel(16);
        let (fake, mut requests) = (self.clone(), request.into_inner());
        tokio::spawn(async move {
            while let Ok(Some(request)) = requests.message().await {
                let Some(answer) = fake.execute_one(&request) else {
                    continue;
                };
                let ends = answer.is_err();
                if out.send(answer).await.is_err() || ends {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(answers))))
    }

    async fn end_sessions(
        &self,
        _: Request<EndSessionsRequest>,
    ) -> Result<Response<EndSessionsResponse>, Status> {
        Err(Status::unimplemented("no test ends sessions here"))
    }

    async fn get_platform(
        &self,
        _: Request<GetPlatformRequest>,
    ) -> Result<Response<GetPlatformResponse>, Status> {
        Ok(Response::new(platform(self.instance)))
    }
}

struct Bench {
    _dir: tempfile::TempDir,
    address: Address,
    link: Arc<ModuleLink>,
}

impl Bench {
    fn new(deadline: Duration, attempts: u32) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let address = Address::Unix(dir.path().join("module.sock"));
        let config = LinkConfig {
            tls: None,
            module: address.clone(),
            streams: 2,
            window: 16,
            calls: 4,
            rpc_deadline: deadline,
            budget: Budget {
                attempts,
                time: Duration::from_secs(60),
            },
            message_limit: 1 << 20,
        };
        let metrics = crate::metrics::Metrics::new();
        let link = ModuleLink::start(config, Arc::clone(&metrics.link)).unwrap();
        Self {
            _dir: dir,
            address,
            link,
        }
    }

    async fn attach(&self) -> Arc<Attachment> {
        self.link.attach(Duration::from_secs(30)).await.unwrap()
    }
}

const PATIENT: Duration = Duration::from_secs(30);
const BOTH: [Via; 2] = [Via::Stream, Via::Rpc];

fn batch(via: Via, rcx: u64) -> Batch {
    let calls = vec![Seamcall::new(Leaf::MEM_PAGE_AUG).rcx(rcx)];
    Batch {
        lp: 0,
        via,
        stop_on_error: true,
        chain: None,
        calls,
    }
}

/// Submits batches one after the other without waiting, then waits for all.
async fn submit(port: &Arc<dyn SeamPort>, via: Via, batches: u64) -> Vec<Result<u64, SeamError>> {
    let port = Arc::clone(port);
    tokio::task::spawn_blocking(move || {
        let tickets: Vec<Ticket> = (1..=batches)
            .map(|rcx| port.submit(batch(via, rcx)))
            .collect();
        tickets
            .into_iter()
            .map(|ticket| ticket.wait().map(|results| results[0].rcx))
            .collect()
    })
    .await
    .unwrap()
}

#[tokio::test]
async fn batches_of_a_processor_run_in_order_with_consecutive_numbers() {
    let bench = Bench::new(PATIENT, 5);
    let fake = Fake::new("a", []);
    let _server = fake.serve(&bench.address);
    let port = bench.link.port(&bench.attach().await);
    let answers = submit(&port, Via::Stream, 100).await;
    assert_eq!(answers, (1..=100).map(Ok).collect::<Vec<_>>());
    let story = fake.story.lock().unwrap();
    assert_eq!(story.ran, (1..=100).collect::<Vec<_>>());
    let session = &story.seen[0].0;
    assert!(session.len() <= 64);
    assert!(
        story
            .seen
            .iter()
            .zip(1..)
            .all(|(seen, n)| seen.0 == *session && seen.1 == n)
    );
    // The module keeps what is under way, and no more.
    assert!(story.recorded.len() <= 8, "{}", story.recorded.len());
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_and_nothing_runs_twice() {
    for via in BOTH {
        let bench = Bench::new(PATIENT, 20);
        let acts = [Act::Answer, Act::Lose, Act::Lose, Act::Answer, Act::Lose];
        let fake = Fake::new("a", acts);
        let _server = fake.serve(&bench.address);
        let port = bench.link.port(&bench.attach().await);
        let mut answers = submit(&port, via, 6).await;
        answers.sort_by_key(|answer| *answer.as_ref().unwrap());
        assert_eq!(answers, (1..=6).map(Ok).collect::<Vec<_>>(), "{via:?}");
        let story = fake.story.lock().unwrap();
        let mut ran = story.ran.clone();
        ran.sort_unstable();
        assert_eq!(ran, [1, 2, 3, 4, 5, 6], "{via:?}");
        assert!(story.seen.len() >= 9, "{via:?}: three answers were lost");
        assert!(!story.acknowledged_too_early, "{via:?}");
    }
}

#[tokio::test]
async fn an_overload_is_waited_out() {
    for via in BOTH {
        let bench = Bench::new(PATIENT, 20);
        let fake = Fake::new("a", [Act::Refuse(tonic::Code::ResourceExhausted); 3]);
        let _server = fake.serve(&bench.address);
        let port = bench.link.port(&bench.attach().await);
        assert_eq!(submit(&port, via, 1).await, [Ok(1)], "{via:?}");
        assert_eq!(fake.story.lock().unwrap().seen.len(), 4, "{via:?}");
    }
}

#[tokio::test]
async fn a_refused_batch_was_not_sent_and_the_ones_behind_it_run() {
    for via in BOTH {
        let bench = Bench::new(PATIENT, 5);
        let fake = Fake::new("a", [Act::Refuse(tonic::Code::InvalidArgument)]);
        let _server = fake.serve(&bench.address);
        let port = bench.link.port(&bench.attach().await);
        let answers = submit(&port, via, 3).await;
        let refused = answers
            .iter()
            .filter(|answer| matches!(answer, Err(SeamError::NotSent { .. })));
        assert_eq!(refused.count(), 1, "{via:?}: {answers:?}");
        assert_eq!(
            answers.iter().filter(|answer| answer.is_ok()).count(),
            2,
            "{via:?}"
        );
    }
}

#[tokio::test]
async fn a_forgotten_session_is_replaced_while_nothing_is_in_doubt() {
    for via in BOTH {
        let bench = Bench::new(PATIENT, 5);
        let fake = Fake::new("a", [Act::Refuse(tonic::Code::NotFound)]);
        let _server = fake.serve(&bench.address);
        let port = bench.link.port(&bench.attach().await);
        assert_eq!(submit(&port, via, 1).await, [Ok(1)], "{via:?}");
        let story = fake.story.lock().unwrap();
        assert_ne!(story.seen[0].0, story.seen[1].0, "{via:?}");
        assert_eq!(story.seen[1].1, 1, "{via:?}");
    }
}

#[tokio::test]
async fn an_answer_that_never_comes_ends_as_unknown_when_the_budget_is_spent() {
    for via in BOTH {
        let bench = Bench::new(Duration::from_millis(50), 3);
        let fake = Fake::new("a", [Act::Silence; 3]);
        let _server = fake.serve(&bench.address);
        let port = bench.link.port(&bench.attach().await);
        let answers = submit(&port, via, 1).await;
        assert!(
            matches!(answers[..], [Err(SeamError::Unknown { .. })]),
            "{via:?}: {answers:?}"
        );
        // The next batch has a number of its own and is not confused with the one given up.
        let port_there = Arc::clone(&port);
        let next = move || port_there.submit(batch(via, 77)).wait();
        assert_eq!(
            tokio::task::spawn_blocking(next).await.unwrap().unwrap()[0].rcx,
            77
        );
    }
}

#[tokio::test]
async fn a_module_that_is_gone_was_sent_nothing() {
    for via in BOTH {
        let bench = Bench::new(PATIENT, 2);
        let fake = Fake::new("a", []);
        let process = fake.serve(&bench.address);
        let port = bench.link.port(&bench.attach().await);
        process.kill();
        let answers = submit(&port, via, 1).await;
        assert!(
            matches!(answers[..], [Err(SeamError::NotSent { .. })]),
            "{via:?}: {answers:?}"
        );
    }
}

#[tokio::test]
async fn batches_of_an_old_run_never_reach_a_new_one() {
    for via in BOTH {
        let bench = Bench::new(PATIENT, 40);
        let old = Fake::new("old", []);
        let process = old.serve(&bench.address);
        let old_run = bench.attach().await;
        let port = bench.link.port(&old_run);
        assert_eq!(submit(&port, via, 1).await, [Ok(1)]);
        process.kill();

        let new = Fake::new("new", []);
        let _server = new.serve(&bench.address);
        let answers = submit(&port, via, 3).await;
        for answer in &answers {
            assert!(
                matches!(answer, Err(SeamError::Restarted { .. })),
                "{via:?}: {answer:?}"
            );
        }
        assert!(old_run.is_retired());
        assert!(new.story.lock().unwrap().seen.is_empty(), "{via:?}");

        let new_run = bench.attach().await;
        assert_eq!(new_run.instance(), "new");
        assert_eq!(submit(&bench.link.port(&new_run), via, 2).await.len(), 2);
        assert_eq!(new.story.lock().unwrap().ran.len(), 2, "{via:?}");
    }
}

#[tokio::test]
async fn a_batch_above_the_message_limit_is_not_sent() {
    let bench = Bench::new(PATIENT, 5);
    let fake = Fake::new("a", []);
    let _server = fake.serve(&bench.address);
    let port = bench.link.port(&bench.attach().await);
    let mut large = batch(Via::Stream, 1);
    large.calls[0].data = vec![0; 2 << 20].into();
    let outcome = tokio::task::spawn_blocking(move || port.submit(large).wait())
        .await
        .unwrap();
    assert!(
        matches!(&outcome, Err(SeamError::NotSent { reason }) if reason.contains("1048576")),
        "{outcome:?}"
    );
    assert!(fake.story.lock().unwrap().seen.is_empty());
}

#[test]
fn answers_that_do_not_fit_the_question_are_not_believed() {
    let asked = |stop_on_error, calls: usize| ExecuteRequest {
        stop_on_error,
        calls: vec![Default::default(); calls],
        ..Default::default()
    };
    let answered = |statuses: &[u64]| ExecuteResponse {
        results: statuses
            .iter()
            .map(|&rax| WireResult {
                rax,
                ..Default::default()
            })
            .collect(),
        ..Default::default()
    };
    const FAILED: u64 = 1 << 63;
    for (case, request, answer, believed) in [
        ("all", asked(true, 2), answered(&[0, 0]), true),
        (
            "stopped at an error",
            asked(true, 2),
            answered(&[FAILED]),
            true,
        ),
        (
            "stopped without an error",
            asked(true, 2),
            answered(&[0]),
            false,
        ),
        (
            "stopped although it should not",
            asked(false, 2),
            answered(&[FAILED]),
            false,
        ),
        ("nothing at all", asked(true, 2), answered(&[]), false),
        ("more than asked", asked(true, 1), answered(&[0, 0]), false),
    ] {
        assert_eq!(results(&request, answer).is_ok(), believed, "{case}");
    }
}

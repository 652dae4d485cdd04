//! A server in this process, and the calls of the conformance platform.
//!
//! Addresses are those of the recorded sequences: TDR at 1 GiB, its pages behind it.

use std::time::Duration;

use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use mirror_proto::module::{
    ExecuteRequest, ExecuteResponse, GetPlatformRequest, GetPlatformResponse, Repeat, Seamcall,
};
use mirror_proto::seamcall_to_wire;
use tdx_defs::{CompletionStatus, Leaf, TdParams};
use tdx_module_svc::config::{Limits, Profile};
use tdx_module_svc::{Config, Error};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tonic::Status;
use tonic::transport::Channel;
use transport::{Address, Listener};

pub(crate) type Client = TdxModuleServiceClient<Channel>;

/// Root page of the TD.
pub(crate) const TDR: u64 = 0x4000_0000;
/// First of the TD's control pages.
const TDCX: u64 = 0x4000_1000;
/// First of the Secure EPT pages, for levels 3, 2 and 1.
const SEPT: u64 = 0x4001_0000;
/// First of the pages that tests map.
pub(crate) const PAGE: u64 = 0x4002_0000;
/// Root page of the vCPU, followed by its other control pages.
pub(crate) const TDVPR: u64 = 0x4000_7000;
/// Host memory.
const SHARED: u64 = 0x10_0000;
/// A private key id.
const HKID: u64 = 33;
/// How long anything may take before a test is called stuck.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A running service.
pub(crate) struct Server {
    pub(crate) unix: String,
    pub(crate) tcp: String,
    stop: oneshot::Sender<()>,
    running: JoinHandle<Result<(), Error>>,
    _dir: tempfile::TempDir,
}

impl Server {
    /// A new module on the conformance platform.
    pub(crate) async fn start() -> Self {
        Self::with(Limits::default()).await
    }

    pub(crate) async fn with(limits: Limits) -> Self {
        Self::serve(Config {
            profile: Profile::Conformance,
            limits,
            ..Config::default()
        })
        .await
    }

    /// A new module whose conditions callers may change.
    pub(crate) async fn with_injection() -> Self {
        Self::serve(Config {
            profile: Profile::Conformance,
            allow_injection: true,
            ..Config::default()
        })
        .await
    }

    /// A new module that takes fault rules.
    pub(crate) async fn with_faults() -> Self {
        Self::serve(Config {
            profile: Profile::Conformance,
            fault_injection: true,
            ..Config::default()
        })
        .await
    }

    async fn serve(config: Config) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let unix = Address::Unix(dir.path().join("module.sock"));
        let tcp: Address = "http://127.0.0.1:0".parse().unwrap();
        let listeners = vec![
            Listener::bind(&unix).await.unwrap(),
            Listener::bind(&tcp).await.unwrap(),
        ];
        let urls = listeners
            .iter()
            .map(|bound| bound.address().unwrap().to_string());
        let [unix, tcp] = <[_; 2]>::try_from(urls.collect::<Vec<_>>()).unwrap();

        let (stop, stopped) = oneshot::channel();
        let running = tokio::spawn(tdx_module_svc::run(config, listeners, async {
            let _ = stopped.await;
        }));
        Self {
            unix,
            tcp,
            stop,
            running,
            _dir: dir,
        }
    }

    pub(crate) async fn client(&self) -> Client {
        TdxModuleServiceClient::new(transport::connect(&self.unix).await.unwrap())
    }

    /// Asks the service to stop; the handle ends when it has.
    pub(crate) fn stop(self) -> (JoinHandle<Result<(), Error>>, tempfile::TempDir) {
        let _ = self.stop.send(());
        (self.running, self._dir)
    }
}

/// One batch without a session, on processor 0.
pub(crate) fn batch(calls: Vec<Seamcall>) -> ExecuteRequest {
    ExecuteRequest {
        calls,
        ..ExecuteRequest::default()
    }
}

/// One batch of a session.
pub(crate) fn numbered(session: &str, sequence: u64, calls: Vec<Seamcall>) -> ExecuteRequest {
    ExecuteRequest {
        session: session.into(),
        sequence,
        ..batch(calls)
    }
}

/// Executes and returns the statuses.
pub(crate) async fn statuses(client: &mut Client, calls: Vec<Seamcall>) -> Vec<CompletionStatus> {
    statuses_of(&execute(client, batch(calls)).await.unwrap())
}

pub(crate) async fn execute(
    client: &mut Client,
    request: ExecuteRequest,
) -> Result<ExecuteResponse, Status> {
    client
        .execute(request)
        .await
        .map(tonic::Response::into_inner)
}

pub(crate) fn statuses_of(answer: &ExecuteResponse) -> Vec<CompletionStatus> {
    answer
        .results
        .iter()
        .map(|result| CompletionStatus(result.rax))
        .collect()
}

pub(crate) async fn platform(client: &mut Client) -> GetPlatformResponse {
    client
        .get_platform(GetPlatformRequest {})
        .await
        .unwrap()
        .into_inner()
}

/// Pages in use of a type.
pub(crate) async fn pages_in_use(client: &mut Client, name: &str) -> u64 {
    let counts = platform(client).await.pages;
    counts
        .iter()
        .find(|count| count.name == name)
        .map_or(0, |count| count.pages_4k)
}

fn call(leaf: Leaf, rcx: u64, rdx: u64) -> Seamcall {
    seamcall_to_wire(tdx_defs::Seamcall::new(leaf).rcx(rcx).rdx(rdx))
}

/// TDH.MNG.CREATE of the TD.
pub(crate) fn create() -> Seamcall {
    call(Leaf::MNG_CREATE, TDR, HKID)
}

/// The rest of the way to a TD that takes memory: keys, control pages, parameters, tables for the
/// first 2 MiB of GPA space.
pub(crate) fn build() -> Vec<Seamcall> {
    let mut calls = vec![call(Leaf::MNG_KEY_CONFIG, TDR, 0)];
    // A run has no RDX stride, and needs none.
    calls.push(repeated(call(Leaf::MNG_ADDCX, TDCX, TDR), 6, 0x1000, 0));
    let params = TdParams::default()
        .with_xfam(3)
        .with_max_vcpus(4)
        .with_eptp_controls(0x1E)
        .with_tsc_frequency(100);
    calls.push(Seamcall {
        data: params.as_bytes().to_vec().into(),
        ..call(Leaf::MNG_INIT, TDR, SHARED)
    });
    for (at, level) in [3, 2, 1].into_iter().enumerate() {
        let page = SEPT + 0x1000 * u64::try_from(at).unwrap();
        calls.push(Seamcall {
            r8: page,
            ..call(Leaf::MEM_SEPT_ADD, level, TDR)
        });
    }
    calls
}

/// One vCPU and the end of measurement.
pub(crate) fn finalize() -> Vec<Seamcall> {
    vec![
        call(Leaf::VP_CREATE, TDVPR, TDR),
        repeated(call(Leaf::VP_ADDCX, TDVPR + 0x1000, TDVPR), 5, 0x1000, 0),
        call(Leaf::VP_INIT, TDVPR, 0),
        call(Leaf::MR_FINALIZE, TDR, 0),
    ]
}

/// TDH.MEM.PAGE.ADD of `gpa` with content.
pub(crate) fn add(gpa: u64, page: u64) -> Seamcall {
    Seamcall {
        r8: page,
        r9: SHARED,
        data: vec![0xA5; 4096].into(),
        ..call(Leaf::MEM_PAGE_ADD, gpa, TDR)
    }
}

/// TDH.MR.EXTEND of all 4 KiB at `gpa`.
pub(crate) fn extend(gpa: u64) -> Seamcall {
    repeated(call(Leaf::MR_EXTEND, gpa, TDR), 16, 0x100, 0)
}

/// TDH.MEM.PAGE.AUG of `gpa`.
pub(crate) fn aug(gpa: u64, page: u64) -> Seamcall {
    Seamcall {
        r8: page,
        ..call(Leaf::MEM_PAGE_AUG, gpa, TDR)
    }
}

/// TDH.MEM.RANGE.BLOCK of one 4 KiB page.
pub(crate) fn block(gpa: u64) -> Seamcall {
    call(Leaf::MEM_RANGE_BLOCK, gpa, TDR)
}

/// TDH.MEM.TRACK.
pub(crate) fn track() -> Seamcall {
    call(Leaf::MEM_TRACK, TDR, 0)
}

/// TDH.MEM.PAGE.REMOVE.
pub(crate) fn remove(gpa: u64) -> Seamcall {
    call(Leaf::MEM_PAGE_REMOVE, gpa, TDR)
}

/// TDH.VP.FLUSH of the vCPU.
pub(crate) fn vp_flush() -> Seamcall {
    call(Leaf::VP_FLUSH, TDVPR, 0)
}

/// TDH.MNG.VPFLUSHDONE.
pub(crate) fn vpflushdone() -> Seamcall {
    call(Leaf::MNG_VPFLUSHDONE, TDR, 0)
}

/// TDH.PHYMEM.PAGE.RDMD, which succeeds on every page of a TDMR.
pub(crate) fn rdmd(page: u64) -> Seamcall {
    call(Leaf::PHYMEM_PAGE_RDMD, page, 0)
}

/// `call`, `count` times with strides.
pub(crate) fn repeated(call: Seamcall, count: u32, rcx_stride: i64, r8_stride: i64) -> Seamcall {
    Seamcall {
        repeat: Some(Repeat {
            count,
            rcx_stride,
            r8_stride,
            r9_stride: 0,
        }),
        ..call
    }
}

/// All statuses are TDX_SUCCESS.
pub(crate) fn assert_success(statuses: &[CompletionStatus]) {
    assert!(
        statuses.iter().all(|status| status.is_success()),
        "{statuses:?}"
    );
}

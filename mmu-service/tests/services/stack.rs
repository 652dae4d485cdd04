//! Both services, each in a runtime of its own that stands for its process: with the runtime go
//! its sockets, as with a process that is killed.

use std::path::Path;
use std::time::Duration;

use clap::Parser as _;
use mirror_proto::mmu::mmu_service_client::MmuServiceClient;
use mirror_proto::mmu::{self as wire, Slot};
use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use mirror_proto::module::{GetPlatformRequest, GetPlatformResponse};
use tokio::sync::oneshot;
use tonic::transport::Channel;
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;
use transport::{Address, Listener};

/// KVM_MEMORY_ATTRIBUTE_PRIVATE.
pub(crate) const PRIVATE: u64 = 8;
/// Bytes.
pub(crate) const PAGE: u64 = 4096;
/// Bytes.
pub(crate) const MIB: u64 = 1 << 20;
/// SHARED bit of a VM with 48-bit addresses.
pub(crate) const SHARED: u64 = 1 << 47;
/// Exit qualification of a write.
pub(crate) const WRITE: u64 = 2;
/// No test waits longer for anything.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// A service in a runtime of its own.
pub(crate) struct Process {
    runtime: Option<tokio::runtime::Runtime>,
    /// Host and port beside the Unix socket.
    pub(crate) authority: String,
    stop: Option<oneshot::Sender<()>>,
    ended: Option<oneshot::Receiver<()>>,
}

impl Process {
    fn start<F>(
        address: &Address,
        run: impl FnOnce(Vec<Listener>, oneshot::Receiver<()>) -> F + Send + 'static,
    ) -> Self
    where
        F: Future<Output = Result<(), String>> + Send,
    {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (stop, stopped) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let (bound, is_bound) = std::sync::mpsc::channel();
        let address = address.clone();
        runtime.spawn(async move {
            let unix = Listener::bind(&address).await.unwrap();
            let port: Address = "http://127.0.0.1:0".parse().unwrap();
            let tcp = Listener::bind(&port).await.unwrap();
            let Address::Tcp(authority) = tcp.address().unwrap() else {
                panic!("bound TCP")
            };
            bound.send(authority).unwrap();
            run(vec![unix, tcp], stopped).await.unwrap();
            let _ = end.send(());
        });
        let authority = is_bound.recv_timeout(PATIENCE).expect("bound");
        Self {
            authority,
            runtime: Some(runtime),
            stop: Some(stop),
            ended: Some(ended),
        }
    }

    /// A new run of the TDX module.
    pub(crate) fn module(address: &Address) -> Self {
        Self::start(address, |listeners, stop| async {
            let config = tdx_module_svc::Config {
                fault_injection: true,
                ..tdx_module_svc::Config::default()
            };
            let stop = async { drop(stop.await) };
            tdx_module_svc::run(config, listeners, stop)
                .await
                .map_err(|e| e.to_string())
        })
    }

    /// The service under test.
    pub(crate) fn mmu(address: &Address, module: &Address, options: &[&str]) -> Self {
        let (listen, module) = (address.to_string(), module.to_string());
        let mut args = vec!["mmu-service", "--listen", &listen, "--module", &module];
        args.extend(options);
        let config = mmu_service::Config::try_parse_from(args).unwrap();
        Self::start(address, |listeners, stop| async {
            let stop = async { drop(stop.await) };
            mmu_service::run(config, listeners, stop)
                .await
                .map_err(|e| e.to_string())
        })
    }

    /// Tells it to stop.
    pub(crate) fn signal(&mut self) {
        drop(self.stop.take());
    }

    /// Waits until it has ended by itself.
    pub(crate) async fn ended(&mut self) {
        let ended = self.ended.take().expect("asked once");
        tokio::time::timeout(PATIENCE, ended)
            .await
            .expect("in time")
            .expect("without a panic");
    }

    /// Ends it at once.
    pub(crate) fn kill(self) {
        drop(self);
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let Some(runtime) = self.runtime.take() else {
            return;
        };
        // On another thread, since waiting is not allowed on one that runs a test. Operations that
        // are blocked in the module link end when their link does.
        let end = std::thread::spawn(move || runtime.shutdown_timeout(Duration::from_secs(2)));
        end.join().expect("no panic at the end");
    }
}

/// A module, a service and a client.
pub(crate) struct Stack {
    pub(crate) dir: tempfile::TempDir,
    pub(crate) module: Option<Process>,
    pub(crate) service: Option<Process>,
    pub(crate) client: MmuServiceClient<Channel>,
}

impl Stack {
    /// Both services, ready.
    pub(crate) async fn start() -> Self {
        Self::with_options(&[]).await
    }

    /// Both services, the MMU with `options`.
    pub(crate) async fn with_options(options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let module = Process::module(&socket(dir.path(), "module"));
        let link = socket(dir.path(), "module");
        Self::beside(dir, Some(module), &link, options).await
    }

    /// A service that reaches its module at `link`.
    pub(crate) async fn beside(
        dir: tempfile::TempDir,
        module: Option<Process>,
        link: &Address,
        options: &[&str],
    ) -> Self {
        let address = socket(dir.path(), "mmu");
        let service = Process::mmu(&address, link, options);
        let client = MmuServiceClient::new(transport::connect(&address.to_string()).await.unwrap())
            .max_decoding_message_size(64 << 20)
            .max_encoding_message_size(64 << 20);
        let stack = Self {
            dir,
            module,
            service: Some(service),
            client,
        };
        if stack.module.is_some() {
            stack.wait_until(ServingStatus::Serving).await;
        }
        stack
    }

    /// Where the module listens, unless something is in between.
    pub(crate) fn module_address(&self) -> Address {
        socket(self.dir.path(), "module")
    }

    /// Where the page of the service is, as host and port.
    pub(crate) fn authority(&self) -> &str {
        &self.service.as_ref().expect("it runs").authority
    }

    /// Waits for a health status of the service.
    pub(crate) async fn wait_until(&self, status: ServingStatus) {
        let address = socket(self.dir.path(), "mmu").to_string();
        let mut health = HealthClient::new(transport::connect(&address).await.unwrap());
        let service = "kvm.mmu.v1.MmuService".to_owned();
        let watch = health.watch(HealthCheckRequest { service }).await.unwrap();
        let mut watch = watch.into_inner();
        let reached = async {
            while let Some(answer) = watch.message().await.unwrap() {
                if answer.status() == status {
                    return;
                }
            }
            panic!("the health watch ended before {status:?}");
        };
        tokio::time::timeout(PATIENCE, reached)
            .await
            .expect("health in time");
    }

    /// What the module holds.
    pub(crate) async fn platform(&self) -> GetPlatformResponse {
        let address = socket(self.dir.path(), "module").to_string();
        let channel = transport::connect(&address).await.unwrap();
        let mut module = TdxModuleServiceClient::new(channel);
        module
            .get_platform(GetPlatformRequest {})
            .await
            .unwrap()
            .into_inner()
    }

    /// Whether the module holds nothing for anybody.
    pub(crate) async fn assert_all_given_back(&self) {
        let platform = self.platform().await;
        assert_eq!(platform.hkids_in_use, 0);
        let held: Vec<_> = platform
            .pages
            .iter()
            .filter(|pages| pages.pages_4k != 0)
            .collect();
        assert!(held.is_empty(), "{held:?}");
    }

    /// A VM with `vcpus` and a private guest_memfd slot of `size` bytes from address 0.
    pub(crate) async fn vm(&mut self, mode: wire::Mode, vcpus: u32, size: u64) -> u64 {
        let request = wire::CreateVmRequest {
            mode: mode.into(),
            ..Default::default()
        };
        let vm_id = self
            .client
            .create_vm(request)
            .await
            .unwrap()
            .into_inner()
            .vm_id;
        for _ in 0..vcpus {
            self.client
                .create_vcpu(wire::CreateVcpuRequest {
                    vm_id,
                    create_only: false,
                })
                .await
                .unwrap();
        }
        self.client
            .set_user_memory_region(region(vm_id, 0, size))
            .await
            .unwrap();
        self.convert(vm_id, 0, size, PRIVATE).await.unwrap();
        vm_id
    }

    /// An ordinary VM with one vCPU, and otherwise as `request` says.
    pub(crate) async fn ordinary(&mut self, request: wire::CreateVmRequest) -> u64 {
        let request = wire::CreateVmRequest {
            kind: wire::VmKind::Ordinary.into(),
            ..request
        };
        let vm_id = self.client.create_vm(request).await.unwrap();
        let vm_id = vm_id.into_inner().vm_id;
        let vcpu = wire::CreateVcpuRequest {
            vm_id,
            create_only: false,
        };
        self.client.create_vcpu(vcpu).await.unwrap();
        vm_id
    }

    pub(crate) async fn set_slot(&mut self, vm_id: u64, slot: Slot) -> Result<(), Status> {
        let slot = Some(slot);
        let request = wire::SetUserMemoryRegionRequest { vm_id, slot };
        self.client.set_user_memory_region(request).await.map(drop)
    }

    /// [`Self::vm`], finalised.
    pub(crate) async fn running_vm(&mut self, mode: wire::Mode, vcpus: u32, size: u64) -> u64 {
        let vm_id = self.vm(mode, vcpus, size).await;
        self.client
            .finalize_vm(wire::FinalizeVmRequest { vm_id, hw_error: 0 })
            .await
            .unwrap();
        vm_id
    }

    pub(crate) async fn convert(
        &mut self,
        vm_id: u64,
        gpa: u64,
        size: u64,
        attributes: u64,
    ) -> Result<wire::Counts, Status> {
        let request = wire::SetMemoryAttributesRequest {
            vm_id,
            gpa,
            size,
            attributes,
        };
        let response = self
            .client
            .set_memory_attributes(request)
            .await?
            .into_inner();
        Ok(response.counts.expect("counts"))
    }

    pub(crate) async fn fault(
        &mut self,
        vm_id: u64,
        vcpu_id: u32,
        gpa: u64,
    ) -> Result<wire::HandleFaultResponse, Status> {
        let fault = Some(wire::Fault {
            gpa,
            qualification: WRITE,
            ..Default::default()
        });
        let request = wire::HandleFaultRequest {
            vm_id,
            vcpu_id,
            fault,
            ..Default::default()
        };
        self.client
            .handle_fault(request)
            .await
            .map(tonic::Response::into_inner)
    }

    pub(crate) async fn prefault(
        &mut self,
        vm_id: u64,
        gpa: u64,
        size: u64,
    ) -> Result<wire::PreFaultMemoryResponse, Status> {
        let request = wire::PreFaultMemoryRequest {
            vm_id,
            vcpu_id: 0,
            gpa,
            size,
        };
        let answers = self.client.pre_fault_memory(request).await?.into_inner();
        Ok(last(answers).await?.expect("a last message"))
    }

    pub(crate) async fn audit(&mut self, vm_id: u64) -> Result<wire::AuditResponse, Status> {
        let answers = self
            .client
            .audit(wire::AuditRequest { vm_id })
            .await?
            .into_inner();
        Ok(last(answers).await?.expect("a last message"))
    }

    /// The mirror is the private tree, and nothing is left half done.
    pub(crate) async fn assert_clean(&mut self, vm_id: u64) {
        let audit = self.audit(vm_id).await.unwrap();
        assert!(audit.finished);
        assert_eq!(
            (audit.mismatches, audit.frozen),
            (0, 0),
            "{:?}",
            audit.first_mismatches
        );
    }

    pub(crate) async fn destroy(&mut self, vm_id: u64) -> wire::DestroyVmResponse {
        self.client
            .destroy_vm(wire::DestroyVmRequest { vm_id, mode: 0 })
            .await
            .unwrap()
            .into_inner()
    }

    pub(crate) async fn list(&mut self) -> Vec<wire::VmInfo> {
        self.client
            .list_vms(wire::ListVmsRequest {})
            .await
            .unwrap()
            .into_inner()
            .vms
    }

    pub(crate) async fn stats(&mut self, vm_id: u64) -> wire::GetStatsResponse {
        self.client
            .get_stats(wire::GetStatsRequest { vm_id })
            .await
            .unwrap()
            .into_inner()
    }
}

/// The address of a service's socket.
pub(crate) fn socket(dir: &Path, name: &str) -> Address {
    Address::Unix(dir.join(format!("{name}.sock")))
}

/// Slot 1: `size` bytes of guest_memfd at `gpa`.
pub(crate) fn region(vm_id: u64, gpa: u64, size: u64) -> wire::SetUserMemoryRegionRequest {
    let slot = Slot {
        slot_id: 1,
        gpa,
        size,
        userspace_addr: 0x7f00_0000_0000,
        guest_memfd: true,
        ..Default::default()
    };
    wire::SetUserMemoryRegionRequest {
        vm_id,
        slot: Some(slot),
    }
}

/// The last message of a stream.
pub(crate) async fn last<T>(mut answers: tonic::Streaming<T>) -> Result<Option<T>, Status> {
    let mut last = None;
    while let Some(answer) = answers.message().await? {
        last = Some(answer);
    }
    Ok(last)
}

/// How often a leaf was called.
pub(crate) fn calls(counts: &wire::Counts, name: &str) -> u64 {
    let named = counts.seamcalls.iter().filter(|leaf| leaf.name == name);
    named.map(|leaf| leaf.count).sum()
}

/// All calls.
pub(crate) fn all_calls(counts: &wire::Counts) -> u64 {
    counts.seamcalls.iter().map(|leaf| leaf.count).sum()
}

/// Pages of one PAMT type.
pub(crate) fn pages(platform: &GetPlatformResponse, name: &str) -> u64 {
    platform
        .pages
        .iter()
        .filter(|pages| pages.name == name)
        .map(|pages| pages.pages_4k)
        .sum()
}

/// The refused field, from BadRequest.
pub(crate) fn field_of(status: &Status) -> Option<String> {
    let details = status.get_error_details();
    details
        .bad_request()
        .and_then(|bad| Some(bad.field_violations.first()?.field.clone()))
}

/// The reason and the errno, from ErrorInfo.
pub(crate) fn reason_of(status: &Status) -> (String, String) {
    let details = status.get_error_details();
    let info = details
        .error_info()
        .expect("every refusal has an ErrorInfo");
    (
        info.reason.clone(),
        info.metadata.get("errno").cloned().unwrap_or_default(),
    )
}

/// Asserts code and reason of a refusal.
pub(crate) fn assert_refused<T: std::fmt::Debug>(
    outcome: Result<T, Status>,
    code: Code,
    reason: &str,
) {
    let status = outcome.expect_err("a refusal");
    assert_eq!(
        (status.code(), &*reason_of(&status).0),
        (code, reason),
        "{status}"
    );
}

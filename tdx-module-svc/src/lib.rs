//! The TDX module as a service: `tdx.module.v1` over a Unix socket or TCP.
//!
//! The shell around the `tdx-module` core. It checks what came over the wire (`batch`), runs each
//! batch in one section without an await (`execute`), remembers answers for batches that are sent
//! again (`replay`), and turns refusals into gRPC statuses (`status`). The core knows none of
//! this, and the shell knows no leaf.
//!
//! Invariants
//! - S1  A request that is refused has changed nothing.
//! - S2  A batch that was started runs to its end and its answer is recorded, whether or not the
//!   caller still waits.
//! - S3  Batches of one session run one after another; a sequence number runs at most once.

pub mod access;
mod batch;
mod cli;
pub mod config;
mod execute;
mod faults;
pub mod fuzz;
mod guest;
mod host;
mod metrics;
mod platform;
mod reasons;
mod replay;
mod running;
mod service;
mod status;
mod trace;

use std::sync::Arc;
use std::time::Duration;

use mirror_proto::module::tdx_fault_service_server::{
    SERVICE_NAME as FAULT_SERVICE_NAME, TdxFaultServiceServer,
};
use mirror_proto::module::tdx_guest_service_server::{
    SERVICE_NAME as GUEST_SERVICE_NAME, TdxGuestServiceServer,
};
use mirror_proto::module::tdx_module_service_server::{SERVICE_NAME, TdxModuleServiceServer};
use mirror_proto::module::tdx_platform_service_server::{
    SERVICE_NAME as PLATFORM_SERVICE_NAME, TdxPlatformServiceServer,
};
use tdx_module::PlatformError;
use tokio_util::sync::CancellationToken;
use tonic::service::{LayerExt as _, Routes};
use tonic_health::ServingStatus;
use tonic_health::server::{HealthReporter, health_reporter};
use transport::{AdmissionLayer, Listener, ServeError};

pub use access::RULES;
pub use cli::cli_main;
pub use config::Config;
pub use platform::{AreaFlag, FeaturesFlag, HkidRange, PlatformFileError, PlatformFlags, TdmrFlag};

use faults::Faults;
use guest::GuestService;
use host::HostService;
use running::Running;
use service::ModuleService;

/// The services that answer health checks by name.
const SERVICES: [&str; 3] = [SERVICE_NAME, GUEST_SERVICE_NAME, PLATFORM_SERVICE_NAME];
/// When a refused caller should come back, in milliseconds: a few small batches later.
const RETRY_AFTER_MS: u64 = 10;

/// The service cannot start, or failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The platform file is not usable.
    #[error(transparent)]
    PlatformFile(#[from] PlatformFileError),
    /// The module does not accept the platform.
    #[error("the platform is not possible")]
    Platform(#[from] PlatformError),
    /// The descriptors that were built in do not decode.
    #[error("server reflection cannot be set up")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Serving failed.
    #[error(transparent)]
    Serve(#[from] ServeError),
}

/// Runs a new module on `listeners` until `shutdown` completes, then drains.
///
/// The module is born here and ends here: another call has another instance id.
pub async fn run(
    config: Config,
    listeners: Vec<Listener>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let running = Arc::new(Running::start(platform::resolve(&config)?, &config.limits)?);
    let draining = CancellationToken::new();
    let faults = if config.fault_injection {
        tracing::warn!("calls meet faults that callers ask for");
        Faults::enabled()
    } else {
        Faults::default()
    };
    let service = ModuleService::new(
        Arc::clone(&running),
        &config.limits,
        faults.clone(),
        draining.clone(),
    );
    let guests = GuestService::new(Arc::clone(&running), &config.limits, draining.clone());
    let host = HostService::new(Arc::clone(&running), config.allow_injection);
    tracing::info!(instance = running.now().instance, "the module is up");
    for listener in &listeners {
        if let Ok(address) = listener.address() {
            tracing::info!(%address, "listening");
        }
    }

    let (health, health_service) = health_reporter();
    for service in SERVICES {
        health
            .set_service_status(service, ServingStatus::Serving)
            .await;
    }
    let admission = AdmissionLayer::new(
        config.limits.max_concurrent_requests,
        Duration::from_millis(RETRY_AFTER_MS),
        reasons::OVERLOADED,
        status::DOMAIN,
    );
    let web = metrics::routes(
        service.metrics(),
        Arc::clone(&running),
        admission.clone(),
        faults.clone(),
    );
    let max_message = usize::try_from(config.limits.max_message_bytes).unwrap_or(usize::MAX);
    let mut services =
        Routes::new(admission.clone().named_layer(
            TdxModuleServiceServer::new(service).max_decoding_message_size(max_message),
        ))
        .add_service(
            admission.clone().named_layer(
                TdxGuestServiceServer::new(guests).max_decoding_message_size(max_message),
            ),
        )
        .add_service(admission.named_layer(
            TdxPlatformServiceServer::new(host).max_decoding_message_size(max_message),
        ))
        .add_service(health_service)
        .add_service(reflection(&config).build_v1()?)
        // Older clients ask the alpha version only.
        .add_service(reflection(&config).build_v1alpha()?);
    if let Some(faults) = faults.service() {
        // Not counted among the admitted: rules are taken away while the module is overloaded, too.
        services = services
            .add_service(TdxFaultServiceServer::new(faults).max_decoding_message_size(max_message));
    }
    let router = transport::server()
        // Its messages carry trace context of their own, see `trace`.
        .layer(
            telemetry::propagate::ServerTraceLayer::new()
                // The host asks for the platform again and again: no trace begins here.
                .continued_only()
                .skip(service::STREAM_PATH)
                .skip(guest::STREAM_PATH),
        )
        .layer(config.access.layer())
        .add_routes(transport::with_web(services, web));

    let drain = Duration::from_millis(config.limits.drain_ms);
    let shutdown = async move {
        shutdown.await;
        stop_serving(health).await;
        draining.cancel();
    };
    Ok(transport::serve(router, listeners, shutdown, drain).await?)
}

fn reflection(config: &Config) -> tonic_reflection::server::Builder<'static> {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(mirror_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // The details of refusals, so that a generic client can show them.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(SERVICE_NAME)
        .with_service_name(GUEST_SERVICE_NAME)
        .with_service_name(PLATFORM_SERVICE_NAME)
        .with_service_name("grpc.health.v1.Health");
    if config.fault_injection {
        builder.with_service_name(FAULT_SERVICE_NAME)
    } else {
        builder
    }
}

/// Tells watchers that it is over, and ends their streams: the drain would wait for them.
async fn stop_serving(mut health: HealthReporter) {
    for service in SERVICES.into_iter().chain([""]) {
        health
            .set_service_status(service, ServingStatus::NotServing)
            .await;
        health.clear_service_status(service).await;
    }
}

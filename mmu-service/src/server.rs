//! The server: services, layers, and the way from the first connection to the last.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use mirror_proto::mmu::mmu_service_server::{MmuServiceServer, SERVICE_NAME};
use telemetry::Gate;
use telemetry::propagate::ServerTraceLayer;
use tokio::time::Instant;
use tonic::service::{LayerExt as _, Routes};
use transport::{AdmissionLayer, Listener};

use crate::cli::Error;
use crate::config::{Config, size};
use crate::health;
use crate::link::ModuleLink;
use crate::metrics::Metrics;
use crate::reasons;
use crate::recover;
use crate::service::{self, Service};
use crate::shell::Shell;
use crate::status;
use crate::store::Store;
use crate::web;

/// When a request that found no place may come back.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// Serves on `listeners` until `shutdown` completes, then drains: running operations end and every
/// VM is released, within the configured time.
///
/// The module need not be there yet: the service is not healthy until it is.
pub async fn run(
    config: Config,
    listeners: Vec<Listener>,
    shutdown: impl Future<Output = ()>,
) -> Result<(), Error> {
    let store = config.state.as_deref().map(Store::open).transpose();
    let store = store.map_err(Error::State)?;
    let metrics = Metrics::new();
    let link =
        ModuleLink::start(config.link_config()?, Arc::clone(&metrics.link)).map_err(Error::Link)?;
    let gate = config.tracing.gate();
    let shell = Shell::new(config.limits, gate.clone(), link, metrics, store.clone());
    let (reporter, health_service) = tonic_health::server::health_reporter();
    let health = health::report(reporter, &shell).await;

    let message_limit = config.limits.message_limit();
    let mmu = MmuServiceServer::new(Service::new(shell.clone()))
        .max_decoding_message_size(message_limit)
        .max_encoding_message_size(message_limit);
    let admission = AdmissionLayer::new(
        size(config.limits.max_requests),
        RETRY_AFTER,
        reasons::OVERLOADED,
        status::DOMAIN,
    );
    let web = web::routes(Arc::clone(&shell), config.page.clone(), admission.clone());
    let services = Routes::new(health_service)
        .add_service(reflection().build_v1().map_err(Error::Reflection)?)
        .add_service(reflection().build_v1alpha().map_err(Error::Reflection)?)
        // Only in front of the work: a busy service still answers health checks.
        .add_service(admission.named_layer(mmu));
    let router = transport::server()
        .layer(
            ServerTraceLayer::new()
                .gate(service::FAULT_PATH, gate)
                // Open as long as a guest runs; its runs pass the gate one by one.
                .gate(service::RUN_PATH, Gate::new(0, Duration::ZERO))
                // Open for hours; its messages have spans of their own.
                .skip(service::FAULT_STREAM_PATH),
        )
        .layer(config.access.layer())
        .add_routes(transport::with_web(services, web));

    for address in listeners
        .iter()
        .filter_map(|listener| listener.address().ok())
    {
        tracing::info!(%address, module = %config.module, "listening");
    }
    let recovery = store.map(|store| tokio::spawn(recover::run(Arc::clone(&shell), store)));
    let drain = config.limits.drain();
    let mut drained_by = None;
    let stopping = async {
        shutdown.await;
        drained_by = Some(Instant::now() + drain);
        shell.start_draining();
    };
    // Half of the time for open connections, so that a client that holds on to its streams does
    // not cost the module its pages.
    transport::serve(router, listeners, stopping, drain / 2)
        .await
        .map_err(Error::Serve)?;
    shell
        .finish(drained_by.unwrap_or_else(|| Instant::now() + drain))
        .await;
    if let Some(recovery) = recovery {
        // It has seen the end of the service, or is in the middle of a look at the module.
        recovery.abort();
    }
    health.abort();
    Ok(())
}

fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(mirror_proto::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        // The details of refusals, so that a generic client can show them.
        .register_encoded_file_descriptor_set(tonic_types::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(SERVICE_NAME)
        .with_service_name("grpc.health.v1.Health")
        .with_service_name("grpc.reflection.v1.ServerReflection")
}

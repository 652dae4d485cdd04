//! Logs and traces of the services and of the command line tool.
//!
//! Logs go to stderr, filtered by `RUST_LOG`. Spans go to an OTLP collector, but only when one is
//! configured by the usual `OTEL_*` variables; see [`settings`] for those that are read here
//! because the OpenTelemetry SDK leaves them to the application. [`propagate`] carries the W3C
//! trace context across gRPC calls, [`context`] inside messages of a long-lived stream. Which faults
//! have spans is decided by [`gate`], or afterwards by [`late`]; [`watch`] keeps the spans of a
//! trace for a caller that asked for them. [`metrics`] has what both services need to be scraped.
//!
//! Invariants
//! - T1  Each layer has a filter of its own: `RUST_LOG=warn` quiets the log and not the traces.
//! - T2  Without a collector nothing connects anywhere and nothing is logged about it.
//! - T3  [`Telemetry::shutdown`] ends in bounded time, collector or no collector.

pub mod context;
pub mod gate;
pub mod late;
mod log;
pub mod metrics;
pub mod propagate;
pub mod settings;
pub mod watch;

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use opentelemetry::global;
use opentelemetry::propagation::TextMapCompositePropagator;
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::{BaggagePropagator, TraceContextPropagator};
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing::{Dispatch, Subscriber};
use tracing_subscriber::filter::{FilterExt as _, LevelFilter, Targets, dynamic_filter_fn};
use tracing_subscriber::layer::{Layered, SubscriberExt as _};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Layer, Registry};

pub use context::{
    add_link, current_trace_id, is_sampled, set_remote_parent, traceparent_of_current_span,
};
pub use gate::Gate;
pub use opentelemetry::KeyValue;

use settings::{Propagator, Settings};

/// How long the last spans may take to leave the process, in milliseconds.
const FLUSH_MS: u64 = 3_000;

/// Crates whose spans describe the transport of traces and not the model.
const UNTRACED: [&str; 7] = [
    "h2",
    "hyper",
    "hyper_util",
    "opentelemetry",
    "opentelemetry_sdk",
    "tonic",
    "tower",
];

/// Telemetry could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `RUST_LOG`, or the default filter, is not a filter.
    #[error("log filter {filter:?} is malformed")]
    Filter {
        /// The filter as given.
        filter: String,
        /// Where it goes wrong.
        #[source]
        source: tracing_subscriber::filter::ParseError,
    },
    /// The OTLP exporter refused its settings.
    #[error("the OTLP span exporter cannot be set up")]
    Exporter(#[source] opentelemetry_otlp::ExporterBuildError),
    /// No thread for the exporter.
    #[error("the thread of the OTLP span exporter cannot be started")]
    Runtime(#[source] std::io::Error),
    /// The process has a subscriber already.
    #[error("telemetry is set up already")]
    Twice(#[source] tracing_subscriber::util::TryInitError),
}

/// Whether this process exports spans.
static RECORDING: AtomicBool = AtomicBool::new(false);

/// Whether spans leave this process: without that, nothing is traced unless a caller watches.
#[inline]
pub fn is_recording() -> bool {
    RECORDING.load(Ordering::Relaxed)
}

/// When spans get trace ids.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TraceIds {
    /// Only while spans are exported, or a trace is watched: without a collector tracing costs one
    /// atomic load.
    #[default]
    WhenExporting,
    /// Always, so that a tool can print the id of what it did and hand it on to the services.
    Always,
}

/// Keeps the exporter alive. [`shutdown`](Self::shutdown) sends what is left.
#[must_use = "spans that are still queued are lost without shutdown()"]
#[derive(Debug)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
    exporting: Option<tokio::runtime::Runtime>,
}

/// Sets up logs and traces of this process; [`TraceIds::WhenExporting`].
///
/// `default_service_name` counts when `OTEL_SERVICE_NAME` is unset, `default_log` when `RUST_LOG`
/// is; an empty `default_log` means warnings, and information from the service's own crate.
pub fn init(
    default_service_name: &'static str,
    default_log: &str,
) -> Result<Telemetry, TelemetryError> {
    init_with(default_service_name, default_log, TraceIds::default())
}

/// [`init`] with a choice of when spans get trace ids.
pub fn init_with(
    default_service_name: &'static str,
    default_log: &str,
    trace_ids: TraceIds,
) -> Result<Telemetry, TelemetryError> {
    let settings = Settings::from_env(|name| std::env::var(name).ok());
    let (telemetry, tracer) = Telemetry::build(default_service_name, &settings)?;
    let always = telemetry.is_exporting() || trace_ids == TraceIds::Always;
    let log_filter = settings.log_filter(default_service_name, default_log);
    let spans = tracer.map(|tracer| otel_layer(tracer, always));
    dispatch(log::layer(log_filter)?, spans)
        .try_init()
        .map_err(TelemetryError::Twice)?;
    if telemetry.is_exporting() {
        late::prepare();
    }
    RECORDING.store(telemetry.is_exporting(), Ordering::Relaxed);
    global::set_text_map_propagator(propagators(&settings));
    for ignored in &settings.ignored {
        tracing::warn!(setting = %ignored, "telemetry setting is ignored");
    }
    Ok(telemetry)
}

/// The layers together. A layer that may be absent has no place among them as an `Option`: `None`
/// switches every span and event on that nobody wants, those of HTTP/2 among them.
fn dispatch<L>(log: L, spans: Option<impl Layer<Layered<L, Registry>> + Send + Sync>) -> Dispatch
where
    L: Layer<Registry> + Send + Sync,
{
    let logging = tracing_subscriber::registry().with(log);
    match spans {
        Some(spans) => logging.with(spans).into(),
        None => logging.into(),
    }
}

impl Telemetry {
    fn build(
        default_service_name: &'static str,
        settings: &Settings,
    ) -> Result<(Self, Option<opentelemetry_sdk::trace::SdkTracer>), TelemetryError> {
        if settings.disabled {
            return Ok((
                Self {
                    provider: None,
                    exporting: None,
                },
                None,
            ));
        }
        let mut resource = Resource::builder()
            .with_attribute(KeyValue::new("service.version", env!("CARGO_PKG_VERSION")));
        // A name set in code would win over the variable.
        if !settings.has_service_name {
            resource = resource.with_service_name(default_service_name);
        }
        let mut provider = SdkTracerProvider::builder()
            .with_resource(resource.build())
            .with_span_processor(watch::Collector::default());
        let mut exporting = None;
        if settings.export {
            // The exporter gets a runtime of its own: its last flush must not wait for a worker of
            // the caller's runtime, which may have a single thread, or be gone.
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(1)
                .thread_name("otlp")
                .enable_all()
                .build()
                .map_err(TelemetryError::Runtime)?;
            let entered = runtime.enter();
            let exporter = opentelemetry_otlp::SpanExporter::builder()
                .with_tonic()
                .build()
                .map_err(TelemetryError::Exporter)?;
            drop(entered);
            provider = provider.with_batch_exporter(exporter);
            exporting = Some(runtime);
        }
        let provider = provider.build();
        let tracer = provider.tracer(default_service_name);
        global::set_tracer_provider(provider.clone());
        Ok((
            Self {
                provider: Some(provider),
                exporting,
            },
            Some(tracer),
        ))
    }

    /// Whether spans leave the process.
    pub fn is_exporting(&self) -> bool {
        self.exporting.is_some()
    }

    /// Sends the spans that are left, for a few seconds at most, and stops the exporter.
    pub fn shutdown(mut self) {
        self.stop();
    }

    fn stop(&mut self) {
        let Some(provider) = self.provider.take() else {
            return;
        };
        let Some(runtime) = self.exporting.take() else {
            return;
        };
        // The SDK bounds neither of the two by an argument of ours while a dead collector is being
        // dialled, so they run beside and the wait is bounded here.
        let (done, finished) = std::sync::mpsc::channel();
        let flush = std::thread::Builder::new()
            .name("otlp-flush".into())
            .spawn(move || {
                let flushed = provider.force_flush();
                let stopped = provider.shutdown_with_timeout(Duration::from_millis(FLUSH_MS));
                let _ = done.send(flushed.and(stopped));
            });
        if flush.is_ok() {
            match finished.recv_timeout(Duration::from_millis(FLUSH_MS)) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::warn!(%error, "the last spans were not delivered"),
                Err(_) => tracing::warn!("the last spans were not delivered in {FLUSH_MS} ms"),
            }
        }
        // Not a plain drop: that would block, and panic inside another runtime.
        runtime.shutdown_background();
    }
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Spans at INFO and above, whatever the log shows (T1), without noise attributes; unless `always`,
/// only while a trace is watched.
fn otel_layer<S>(tracer: opentelemetry_sdk::trace::SdkTracer, always: bool) -> impl Layer<S>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    tracing_opentelemetry::layer()
        .with_tracer(tracer)
        .with_threads(false)
        .with_tracked_inactivity(false)
        .with_location(false)
        .with_target(false)
        .with_filter(
            Targets::new()
                .with_default(LevelFilter::INFO)
                .with_targets(UNTRACED.map(|name| (name, LevelFilter::OFF)))
                .and(dynamic_filter_fn(move |_, _| always || watch::any())),
        )
}

fn propagators(settings: &Settings) -> TextMapCompositePropagator {
    TextMapCompositePropagator::new(
        settings
            .propagators
            .iter()
            .map(|propagator| match propagator {
                Propagator::TraceContext => Box::new(TraceContextPropagator::new())
                    as Box<dyn opentelemetry::propagation::TextMapPropagator + Send + Sync>,
                Propagator::Baggage => Box::new(BaggagePropagator::new()),
            })
            .collect(),
    )
}

#[cfg(test)]
pub(crate) mod testing {
    //! A subscriber whose finished spans can be read back.

    use super::*;
    use opentelemetry_sdk::trace::{InMemorySpanExporter, SpanData};

    pub(crate) struct Spans {
        exporter: InMemorySpanExporter,
        _default: tracing::subscriber::DefaultGuard,
    }

    impl Spans {
        /// Collects the spans of this thread from here on.
        pub(crate) fn collect() -> Self {
            let exporter = InMemorySpanExporter::default();
            let provider = SdkTracerProvider::builder()
                .with_simple_exporter(exporter.clone())
                .with_span_processor(crate::watch::Collector::default())
                .build();
            global::set_text_map_propagator(TraceContextPropagator::new());
            let subscriber =
                tracing_subscriber::registry().with(otel_layer(provider.tracer("test"), true));
            Self {
                exporter,
                _default: tracing::subscriber::set_default(subscriber),
            }
        }

        pub(crate) fn finished(&self) -> Vec<SpanData> {
            self.exporter.get_finished_spans().unwrap()
        }
    }

    pub(crate) fn attribute(span: &SpanData, key: &str) -> Option<String> {
        let found = span
            .attributes
            .iter()
            .find(|attribute| attribute.key.as_str() == key)?;
        Some(found.value.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_collector_that_is_not_there_delays_the_end_by_seconds_at_most() {
        let settings = Settings {
            export: true,
            ..Settings::from_env(|_| None)
        };
        let (telemetry, tracer) = Telemetry::build("test", &settings).unwrap();
        assert!(telemetry.is_exporting());
        drop(opentelemetry::trace::Tracer::start(
            &tracer.unwrap(),
            "lost",
        ));
        let started = std::time::Instant::now();
        telemetry.shutdown();
        assert!(started.elapsed() < Duration::from_millis(2 * FLUSH_MS));
    }

    #[test]
    fn without_a_collector_nothing_is_exported_and_a_disabled_sdk_has_no_tracer() {
        for (case, disabled, traced) in [
            ("nothing set", false, true),
            ("OTEL_SDK_DISABLED", true, false),
        ] {
            let settings = Settings {
                disabled,
                ..Settings::from_env(|_| None)
            };
            let (telemetry, tracer) = Telemetry::build("test", &settings).unwrap();
            assert_eq!(tracer.is_some(), traced, "{case}");
            assert!(!telemetry.is_exporting(), "{case}");
        }
    }

    #[test]
    fn what_neither_the_log_nor_a_trace_shows_is_never_made() {
        let provider = SdkTracerProvider::builder().build();
        for (case, tracer) in [
            ("OTEL_SDK_DISABLED", None),
            ("a collector", Some(provider.tracer("test"))),
        ] {
            let traced = tracer.is_some();
            let spans = tracer.map(|tracer| otel_layer(tracer, true));
            let log = log::layer("warn".into()).unwrap();
            let _default = tracing::dispatcher::set_default(&dispatch(log, spans));
            // The level and the target of a call site of HTTP/2, and one of ours.
            let of_http2 = tracing::trace_span!(target: "h2", "FramedRead::next");
            assert!(of_http2.is_disabled(), "{case}");
            let ours = tracing::info_span!("handle_fault");
            assert_eq!(!ours.is_disabled(), traced, "{case}");
        }
    }

    #[test]
    fn without_a_collector_spans_exist_only_on_request_or_while_their_trace_is_watched() {
        let _alone = crate::watch::tests::alone();
        for (case, always, watched, traced) in [
            ("a service", false, false, false),
            ("a service that explains", false, true, true),
            ("the command line tool", true, false, true),
        ] {
            let provider = SdkTracerProvider::builder().build();
            let layer = otel_layer(provider.tracer("test"), always);
            let subscriber = tracing_subscriber::registry().with(layer);
            let _default = tracing::subscriber::set_default(subscriber);
            let watch = watched.then(|| {
                watch::Watch::begin("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
            });
            let span = tracing::info_span!("fault");
            assert_eq!(span.in_scope(current_trace_id).is_some(), traced, "{case}");
            drop(watch);
        }
    }
}

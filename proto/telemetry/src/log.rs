//! The log on stderr.
//!
//! The OpenTelemetry SDK reports a collector that does not answer with every batch of spans; one
//! line a minute says as much.

use std::io::IsTerminal as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::filter::FilterExt as _;
use tracing_subscriber::layer::{Context, Filter};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, fmt};

use crate::TelemetryError;

/// Least time between two lines of the OpenTelemetry SDK, in seconds.
const SDK_LOG_INTERVAL_S: u64 = 60;

/// The log layer under the filter directives `filter`.
pub(crate) fn layer<S>(filter: String) -> Result<impl Layer<S>, TelemetryError>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let directives = match EnvFilter::builder().parse(&filter) {
        Ok(directives) => directives,
        Err(source) => return Err(TelemetryError::Filter { filter, source }),
    };
    let no_color = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    Ok(fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal() && !no_color)
        .with_filter(directives.and(SdkRateLimit::new())))
}

/// Lets through one event of the OpenTelemetry crates per interval, and everything else.
struct SdkRateLimit {
    started: Instant,
    /// Milliseconds after `started` until which those events are dropped.
    quiet_until_ms: AtomicU64,
}

impl SdkRateLimit {
    fn new() -> Self {
        Self {
            started: Instant::now(),
            quiet_until_ms: AtomicU64::new(0),
        }
    }

    /// Whether an event `now` after the start passes; the first of those that race wins.
    fn admit(&self, now: Duration) -> bool {
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        let quiet_until = self.quiet_until_ms.load(Ordering::Relaxed);
        now_ms >= quiet_until
            && self
                .quiet_until_ms
                .compare_exchange(
                    quiet_until,
                    now_ms.saturating_add(SDK_LOG_INTERVAL_S * 1000),
                    Ordering::Relaxed,
                    Ordering::Relaxed,
                )
                .is_ok()
    }
}

impl<S: Subscriber> Filter<S> for SdkRateLimit {
    fn enabled(&self, _: &Metadata<'_>, _: &Context<'_, S>) -> bool {
        true
    }

    fn event_enabled(&self, event: &Event<'_>, _: &Context<'_, S>) -> bool {
        !event.metadata().target().starts_with("opentelemetry")
            || self.admit(self.started.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sdk_gets_one_line_per_interval() {
        let limit = SdkRateLimit::new();
        for (at_s, admitted) in [(0, true), (1, false), (59, false), (60, true), (61, false)] {
            assert_eq!(
                limit.admit(Duration::from_secs(at_s)),
                admitted,
                "second {at_s}"
            );
        }
    }

    #[test]
    fn a_malformed_filter_is_refused_with_its_text() {
        let refused = layer::<tracing_subscriber::Registry>("warn,a=b=c".into());
        let error = refused.err().map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            Some("log filter \"warn,a=b=c\" is malformed")
        );
    }
}

//! The `OTEL_*` variables that the OpenTelemetry SDK leaves to the application.
//!
//! Source: OpenTelemetry specification, "Environment Variable Specification". The SDK and its
//! exporter read the others themselves: `OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`,
//! `OTEL_TRACES_SAMPLER`, `OTEL_BSP_*`, `OTEL_EXPORTER_OTLP_*`, `OTEL_SPAN_*_LIMIT`.
//!
//! An empty variable counts as unset. A value that is not known here is ignored with a warning, as
//! the specification asks: a setting meant for another program must not stop this one.

/// How the trace context travels in headers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Propagator {
    /// W3C `traceparent` and `tracestate`.
    TraceContext,
    /// W3C `baggage`.
    Baggage,
}

/// What the variables say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// `OTEL_SDK_DISABLED=true`: no spans at all.
    pub disabled: bool,
    /// Spans go to an OTLP collector: an endpoint is set or `OTEL_TRACES_EXPORTER=otlp`.
    pub export: bool,
    /// `OTEL_SERVICE_NAME`, or `service.name` among `OTEL_RESOURCE_ATTRIBUTES`, is set.
    pub has_service_name: bool,
    /// `OTEL_PROPAGATORS`; `tracecontext,baggage` by default.
    pub propagators: Vec<Propagator>,
    /// `RUST_LOG`.
    pub rust_log: Option<String>,
    /// Settings without effect, as `NAME=value`.
    pub ignored: Vec<String>,
}

impl Settings {
    /// Reads the variables by `lookup`.
    pub fn from_env(lookup: impl Fn(&str) -> Option<String>) -> Self {
        let get = |name: &str| lookup(name).filter(|value| !value.trim().is_empty());
        let mut ignored = Vec::new();
        let has_endpoint = get("OTEL_EXPORTER_OTLP_ENDPOINT").is_some()
            || get("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT").is_some();
        let export = match get("OTEL_TRACES_EXPORTER").as_deref().map(str::trim) {
            Some("otlp") => true,
            Some("none") => false,
            Some(other) => {
                ignored.push(format!("OTEL_TRACES_EXPORTER={other}"));
                has_endpoint
            }
            None => has_endpoint,
        };
        let disabled =
            get("OTEL_SDK_DISABLED").is_some_and(|value| value.trim().eq_ignore_ascii_case("true"));
        let has_service_name = get("OTEL_SERVICE_NAME").is_some()
            || get("OTEL_RESOURCE_ATTRIBUTES").is_some_and(|attributes| {
                attributes
                    .split(',')
                    .any(|pair| pair.trim().starts_with("service.name="))
            });
        let propagators = match get("OTEL_PROPAGATORS") {
            None => vec![Propagator::TraceContext, Propagator::Baggage],
            Some(names) => parse_propagators(&names, &mut ignored),
        };
        Self {
            disabled,
            export: export && !disabled,
            has_service_name,
            propagators,
            rust_log: get("RUST_LOG"),
            ignored,
        }
    }

    /// `RUST_LOG`, else `default`, else warnings and what `service` itself has to say.
    pub fn log_filter(&self, service: &str, default: &str) -> String {
        match &self.rust_log {
            Some(filter) => filter.clone(),
            None if default.is_empty() => format!("warn,{}=info", service.replace('-', "_")),
            None => default.to_owned(),
        }
    }
}

fn parse_propagators(names: &str, ignored: &mut Vec<String>) -> Vec<Propagator> {
    let mut propagators = Vec::new();
    for name in names.split(',').map(str::trim) {
        let propagator = match name {
            "tracecontext" => Propagator::TraceContext,
            "baggage" => Propagator::Baggage,
            "none" => return Vec::new(),
            other => {
                ignored.push(format!("OTEL_PROPAGATORS={other}"));
                continue;
            }
        };
        if !propagators.contains(&propagator) {
            propagators.push(propagator);
        }
    }
    propagators
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> Settings {
        Settings::from_env(|name| {
            variables
                .iter()
                .find(|(key, _)| *key == name)
                .map(|(_, value)| (*value).to_owned())
        })
    }

    #[test]
    fn spans_are_exported_only_when_a_collector_is_named() {
        const ENDPOINT: (&str, &str) = ("OTEL_EXPORTER_OTLP_ENDPOINT", "http://localhost:4317");
        for (case, variables, export) in [
            ("nothing set", &[][..], false),
            ("an endpoint", &[ENDPOINT], true),
            (
                "an empty endpoint",
                &[("OTEL_EXPORTER_OTLP_ENDPOINT", "")],
                false,
            ),
            (
                "a traces endpoint",
                &[("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://h:1")],
                true,
            ),
            (
                "asked for by name",
                &[("OTEL_TRACES_EXPORTER", "otlp")],
                true,
            ),
            (
                "refused by name",
                &[ENDPOINT, ("OTEL_TRACES_EXPORTER", "none")],
                false,
            ),
            (
                "SDK disabled",
                &[ENDPOINT, ("OTEL_SDK_DISABLED", "TRUE")],
                false,
            ),
            (
                "SDK not disabled",
                &[ENDPOINT, ("OTEL_SDK_DISABLED", "1")],
                true,
            ),
        ] {
            assert_eq!(settings(variables).export, export, "{case}");
        }
    }

    #[test]
    fn unknown_values_are_ignored_and_reported() {
        let given = settings(&[
            ("OTEL_TRACES_EXPORTER", "zipkin"),
            ("OTEL_PROPAGATORS", "b3,tracecontext"),
        ]);
        assert!(!given.export);
        assert_eq!(given.propagators, [Propagator::TraceContext]);
        assert_eq!(
            given.ignored,
            ["OTEL_TRACES_EXPORTER=zipkin", "OTEL_PROPAGATORS=b3"]
        );
    }

    #[test]
    fn propagators_follow_the_variable() {
        use Propagator::{Baggage, TraceContext};
        for (value, expected) in [
            ("", vec![TraceContext, Baggage]),
            ("baggage", vec![Baggage]),
            ("tracecontext, tracecontext", vec![TraceContext]),
            ("tracecontext,none", vec![]),
        ] {
            let given = settings(&[("OTEL_PROPAGATORS", value)]);
            assert_eq!(given.propagators, expected, "{value:?}");
        }
    }

    #[test]
    fn a_service_name_in_either_variable_counts() {
        for (name, value, found) in [
            ("OTEL_SERVICE_NAME", "mine", true),
            (
                "OTEL_RESOURCE_ATTRIBUTES",
                "host.name=a,service.name=mine",
                true,
            ),
            ("OTEL_RESOURCE_ATTRIBUTES", "host.name=a", false),
        ] {
            assert_eq!(
                settings(&[(name, value)]).has_service_name,
                found,
                "{name}={value}"
            );
        }
    }

    #[test]
    fn the_log_filter_is_the_first_one_given() {
        let set = settings(&[("RUST_LOG", "debug")]);
        let unset = settings(&[]);
        assert_eq!(set.log_filter("tdx-module-svc", "warn"), "debug");
        assert_eq!(unset.log_filter("tdx-module-svc", "error"), "error");
        assert_eq!(
            unset.log_filter("tdx-module-svc", ""),
            "warn,tdx_module_svc=info"
        );
    }
}

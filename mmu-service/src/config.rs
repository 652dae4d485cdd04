//! Settings of the service: command line first, environment second, default last.
//!
//! Parsed once, checked by clap, then passed down explicitly.

use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, value_parser};
use telemetry::Gate;
use transport::{Address, ClientTls, ClientTlsFiles};

use crate::access::{Access, CallerTls};
use crate::cli::Error;
use crate::link::{Budget, LinkConfig};

/// Where the service listens by default.
pub const DEFAULT_LISTEN: &str = "unix:///run/tdx-mirror-mmu/mmu.sock";
/// Where the module listens by default.
pub const DEFAULT_MODULE: &str = "unix:///run/tdx-mirror-mmu/module.sock";

/// KVM's memory management for TDX guests as a gRPC service, kvm.mmu.v1.MmuService.
#[derive(Debug, Clone, Parser)]
#[command(name = "mmu-service", version, args_conflicts_with_subcommands = true)]
pub struct Config {
    /// What to do instead of serving.
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Where to listen, unix:///path, https://host:port or http://host:port; more than once for
    /// several places.
    #[arg(long, value_name = "URL", env = "MMU_LISTEN", value_delimiter = ',', default_value = DEFAULT_LISTEN)]
    pub listen: Vec<Address>,

    /// Where the TDX module listens, unix:///path, https://host:port or http://host:port.
    #[arg(long, value_name = "URL", env = "MMU_MODULE", default_value = DEFAULT_MODULE)]
    pub module: Address,

    /// Where the state is that outlives the service: VMs are there again after a restart. A
    /// directory of its own, which nobody else may enter. Without it VMs end with the service.
    #[arg(long, value_name = "DIR", env = "MMU_STATE")]
    pub state: Option<PathBuf>,

    /// What the service takes on at a time.
    #[command(flatten)]
    pub limits: Limits,

    /// How the module is talked to.
    #[command(flatten)]
    pub link: Link,

    /// Certificates for a module at https://.
    #[command(flatten)]
    pub module_tls: ModuleTls,

    /// Who may call.
    #[command(flatten)]
    pub access: Access,

    /// The page for browsers.
    #[command(flatten)]
    pub page: Page,

    /// Which faults are traced.
    #[command(flatten)]
    pub tracing: Tracing,
}

/// What to do instead of serving.
#[derive(Debug, Clone, Subcommand)]
pub enum Command {
    /// Ask a running service whether it is serving: exit status 0 when it is.
    Healthcheck {
        /// Where it listens, unix:///path, https://host:port or http://host:port.
        #[arg(long, value_name = "URL", env = "MMU_ENDPOINT", default_value = DEFAULT_LISTEN)]
        endpoint: Address,
        /// Certificates for an https:// address.
        #[command(flatten)]
        tls: CallerTls,
    },
}

/// The page for browsers.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Page")]
pub struct Page {
    /// Where Jaeger's page is, for links to the traces of actions.
    #[arg(long, value_name = "URL", env = "MMU_JAEGER_URL", default_value = "http://localhost:16686", value_parser = web_url)]
    pub jaeger_url: String,

    /// Name by which browsers reach the page, besides localhost and plain addresses; more than
    /// once for several names.
    #[arg(
        long,
        value_name = "NAME",
        env = "MMU_PAGE_HOST",
        value_delimiter = ','
    )]
    pub page_host: Vec<String>,

    /// Requests of pages that are in work; those above are refused.
    #[arg(long, value_name = "N", env = "MMU_MAX_PAGE_REQUESTS", default_value = "32", value_parser = value_parser!(u32).range(1..=1024))]
    pub max_page_requests: u32,
}

/// A link that a browser may follow: no script, no credentials.
fn web_url(text: &str) -> Result<String, String> {
    let url = text.strip_suffix('/').unwrap_or(text);
    let host = url
        .strip_prefix("http://")
        .or_else(|| url.strip_prefix("https://"));
    match host {
        Some(host) if !host.is_empty() && !host.contains(['@', '"', '\'', '<', '>', ' ']) => {
            Ok(url.to_owned())
        }
        _ => Err("not of the form http://host:port or https://host:port".to_owned()),
    }
}

/// What the service takes on at a time.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// VMs at a time.
    #[arg(long, value_name = "N", env = "MMU_MAX_VMS", default_value = "4096", value_parser = value_parser!(u32).range(1..=1_048_576))]
    pub max_vms: u32,

    /// Operations that work at a time; each has a thread while it does.
    #[arg(long, value_name = "N", env = "MMU_MAX_OPERATIONS", default_value = "256", value_parser = value_parser!(u32).range(1..=4096))]
    pub max_operations: u32,

    /// Operations of one VM that work or wait for a thread; more are refused at once, so that a
    /// VM's flood leaves places for others.
    #[arg(long, value_name = "N", env = "MMU_MAX_VM_OPERATIONS", default_value = "128", value_parser = value_parser!(u32).range(1..=4096))]
    pub max_vm_operations: u32,

    /// Requests that are in work or wait for a thread; those above are refused at once.
    #[arg(long, value_name = "N", env = "MMU_MAX_REQUESTS", default_value = "1024", value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_requests: u32,

    /// Faults in one message of HandleFaults.
    #[arg(long, value_name = "N", env = "MMU_MAX_FAULTS", default_value = "4096", value_parser = value_parser!(u32).range(1..=65_536))]
    pub max_faults: u32,

    /// Messages of one HandleFaults stream that are read ahead.
    #[arg(long, value_name = "N", env = "MMU_MAX_FAULT_BATCHES", default_value = "8", value_parser = value_parser!(u32).range(1..=256))]
    pub max_fault_batches: u32,

    /// Size of one message, in bytes.
    #[arg(long, value_name = "BYTES", env = "MMU_MAX_MESSAGE", default_value = "16777216", value_parser = value_parser!(u32).range(65_536..=1_073_741_824))]
    pub max_message: u32,

    /// How long the reader of a stream may take nothing before the stream ends, in seconds.
    #[arg(long, value_name = "SECONDS", env = "MMU_STALL", default_value = "30", value_parser = value_parser!(u64).range(1..=3600))]
    pub stall_s: u64,

    /// How long running operations and the release of the VMs may take at the end, in seconds.
    #[arg(long, value_name = "SECONDS", env = "MMU_DRAIN", default_value = "8", value_parser = value_parser!(u64).range(0..=3600))]
    pub drain_s: u64,
}

/// How the module is talked to.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Module link")]
pub struct Link {
    /// Streams to the module; a logical processor always uses the same one.
    #[arg(long, value_name = "N", env = "MMU_LINK_STREAMS", default_value = "4", value_parser = value_parser!(u32).range(1..=64))]
    pub link_streams: u32,

    /// Batches under way on each stream; kept below the module's replay window.
    #[arg(long, value_name = "N", env = "MMU_LINK_WINDOW", default_value = "16", value_parser = value_parser!(u32).range(1..=1024))]
    pub link_window: u32,

    /// Single calls under way, for VMs in mode `kernel`.
    #[arg(long, value_name = "N", env = "MMU_LINK_CALLS", default_value = "16", value_parser = value_parser!(u32).range(1..=1024))]
    pub link_calls: u32,

    /// How long the module may take for one batch, in seconds.
    #[arg(long, value_name = "SECONDS", env = "MMU_RPC_DEADLINE", default_value = "10", value_parser = value_parser!(u64).range(1..=3600))]
    pub rpc_deadline_s: u64,

    /// How often in a row a batch is sent without an answer before it is given up.
    #[arg(
        long,
        value_name = "N",
        env = "MMU_RECONNECT_ATTEMPTS",
        default_value = "24"
    )]
    pub reconnect_attempts: NonZeroU32,

    /// How long a lost module is waited for before batches are given up, in seconds.
    #[arg(long, value_name = "SECONDS", env = "MMU_RECONNECT_TIME", default_value = "15", value_parser = value_parser!(u64).range(0..=3600))]
    pub reconnect_time_s: u64,
}

/// Certificates for a module at https://.
#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "Module link")]
pub struct ModuleTls {
    /// Authority of the module's certificate, PEM, for a module at https://.
    #[arg(long, value_name = "FILE", env = "MMU_MODULE_TLS_CA")]
    pub module_tls_ca: Option<PathBuf>,

    /// Certificate to show to the module, PEM; default: that of --tls-cert.
    #[arg(long, value_name = "FILE", env = "MMU_MODULE_TLS_CERT", requires_all = ["module_tls_ca", "module_tls_key"])]
    pub module_tls_cert: Option<PathBuf>,

    /// Its private key.
    #[arg(
        long,
        value_name = "FILE",
        env = "MMU_MODULE_TLS_KEY",
        requires = "module_tls_cert"
    )]
    pub module_tls_key: Option<PathBuf>,
}

/// Which faults are traced, while spans are exported. A fault whose caller says "sampled" always
/// is; one that failed, or met a busy module, has at least a span of its own.
#[derive(Debug, Clone, Copy, Args)]
#[command(next_help_heading = "Tracing")]
pub struct Tracing {
    /// Trace one fault in N that nobody asked to be traced; 0: none.
    #[arg(long, value_name = "N", env = "MMU_TRACE_EVERY", default_value = "100")]
    pub trace_every: u32,

    /// A fault, or a message of faults, that takes this long always has a span, in milliseconds.
    #[arg(long, value_name = "MS", env = "MMU_TRACE_SLOW_MS", default_value = "10", value_parser = value_parser!(u64).range(0..=3_600_000))]
    pub trace_slow_ms: u64,
}

impl Tracing {
    pub(crate) fn gate(&self) -> Gate {
        Gate::new(self.trace_every, Duration::from_millis(self.trace_slow_ms))
    }
}

impl Config {
    /// Reads the certificates for the module, if it needs any.
    pub(crate) fn link_config(&self) -> Result<LinkConfig, Error> {
        Ok(LinkConfig {
            module: self.module.clone(),
            tls: self.module_certificates()?,
            // A stream without a logical processor is never opened, so this is an upper bound.
            streams: size(self.link.link_streams),
            window: size(self.link.link_window),
            calls: size(self.link.link_calls),
            rpc_deadline: Duration::from_secs(self.link.rpc_deadline_s),
            budget: Budget {
                attempts: self.link.reconnect_attempts.get(),
                time: Duration::from_secs(self.link.reconnect_time_s),
            },
            message_limit: self.limits.message_limit(),
        })
    }

    fn module_certificates(&self) -> Result<Option<ClientTls>, Error> {
        if !matches!(self.module, Address::Tls(_)) {
            return Ok(None);
        }
        let ModuleTls {
            module_tls_ca: Some(ca),
            module_tls_cert,
            module_tls_key,
        } = self.module_tls.clone()
        else {
            return Err(Error::NoModuleCertificate {
                module: self.module.clone(),
            });
        };
        let identity = module_tls_cert.zip(module_tls_key);
        let own = self
            .access
            .tls_cert
            .clone()
            .zip(self.access.tls_key.clone());
        let files = ClientTlsFiles {
            ca,
            identity: identity.or(own),
        };
        ClientTls::load(files).map(Some).map_err(Error::Tls)
    }
}

impl Limits {
    /// Bytes.
    pub(crate) fn message_limit(&self) -> usize {
        size(self.max_message)
    }

    pub(crate) fn stall(&self) -> Duration {
        Duration::from_secs(self.stall_s)
    }

    pub(crate) fn drain(&self) -> Duration {
        Duration::from_secs(self.drain_s)
    }
}

/// A limit as a size in memory.
pub(crate) fn size(limit: u32) -> usize {
    usize::try_from(limit).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Config::command().debug_assert();
    }

    #[test]
    fn several_places_to_listen_at_can_be_given() {
        for args in [
            &[
                "mmu-service",
                "--listen",
                "unix:///a/b",
                "--listen",
                "http://127.0.0.1:0",
            ][..],
            &["mmu-service", "--listen", "unix:///a/b,http://127.0.0.1:0"],
        ] {
            let config = Config::try_parse_from(args).unwrap();
            let places: Vec<String> = config.listen.iter().map(ToString::to_string).collect();
            assert_eq!(places, ["unix:///a/b", "http://127.0.0.1:0"]);
        }
    }

    #[test]
    fn values_out_of_range_are_refused_with_their_option() {
        for (option, value) in [
            ("--listen", "ftp://x"),
            ("--module", "nowhere"),
            ("--max-vms", "0"),
            ("--max-operations", "4097"),
            ("--max-vm-operations", "0"),
            ("--max-message", "1"),
            ("--rpc-deadline-s", "0"),
            ("--reconnect-attempts", "0"),
            ("--max-page-requests", "0"),
            ("--jaeger-url", "javascript:alert(1)"),
            ("--jaeger-url", "http://"),
            ("--jaeger-url", "http://user@jaeger"),
            ("--trace-every", "often"),
            ("--trace-slow-ms", "3600001"),
        ] {
            let error = Config::try_parse_from(["mmu-service", option, value]).unwrap_err();
            assert!(error.to_string().contains(option), "{option}: {error}");
        }
    }

    #[test]
    fn the_way_to_jaeger_needs_no_slash_at_its_end() {
        for url in ["https://jaeger.example/ui", "https://jaeger.example/ui/"] {
            let config = Config::try_parse_from(["mmu-service", "--jaeger-url", url]).unwrap();
            assert_eq!(config.page.jaeger_url, "https://jaeger.example/ui");
        }
    }

    #[test]
    fn a_health_check_takes_an_endpoint_and_nothing_else() {
        let config =
            Config::try_parse_from(["mmu-service", "healthcheck", "--endpoint", "http://h:1"])
                .unwrap();
        assert!(matches!(
            config.command,
            Some(Command::Healthcheck { endpoint, .. }) if endpoint.to_string() == "http://h:1"
        ));
    }
}

//! Settings of the service: one struct, parsed once, passed down.
//!
//! Each setting is a command line option; those that a container needs are environment variables
//! too. The platform comes from a profile, a TOML file and flags, see `platform`.

use std::path::PathBuf;

use clap::builder::TypedValueParser as _;
use tdx_module::Release;
use transport::Address;

use crate::access::Access;
use crate::platform::PlatformFlags;

/// Where the service listens when nobody says otherwise.
pub const DEFAULT_LISTEN: &str = "unix:///run/tdx-mirror-mmu/module.sock";

/// Threads that serve when nobody says otherwise.
const DEFAULT_WORKERS: usize = 1;
/// Most of them.
const MAX_WORKERS: u64 = 64;

/// Settings of the service.
#[derive(Debug, Clone, clap::Args)]
pub struct Config {
    /// Address to listen at, unix:///path, https://host:port or http://host:port; may be given
    /// several times
    #[arg(long, value_name = "URL", env = "TDX_MODULE_LISTEN", value_delimiter = ',',
          default_value = DEFAULT_LISTEN)]
    pub listen: Vec<Address>,

    /// Platform that the module finds itself on
    #[arg(long, value_enum, env = "TDX_MODULE_PROFILE", default_value_t)]
    pub profile: Profile,

    /// TOML file with settings of the platform that differ from the profile
    #[arg(long, value_name = "FILE", env = "TDX_MODULE_PLATFORM")]
    pub platform: Option<PathBuf>,

    /// Module release whose answers are given; counts more than the platform file
    #[arg(long, env = "TDX_MODULE_RELEASE", value_parser = release_parser())]
    pub release: Option<Release>,

    /// Let callers change conditions: hold locks, take entropy away, start the module anew. For
    /// tests of a host; nobody who can call is kept from it
    #[arg(long, env = "TDX_MODULE_ALLOW_INJECTION")]
    pub allow_injection: bool,

    /// Let callers set rules by which calls fail, replies get lost, and the process aborts: the
    /// service TdxFaultService is there. For tests of a host
    #[arg(long, env = "TDX_MODULE_FAULT_INJECTION")]
    pub fault_injection: bool,
    /// Threads that decode, execute and encode; long batches run beside them. One answers soonest,
    /// more serve more vCPUs at a time
    #[arg(long, value_name = "N", env = "TDX_MODULE_WORKERS", default_value_t = DEFAULT_WORKERS,
          value_parser = workers())]
    pub workers: usize,

    /// Stop when standard input is closed, so that a parent process takes the service along
    #[arg(long)]
    pub stop_with_stdin: bool,

    /// Who may call.
    #[command(flatten)]
    pub access: Access,

    /// The platform by flags.
    #[command(flatten)]
    pub machine: PlatformFlags,

    /// Bounds of what one caller may ask for.
    #[command(flatten)]
    pub limits: Limits,
}

/// A platform that ships with the service.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, clap::ValueEnum)]
pub enum Profile {
    /// Memory, keys and processors in plenty
    #[default]
    Roomy,
    /// The small platform on which the conformance sequences were recorded
    Conformance,
}

/// Bounds. Every queue, table and message has one.
#[derive(Debug, Clone, PartialEq, Eq, clap::Args)]
#[command(next_help_heading = "Limits")]
pub struct Limits {
    /// Calls in one batch
    #[arg(long, value_name = "N", default_value_t = Self::DEFAULT.max_calls)]
    pub max_calls: u32,

    /// Runs of one repeated call, and of one batch altogether
    #[arg(long, value_name = "N", default_value_t = Self::DEFAULT.max_repeat)]
    pub max_repeat: u32,

    /// Bytes of one request
    #[arg(long, value_name = "BYTES", default_value_t = Self::DEFAULT.max_message_bytes)]
    pub max_message_bytes: u64,

    /// Answers that are kept for each session, for batches that are sent again
    #[arg(long, value_name = "N", default_value_t = Self::DEFAULT.replay_window,
          value_parser = clap::value_parser!(u32).range(1..))]
    pub replay_window: u32,

    /// Sessions that are remembered; the least recently used one goes first
    #[arg(long, value_name = "N", default_value_t = Self::DEFAULT.max_sessions,
          value_parser = at_least_one())]
    pub max_sessions: usize,

    /// Bytes that the answers of all sessions may take until they are acknowledged or leave their
    /// window
    #[arg(long, value_name = "BYTES", default_value_t = Self::DEFAULT.max_replay_bytes)]
    pub max_replay_bytes: u64,

    /// The same of one session
    #[arg(long, value_name = "BYTES", default_value_t = Self::DEFAULT.max_session_replay_bytes)]
    pub max_session_replay_bytes: u64,

    /// Answers of one stream that may wait to be sent before its next batch runs
    #[arg(long, value_name = "N", default_value_t = Self::DEFAULT.max_in_flight,
          value_parser = at_least_one())]
    pub max_in_flight: usize,

    /// Requests in work at a time; more are refused with RESOURCE_EXHAUSTED
    #[arg(long, value_name = "N", default_value_t = Self::DEFAULT.max_concurrent_requests,
          value_parser = at_least_one())]
    pub max_concurrent_requests: usize,

    /// Milliseconds that requests in flight get to finish when the service stops
    #[arg(long, value_name = "MS", default_value_t = Self::DEFAULT.drain_ms)]
    pub drain_ms: u64,
}

impl Limits {
    /// What holds unless said otherwise.
    pub const DEFAULT: Self = Self {
        max_calls: 4096,
        max_repeat: 1 << 20,
        max_message_bytes: 16 << 20,
        replay_window: 64,
        max_sessions: 1024,
        max_replay_bytes: 256 << 20,
        max_session_replay_bytes: 32 << 20,
        max_in_flight: 32,
        max_concurrent_requests: 256,
        drain_ms: 10_000,
    };
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}

impl Default for Config {
    /// The roomy platform. Listens nowhere: whoever hosts the service brings the listeners.
    fn default() -> Self {
        Self {
            listen: Vec::new(),
            profile: Profile::default(),
            platform: None,
            machine: PlatformFlags::default(),
            release: None,
            allow_injection: false,
            fault_injection: false,
            workers: DEFAULT_WORKERS,
            stop_with_stdin: false,
            access: Access::default(),
            limits: Limits::default(),
        }
    }
}

/// Names of the releases, as on the wire and in the platform file.
const RELEASES: [(&str, Release); 2] = [("1.5.05", Release::R1_5_05), ("1.5.34", Release::R1_5_34)];

/// The name of a release.
pub(crate) fn release_name(release: Release) -> &'static str {
    match release {
        Release::R1_5_05 => "1.5.05",
        Release::R1_5_34 => "1.5.34",
    }
}

/// The release of a name.
pub(crate) fn release_by_name(name: &str) -> Option<Release> {
    RELEASES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, release)| *release)
}

fn release_parser() -> impl clap::builder::TypedValueParser<Value = Release> {
    clap::builder::PossibleValuesParser::new(RELEASES.map(|(name, _)| name))
        .try_map(|name| release_by_name(&name).ok_or("no such release"))
}

fn workers() -> impl clap::builder::TypedValueParser<Value = usize> {
    clap::value_parser!(u64)
        .range(1..=MAX_WORKERS)
        .try_map(usize::try_from)
}

fn at_least_one() -> impl clap::builder::TypedValueParser<Value = usize> {
    clap::value_parser!(u64).range(1..).try_map(usize::try_from)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;

    #[derive(Debug, clap::Parser)]
    struct Args {
        #[command(flatten)]
        config: Config,
    }

    fn parse(args: &[&str]) -> Result<Config, clap::Error> {
        let args = [&["tdx-module-svc"], args].concat();
        Args::try_parse_from(args).map(|args| args.config)
    }

    #[test]
    fn options_have_the_documented_defaults() {
        let config = parse(&[]).unwrap();
        assert_eq!(config.listen, [DEFAULT_LISTEN.parse().unwrap()]);
        assert_eq!(config.profile, Profile::Roomy);
        assert_eq!(config.limits, Limits::default());
        assert!(config.release.is_none() && config.platform.is_none());
    }

    #[test]
    fn every_flag_is_documented() {
        use clap::CommandFactory as _;
        let documented = include_str!("../../docs/configuration.md");
        for argument in Args::command().get_arguments() {
            let flag = format!("`--{}", argument.get_long().unwrap());
            let ends = documented.match_indices(&flag).any(|(at, _)| {
                let next = documented[at + flag.len()..].chars().next();
                matches!(next, Some('`' | ' '))
            });
            assert!(ends, "{flag}");
        }
    }

    #[test]
    fn listen_may_be_given_several_times() {
        let config = parse(&["--listen", "unix:///a", "--listen", "http://[::]:1"]).unwrap();
        assert_eq!(config.listen.len(), 2);
    }

    #[test]
    fn impossible_options_are_refused() {
        for args in [
            ["--listen", "tcp://1.2.3.4:5"],
            ["--profile", "huge"],
            ["--release", "1.6"],
            ["--workers", "0"],
            ["--workers", "65"],
            ["--replay-window", "0"],
            ["--max-sessions", "0"],
            ["--max-in-flight", "0"],
            ["--max-repeat", "-1"],
        ] {
            assert!(parse(&args).is_err(), "{args:?}");
        }
    }

    #[test]
    fn releases_have_one_name() {
        for (name, release) in RELEASES {
            assert_eq!(release_name(release), name);
            let config = parse(&["--release", name]).unwrap();
            assert_eq!(config.release.map(release_name), Some(name));
        }
    }
}

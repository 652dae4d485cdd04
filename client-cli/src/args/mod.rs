//! The command line: commands, options and what they accept.
//!
//! Command names, and the keys of `--output json`, are an interface for scripts.

mod bench;
mod certs;
mod chaos;
mod compare;
mod conformance;
mod guest;
mod host;
mod inject;
mod measure;
mod memory;
mod number;
mod private;
mod replay;
mod scenario;
mod seamcall;
mod tables;
mod vm;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mirror_proto::mmu::Mode;

pub use bench::BenchArgs;
pub use certs::CertsArgs;
pub use chaos::{ChaosCommand, ChaosRunArgs, ChaosSoakArgs};
pub use compare::CompareArgs;
pub use conformance::ConformanceArgs;
pub use guest::{GuestArgs, GuestWord, GuestWordError};
pub use host::{
    HostChangeArg, HostChangeArgs, HostCommand, HostUnmapArgs, NxCommand, NxRecoverArgs, NxSetArgs,
    TouchArgs, WriteProtectArgs,
};
pub use inject::{AbortArg, InjectCommand, InjectSetArgs};
pub use measure::{MeasureArgs, MeasureOrder};
pub use memory::{
    ConvertArgs, FaultArgs, HostPageSizeArg, PrefaultArgs, PunchHoleArgs, SlotCommand,
    SlotDeleteArgs, SlotSetArgs, Visibility,
};
pub use number::NumberError;
pub use private::{AddressRange, PrivateError, PrivateMemory};
pub use replay::{DemoArgs, Order, ReplayArgs};
pub use scenario::{ScenarioCommand, ScenarioRunArgs};
pub use seamcall::{ExplainArgs, Register, RegisterValue, SeamcallArgs, StatusArg, Stride};
pub use tables::{
    AgeArgs, DirtyLogClearArgs, DirtyLogCommand, DirtyLogGetArgs, DirtyLogSetArgs, EventsArgs,
    ZapArgs, ZapFastArgs,
};
pub use vm::{
    DirtyLogArg, InitRegionArgs, TreeArgs, TreeRoot, VcpuCommand, VmCommand, VmCreateArgs,
    VmKindArg, WalkArgs,
};

/// Drives and inspects the TDX mirror MMU.
///
/// Results go to stdout, everything else to stderr. Numbers may be decimal, 0x hexadecimal or
/// sizes such as 4K, 2M and 1G. Exit status: 0 done, 1 the system answered no, 2 usage.
#[derive(Debug, Parser)]
#[command(name = "mmuctl", version = env!("MMUCTL_VERSION"), propagate_version = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub globals: Globals,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub struct Globals {
    /// The MMU service: unix:///path, https://host:port or http://host:port
    #[arg(long, global = true, env = "MMUCTL_MMU", value_name = "URL", value_parser = url)]
    pub mmu: Option<String>,
    /// The TDX module: unix:///path, https://host:port or http://host:port
    #[arg(long, global = true, env = "MMUCTL_MODULE", value_name = "URL", value_parser = url)]
    pub module: Option<String>,
    /// Authority of the services' certificates, PEM, for https:// URLs
    #[arg(long, global = true, env = "MMUCTL_TLS_CA", value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// Certificate to show to them, PEM; it says which roles the caller holds
    #[arg(long, global = true, env = "MMUCTL_TLS_CERT", value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,
    /// Its private key
    #[arg(
        long,
        global = true,
        env = "MMUCTL_TLS_KEY",
        value_name = "FILE",
        requires = "tls_cert"
    )]
    pub tls_key: Option<PathBuf>,
    /// Start both services for this one command, on private sockets; goes before --mmu and
    /// --module. The default of demo, measure and replay when no URL is given
    #[arg(long, global = true)]
    pub local: bool,
    /// How to print the result
    #[arg(long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub output: Format,
    /// Where Jaeger shows its pages: links to traces are printed
    #[arg(long, global = true, env = "MMUCTL_JAEGER", value_name = "URL", value_parser = page_url)]
    pub jaeger: Option<String>,
    /// How long to wait for an answer: seconds, or a number with ms, s or m. Default: 60 seconds,
    /// 30 minutes for operations on ranges
    #[arg(long, global = true, value_parser = number::duration, value_name = "TIME")]
    pub timeout: Option<Duration>,
}

/// How a result is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// Tables for people.
    Table,
    /// One JSON object.
    Json,
}

/// How changes of the mirror reach the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum ModeArg {
    /// One RPC for each SEAMCALL, in the kernel's order and number.
    Kernel,
    /// Chains and runs of calls: the fewest messages.
    #[default]
    Batched,
}

impl ModeArg {
    /// The wire's word.
    pub fn to_wire(self) -> Mode {
        match self {
            Self::Kernel => Mode::Kernel,
            Self::Batched => Mode::Batched,
        }
    }

    /// The mode that this one is compared with.
    pub fn other(self) -> Self {
        match self {
            Self::Kernel => Self::Batched,
            Self::Batched => Self::Kernel,
        }
    }

    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Batched => "batched",
        }
    }
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// The main job in a minute: build a measured TD, boot it from a recording, convert memory,
    /// audit, and compare both modes
    Demo(DemoArgs),
    /// Create, list, show, build and destroy VMs
    #[command(subcommand)]
    Vm(VmCommand),
    /// Add vCPUs
    #[command(subcommand)]
    Vcpu(VcpuCommand),
    /// Set and delete memory slots
    #[command(subcommand)]
    Slot(SlotCommand),
    /// One guest access that no translation serves
    Fault(FaultArgs),
    /// Run a vCPU: what the guest does, with the exits that it causes (KVM_RUN)
    Guest(GuestArgs),
    /// Map a range before the guest touches it (KVM_PRE_FAULT_MEMORY)
    Prefault(PrefaultArgs),
    /// Make a range private or shared (KVM_SET_MEMORY_ATTRIBUTES)
    Convert(ConvertArgs),
    /// Give pages of a slot's guest_memfd back (FALLOC_FL_PUNCH_HOLE)
    PunchHole(PunchHoleArgs),
    /// Play a recording of kvm_page_fault events (ftrace, trace-cmd, perf script) as guest accesses
    Replay(ReplayArgs),
    /// Read, clear, begin and end dirty logs
    #[command(subcommand)]
    DirtyLog(DirtyLogCommand),
    /// Ask what the guest used lately, by host address (kvm_age_hva)
    Age(AgeArgs),
    /// Take shared mappings away: a range, or all (kvm_zap_gfn_range, kvm_mmu_zap_all)
    Zap(ZapArgs),
    /// Make the direct root obsolete (kvm_mmu_zap_all_fast)
    ZapFast(ZapFastArgs),
    /// The host changes its mapping of user memory, or takes it back
    #[command(subcommand)]
    Host(HostCommand),
    /// Take write access away: from the shared leaves of a slot, or from one frame for good
    WriteProtect(WriteProtectArgs),
    /// The guest's processor touches shared memory: accessed and dirty bits, no faults
    Touch(TouchArgs),
    /// Huge pages without X (nx_huge_pages): switch the mitigation, recover what it split
    #[command(subcommand)]
    Nx(NxCommand),
    /// Print the tracepoints of a VM as they come, in the form of tracefs' trace file
    Events(EventsArgs),
    /// Play a marked recording of a real KVM and compare what the model does, event by event
    Compare(CompareArgs),
    /// Play recorded call sequences against a module and compare every answer
    Conformance(ConformanceArgs),
    /// Scenarios and races of the past by name: list them, or run some
    #[command(subcommand)]
    Scenario(ScenarioCommand),
    /// Seeded workload and faults on services of its own: kills, cuts, busy answers; then audits
    #[command(subcommand)]
    Chaos(ChaosCommand),
    /// Rules by which the module's calls meet faults (a module with --fault-injection)
    #[command(subcommand)]
    Inject(InjectCommand),
    /// MRTD of a firmware image: build a TD from its TDX metadata through both services
    Measure(MeasureArgs),
    /// Measure what the system costs, each figure beside its floor from the same run
    Bench(BenchArgs),
    /// The entries on the path to an address: the tree of KVM beside the module's
    Walk(WalkArgs),
    /// The page table trees of a VM
    Tree(TreeArgs),
    /// Compare mirror, private tree and PAMT entry by entry
    Audit {
        /// The VM
        #[arg(long, value_name = "ID", value_parser = number::number)]
        vm: u64,
    },
    /// Counters of a VM, or of the service
    Stats {
        /// The VM; default: the whole service
        #[arg(long, value_name = "ID", value_parser = number::number)]
        vm: Option<u64>,
    },
    /// One raw call of the TDX module
    Seamcall(SeamcallArgs),
    /// What a completion status (RAX) says, and what a host does about it
    Explain(ExplainArgs),
    /// Make certificates for development: an authority, both services, and a caller for each role
    Certs(CertsArgs),
    /// Completion script for a shell
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
    /// The manual page, as roff
    Man,
}

impl Command {
    /// Name of the command's span when it changes something, else `None`.
    pub fn span_name(&self) -> Option<&'static str> {
        Some(match self {
            Self::Demo(_) => "demo",
            Self::Vm(VmCommand::Create(_)) => "vm create",
            Self::Vm(VmCommand::Init(_)) => "vm init",
            Self::Vm(VmCommand::Destroy(_)) => "vm destroy",
            Self::Vm(VmCommand::InitRegion(_)) => "vm init-region",
            Self::Vm(VmCommand::Finalize(_)) => "vm finalize",
            Self::Vcpu(VcpuCommand::Add { .. }) => "vcpu add",
            Self::Vcpu(VcpuCommand::Init { .. }) => "vcpu init",
            Self::Slot(SlotCommand::Set(_)) => "slot set",
            Self::Slot(SlotCommand::Delete(_)) => "slot delete",
            Self::Fault(_) => "fault",
            Self::Guest(_) => "guest",
            Self::Prefault(_) => "prefault",
            Self::Convert(_) => "convert",
            Self::PunchHole(_) => "punch-hole",
            Self::Replay(_) => "replay",
            Self::DirtyLog(DirtyLogCommand::Get(_)) => "dirty-log get",
            Self::DirtyLog(DirtyLogCommand::Clear(_)) => "dirty-log clear",
            Self::DirtyLog(DirtyLogCommand::Set(_)) => "dirty-log set",
            Self::Age(_) => "age",
            Self::Zap(_) => "zap",
            Self::ZapFast(_) => "zap-fast",
            Self::Host(HostCommand::Change(_)) => "host change",
            Self::Host(HostCommand::Unmap(_)) => "host unmap",
            Self::WriteProtect(_) => "write-protect",
            Self::Touch(_) => "touch",
            Self::Nx(NxCommand::Set(_)) => "nx set",
            Self::Nx(NxCommand::Recover(_)) => "nx recover",
            Self::Measure(_) => "measure",
            Self::Seamcall(_) => "seamcall",
            Self::Vm(VmCommand::List | VmCommand::Show(_))
            | Self::Events(_)
            | Self::Compare(_)
            | Self::Conformance(_)
            | Self::Bench(_)
            | Self::Chaos(_)
            | Self::Inject(_)
            | Self::Walk(_)
            | Self::Tree(_)
            | Self::Audit { .. }
            | Self::Stats { .. }
            | Self::Explain(_)
            | Self::Scenario(_)
            | Self::Certs(_)
            | Self::Completions { .. }
            | Self::Man => return None,
        })
    }

    /// Whether the command shows its spans.
    pub fn explains(&self) -> bool {
        matches!(self, Self::Fault(fault) if fault.explain)
    }

    /// Whether the command encodes, reads and waits for several streams side by side. Any other makes
    /// one call behind the other.
    pub fn works_side_by_side(&self) -> bool {
        matches!(
            self,
            Self::Demo(_) | Self::Replay(_) | Self::Chaos(_) | Self::Bench(_)
        )
    }

    /// Whether the command brings its own services along when no URL is given.
    pub fn is_local_by_default(&self) -> bool {
        matches!(
            self,
            Self::Demo(_)
                | Self::Replay(_)
                | Self::Compare(_)
                | Self::Conformance(_)
                | Self::Measure(_)
                | Self::Bench(_)
        )
    }
}

/// The address of a page. An empty variable is unset.
fn page_url(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with("http://") || text.starts_with("https://") {
        Ok(text.to_owned())
    } else {
        Err(format!("{text:?} does not begin with http:// or https://"))
    }
}

/// A URL is checked here, so that a mistake in it is a usage error. An empty variable is unset.
fn url(text: &str) -> Result<String, transport::AddressError> {
    if text.is_empty() {
        return Ok(String::new());
    }
    text.parse::<transport::Address>()
        .map(|address| address.to_string())
}

#[cfg(test)]
mod tests;

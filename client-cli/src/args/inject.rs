//! `inject`: fault rules of a module.

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use mirror_proto::module::fault_rule::{Action, When};
use mirror_proto::module::{
    FaultAbort, FaultCut, FaultDelay, FaultLoseReply, FaultRule, FaultStatus,
};
use tdx_defs::Leaf;

use super::number::{number, number32};
use super::private::range;
use super::{AddressRange, StatusArg};

/// `mmuctl inject`.
#[derive(Debug, Subcommand)]
pub enum InjectCommand {
    /// Add a rule
    Set(Box<InjectSetArgs>),
    /// The rules, and how often each has fired
    List,
    /// Take rules away
    Clear {
        /// Which ones; default: all
        #[arg(value_name = "ID", value_parser = number)]
        ids: Vec<u64>,
    },
}

/// `mmuctl inject set`.
#[derive(Debug, Args)]
#[command(group(ArgGroup::new("when").required(true).args(["nth", "per_million"])))]
#[command(group(ArgGroup::new("action").required(true)
    .args(["busy", "status", "delay_ms", "lose_reply", "cut", "abort"])))]
pub struct InjectSetArgs {
    /// The leaf that is met, such as mem_page_aug; default: any
    #[arg(long, value_name = "LEAF")]
    pub leaf: Option<Leaf>,
    /// Guest addresses that the call is about, FROM-TO; default: any
    #[arg(long, value_name = "RANGE", value_parser = range)]
    pub gpa: Option<AddressRange>,
    /// The nth run that matches, from 1
    #[arg(long, value_name = "N", value_parser = number)]
    pub nth: Option<u64>,
    /// By chance: so many of a million runs
    #[arg(long, value_name = "N", value_parser = number32)]
    pub per_million: Option<u32>,
    /// Determines the chances
    #[arg(
        long,
        value_name = "N",
        default_value = "0",
        value_parser = number,
        requires = "per_million"
    )]
    pub seed: u64,
    /// How often the rule fires at most; default: once with --nth, without a bound by chance
    #[arg(long, value_name = "N", value_parser = number)]
    pub times: Option<u64>,
    /// Answer that a lock is held, without running the leaf
    #[arg(long)]
    pub busy: bool,
    /// Answer this status, one that the leaf may give in any state, without running it
    #[arg(long, value_name = "STATUS", requires = "leaf")]
    pub status: Option<StatusArg>,
    /// Wait before the batch runs, at most 10000 ms
    #[arg(long, value_name = "MS", value_parser = number32)]
    pub delay_ms: Option<u32>,
    /// Run the batch, drop its answer and end the stream
    #[arg(long)]
    pub lose_reply: bool,
    /// End the stream; the batch does not run
    #[arg(long)]
    pub cut: bool,
    /// Abort the module
    #[arg(long, value_enum, value_name = "WHEN")]
    pub abort: Option<AbortArg>,
}

/// When the module aborts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum AbortArg {
    /// Before the batch runs.
    Before,
    /// When it ran and its answer is not sent.
    After,
}

impl InjectSetArgs {
    /// The rule. The groups of the parser see to it that there is one action and one time.
    pub fn rule(&self) -> FaultRule {
        let action = match (self.status, self.delay_ms, self.abort) {
            (Some(status), ..) => Action::Status(FaultStatus { rax: status.0.0 }),
            (_, Some(ms), _) => Action::Delay(FaultDelay { ms }),
            (.., Some(abort)) => Action::Abort(FaultAbort {
                after: abort == AbortArg::After,
            }),
            _ if self.lose_reply => Action::LoseReply(FaultLoseReply {}),
            _ if self.cut => Action::Cut(FaultCut {}),
            _ => Action::Status(FaultStatus { rax: 0 }),
        };
        FaultRule {
            leaf: self.leaf.map(|leaf| leaf.0.into()),
            gpa: self.gpa.map_or(0, |range| range.start),
            gpa_end: self.gpa.map_or(0, |range| range.end),
            when: self
                .nth
                .map(When::Nth)
                .or(self.per_million.map(When::PerMillion)),
            seed: self.seed,
            times: self.times.unwrap_or(0),
            action: Some(action),
        }
    }
}

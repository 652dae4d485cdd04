//! `chaos`: seeded workload and faults.

use std::time::Duration;

use clap::{Args, Subcommand};

use super::number::{duration, number};

/// `mmuctl chaos`.
#[derive(Debug, Subcommand)]
pub enum ChaosCommand {
    /// Play a seed: several VMs at work, busy answers, delays, lost replies, cuts and kills; ends
    /// with an audit of every VM and a module that must be empty
    Run(ChaosRunArgs),
    /// The same for as long as asked
    Soak(ChaosSoakArgs),
}

/// `mmuctl chaos run`.
#[derive(Debug, Args)]
pub struct ChaosRunArgs {
    /// Determines workload and faults
    #[arg(long, value_name = "N", value_parser = number)]
    pub seed: u64,
    /// End with the first round that is over after so long
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub seconds: Option<Duration>,
    /// End after so many operations, rounded up to whole rounds
    #[arg(long, value_name = "N", value_parser = number, conflicts_with = "seconds")]
    pub operations: Option<u64>,
    /// VMs at work at a time
    #[arg(long, value_name = "N", default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vms: u32,
}

/// `mmuctl chaos soak`.
#[derive(Debug, Args)]
pub struct ChaosSoakArgs {
    /// How long
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u64).range(1..=10_080))]
    pub minutes: u64,
    /// VMs at work at a time
    #[arg(long, value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub vms: u32,
    /// Determines workload and faults
    #[arg(long, value_name = "N", default_value = "1", value_parser = number)]
    pub seed: u64,
}

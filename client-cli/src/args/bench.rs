//! `bench`.

use std::path::PathBuf;

use clap::Args;

use super::number::number;
use crate::bench::{Name, Plan};

/// `mmuctl bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure
    #[arg(value_enum, value_name = "NAME")]
    pub name: Name,
    /// Guest memory; each benchmark has its own default
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: Option<u64>,
    /// Repeats that count
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub repeats: u32,
    /// Repeats before them that do not
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(..=1000))]
    pub warm_up: u32,
    /// Draws the figures of `growth` into an SVG file
    #[arg(long, value_name = "FILE")]
    pub plot: Option<PathBuf>,
}

impl BenchArgs {
    /// What to measure.
    pub fn plan(&self) -> Plan {
        Plan {
            name: self.name,
            size: self.size,
            repeats: self.repeats,
            warm_up: self.warm_up,
        }
    }
}

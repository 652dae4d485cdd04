//! `scenario`.

use clap::{Args, Subcommand};

use super::ModeArg;

/// `mmuctl scenario`.
#[derive(Debug, Subcommand)]
pub enum ScenarioCommand {
    /// What can be run: id, group and title
    List,
    /// Play scenarios on a host and a module in this process; fails when one does not do what it
    /// says
    Run(ScenarioRunArgs),
}

/// `mmuctl scenario run`.
#[derive(Debug, Args)]
pub struct ScenarioRunArgs {
    /// Scenarios as `list` names them, such as P01 or zero-step
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    /// How changes of the mirror reach the module
    #[arg(long, value_enum, default_value_t = ModeArg::Kernel, value_name = "MODE")]
    pub mode: ModeArg,
}

//! `chaos`: seeded workload and faults on services of its own.

use std::time::Duration;

use crate::args::{ChaosCommand, ChaosRunArgs, ChaosSoakArgs};
use crate::chaos::{self, Length, Plan};
use crate::error::Error;
use crate::output::Answer;
use crate::session::Session;

/// Operations of a run when neither they nor a time are given.
const OPERATIONS: u64 = 240;

/// `mmuctl chaos`.
pub(super) async fn run(session: &Session, command: &ChaosCommand) -> Result<Answer, Error> {
    if session.is_given() {
        let reason = "chaos kills its services and so starts its own: leave the URLs out";
        return Err(Error::Usage(reason.to_owned()));
    }
    let plan = match command {
        ChaosCommand::Run(args) => run_plan(args),
        ChaosCommand::Soak(args) => soak_plan(args),
    };
    Ok(chaos::run(&plan, &session.stop).await?.answer())
}

fn run_plan(args: &ChaosRunArgs) -> Plan {
    let vms = usize::try_from(args.vms).unwrap_or(1);
    let length = match args.seconds {
        Some(time) => Length::Time(time),
        None => Length::of_operations(args.operations.unwrap_or(OPERATIONS), vms),
    };
    Plan {
        seed: args.seed,
        vms,
        length,
    }
}

fn soak_plan(args: &ChaosSoakArgs) -> Plan {
    Plan {
        seed: args.seed,
        vms: usize::try_from(args.vms).unwrap_or(1),
        length: Length::Time(Duration::from_secs(args.minutes * 60)),
    }
}

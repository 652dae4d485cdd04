//! `replay`: a recording as guest accesses.

use std::io::BufRead;
use std::sync::Arc;

use tdx_defs::{Gpaw, PAGE_SIZE};

use crate::args::ReplayArgs;
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, pairs};
use crate::progress::Progress;
use crate::replay::{
    Plan, PlanOptions, Player, Report, TdVm, VmSpec, audit, platform_use, with_vm,
};
use crate::trace::{self, Trace};

/// Unreadable lines that are named on stderr.
const NAMED_LINES: u64 = 10;

/// `mmuctl replay`.
pub(super) async fn run(client: &Client, args: &ReplayArgs) -> Result<Answer, Error> {
    let options = options(args)?;
    let file = args.file.clone();
    // Reading and unpacking is work for a thread of its own.
    let reading = tokio::task::spawn_blocking(move || read(trace::open(&file)?));
    let trace = tokio::select! {
        trace = reading => trace.map_err(|error| Error::Runtime(std::io::Error::other(error)))??,
        () = client.stop().asked() => return Err(Error::Interrupted),
    };
    if args.strict && trace.summary.unreadable > 0 {
        return Err(Error::Unreadable {
            count: trace.summary.unreadable,
        });
    }
    let plan = Plan::new(&trace, &options)?;
    warn(&plan, &trace);
    let report = play(client, args, trace, plan).await?;
    if let Some(reason) = &report.played.first_error {
        let count: u64 = report.played.errors.values().sum();
        eprintln!("mmuctl: {count} faults left KVM_RUN with an error; the first: {reason}");
    }
    Ok(Answer {
        verdict: report.audit.verdict(),
        ..Answer::new(report.to_json(), pairs(report.rows()))
    })
}

async fn play(
    client: &Client,
    args: &ReplayArgs,
    trace: Trace,
    plan: Plan,
) -> Result<Report, Error> {
    let spec = VmSpec {
        mode: args.mode.to_wire(),
        gpaw: args.gpaw,
        label: "replay",
    };
    let done = with_vm(client, spec, plan.vcpus.len(), async |vm_id| {
        let vm = Arc::new(TdVm::build(client, vm_id, &plan, None).await?);
        let progress = Progress::new("faults", plan.fault_count());
        let played = Player::new(client, vm.clone(), progress)
            .play(&plan, args.order)
            .await?;
        Ok((
            vm.mrtd.clone(),
            vm.built.clone(),
            played,
            audit(client, vm_id).await?,
        ))
    });
    let (mrtd, built, played, audit) = done.await?;
    Ok(Report {
        mode: args.mode.name(),
        order: args.order.name(),
        summary: trace.summary,
        plan,
        built,
        mrtd,
        played,
        audit,
        after_destroy: platform_use(client).await?,
    })
}

fn options(args: &ReplayArgs) -> Result<PlanOptions, Error> {
    let gpaw = match args.gpaw {
        48 => Gpaw::W48,
        52 => Gpaw::W52,
        other => return Err(Error::Usage(format!("gpaw {other} is neither 48 nor 52"))),
    };
    if let Some(base) = args.hva_base.filter(|base| base % PAGE_SIZE != 0) {
        return Err(Error::Usage(format!(
            "hva-base {base:#x} is not a multiple of the page size {PAGE_SIZE:#x}"
        )));
    }
    Ok(PlanOptions {
        private: args.private.clone(),
        gpaw,
        hva_base: args.hva_base,
        image: Vec::new(),
    })
}

/// Reads a recording and names the first unreadable lines.
pub(super) fn read(input: impl BufRead) -> Result<Trace, Error> {
    let mut named = 0;
    let trace = trace::read(input, |unreadable| {
        if named < NAMED_LINES {
            eprintln!("mmuctl: {unreadable}");
        }
        named += 1;
    })?;
    if named > NAMED_LINES {
        eprintln!("mmuctl: {} more lines cannot be read", named - NAMED_LINES);
    }
    Ok(trace)
}

fn warn(plan: &Plan, trace: &Trace) {
    if plan.out_of_range > 0 {
        eprintln!(
            "mmuctl: {} addresses are wider than the guest's and are left out; --gpaw 52 may fit",
            plan.out_of_range
        );
    }
    if trace.summary.lost > 0 {
        eprintln!("mmuctl: the recorder lost {} events", trace.summary.lost);
    }
}

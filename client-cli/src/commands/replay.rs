//! `replay`: a recording as guest accesses.

use std::io::BufRead;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use tdx_defs::{Gpaw, PAGE_SIZE};

use crate::args::{ModeArg, PrivateMemory, ReplayArgs};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, merge, pairs};
use crate::progress::Progress;
use crate::replay::html::{MeasuredRun, Page};
use crate::replay::{
    AddressMap, Plan, PlanOptions, Player, Report, TdVm, VmSpec, audit, platform_use, with_vm,
};
use crate::session::Session;
use crate::trace::{self, Event, Summary, Trace};

/// Unreadable lines that are named on stderr.
const NAMED_LINES: u64 = 10;

/// `mmuctl replay`.
pub(super) async fn run(
    session: &Session,
    client: &Client,
    args: &ReplayArgs,
) -> Result<Answer, Error> {
    if let Some(file) = &args.report {
        // Before the work: a page that nobody can write should not cost minutes.
        std::fs::write(file, "").map_err(|source| Error::Report {
            file: file.clone(),
            source,
        })?;
    }
    let options = options(args)?;
    let file = args.file.clone();
    let started = Instant::now();
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
    let read = started.elapsed();
    warn(&plan, &trace);
    let recorded_ns = if args.report.is_some() {
        times_of(&trace)
    } else {
        Vec::new()
    };
    let summary = trace.summary;
    drop(trace);
    let run = play(session, client, args, args.mode, summary, plan.clone()).await?;
    let mut verdict = run.report.audit.verdict();
    if let Some(file) = &args.report {
        let other = match args.one_mode {
            true => None,
            false => Some(play(session, client, args, args.mode.other(), summary, plan).await?),
        };
        let page = Page {
            file: &name_of(&args.file),
            command: &command(args),
            recorded_ns: &recorded_ns,
            run: &run,
            other: other.as_ref(),
        };
        std::fs::write(file, page.html()).map_err(|source| Error::Report {
            file: file.clone(),
            source,
        })?;
        eprintln!("mmuctl: the report is in {}", file.display());
        verdict = verdict.or_else(|| other.and_then(|other| other.report.audit.verdict()));
    }
    let report = &run.report;
    if let Some(reason) = &report.played.first_error {
        let count: u64 = report.played.errors.values().sum();
        eprintln!("mmuctl: {count} faults left KVM_RUN with an error; the first: {reason}");
    }
    let from_file = report.faults_per_s_with(read);
    let (mut json, mut rows) = (report.to_json(), report.rows());
    let own = json!({ "read_s": read.as_secs_f64(), "faults_per_s_with_reading": from_file });
    if let Value::Object(own) = own {
        merge(&mut json, own);
    }
    rows.push((
        "faults per second, reading counted".into(),
        format!("{from_file:.0}"),
    ));
    Ok(Answer {
        verdict,
        ..Answer::new(json, pairs(rows))
    })
}

/// Plays the recording on a VM of its own.
async fn play(
    session: &Session,
    client: &Client,
    args: &ReplayArgs,
    mode: ModeArg,
    summary: Summary,
    plan: Plan,
) -> Result<MeasuredRun, Error> {
    let spec = VmSpec {
        mode: mode.to_wire(),
        gpaw: args.gpaw,
        label: "replay",
    };
    let reports = args.report.is_some();
    let memory_before = session.memory();
    let done = with_vm(client, spec, plan.vcpus.len(), async |vm_id| {
        let vm = Arc::new(TdVm::build(client, vm_id, &plan, None).await?);
        let map = async || match reports {
            true => AddressMap::of_vm(client, vm_id, &plan).await,
            false => Ok(AddressMap::new(&plan)),
        };
        let before = map().await?;
        let progress = Progress::new("faults", plan.fault_count());
        let player = Player::new(client, vm.clone(), progress).accepting(args.accept);
        let played = player.play(&plan, args.order).await?;
        let memory = memory_before.zip(session.memory());
        let after = map().await?;
        let audit = audit(client, vm_id).await?;
        Ok((vm, played, player.meter(), before, after, memory, audit))
    });
    let (vm, played, meter, before, after, memory, audit) = done.await?;
    let report = Report {
        mode: mode.name(),
        order: args.order.name(),
        summary,
        plan,
        built: vm.built.clone(),
        mrtd: vm.mrtd.clone(),
        played,
        audit,
        after_destroy: platform_use(client).await?,
    };
    Ok(MeasuredRun {
        report,
        meter,
        before,
        after,
        memory,
    })
}

fn times_of(trace: &Trace) -> Vec<u64> {
    let events = trace.events.iter();
    events
        .filter_map(|event| match event {
            Event::Fault(fault) => Some(fault.time_ns),
            Event::Unmap(_) => None,
        })
        .collect()
}

/// The name of a recording for people.
fn name_of(file: &Path) -> String {
    match file.file_name() {
        Some(name) if name != "-" => name.to_string_lossy().into_owned(),
        _ => "standard input".to_owned(),
    }
}

/// The command line that makes the same page.
fn command(args: &ReplayArgs) -> String {
    let mut words = vec!["mmuctl".to_owned(), "replay".to_owned()];
    words.push(quoted(&args.file.to_string_lossy()));
    match &args.private {
        PrivateMemory::All => {}
        PrivateMemory::None => words.extend(["--private".into(), "none".into()]),
        PrivateMemory::Ranges(ranges) => {
            let ranges: Vec<String> = ranges
                .iter()
                .map(|range| format!("{:x}-{:x}", range.start, range.end))
                .collect();
            words.extend(["--private".into(), ranges.join(",")]);
        }
    }
    words.extend(["--mode".into(), args.mode.name().into()]);
    words.extend(["--order".into(), args.order.name().into()]);
    if args.accept {
        words.push("--accept".into());
    }
    if let Some(base) = args.hva_base {
        words.push(format!("--hva-base {base:x}"));
    }
    if args.gpaw != 48 {
        words.push(format!("--gpaw {}", args.gpaw));
    }
    if args.strict {
        words.push("--strict".into());
    }
    if let Some(report) = &args.report {
        words.extend(["--report".into(), quoted(&report.to_string_lossy())]);
    }
    if args.one_mode {
        words.push("--one-mode".into());
    }
    words.join(" ")
}

/// A word for a shell.
fn quoted(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./:=,+".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', "'\\''"))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_quoted_only_where_a_shell_needs_it() {
        for (word, quoted_word) in [
            ("a/b-1.trace.zst", "a/b-1.trace.zst"),
            ("my trace", "'my trace'"),
            ("it's", r"'it'\''s'"),
            ("", "''"),
        ] {
            assert_eq!(quoted(word), quoted_word);
        }
    }
}

//! `demo`: the main job in a minute, in both propagation modes.
//!
//! For each mode: a TD is built and measured from a small firmware image, boots with a bundled
//! recording, 2 MiB of its memory become shared and private again, the guest touches them again,
//! and an audit compares the trees.

use std::sync::Arc;

use serde_json::{Value, json};
use tdx_defs::Gpaw;

use super::ranges::set_attributes;
use super::replay::read;
use crate::args::{AddressRange, DemoArgs, ModeArg, Order, PrivateMemory, Visibility};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, Table, hex, merge};
use crate::progress::Progress;
use crate::replay::{
    Plan, PlanOptions, Played, Player, Report, Segment, TdVm, VmSpec, audit, platform_use,
    with_vm_or_keep,
};
use crate::session::Session;
use crate::tally::Tally;
use crate::tdvf::Tdvf;
use crate::trace::Trace;

/// A synthetic image in the format of TDX virtual firmware.
const IMAGE: &[u8] = include_bytes!("../../data/tiny.fd");
/// The first 5,000 first touches of a real boot.
const TRACE: &[u8] = include_bytes!("../../data/boot-small.trace");
/// How much memory is converted.
const CONVERTED: u64 = 2 << 20;

/// What one mode did.
struct Run {
    report: Report,
    converted: AddressRange,
    to_shared: Tally,
    to_private: Tally,
    again: Played,
    /// The VM, where it is still there.
    kept: Option<u64>,
}

/// `mmuctl demo`.
pub(super) async fn run(
    session: &Session,
    client: &Client,
    args: &DemoArgs,
) -> Result<Answer, Error> {
    if args.keep && session.is_local() {
        let reason = "--keep needs services that stay: name them with --mmu";
        return Err(Error::Usage(reason.to_owned()));
    }
    let image = Tdvf::parse(IMAGE)?;
    let trace = read(TRACE)?;
    let kernel = boot(client, ModeArg::Kernel, false, &image, &trace).await?;
    let batched = boot(client, ModeArg::Batched, args.keep, &image, &trace).await?;
    let mut json = batched.report.to_json();
    if let Value::Object(members) =
        json!({ "kernel": kernel.to_json(), "batched": batched.to_json(), "vm_id": batched.kept })
    {
        merge(&mut json, members);
    }
    let verdict = kernel
        .report
        .audit
        .verdict()
        .or(batched.report.audit.verdict());
    Ok(Answer {
        verdict,
        ..Answer::new(json, text(&kernel, &batched))
    })
}

async fn boot(
    client: &Client,
    mode: ModeArg,
    keep: bool,
    image: &Tdvf<'_>,
    trace: &Trace,
) -> Result<Run, Error> {
    let options = PlanOptions {
        private: PrivateMemory::All,
        gpaw: Gpaw::W48,
        hva_base: None,
        image: image.added_memory(),
    };
    let plan = Plan::new(trace, &options)?;
    let converted = busiest_region(&plan);
    let spec = VmSpec {
        mode: mode.to_wire(),
        gpaw: 48,
        label: "demo",
    };
    let done = with_vm_or_keep(client, spec, plan.vcpus.len(), !keep, async |vm_id| {
        let vm = Arc::new(TdVm::build(client, vm_id, &plan, Some(image)).await?);
        let progress = Progress::new("faults", plan.fault_count());
        let player = Player::new(client, vm.clone(), progress);
        let played = player.play(&plan, Order::Recorded).await?;
        let convert =
            async |to| set_attributes(client, vm_id, converted.start, CONVERTED, to).await;
        let to_shared = convert(Visibility::Shared).await?;
        let to_private = convert(Visibility::Private).await?;
        // Conversion drops contents and mappings: the guest's next touches are faults again.
        let again = player
            .play(&touches_of(&plan, converted), Order::Recorded)
            .await?;
        let audit = audit(client, vm_id).await?;
        Ok((
            vm.mrtd.clone(),
            vm.built.clone(),
            played,
            to_shared,
            to_private,
            again,
            audit,
        ))
    });
    let ((mrtd, built, played, to_shared, to_private, again, audit), vm_id) = done.await?;
    let report = Report {
        mode: mode.name(),
        order: Order::Recorded.name(),
        summary: trace.summary,
        plan,
        built,
        mrtd,
        played,
        audit,
        after_destroy: platform_use(client).await?,
    };
    Ok(Run {
        report,
        converted,
        to_shared,
        to_private,
        again,
        kept: keep.then_some(vm_id),
    })
}

/// The 2 MiB with most touched pages.
fn busiest_region(plan: &Plan) -> AddressRange {
    let mut touches = std::collections::BTreeMap::<u64, u32>::new();
    for fault in plan.segments.iter().flat_map(|segment| &segment.faults) {
        *touches.entry(fault.gpa / CONVERTED).or_default() += 1;
    }
    let busiest = touches
        .iter()
        .max_by_key(|(region, count)| (**count, std::cmp::Reverse(**region)));
    let start = busiest.map_or(0, |(region, _)| region * CONVERTED);
    AddressRange {
        start,
        end: start + CONVERTED,
    }
}

/// The plan's accesses to a range and nothing else.
fn touches_of(plan: &Plan, range: AddressRange) -> Plan {
    let all = plan.segments.iter().flat_map(|segment| &segment.faults);
    let inside = |gpa: u64| range.start <= gpa && gpa < range.end;
    let faults = all.filter(|fault| inside(fault.gpa)).copied().collect();
    Plan {
        segments: vec![Segment {
            faults,
            unmap: None,
        }],
        ..plan.clone()
    }
}

impl Run {
    fn to_json(&self) -> Value {
        let mut json = self.report.to_json();
        let convert = json!({
            "gpa": hex(self.converted.start),
            "size": self.converted.size(),
            "to_shared": self.to_shared.to_json(),
            "to_private": self.to_private.to_json(),
            "touched_again": { "faults": self.again.faults, "ret_pf": self.again.ret_pf },
        });
        let build = Value::Object(self.report.built.to_json());
        if let Value::Object(members) = json!({ "build": build, "convert": convert }) {
            merge(&mut json, members);
        }
        json
    }
}

fn text(kernel: &Run, batched: &Run) -> String {
    let mut table = Table::new(&["", ">kernel", ">batched"]);
    let mut row = |name: &str, value: &dyn Fn(&Run) -> String| {
        table.row([name.to_owned(), value(kernel), value(batched)]);
    };
    row("build: SEAMCALLs", &|run| {
        run.report.built.seamcall_count().to_string()
    });
    row("build: messages", &|run| run.report.built.rpcs.to_string());
    row("boot: faults", &|run| run.report.played.faults.to_string());
    for name in ["FIXED", "SPURIOUS"] {
        row(&format!("boot: RET_PF_{name}"), &|run| {
            run.report
                .played
                .ret_pf
                .get(name)
                .copied()
                .unwrap_or(0)
                .to_string()
        });
    }
    row("boot: SEAMCALLs", &|run| {
        run.report.played.tally.seamcall_count().to_string()
    });
    row("boot: messages", &|run| {
        run.report.played.tally.rpcs.to_string()
    });
    row("boot: seconds", &|run| {
        format!("{:.3}", run.report.played.elapsed.as_secs_f64())
    });
    row("boot: faults per second", &|run| {
        format!("{:.0}", run.report.faults_per_s())
    });
    row("2 MiB to shared: pages", &|run| {
        run.to_shared.pages_zapped.to_string()
    });
    row("2 MiB to shared: SEAMCALLs", &|run| {
        run.to_shared.seamcall_count().to_string()
    });
    row("2 MiB to shared: messages", &|run| {
        run.to_shared.rpcs.to_string()
    });
    row("2 MiB to shared: kicks", &|run| {
        run.to_shared.kicks.to_string()
    });
    row("and private again: faults", &|run| {
        run.again.faults.to_string()
    });
    row("audit: entries", &|run| {
        run.report.audit.entries.to_string()
    });
    row("audit: mismatches", &|run| {
        run.report.audit.mismatches.to_string()
    });
    let saved = ratio(
        kernel.report.played.tally.rpcs,
        batched.report.played.tally.rpcs,
    );
    let saved_convert = ratio(kernel.to_shared.rpcs, batched.to_shared.rpcs);
    let kept = batched.kept.map_or_else(String::new, |vm| {
        format!("\nVM {vm} is still there; mmuctl vm destroy --vm {vm} ends it.")
    });
    format!(
        "MRTD {}\n{table}\nBatching needs {saved} fewer messages for the boot and {saved_convert} \
         fewer to convert 2 MiB; the result is the same.{kept}",
        batched.report.mrtd
    )
}

fn ratio(many: u64, few: u64) -> String {
    format!("{:.1} times", many as f64 / few.max(1) as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bundled_files_make_a_plan() {
        let image = Tdvf::parse(IMAGE).unwrap();
        let trace = read(TRACE).unwrap();
        let options = PlanOptions {
            private: PrivateMemory::All,
            gpaw: Gpaw::W48,
            hva_base: None,
            image: image.added_memory(),
        };
        let plan = Plan::new(&trace, &options).unwrap();
        assert_eq!(plan.fault_count(), 5000);
        let region = busiest_region(&plan);
        assert_eq!(region.start, 0xa0_0000);
        assert_eq!(touches_of(&plan, region).fault_count(), 512);
        for memory in image.added_memory() {
            assert!(
                plan.slots
                    .iter()
                    .any(|slot| slot.range.intersect(memory) == Some(memory))
            );
        }
    }
}

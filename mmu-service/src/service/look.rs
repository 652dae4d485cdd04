//! Looking at a VM: GetWalk, DumpTree, Audit, GetStats. A VM that is dead can be looked at too.

use std::ops::ControlFlow;
use std::sync::Arc;

use mirror_proto::mmu as wire;
use tdp_mmu::{AuditReport, Stats};
use tonic::Status;
use tracing::info_span;

use super::stream::{Answers, answer};
use crate::convert::{
    counts_to_wire, min_level_from_wire, root_from_wire, tree_entry_to_wire, walk_to_wire,
};
use crate::link::LinkState;
use crate::shell::Shell;
use crate::status;

/// Entries in one message of DumpTree.
const TREE_ENTRIES: usize = 512;

pub(crate) async fn get_walk(
    shell: &Arc<Shell>,
    request: wire::GetWalkRequest,
) -> Result<wire::GetWalkResponse, Status> {
    let wire::GetWalkRequest { vm_id, gpa, module } = request;
    let entry = shell.vms.get(vm_id)?;
    let span = info_span!(
        "get_walk",
        kvm.vm = vm_id,
        kvm.gpa = gpa,
        kvm.module = module
    );
    let walk = shell
        .operate(&entry, span, move |vm| vm.walk(gpa, module))
        .await?;
    Ok(walk_to_wire(&walk))
}

pub(super) fn dump_tree(
    shell: &Arc<Shell>,
    request: wire::DumpTreeRequest,
) -> Result<Answers<wire::DumpTreeResponse>, Status> {
    let root = root_from_wire(request.root).map_err(status::of_field)?;
    let min_level = min_level_from_wire(request.min_level).map_err(status::of_field)?;
    let entry = shell.vms.get(request.vm_id)?;
    let span = info_span!("dump_tree", kvm.vm = entry.id);
    Ok(answer(shell, entry, span, move |vm, pieces| {
        let mut entries = Vec::with_capacity(TREE_ENTRIES);
        let mut has_reader = true;
        vm.dump_tree(root, min_level, &mut |entry| {
            entries.push(tree_entry_to_wire(&entry));
            if entries.len() == TREE_ENTRIES {
                let full = std::mem::replace(&mut entries, Vec::with_capacity(TREE_ENTRIES));
                has_reader = pieces.deliver(wire::DumpTreeResponse { entries: full });
            }
            if has_reader {
                ControlFlow::Continue(())
            } else {
                ControlFlow::Break(())
            }
        })?;
        let is_last = has_reader && !entries.is_empty();
        Ok(is_last.then_some(wire::DumpTreeResponse { entries }))
    }))
}

pub(crate) fn audit(
    shell: &Arc<Shell>,
    request: wire::AuditRequest,
) -> Result<Answers<wire::AuditResponse>, Status> {
    let entry = shell.live_vm(request.vm_id)?;
    let span = info_span!("audit", kvm.vm = entry.id);
    Ok(answer(shell, entry, span, |vm, pieces| {
        let report = vm.audit(&mut |entries, mismatches| {
            pieces.progress(wire::AuditResponse {
                entries,
                mismatches,
                ..Default::default()
            });
        })?;
        Ok(Some(audit_to_wire(report)))
    }))
}

fn audit_to_wire(report: AuditReport) -> wire::AuditResponse {
    wire::AuditResponse {
        entries: report.entries,
        mismatches: report.mismatches,
        first_mismatches: report
            .first_mismatches
            .into_iter()
            .map(|mismatch| wire::Mismatch {
                gpa: mismatch.gpa,
                level: mismatch.level.get().into(),
                reason: mismatch.reason,
            })
            .collect(),
        finished: true,
        frozen: report.frozen,
        leaves: report.leaves,
        tables: report.tables,
    }
}

pub(super) async fn get_stats(
    shell: &Arc<Shell>,
    request: wire::GetStatsRequest,
) -> Result<wire::GetStatsResponse, Status> {
    let (module_instance, host_pages_in_use) = match &*shell.link.state().borrow() {
        LinkState::Up(module) => (module.instance().to_owned(), module.host().pages_in_use()),
        LinkState::Connecting | LinkState::Down { .. } => (String::new(), 0),
    };
    let span = info_span!("get_stats", kvm.vm = request.vm_id);
    let shell_there = Arc::clone(shell);
    let (stats, vms, last_event) = if request.vm_id == 0 {
        let (stats, vms) = shell.run(span, move || totals(&shell_there)).await?;
        (stats, vms, 0)
    } else {
        let entry = shell.vms.get(request.vm_id)?;
        let stats = shell.operate(&entry, span, |vm| Ok(vm.stats())).await?;
        (stats, 1, entry.events.last())
    };
    Ok(wire::GetStatsResponse {
        counts: Some(counts_to_wire(&stats.counts)),
        pages_4k: stats.pages_4k,
        pages_2m: stats.pages_2m,
        pages_1g: stats.pages_1g,
        remote_tlb_flush_requests: stats.remote_tlb_flush_requests,
        vms,
        host_pages_in_use,
        page_table_bytes: stats.page_table_bytes,
        module_instance,
        nx_lpage_splits: stats.nx_lpage_splits,
        last_event,
    })
}

/// All VMs together: what they did, those that are gone included, and what they hold.
fn totals(shell: &Shell) -> (Stats, u64) {
    let mut all = Stats {
        counts: shell.vms.gone(),
        ..Stats::default()
    };
    let mut vms = 0;
    for entry in shell.vms.all() {
        let one = entry.vm.stats();
        all.counts += &one.counts;
        all.pages_4k += one.pages_4k;
        all.pages_2m += one.pages_2m;
        all.pages_1g += one.pages_1g;
        all.remote_tlb_flush_requests += one.remote_tlb_flush_requests;
        all.page_table_bytes += one.page_table_bytes;
        all.nx_lpage_splits += one.nx_lpage_splits;
        vms += 1;
    }
    (all, vms)
}

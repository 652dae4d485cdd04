//! Wire ⇄ core for kvm.mmu.v1. Every refusal names the field and its limit.
//!
//! What depends on the state of a VM, alignment and ranges among it, is judged by the core.

use mirror_proto::{InvalidField, mmu as wire};
use tdp_mmu::{
    Counts, DirtyLogMode, Fault, FaultOutcome, FaultReport, FaultsReport, HostChange, HostPageSize,
    MAX_SLOTS, Mode, RetPf, RootKind, SlotSpec, TreeEntry, VmKind, Walk, WalkEntry,
};
use tdx_defs::{CompletionStatus, GpaLayout, Gpaw, Leaf, Level};

use crate::config::size;
use crate::registry::VmEntry;

/// A message that must be there.
pub(crate) fn required<T>(message: Option<T>, field: &str) -> Result<T, InvalidField> {
    message.ok_or_else(|| InvalidField::new(field, "missing"))
}

pub(crate) fn gpaw_from_wire(gpaw: u32) -> Result<Gpaw, InvalidField> {
    match gpaw {
        0 | 48 => Ok(Gpaw::W48),
        52 => Ok(Gpaw::W52),
        other => Err(InvalidField::new(
            "gpaw",
            format!("{other} is neither 48 nor 52"),
        )),
    }
}

/// Unspecified means batched, as the contract says.
pub(crate) fn mode_from_wire(mode: i32) -> Result<Mode, InvalidField> {
    match wire::Mode::try_from(mode) {
        Ok(wire::Mode::Unspecified | wire::Mode::Batched) => Ok(Mode::Batched),
        Ok(wire::Mode::Kernel) => Ok(Mode::Kernel),
        Err(_) => Err(InvalidField::new("mode", format!("{mode} is not a mode"))),
    }
}

fn mode_to_wire(mode: Mode) -> wire::Mode {
    match mode {
        Mode::Batched => wire::Mode::Batched,
        Mode::Kernel => wire::Mode::Kernel,
    }
}

/// Unspecified means a TD.
pub(crate) fn kind_from_wire(kind: i32) -> Result<VmKind, InvalidField> {
    match wire::VmKind::try_from(kind) {
        Ok(wire::VmKind::Unspecified | wire::VmKind::Td) => Ok(VmKind::Td),
        Ok(wire::VmKind::Ordinary) => Ok(VmKind::Ordinary),
        Err(_) => Err(InvalidField::new(
            "kind",
            format!("{kind} is not a kind of VM"),
        )),
    }
}

fn kind_to_wire(kind: VmKind) -> wire::VmKind {
    match kind {
        VmKind::Td => wire::VmKind::Td,
        VmKind::Ordinary => wire::VmKind::Ordinary,
    }
}

/// Unspecified means that reading protects.
pub(crate) fn dirty_log_from_wire(mode: i32) -> Result<DirtyLogMode, InvalidField> {
    match wire::DirtyLogMode::try_from(mode) {
        Ok(wire::DirtyLogMode::Unspecified | wire::DirtyLogMode::Protect) => {
            Ok(DirtyLogMode::Protect)
        }
        Ok(wire::DirtyLogMode::Manual) => Ok(DirtyLogMode::Manual),
        Ok(wire::DirtyLogMode::ManualInitiallySet) => Ok(DirtyLogMode::ManualInitiallySet),
        Err(_) => Err(InvalidField::new(
            "dirty_log",
            format!("{mode} is not a way to read the log"),
        )),
    }
}

/// Unspecified means 4 KiB.
pub(crate) fn page_size_from_wire(size: i32, field: &str) -> Result<HostPageSize, InvalidField> {
    match wire::HostPageSize::try_from(size) {
        Ok(wire::HostPageSize::Unspecified | wire::HostPageSize::HostPageSize4k) => {
            Ok(HostPageSize::Size4K)
        }
        Ok(wire::HostPageSize::HostPageSize2m) => Ok(HostPageSize::Size2M),
        Ok(wire::HostPageSize::HostPageSize1g) => Ok(HostPageSize::Size1G),
        Err(_) => Err(InvalidField::new(
            field,
            format!("{size} is not a page size"),
        )),
    }
}

fn page_size_to_wire(size: HostPageSize) -> wire::HostPageSize {
    match size {
        HostPageSize::Size4K => wire::HostPageSize::HostPageSize4k,
        HostPageSize::Size2M => wire::HostPageSize::HostPageSize2m,
        HostPageSize::Size1G => wire::HostPageSize::HostPageSize1g,
    }
}

/// Unspecified means no change, only the notifier. A page size belongs to one change.
pub(crate) fn host_change_from_wire(
    change: i32,
    page_size: i32,
) -> Result<Option<HostChange>, InvalidField> {
    let change = wire::HostChange::try_from(change).map_err(|_| {
        InvalidField::new("change", format!("{change} is not a change of the host"))
    })?;
    let size = page_size_from_wire(page_size, "page_size")?;
    if (change == wire::HostChange::PageSize) != (page_size != 0) {
        let reason = "goes with HOST_CHANGE_PAGE_SIZE, and with nothing else";
        return Err(InvalidField::new("page_size", reason));
    }
    Ok(match change {
        wire::HostChange::Unspecified => None,
        wire::HostChange::Drop => Some(HostChange::Drop),
        wire::HostChange::DropToZero => Some(HostChange::DropToZero),
        wire::HostChange::ReadOnly => Some(HostChange::ReadOnly),
        wire::HostChange::ReadWrite => Some(HostChange::ReadWrite),
        wire::HostChange::NoAccess => Some(HostChange::NoAccess),
        wire::HostChange::PageSize => Some(HostChange::PageSize(size)),
        wire::HostChange::Share => Some(HostChange::Share),
        wire::HostChange::Write => Some(HostChange::Write),
    })
}

/// Unspecified means both roots.
pub(crate) fn root_from_wire(root: i32) -> Result<Option<RootKind>, InvalidField> {
    match wire::Root::try_from(root) {
        Ok(wire::Root::Unspecified) => Ok(None),
        Ok(wire::Root::Direct) => Ok(Some(RootKind::Direct)),
        Ok(wire::Root::Mirror) => Ok(Some(RootKind::Mirror)),
        Err(_) => Err(InvalidField::new("root", format!("{root} is not a root"))),
    }
}

fn root_to_wire(root: RootKind) -> i32 {
    match root {
        RootKind::Direct => wire::Root::Direct,
        RootKind::Mirror => wire::Root::Mirror,
    }
    .into()
}

/// Zero means the lowest level.
pub(crate) fn min_level_from_wire(level: u32) -> Result<Level, InvalidField> {
    let number = u8::try_from(level.max(1)).unwrap_or(u8::MAX);
    Level::new(number)
        .map_err(|_| InvalidField::new("min_level", format!("{level} is outside 1..=5")))
}

pub(crate) fn slot_from_wire(slot: wire::Slot) -> Result<SlotSpec, InvalidField> {
    // KVM keeps an address space number above bit 15; a TD has one address space.
    if size(slot.slot_id) >= MAX_SLOTS {
        let reason = format!("{} is outside 0..{MAX_SLOTS}", slot.slot_id);
        return Err(InvalidField::new("slot.slot_id", reason));
    }
    Ok(SlotSpec {
        slot_id: slot.slot_id,
        gpa: slot.gpa,
        size: slot.size,
        userspace_addr: slot.userspace_addr,
        guest_memfd: slot.guest_memfd,
        read_only: slot.read_only,
        log_dirty: slot.log_dirty,
        host_page_size: page_size_from_wire(slot.host_page_size, "slot.host_page_size")?,
        demand_zero: slot.demand_zero,
    })
}

pub(crate) fn slot_to_wire(slot: &SlotSpec) -> wire::Slot {
    wire::Slot {
        slot_id: slot.slot_id,
        gpa: slot.gpa,
        size: slot.size,
        userspace_addr: slot.userspace_addr,
        guest_memfd: slot.guest_memfd,
        read_only: slot.read_only,
        log_dirty: slot.log_dirty,
        host_page_size: page_size_to_wire(slot.host_page_size).into(),
        demand_zero: slot.demand_zero,
    }
}

pub(crate) fn fault_from_wire(fault: &wire::Fault) -> Fault {
    Fault {
        gpa: fault.gpa,
        qualification: fault.qualification,
        extended: fault.extended_qualification,
    }
}

/// The name of a leaf, or its number.
fn leaf_name(leaf: Leaf) -> String {
    leaf.to_string()
}

fn status_name(status: CompletionStatus) -> String {
    status.name().unwrap_or_else(|| status.to_string())
}

pub(crate) fn counts_to_wire(counts: &Counts) -> wire::Counts {
    wire::Counts {
        seamcalls: counts
            .seamcalls
            .iter()
            .map(|(leaf, count)| wire::LeafCount {
                leaf: leaf.0.into(),
                name: leaf_name(leaf),
                count,
            })
            .collect(),
        rpcs: counts.rpcs,
        kicks: counts.kicks,
        flushes: counts.flushes,
        mirror_hits: counts.mirror_hits,
        pages_mapped: counts.pages_mapped,
        pages_zapped: counts.pages_zapped,
        pf_taken: counts.pf_taken,
        pf_fixed: counts.pf_fixed,
        pf_spurious: counts.pf_spurious,
        pf_emulate: counts.pf_emulate,
        pf_fast: counts.pf_fast,
        pf_mmio_spte_created: counts.pf_mmio_spte_created,
    }
}

fn ret_pf_to_wire(ret_pf: RetPf) -> wire::RetPf {
    match ret_pf {
        RetPf::Continue => wire::RetPf::Continue,
        RetPf::Retry => wire::RetPf::Retry,
        RetPf::Emulate => wire::RetPf::Emulate,
        RetPf::WriteProtected => wire::RetPf::WriteProtected,
        RetPf::Invalid => wire::RetPf::Invalid,
        RetPf::Fixed => wire::RetPf::Fixed,
        RetPf::Spurious => wire::RetPf::Spurious,
    }
}

/// `RET_PF_FIXED` and the like.
pub(crate) fn ret_pf_name(ret_pf: RetPf) -> &'static str {
    ret_pf_to_wire(ret_pf).as_str_name()
}

pub(crate) fn root_name(root: RootKind) -> &'static str {
    match root {
        RootKind::Direct => "direct",
        RootKind::Mirror => "mirror",
    }
}

pub(crate) fn fault_report_to_wire(report: FaultReport) -> wire::HandleFaultResponse {
    wire::HandleFaultResponse {
        ret_pf: ret_pf_to_wire(report.ret_pf).into(),
        root: root_to_wire(report.root),
        level: report.level.map_or(0, |level| level.get().into()),
        hpa: report.pfn.map_or(0, |pfn| pfn.base().get()),
        seamcalls: report
            .seamcalls
            .into_iter()
            .map(|(leaf, status)| wire::SeamcallTrace {
                leaf: leaf.0.into(),
                name: leaf_name(leaf),
                status: status.0,
                status_name: status_name(status),
            })
            .collect(),
        rpcs: report.counts.rpcs,
        counts: Some(counts_to_wire(&report.counts)),
        spans: Vec::new(),
    }
}

fn outcome_to_wire(outcome: &FaultOutcome) -> wire::FaultOutcome {
    let (ret_pf, errno, reason) = match &outcome.result {
        Ok(ret_pf) => (ret_pf_to_wire(*ret_pf), 0, String::new()),
        Err(error) => (wire::RetPf::Unspecified, -error.errno(), error.to_string()),
    };
    wire::FaultOutcome {
        index: outcome.index,
        ret_pf: ret_pf.into(),
        errno,
        reason,
    }
}

pub(crate) fn faults_report_to_wire(tag: u64, report: &FaultsReport) -> wire::HandleFaultsResponse {
    wire::HandleFaultsResponse {
        tag,
        fixed: report.fixed,
        spurious: report.spurious,
        others: report.others.iter().map(outcome_to_wire).collect(),
        others_count: report.others_count,
        counts: Some(counts_to_wire(&report.counts)),
    }
}

/// Lower-case hex digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn gpaw_to_wire(gpaw: Gpaw) -> u32 {
    GpaLayout::new(gpaw).width()
}

pub(crate) fn vm_info_to_wire(entry: &VmEntry) -> wire::VmInfo {
    let info = entry.vm.info();
    // The core learns of a restart by its next call, which may never come.
    let (state, reason) = match entry.lost() {
        Some(reason) => ("dead", Some(reason)),
        None => (info.state, info.reason),
    };
    wire::VmInfo {
        vm_id: entry.id,
        label: entry.label.clone(),
        gpaw: gpaw_to_wire(info.gpaw),
        mode: mode_to_wire(info.mode).into(),
        state: state.to_owned(),
        reason: reason.unwrap_or_default(),
        vcpus: info.vcpus,
        hkid: info.hkid.unwrap_or(0),
        tdr: info.tdr.get(),
        pages_4k: info.pages_4k,
        pages_2m: info.pages_2m,
        pages_1g: info.pages_1g,
        slots: info.slots.iter().map(slot_to_wire).collect(),
        mrtd: info.mrtd.map(|mrtd| hex(&mrtd)).unwrap_or_default(),
        kind: kind_to_wire(info.kind).into(),
    }
}

fn walk_entry_to_wire(entry: &WalkEntry) -> wire::WalkEntry {
    let (sept_entry, sept_level_state) = entry.sept.unzip();
    wire::WalkEntry {
        level: entry.level.get().into(),
        index: entry.index.into(),
        spte: entry.spte,
        kind: entry.kind.to_string(),
        hpa: entry.hpa,
        external_hpa: entry.external_hpa,
        sept_entry,
        sept_level_state,
        sept_state: entry.sept_state.unwrap_or_default().to_owned(),
    }
}

pub(crate) fn walk_to_wire(walk: &Walk) -> wire::GetWalkResponse {
    wire::GetWalkResponse {
        root: root_to_wire(walk.root),
        entries: walk.entries.iter().map(walk_entry_to_wire).collect(),
        mapped: walk.mapped,
        private_attribute: walk.private_attribute,
    }
}

pub(crate) fn tree_entry_to_wire(entry: &TreeEntry) -> wire::TreeEntry {
    wire::TreeEntry {
        root: root_to_wire(entry.root),
        level: entry.level.get().into(),
        gpa: entry.gfn.base().get(),
        count: entry.count,
        spte: entry.spte,
        kind: entry.kind.to_string(),
        hpa: entry.hpa,
        external_hpa: entry.external_hpa,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_that_stand_for_nothing_are_refused_by_their_field() {
        for (field, refusal) in [
            ("gpaw", gpaw_from_wire(47).unwrap_err()),
            ("gpaw", gpaw_from_wire(u32::MAX).unwrap_err()),
            ("mode", mode_from_wire(3).unwrap_err()),
            ("mode", mode_from_wire(-1).unwrap_err()),
            ("root", root_from_wire(99).unwrap_err()),
            ("min_level", min_level_from_wire(6).unwrap_err()),
            ("min_level", min_level_from_wire(u32::MAX).unwrap_err()),
            ("slot", required::<()>(None, "slot").unwrap_err()),
            ("kind", kind_from_wire(3).unwrap_err()),
            ("dirty_log", dirty_log_from_wire(-1).unwrap_err()),
            ("slot.x", page_size_from_wire(4, "slot.x").unwrap_err()),
            ("change", host_change_from_wire(99, 0).unwrap_err()),
            ("page_size", host_change_from_wire(6, 4).unwrap_err()),
            ("page_size", host_change_from_wire(6, 0).unwrap_err()),
            ("page_size", host_change_from_wire(1, 2).unwrap_err()),
        ] {
            assert_eq!(refusal.field, field);
        }
    }

    #[test]
    fn defaults_are_those_of_the_contract() {
        assert_eq!(gpaw_from_wire(0).unwrap(), Gpaw::W48);
        assert!(matches!(mode_from_wire(0), Ok(Mode::Batched)));
        assert!(matches!(root_from_wire(0), Ok(None)));
        assert_eq!(min_level_from_wire(0).unwrap(), Level::L4K);
    }

    #[test]
    fn every_ret_pf_has_the_name_of_the_kernel() {
        for (ret_pf, name) in [
            (RetPf::Continue, "RET_PF_CONTINUE"),
            (RetPf::Retry, "RET_PF_RETRY"),
            (RetPf::Emulate, "RET_PF_EMULATE"),
            (RetPf::WriteProtected, "RET_PF_WRITE_PROTECTED"),
            (RetPf::Invalid, "RET_PF_INVALID"),
            (RetPf::Fixed, "RET_PF_FIXED"),
            (RetPf::Spurious, "RET_PF_SPURIOUS"),
        ] {
            assert_eq!(ret_pf_name(ret_pf), name);
        }
    }
}

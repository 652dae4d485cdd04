//! What the guest and the host did inside a step, from its events: faulting accesses, ranges that
//! the host took back, questions of what was used, huge pages that came back.
//!
//! A notifier inside a fault is the host copying a page; the model finds that out by itself where it
//! knows that the page is shared, and is told where it does not.

use std::collections::{BTreeMap, BTreeSet};

use mirror_proto::mmu::{
    AgeRangeRequest, Fault, HandleFaultRequest, HostChange, HostPageSize, RecoverNxHugePagesRequest,
};
use tdx_defs::PAGE_SIZE;

use super::recording::{Line, Step};
use super::service::{RecordedVm, call};
use super::settings::page_size;
use crate::error::Error;
use crate::trace::{exit_qualification, hex, parse_fault};

/// Ranges that are remembered of the host's changes; later ones are as if untouched.
const MAX_RANGES: usize = 4096;
const MIB_2: u64 = 2 << 20;

/// A slot, as far as faults need it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct KnownSlot {
    pub(super) gpa: u64,
    pub(super) size: u64,
    pub(super) hva: u64,
    pub(super) log_dirty: bool,
    pub(super) guest_memfd: bool,
}

/// What is known of the host's memory besides what the model keeps.
#[derive(Debug, Default)]
pub(super) struct HostMemory {
    pub(super) slots: BTreeMap<u64, KnownSlot>,
    /// Where the host changed something: its page sizes there are taken from what faults ask for.
    pub(super) changed: Vec<(u64, u64)>,
    /// Where pages may be somebody else's, too.
    pub(super) shared: Vec<(u64, u64)>,
    /// Where a file behind the memory has lost its end.
    pub(super) truncated: Vec<(u64, u64)>,
    /// Level that was told last, by first address of 2 MiB.
    pub(super) fitted: BTreeMap<u64, u64>,
    /// The mitigation decides about levels, then.
    pub(super) nx_huge_pages: bool,
}

impl HostMemory {
    fn slot_of(&self, gpa: u64) -> Option<&KnownSlot> {
        let mut slots = self.slots.values();
        slots.find(|slot| {
            gpa.checked_sub(slot.gpa)
                .is_some_and(|offset| offset < slot.size)
        })
    }

    pub(super) fn note(ranges: &mut Vec<(u64, u64)>, range: (u64, u64)) {
        if ranges.len() < MAX_RANGES && !ranges.contains(&range) {
            ranges.push(range);
        }
    }

    pub(super) fn change(&mut self, range: (u64, u64)) {
        Self::note(&mut self.changed, range);
        let around = range.0 - range.0 % MIB_2..range.1;
        self.fitted.retain(|first, _| !around.contains(first));
    }

    fn is_in(ranges: &[(u64, u64)], start: u64, end: u64) -> bool {
        ranges.iter().any(|range| range.0 < end && start < range.1)
    }
}

/// What the stimuli of a step came to.
#[derive(Debug, Default)]
pub(super) struct Effects {
    /// The last refusal.
    pub(super) errno: i32,
    /// vCPUs that faulted.
    pub(super) vcpus: BTreeSet<u32>,
    /// Why the rest cannot be compared.
    pub(super) skip: Option<String>,
    /// Ranges that were notified.
    pub(super) notified: Vec<(u64, u64)>,
}

impl Effects {
    fn skip(&mut self, reason: String) {
        self.skip.get_or_insert(reason);
    }
}

/// Numbers behind the last colon, with or without dashes between: what notifier events print.
fn addresses(text: &str) -> Option<(u64, Option<u64>)> {
    let (_, numbers) = text.rsplit_once(": ")?;
    let mut numbers = numbers
        .split(" -- ")
        .map(|number| hex("address", number.trim()).ok());
    Some((numbers.next()??, numbers.next().flatten()))
}

/// Plays what stands in a step. `change` happens to every range that is notified outside of a
/// fault.
pub(super) async fn play(
    vm: &mut RecordedVm,
    host: &mut HostMemory,
    step: &Step,
    change: Option<HostChange>,
) -> Result<Effects, Error> {
    let mut effects = Effects::default();
    // Threads that are inside a fault, and how many of the step's events there were before it.
    let mut faulting: BTreeMap<u32, usize> = BTreeMap::new();
    for (at, line) in step.lines.iter().enumerate() {
        match &*line.name {
            "kvm_page_fault" => {
                let before = vm.look_len();
                faulting.insert(line.thread, before);
                fault(vm, host, &step.lines, at, &mut effects).await?;
            }
            "kvm_unmap_hva_range" => {
                let Some((start, Some(end))) = addresses(&line.text) else {
                    effects.skip(format!("{:?} has no range", short(&line.text)));
                    continue;
                };
                let mut told = false;
                if let Some(before) = faulting.get_mut(&line.thread) {
                    told = copied_already(vm, before, start, end).await?;
                }
                if !told {
                    let change = of_thread(line, change, faulting.contains_key(&line.thread));
                    notify(vm, host, (start, end), change, &mut effects).await?;
                }
            }
            "kvm_age_hva" | "kvm_test_age_hva" => age(vm, line, &mut effects).await?,
            _ => {}
        }
    }
    recover(vm, step).await?;
    Ok(effects)
}

/// What the host does in a thread of its own, or a fault on a page that it has to copy.
fn of_thread(line: &Line, change: Option<HostChange>, in_fault: bool) -> Option<HostChange> {
    match &*line.task {
        "ksmd" => Some(HostChange::DropToZero),
        "khugepaged" => None,
        _ if in_fault => Some(HostChange::Write),
        _ => change,
    }
}

fn short(text: &str) -> String {
    text.chars().take(60).collect()
}

/// Whether the model told itself of a range since an event of the step.
async fn copied_already(
    vm: &mut RecordedVm,
    before: &mut usize,
    start: u64,
    end: u64,
) -> Result<bool, Error> {
    let records = vm.look().await?;
    let own = records.iter().enumerate().skip(*before).find(|(_, record)| {
        record.name == "kvm_unmap_hva_range"
            && matches!(addresses(&record.text), Some((first, Some(last))) if first < end && start < last)
    });
    let found = own.map(|(at, _)| at);
    if let Some(at) = found {
        *before = at + 1;
    }
    Ok(found.is_some())
}

async fn notify(
    vm: &RecordedVm,
    host: &mut HostMemory,
    range: (u64, u64),
    change: Option<HostChange>,
    effects: &mut Effects,
) -> Result<(), Error> {
    let (start, end) = range;
    if let Err(errno) = vm.notify(start, end).await? {
        effects.skip(format!(
            "the notifier for {start:#x}-{end:#x} was refused: errno {errno}"
        ));
        return Ok(());
    }
    host.change(range);
    HostMemory::note(&mut effects.notified, range);
    if let Some(change) = change {
        if matches!(change, HostChange::Share | HostChange::DropToZero) {
            HostMemory::note(&mut host.shared, range);
        }
        let none = HostPageSize::Unspecified;
        // The range was taken by the notifier, so it is one.
        let _ = vm.set_host(start, end, change, none).await?;
    }
    Ok(())
}

async fn fault(
    vm: &mut RecordedVm,
    host: &mut HostMemory,
    lines: &[Line],
    at: usize,
    effects: &mut Effects,
) -> Result<(), Error> {
    let line = &lines[at];
    let Ok(payload) = parse_fault(&line.text) else {
        effects.skip(format!("{:?} is no fault that is known", short(&line.text)));
        return Ok(());
    };
    let vcpu_id = payload.vcpu.unwrap_or(0);
    effects.vcpus.insert(vcpu_id);
    if let Err(errno) = vm.need_vcpus(vcpu_id.saturating_add(1)).await? {
        effects.skip(format!("vcpu {vcpu_id} was refused: errno {errno}"));
        return Ok(());
    }
    let qualification = exit_qualification(payload.error_code);
    let inside: Vec<&Line> = lines[at + 1..]
        .iter()
        .filter(|other| other.thread == line.thread)
        .take_while(|other| other.name != "kvm_page_fault")
        .collect();
    prepare(vm, host, payload.address, qualification & 2 != 0, &inside).await?;
    let message = HandleFaultRequest {
        vm_id: vm.vm_id,
        vcpu_id,
        fault: Some(Fault {
            gpa: payload.address,
            qualification,
            ..Default::default()
        }),
        explain: false,
    };
    if let Err(errno) = call!(vm.client, "HandleFault", handle_fault, message)? {
        effects.errno = errno;
    }
    Ok(())
}

/// What the host's memory is like where a fault is about to be: who else has the page, and how
/// large it is, where the host has changed something and only the recording knows.
async fn prepare(
    vm: &RecordedVm,
    host: &mut HostMemory,
    gpa: u64,
    write: bool,
    inside: &[&Line],
) -> Result<(), Error> {
    let Some(&slot) = host.slot_of(gpa) else {
        return Ok(());
    };
    let page = gpa - gpa % PAGE_SIZE;
    let hva = slot.hva.wrapping_add(page - slot.gpa);
    let copied = inside.iter().any(|line| line.name == "kvm_unmap_hva_range");
    let end = hva.saturating_add(PAGE_SIZE);
    let change = match copied {
        // The host copies here, so somebody else has the page, whoever told of it.
        true if write => Some(HostChange::Share),
        // Nobody else has it any more, or the host wrote before.
        false if write && HostMemory::is_in(&host.shared, hva, end) => Some(HostChange::Write),
        _ => None,
    };
    if let Some(change) = change {
        let _ = vm
            .set_host(hva, end, change, HostPageSize::Unspecified)
            .await?;
    }
    let wanted = inside
        .iter()
        .find(|line| line.name == "kvm_mmu_spte_requested");
    let level = wanted.and_then(|line| {
        let mut words = line
            .text
            .split_whitespace()
            .skip_while(|word| *word != "level");
        words.nth(1)?.parse::<u64>().ok()
    });
    let Some(level) = level else {
        return Ok(());
    };
    let area = MIB_2 << (9 * level.clamp(2, 3).saturating_sub(2));
    let first = hva - hva % area;
    let changed = HostMemory::is_in(&host.changed, first, first.saturating_add(area));
    // With a log or the mitigation a small page says nothing about the host.
    let free = !slot.log_dirty && !host.nx_huge_pages;
    if changed && free && host.fitted.get(&first) != Some(&level) {
        let end = first.saturating_add(area);
        let _ = vm
            .set_host(first, end, HostChange::PageSize, page_size(level))
            .await?;
        if host.fitted.len() < MAX_RANGES {
            host.fitted.insert(first, level);
        }
    }
    Ok(())
}

async fn age(vm: &RecordedVm, line: &Line, effects: &mut Effects) -> Result<(), Error> {
    let test = line.name == "kvm_test_age_hva";
    let range = addresses(&line.text).and_then(|(start, end)| match test {
        true => Some((
            start - start % PAGE_SIZE,
            start.checked_add(PAGE_SIZE)? & !(PAGE_SIZE - 1),
        )),
        false => Some((start, end?)),
    });
    let Some((start, end)) = range else {
        effects.skip(format!("{:?} has no range", short(&line.text)));
        return Ok(());
    };
    let message = AgeRangeRequest {
        vm_id: vm.vm_id,
        start,
        end,
        test,
    };
    if let Err(errno) = call!(vm.client, "AgeRange", age_range, message)? {
        effects.skip(format!(
            "aging {start:#x}-{end:#x} was refused: errno {errno}"
        ));
    }
    Ok(())
}

/// The kernel's thread takes tables away as it likes: as many as it took.
async fn recover(vm: &RecordedVm, step: &Step) -> Result<(), Error> {
    let taken = step
        .lines
        .iter()
        .filter(|line| line.task.starts_with("kvm-nx") && line.name == "kvm_mmu_prepare_zap_page")
        .count();
    let most = u32::try_from(taken).unwrap_or(u32::MAX);
    if most > 0 {
        let message = RecoverNxHugePagesRequest {
            vm_id: vm.vm_id,
            most,
        };
        let _ = call!(
            vm.client,
            "RecoverNxHugePages",
            recover_nx_huge_pages,
            message
        )?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notifier_events_print_a_range_or_an_address() {
        for (text, expected) in [
            (
                "mmu notifier unmap range: 0x1000 -- 0x2000",
                Some((0x1000, Some(0x2000))),
            ),
            ("mmu notifier test age hva: 0x007f00", Some((0x7f00, None))),
            ("mmu notifier unmap range: x -- 0x2000", None),
            ("", None),
        ] {
            assert_eq!(addresses(text), expected, "{text}");
        }
    }
}

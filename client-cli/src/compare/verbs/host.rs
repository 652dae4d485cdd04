//! What the host does to the memory behind the guest: its mappings, and the files behind those.

use mirror_proto::mmu::{HostChange, HostPageSize, PunchHoleRequest};

use super::{Context, Done};
use crate::compare::recording::Step;
use crate::compare::service::call;
use crate::compare::stimuli::{self, HostMemory};
use crate::error::Error;

/// Plays what stands in the step and nothing else.
pub(super) async fn host_step(
    context: Context<'_>,
    change: Option<HostChange>,
) -> Result<Done, Error> {
    let effects = stimuli::play(context.vm, context.host, context.step, change).await?;
    Ok(Done::default().with(effects))
}

/// The same, and then the host's memory is another.
pub(super) async fn host_range(
    context: Context<'_>,
    change: Option<HostChange>,
) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let (start, size) = readable!(range_of(step));
    let effects = stimuli::play(vm, host, step, None).await?;
    let page = tdx_defs::PAGE_SIZE;
    let range = start
        .checked_add(size)
        .and_then(|end| end.checked_next_multiple_of(page));
    let Some(end) = range.filter(|end| *end > start) else {
        return Ok(Done::skip(format!("{start:#x} + {size:#x} is no range")).with(effects));
    };
    let start = start - start % page;
    host.change((start, end));
    let mut done = Done::default().with(effects);
    if let Some(change) = change {
        if change == HostChange::DropToZero {
            HostMemory::note(&mut host.shared, (start, end));
        }
        let answer = vm
            .set_host(start, end, change, HostPageSize::Unspecified)
            .await?;
        if let Err(errno) = answer {
            done.skip
                .get_or_insert(format!("the change of the host was refused: errno {errno}"));
        }
    }
    Ok(done)
}

/// First address and bytes of the host's range.
fn range_of(step: &Step) -> Result<(u64, u64), String> {
    Ok((
        step.number(&["hva", "addr", "userspace_addr"])?,
        step.number(&["len", "size", "length"])?,
    ))
}

pub(super) async fn madvise(context: Context<'_>) -> Result<Done, Error> {
    let step = context.step;
    let verb = step.verb();
    let given = step.field("advice").map(str::to_ascii_uppercase);
    let words = given.unwrap_or_else(|| step.words());
    let first = words
        .split(['(', ')', ' ', ','])
        .find(|word| !word.is_empty());
    let first = advice_in(&verb).or(first).unwrap_or("");
    let advice = first.strip_prefix("MADV_").unwrap_or(first);
    let change = match advice {
        "DONTNEED" | "DONTNEED_LOCKED" => Some(HostChange::DropToZero),
        "REMOVE" | "PAGEOUT" => Some(HostChange::Drop),
        "POPULATE_WRITE" | "UNMERGEABLE" => Some(HostChange::Write),
        "FREE" | "COLD" | "WILLNEED" | "NORMAL" | "RANDOM" | "SEQUENTIAL" | "MERGEABLE"
        | "HUGEPAGE" | "NOHUGEPAGE" | "COLLAPSE" | "POPULATE_READ" | "DONTFORK" | "DOFORK" => None,
        other => {
            let reason = format!("MADVISE {other:.40} is no advice that is known");
            let done = host_step(context, None).await?;
            return Ok(Done {
                skip: Some(reason),
                ..done
            });
        }
    };
    host_range(context, change).await
}

/// `DONTNEED` of a verb such as `MADV_DONTNEED`.
pub(super) fn advice_in(verb: &str) -> Option<&str> {
    let advice = verb.strip_prefix("MADVISE_");
    advice.or_else(|| verb.strip_prefix("MADV_"))
}

pub(super) async fn mprotect(context: Context<'_>) -> Result<Done, Error> {
    let step = context.step;
    let given = step.field("prot").map(str::to_ascii_uppercase);
    let words = given.unwrap_or_else(|| step.words());
    let rights: Vec<&str> = words
        .split(['|', '+', ',', '(', ')', ' '])
        .map(|word| word.strip_prefix("PROT_").unwrap_or(word))
        .collect();
    let has = |names: &[&str]| rights.iter().any(|right| names.contains(right));
    let change = match () {
        () if has(&["WRITE", "RW", "READWRITE", "READ_WRITE", "RWX"]) => HostChange::ReadWrite,
        () if has(&["READ", "R", "RO", "READONLY", "READ_ONLY", "RX"]) => HostChange::ReadOnly,
        () if has(&["NONE"]) => HostChange::NoAccess,
        () => {
            return Ok(Done::unreadable(format!(
                "MPROTECT {words:.40} is no protection that is known"
            )));
        }
    };
    host_range(context, Some(change)).await
}

/// A hole in the file behind the memory: the next access gets new pages.
pub(super) async fn fallocate(context: Context<'_>) -> Result<Done, Error> {
    let step = context.step;
    let title = step.title.to_ascii_uppercase();
    if title.contains("GMEM") || title.contains("GUEST_MEMFD") {
        return punch_guest_memfd(context).await;
    }
    let mode = step.field("mode").map(str::to_ascii_uppercase);
    let mode = mode.unwrap_or_else(|| format!("{} {}", step.verb(), step.words()));
    if !mode.contains("PUNCH_HOLE") {
        let reason = format!("FALLOCATE {mode:.40} is no hole: not known");
        return Ok(Done::unreadable(reason));
    }
    // Offsets are the file's: without an address the notifiers say where it was mapped.
    match range_of(step) {
        Ok(_) => host_range(context, Some(HostChange::Drop)).await,
        Err(_) => host_step(context, Some(HostChange::Drop)).await,
    }
}

/// KVM zaps what the file is bound to, then the user mapping is told.
async fn punch_guest_memfd(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let (offset, size) = (
        number!(step, "offset", "start"),
        number!(step, "len", "size"),
    );
    let bound = host.slots.iter().filter(|(_, slot)| slot.guest_memfd);
    let bound: Vec<u64> = bound.map(|(id, _)| *id).collect();
    let named = readable!(step.optional(&["slot", "slot_id"]));
    let Some(slot) = named.or(bound.first().copied().filter(|_| bound.len() == 1)) else {
        let reason = format!(
            "{} slots have a guest_memfd, and none is named",
            bound.len()
        );
        return Ok(Done::unreadable(reason));
    };
    let message = PunchHoleRequest {
        vm_id: vm.vm_id,
        slot_id: u32::try_from(slot).unwrap_or(u32::MAX),
        offset,
        size,
    };
    let answer = call!(vm.client, "PunchHole", punch_hole, message)?;
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(Done::of(answer).with(effects))
}

/// The file behind the memory becomes shorter: what was behind its end is gone. When it becomes
/// longer, nobody is told, and new pages come.
pub(super) async fn truncate(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let effects = stimuli::play(vm, host, step, Some(HostChange::NoAccess)).await?;
    let back = match effects.notified.is_empty() {
        true => std::mem::take(&mut host.truncated),
        false => Vec::new(),
    };
    for &(start, end) in &back {
        let none = HostPageSize::Unspecified;
        let _ = vm.set_host(start, end, HostChange::ReadWrite, none).await?;
    }
    for &range in &effects.notified {
        HostMemory::note(&mut host.truncated, range);
    }
    Ok(Done::default().with(effects))
}

//! The steps that are known, and what each asks of the services.

use mirror_proto::mmu::{
    ClearDirtyLogRequest, GetDirtyLogRequest, HostChange, HostPageSize, PreFaultMemoryRequest,
    PunchHoleRequest, SetNxHugePagesRequest, SetUserMemoryRegionRequest, Slot, TouchMemoryRequest,
    ZapAllFastRequest,
};

use super::arguments::{argument, number};
use super::recording::Step;
use super::report::Difference;
use super::service::{RecordedVm, call};
use super::settings::{
    CAP_MANUAL_LOG, CAP_QUIRKS, GUEST_MEMFD, LOG_DIRTY, READ_ONLY, Settings, capability, parameter,
    slot_flags,
};
use super::stimuli::{self, Effects, HostMemory, KnownSlot};
use crate::commands::tables::pages_of;
use crate::error::Error;

/// Addresses in one TouchMemory: the limit of the wire.
const TOUCHES: u64 = 4096;
/// Addresses of one step that are touched.
const MAX_TOUCHED: u64 = 1 << 20;
/// Words of one bitmap.
const MAX_WORDS: u64 = 1 << 20;

/// What came of a step besides events.
#[derive(Debug, Default)]
pub(super) struct Done {
    pub(super) errno: i32,
    pub(super) difference: Option<Difference>,
    pub(super) skip: Option<String>,
    /// vCPUs that faulted in it.
    pub(super) vcpus: usize,
    /// It could not be read, so that nothing of it was played yet.
    pub(super) is_unplayed: bool,
}

impl Done {
    fn skip(reason: impl Into<String>) -> Self {
        Self {
            skip: Some(reason.into()),
            ..Self::default()
        }
    }

    fn unreadable(reason: impl Into<String>) -> Self {
        Self {
            is_unplayed: true,
            ..Self::skip(reason)
        }
    }

    fn of<T>(answer: Result<T, i32>) -> Self {
        Self {
            errno: answer.err().unwrap_or(0),
            ..Self::default()
        }
    }

    /// What the guest and the host did meanwhile.
    fn with(mut self, effects: Effects) -> Self {
        if self.errno == 0 {
            self.errno = effects.errno;
        }
        self.skip = self.skip.or(effects.skip);
        self.vcpus = effects.vcpus.len();
        self
    }
}

/// Where a step stands.
pub(super) struct Context<'a> {
    pub(super) vm: &'a mut RecordedVm,
    pub(super) host: &'a mut HostMemory,
    pub(super) settings: &'a Settings,
    /// Its place among the VM's steps.
    pub(super) at: usize,
    pub(super) step: &'a Step,
}

/// An argument that is missing or no number: the step cannot be played.
macro_rules! number {
    ($step:expr, $($key:literal),+) => {
        readable!($step.number(&[$($key),+]))
    };
}
macro_rules! readable {
    ($number:expr) => {
        match $number {
            Ok(number) => number,
            Err(reason) => return Ok(Done::unreadable(reason)),
        }
    };
}

const GUEST: [&str; 9] = [
    "ACCESS",
    "RACE",
    "PARALLEL",
    "CONCURRENT",
    "RUN",
    "GUEST",
    "MIX",
    "RANDOM",
    "BOTH",
];
/// Work of the host that KVM hears of through its notifiers.
const HOST: [&str; 24] = [
    "AGE",
    "PAGE_IDLE",
    "IDLE",
    "TEST_YOUNG",
    "CLEAR_YOUNG",
    "CLEAR_REFS",
    "YOUNG",
    "MGLRU",
    "LRU_GEN",
    "DAMON",
    "WAIT",
    "SLEEP",
    "KSM",
    "KHUGEPAGED",
    "CHILD",
    "SWAP",
    "MIGRATE",
    "MOVE_PAGES",
    "MBIND",
    "COMPACT",
    "RECLAIM",
    "NX_RECOVER",
    "RECOVER",
    "HOST_READ",
];

/// Plays one step of a VM that is there. Its events are read afterwards.
pub(super) async fn play(context: Context<'_>) -> Result<Done, Error> {
    let Context {
        vm,
        host,
        settings,
        at,
        step,
    } = context;
    let context = Context {
        vm: &mut *vm,
        host: &mut *host,
        settings,
        at,
        step,
    };
    let done = play_verb(context).await?;
    if !done.is_unplayed {
        return Ok(done);
    }
    // What the guest and the host did is known all the same.
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(done.with(effects))
}

async fn play_verb(context: Context<'_>) -> Result<Done, Error> {
    let step = context.step;
    let verb = step.verb();
    let verb = verb.as_str();
    let begins = |list: &[&str]| list.iter().any(|known| verb.starts_with(known));
    match verb {
        "ENABLE_CAP" => enable_cap(context).await,
        "CREATE_VCPU" => create_vcpu(context).await,
        "SET_USER_MEMORY_REGION" | "SET_USER_MEMORY_REGION2" => set_region(context).await,
        "GET_DIRTY_LOG" => get_dirty_log(context).await,
        "CLEAR_DIRTY_LOG" => clear_dirty_log(context).await,
        "PRE_FAULT_MEMORY" => pre_fault(context).await,
        "MADVISE" | "PROCESS_MADVISE" => madvise(context).await,
        _ if advice_in(verb).is_some() => madvise(context).await,
        "MPROTECT" => mprotect(context).await,
        "MUNMAP" => host_range(context, Some(HostChange::NoAccess)).await,
        "FORK" => host_step(context, Some(HostChange::Share)).await,
        "FALLOCATE" | "PUNCH_HOLE" | "GMEM_PUNCH_HOLE" | "GUEST_MEMFD_PUNCH_HOLE" => {
            fallocate(context).await
        }
        "TRUNCATE" | "FTRUNCATE" => truncate(context).await,
        "ZAP_ALL_FAST" => {
            let vm_id = context.vm.vm_id;
            let message = ZapAllFastRequest { vm_id };
            Ok(Done::of(call!(
                context.vm.client,
                "ZapAllFast",
                zap_all_fast,
                message
            )?))
        }
        _ if ["HOST_WRITE", "HOST_TOUCH", "POPULATE"].contains(&verb) => {
            host_range(context, Some(HostChange::Write)).await
        }
        _ if parameter(step, "nx_huge_pages").is_some() => nx_huge_pages(context).await,
        // Taken in before the VM was made.
        _ if parameter(step, "eager_page_split").is_some() => host_step(context, None).await,
        _ if begins(&GUEST) => access(context).await,
        _ if begins(&HOST) => host_step(context, None).await,
        _ => {
            let reason = format!("{:.60} is no step that is known", step.title);
            let done = host_step(context, None).await?;
            Ok(Done {
                skip: Some(reason),
                ..done
            })
        }
    }
}

/// Plays what stands in the step and nothing else.
async fn host_step(context: Context<'_>, change: Option<HostChange>) -> Result<Done, Error> {
    let effects = stimuli::play(context.vm, context.host, context.step, change).await?;
    Ok(Done::default().with(effects))
}

/// The same, and then the host's memory is another.
async fn host_range(context: Context<'_>, change: Option<HostChange>) -> Result<Done, Error> {
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

async fn enable_cap(context: Context<'_>) -> Result<Done, Error> {
    let cap = readable!(capability(context.step));
    if CAP_QUIRKS.contains(&cap) || cap == CAP_MANUAL_LOG {
        // Taken in when the VM was made; what was refused then is refused for its arguments.
        let errno = context.step.outcome.map_or(0, |outcome| outcome.errno);
        return Ok(Done {
            errno,
            ..Done::default()
        });
    }
    Ok(Done::skip(format!(
        "capability {cap} has no counterpart in the model"
    )))
}

async fn create_vcpu(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, step, .. } = context;
    // "n" is how many there are to be, or how many more.
    let count = readable!(step.optional(&["n", "count"])).unwrap_or(1);
    let more = u64::from(vm.vcpus) + 1;
    let count = u32::try_from(count.max(more)).unwrap_or(u32::MAX);
    Ok(Done::of(vm.need_vcpus(count).await?))
}

async fn set_region(context: Context<'_>) -> Result<Done, Error> {
    let Context {
        vm,
        host,
        settings,
        at,
        step,
    } = context;
    let id = number!(step, "slot", "slot_id", "id");
    let gpa = number!(step, "gpa", "guest_phys_addr");
    let size = number!(step, "size", "memory_size", "len");
    let hva = number!(step, "hva", "userspace_addr", "addr");
    let flags = readable!(slot_flags(step));
    if flags & !(LOG_DIRTY | READ_ONLY | GUEST_MEMFD) != 0 {
        return Ok(Done::skip(format!(
            "flags {flags:#x} have no counterpart in the model"
        )));
    }
    let Some(slot_id) = u32::try_from(id).ok().filter(|id| *id < 1 << 15) else {
        return Ok(Done::skip(format!(
            "slot {id:#x} is in another address space"
        )));
    };
    let note = step.field("note").unwrap_or("");
    let page_size =
        noted_page_size(note).unwrap_or_else(|| settings.largest(at, gpa >> 12, size >> 12));
    let slot = Slot {
        slot_id,
        gpa,
        size,
        userspace_addr: hva,
        read_only: flags & READ_ONLY != 0,
        log_dirty: flags & LOG_DIRTY != 0,
        host_page_size: page_size.into(),
        demand_zero: note.contains("not-populated") || note.contains("unpopulated"),
        guest_memfd: flags & GUEST_MEMFD != 0,
    };
    let message = SetUserMemoryRegionRequest {
        vm_id: vm.vm_id,
        slot: Some(slot),
    };
    let answer = call!(
        vm.client,
        "SetUserMemoryRegion",
        set_user_memory_region,
        message
    )?;
    if answer.is_ok() {
        let known = KnownSlot {
            gpa,
            size,
            hva,
            log_dirty: slot.log_dirty,
            guest_memfd: slot.guest_memfd,
        };
        match size {
            0 => host.slots.remove(&id),
            _ => host.slots.insert(id, known),
        };
    }
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(Done::of(answer).with(effects))
}

/// What a note says of the host's pages.
fn noted_page_size(note: &str) -> Option<HostPageSize> {
    let says = |words: &[&str]| words.iter().any(|word| note.contains(word));
    if says(&["noTHP", "no-THP", "4K"]) {
        Some(HostPageSize::HostPageSize4k)
    } else if says(&["1G"]) {
        Some(HostPageSize::HostPageSize1g)
    } else if says(&["THP", "2M"]) {
        Some(HostPageSize::HostPageSize2m)
    } else {
        None
    }
}

/// The guest runs: its faults, and what it touched without one.
async fn access(context: Context<'_>) -> Result<Done, Error> {
    let Context {
        vm,
        host,
        settings,
        step,
        ..
    } = context;
    let change = step
        .title
        .contains("DONTNEED")
        .then_some(HostChange::DropToZero);
    let effects = stimuli::play(vm, host, step, change).await?;
    let mut done = Done::default().with(effects);
    if settings.ages
        && let Err(reason) = touch(vm, step).await?
    {
        done.skip.get_or_insert(reason);
    }
    Ok(done)
}

/// Sets the accessed bits that the guest's accesses set. An address that faults has none.
async fn touch(vm: &RecordedVm, step: &Step) -> Result<Result<(), String>, Error> {
    let argument = |key| step.optional(&[key]);
    let (gpa, count, stride) = match (argument("gpa"), argument("count"), argument("stride")) {
        (Ok(gpa), Ok(count), Ok(stride)) => (gpa, count, stride),
        (Err(reason), ..) | (_, Err(reason), _) | (.., Err(reason)) => return Ok(Err(reason)),
    };
    let (Some(gpa), Some(count)) = (gpa, count) else {
        return Ok(Ok(()));
    };
    let stride = stride.unwrap_or(0);
    let op = step.field("op").map(str::to_ascii_uppercase);
    let write = op.unwrap_or_else(|| step.words()).contains("WRITE");
    let count = count.min(MAX_TOUCHED);
    let mut at = 0;
    while at < count {
        let part = TOUCHES.min(count - at);
        let message = TouchMemoryRequest {
            vm_id: vm.vm_id,
            gpa: gpa.wrapping_add(at.wrapping_mul(stride)),
            count: u32::try_from(part).unwrap_or(1),
            stride,
            write,
        };
        // Addresses that cannot be were no accesses either.
        let _ = call!(vm.client, "TouchMemory", touch_memory, message)?;
        at += part;
    }
    Ok(Ok(()))
}

async fn get_dirty_log(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let slot_id = u32::try_from(number!(step, "slot", "slot_id", "id")).unwrap_or(u32::MAX);
    let message = GetDirtyLogRequest {
        vm_id: vm.vm_id,
        slot_id,
    };
    let answer = call!(vm.client, "GetDirtyLog", get_dirty_log, message)?;
    let difference = match (&answer, step.note("DIRTY")) {
        (Ok(log), Some(note)) => dirty_difference(note, &log.bitmap),
        _ => None,
    };
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(Done {
        difference,
        ..Done::of(answer).with(effects)
    })
}

fn dirty_difference(note: &str, bitmap: &[u64]) -> Option<Difference> {
    let found = pages_of(bitmap);
    let value = |key| argument(note, key);
    let count = value("count").and_then(number);
    if let Some(count) = count.filter(|count| *count != found.len() as u64) {
        return Some(Difference::new("dirty pages", count, found.len()));
    }
    let listed = value("pages")?.split(',').filter(|page| !page.is_empty());
    let listed: Option<Vec<u64>> = listed
        .map(|page| u64::from_str_radix(page, 16).ok())
        .collect();
    // A list that was cut short has its count.
    let listed = listed.filter(|listed| count.is_none_or(|count| listed.len() as u64 == count))?;
    let first = listed
        .iter()
        .zip(&found)
        .find(|(listed, found)| listed != found);
    let (listed, found) = first?;
    Some(Difference::new(
        "dirty page",
        format!("{listed:x}"),
        format!("{found:x}"),
    ))
}

async fn clear_dirty_log(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let slot_id = u32::try_from(number!(step, "slot", "slot_id", "id")).unwrap_or(u32::MAX);
    let first_page = readable!(step.optional(&["first_page", "first", "offset", "start"]));
    let first_page = first_page.unwrap_or(0);
    let num_pages = number!(step, "num_pages", "num", "npages", "count", "pages");
    let words = num_pages.div_ceil(64);
    if words > MAX_WORDS {
        return Ok(Done::skip(format!(
            "{num_pages} pages are above the limit of {}",
            MAX_WORDS * 64
        )));
    }
    let mut bitmap = vec![u64::MAX; usize::try_from(words).unwrap_or(0)];
    let rest = num_pages % 64;
    if let (Some(last), 1..) = (bitmap.last_mut(), rest) {
        *last = (1 << rest) - 1;
    }
    // The program may have set some bits only.
    let given = step.field("bitmap").or_else(|| step.field("mask"));
    if let Some(given) = given {
        let Some(bits) = number(given) else {
            return Ok(Done::unreadable(format!(
                "bitmap: {given:.40} is no number"
            )));
        };
        for (at, word) in bitmap.iter_mut().enumerate() {
            *word &= if at == 0 { bits } else { 0 };
        }
    }
    let message = ClearDirtyLogRequest {
        vm_id: vm.vm_id,
        slot_id,
        first_page,
        bitmap,
        num_pages,
    };
    let answer = call!(vm.client, "ClearDirtyLog", clear_dirty_log, message)?;
    let effects = stimuli::play(vm, host, step, None).await?;
    Ok(Done::of(answer).with(effects))
}

async fn pre_fault(context: Context<'_>) -> Result<Done, Error> {
    const CALL: &str = "PreFaultMemory";
    let Context { vm, step, .. } = context;
    let size = number!(step, "size", "len");
    let vcpu = readable!(step.optional(&["vcpu", "vcpu_id"])).unwrap_or(0);
    let vcpu_id = u32::try_from(vcpu).unwrap_or(u32::MAX);
    let message = PreFaultMemoryRequest {
        vm_id: vm.vm_id,
        vcpu_id,
        gpa: number!(step, "gpa"),
        size,
    };
    let mut stream = match call!(vm.client, "PreFaultMemory", pre_fault_memory, message)? {
        Ok(stream) => stream,
        Err(errno) => return Ok(Done::of::<()>(Err(errno))),
    };
    let mut last = None;
    loop {
        let next = vm.client.next(CALL, &mut stream).await;
        match super::service::answered(next)? {
            Ok(Some(answer)) => last = Some(answer),
            Ok(None) => break,
            Err(errno) => return Ok(Done::of::<()>(Err(errno))),
        }
    }
    let last = last
        .filter(|last| last.finished)
        .ok_or(Error::Truncated { call: CALL })?;
    let left = size.saturating_sub(last.done);
    let noted = step
        .note("PRE_FAULT")
        .and_then(|note| number(argument(note, "left_size")?));
    Ok(Done {
        difference: noted
            .filter(|noted| *noted != left)
            .map(|noted| Difference::new("left_size", format!("{noted:#x}"), format!("{left:#x}"))),
        ..Done::default()
    })
}

async fn madvise(context: Context<'_>) -> Result<Done, Error> {
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
fn advice_in(verb: &str) -> Option<&str> {
    let advice = verb.strip_prefix("MADVISE_");
    advice.or_else(|| verb.strip_prefix("MADV_"))
}

async fn mprotect(context: Context<'_>) -> Result<Done, Error> {
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
async fn fallocate(context: Context<'_>) -> Result<Done, Error> {
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
async fn truncate(context: Context<'_>) -> Result<Done, Error> {
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

async fn nx_huge_pages(context: Context<'_>) -> Result<Done, Error> {
    let on = parameter(context.step, "nx_huge_pages").unwrap_or(false);
    let message = SetNxHugePagesRequest {
        vm_id: context.vm.vm_id,
        on,
    };
    let answer = call!(
        context.vm.client,
        "SetNxHugePages",
        set_nx_huge_pages,
        message
    )?;
    context.host.nx_huge_pages = on;
    let effects = stimuli::play(context.vm, context.host, context.step, None).await?;
    Ok(Done::of(answer).with(effects))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dirty_log_is_compared_by_count_and_by_page() {
        for (note, bitmap, what) in [
            ("slot=1 count=2 pages=20,21", vec![3 << 32], None),
            (
                "slot=1 count=3 pages=20,21",
                vec![3 << 32],
                Some("dirty pages"),
            ),
            (
                "slot=1 count=2 pages=20,22",
                vec![3 << 32],
                Some("dirty page"),
            ),
            ("slot=1 count=2 pages=20,...", vec![3 << 32], None),
            ("slot=1 count=0 pages=", vec![0], None),
            ("slot=1", vec![1], None),
        ] {
            let found = dirty_difference(note, &bitmap).map(|difference| difference.what);
            assert_eq!(found.as_deref(), what, "{note}");
        }
    }

    #[test]
    fn notes_name_the_pages_of_the_host() {
        for (note, size) in [
            (
                "2M-backed(THP),populated",
                Some(HostPageSize::HostPageSize2m),
            ),
            (
                "THP,populated,congruent",
                Some(HostPageSize::HostPageSize2m),
            ),
            ("4K-backed,populated", Some(HostPageSize::HostPageSize4k)),
            ("hugetlb-1G", Some(HostPageSize::HostPageSize1g)),
            ("MOVE", None),
        ] {
            assert_eq!(noted_page_size(note), size, "{note}");
        }
    }
}

//! The steps that are known, and what each asks of the services.

use mirror_proto::mmu::{
    ClearDirtyLogRequest, GetDirtyLogRequest, HostChange, HostPageSize, PreFaultMemoryRequest,
    SetNxHugePagesRequest, SetUserMemoryRegionRequest, Slot, TouchMemoryRequest, ZapAllFastRequest,
};

use super::recording::{Step, fields, number};
use super::report::Difference;
use super::service::{RecordedVm, call};
use super::settings::{CAP_MANUAL_LOG, CAP_QUIRKS, Settings, parameter};
use super::stimuli::{self, Effects, HostMemory, KnownSlot};
use crate::commands::tables::pages_of;
use crate::error::Error;

/// KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY, KVM_MEM_GUEST_MEMFD.
const LOG_DIRTY: u64 = 1 << 0;
const READ_ONLY: u64 = 1 << 1;
const GUEST_MEMFD: u64 = 1 << 2;
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
}

impl Done {
    fn skip(reason: impl Into<String>) -> Self {
        Self {
            skip: Some(reason.into()),
            ..Self::default()
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
        match $step.number(&[$($key),+]) {
            Ok(number) => number,
            Err(reason) => return Ok(Done::skip(reason)),
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
    let step = context.step;
    let verb = step.verb().to_ascii_uppercase();
    let verb = verb.strip_prefix("KVM_").unwrap_or(&verb);
    let begins = |list: &[&str]| list.iter().any(|known| verb.starts_with(known));
    match verb {
        "ENABLE_CAP" => enable_cap(context).await,
        "CREATE_VCPU" => create_vcpu(context).await,
        "SET_USER_MEMORY_REGION" | "SET_USER_MEMORY_REGION2" => set_region(context).await,
        "GET_DIRTY_LOG" => get_dirty_log(context).await,
        "CLEAR_DIRTY_LOG" => clear_dirty_log(context).await,
        "PRE_FAULT_MEMORY" => pre_fault(context).await,
        "MADVISE" => madvise(context).await,
        "MPROTECT" => mprotect(context).await,
        "MUNMAP" => host_range(context, Some(HostChange::NoAccess)).await,
        "FORK" => host_step(context, Some(HostChange::Share)).await,
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
            let reason = format!("{:.40} is no step that is known", step.verb());
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
    let effects = stimuli::play(vm, host, step, None).await?;
    let (start, size) = (number!(step, "hva", "addr"), number!(step, "len", "size"));
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

async fn enable_cap(context: Context<'_>) -> Result<Done, Error> {
    let cap = number!(context.step, "cap");
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
    let count = step.number(&["n", "count"]).unwrap_or(1);
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
    let id = number!(step, "slot");
    let (gpa, size) = (number!(step, "gpa"), number!(step, "size"));
    let (hva, flags) = (number!(step, "hva"), step.number(&["flags"]).unwrap_or(0));
    if flags & GUEST_MEMFD != 0 {
        return Ok(Done::skip("an ordinary VM of the model has no guest_memfd"));
    }
    if flags & !(LOG_DIRTY | READ_ONLY) != 0 {
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
        guest_memfd: false,
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
    if settings.ages {
        touch(vm, step).await?;
    }
    Ok(Done::default().with(effects))
}

/// Sets the accessed bits that the guest's accesses set. An address that faults has none.
async fn touch(vm: &RecordedVm, step: &Step) -> Result<(), Error> {
    let argument = |keys: &[&str]| step.number(keys).ok();
    let (Some(gpa), Some(count)) = (argument(&["gpa"]), argument(&["count"])) else {
        return Ok(());
    };
    let stride = argument(&["stride"]).unwrap_or(0);
    let write = step.field("op") == Some("write");
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
    Ok(())
}

async fn get_dirty_log(context: Context<'_>) -> Result<Done, Error> {
    let Context { vm, host, step, .. } = context;
    let slot_id = u32::try_from(number!(step, "slot")).unwrap_or(u32::MAX);
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
    let value = |key| {
        fields(note)
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    };
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
    let slot_id = u32::try_from(number!(step, "slot")).unwrap_or(u32::MAX);
    let first_page = step
        .number(&["first_page", "first", "offset", "start"])
        .unwrap_or(0);
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
            return Ok(Done::skip(format!("bitmap: {given:.40} is no number")));
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
    let size = number!(step, "size");
    let vcpu_id = u32::try_from(step.number(&["vcpu"]).unwrap_or(0)).unwrap_or(u32::MAX);
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
    let noted = step.note("PRE_FAULT").and_then(|note| {
        let (_, value) = fields(note).find(|(name, _)| *name == "left_size")?;
        number(value)
    });
    Ok(Done {
        difference: noted
            .filter(|noted| *noted != left)
            .map(|noted| Difference::new("left_size", format!("{noted:#x}"), format!("{left:#x}"))),
        ..Done::default()
    })
}

async fn madvise(context: Context<'_>) -> Result<Done, Error> {
    let words = context.step.words();
    let advice = words.split(['(', ' ']).next().unwrap_or("");
    let advice = advice.strip_prefix("MADV_").unwrap_or(advice);
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

async fn mprotect(context: Context<'_>) -> Result<Done, Error> {
    let words = context.step.words();
    let change = match () {
        () if words.contains("WRITE") => HostChange::ReadWrite,
        () if words.contains("READ") => HostChange::ReadOnly,
        () if words.contains("NONE") => HostChange::NoAccess,
        () => {
            return Ok(Done::skip(format!(
                "MPROTECT {words:.40} is no protection that is known"
            )));
        }
    };
    host_range(context, Some(change)).await
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

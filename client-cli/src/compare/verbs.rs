//! The steps that are known, and what each asks of the services.
//!
//! | file | steps |
//! |---|---|
//! | here | which step is which, capabilities, vCPUs, parameters of KVM |
//! | `guest` | the guest runs, or is run ahead of |
//! | `host` | the host's mappings and files |
//! | `log` | the dirty log |
//! | `slots` | memory slots |

// Visible in the modules below, which come behind them.
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

mod guest;
mod host;
mod log;
mod slots;

use mirror_proto::mmu::{HostChange, SetNxHugePagesRequest, ZapAllFastRequest};

use super::recording::Step;
use super::report::Difference;
use super::service::{RecordedVm, call};
use super::settings::{CAP_MANUAL_LOG, CAP_QUIRKS, Settings, capability, parameter};
use super::stimuli::{self, Effects, HostMemory};
use crate::error::Error;

use guest::{access, pre_fault};
use host::{advice_in, fallocate, host_range, host_step, madvise, mprotect, truncate};
use log::{clear_dirty_log, get_dirty_log};
use slots::set_region;

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

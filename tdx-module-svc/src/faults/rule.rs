//! One rule: which runs of which leaf it meets, when, and what then happens.

use std::ops::Range;
use std::time::Duration;

use mirror_proto::InvalidField;
use mirror_proto::module::FaultRule;
use mirror_proto::module::fault_rule::{Action as WireAction, When as WireWhen};
use tdx_defs::{CompletionStatus, Leaf, PAGE_SIZE};

/// Longest delay, in milliseconds.
pub(super) const MAX_DELAY_MS: u32 = 10_000;
/// Chances are so many of this.
pub(super) const MILLION: u32 = 1_000_000;

/// When a matching run is met by the action.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// From the nth matching run on, counted from 1.
    Nth(u64),
    /// By chance, so many of a million.
    Chance(u32),
}

/// What happens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Action {
    /// The run is not made; this is its answer. `None`: the usual transient status of its leaf.
    Status(Option<CompletionStatus>),
    /// The batch waits.
    Delay(Duration),
    /// The batch runs, its answer gets lost.
    LoseReply,
    /// The batch does not run, its stream ends.
    Cut,
    /// The process ends, before or after the batch.
    Abort {
        /// After.
        after: bool,
    },
}

/// A checked rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Rule {
    /// `None`: any.
    pub(crate) leaf: Option<Leaf>,
    /// Guest physical addresses, bytes. `None`: whatever the call is about.
    pub(crate) gpa: Option<Range<u64>>,
    pub(crate) when: When,
    pub(crate) seed: u64,
    /// How often it fires at most.
    pub(crate) times: u64,
    pub(crate) action: Action,
}

impl Rule {
    /// Checks a rule from the wire.
    pub(super) fn check(wire: &FaultRule) -> Result<Self, InvalidField> {
        let leaf = wire
            .leaf
            .map(|leaf| {
                u16::try_from(leaf)
                    .map(Leaf)
                    .map_err(|_| InvalidField::new("leaf", format!("{leaf} is above 65535")))
            })
            .transpose()?;
        let gpa = match (wire.gpa, wire.gpa_end) {
            (0, 0) => None,
            (from, to) if from < to => Some(from..to),
            (from, to) => {
                let reason = format!("{to:#x} is not above gpa, {from:#x}");
                return Err(InvalidField::new("gpa_end", reason));
            }
        };
        let (when, once) = match wire.when {
            None => return Err(InvalidField::new("nth", "missing, as is per_million")),
            Some(WireWhen::Nth(0)) => {
                return Err(InvalidField::new("nth", "0, runs are counted from 1"));
            }
            Some(WireWhen::Nth(nth)) => (When::Nth(nth), true),
            Some(WireWhen::PerMillion(chance)) if (1..=MILLION).contains(&chance) => {
                (When::Chance(chance), false)
            }
            Some(WireWhen::PerMillion(chance)) => {
                let reason = format!("{chance}, allowed are 1 to {MILLION}");
                return Err(InvalidField::new("per_million", reason));
            }
        };
        Ok(Self {
            leaf,
            gpa,
            when,
            seed: wire.seed,
            times: match (wire.times, once) {
                (0, true) => 1,
                (0, false) => u64::MAX,
                (times, _) => times,
            },
            action: action(wire.action.as_ref(), leaf)?,
        })
    }

    /// Whether a rule for statuses can say something for this leaf.
    pub(super) fn speaks_for(&self, leaf: Leaf) -> bool {
        match self.action {
            Action::Status(None) => !CompletionStatus::transient(leaf).is_empty(),
            _ => true,
        }
    }
}

fn action(wire: Option<&WireAction>, leaf: Option<Leaf>) -> Result<Action, InvalidField> {
    Ok(match wire {
        None => return Err(InvalidField::new("action", "missing")),
        Some(WireAction::Status(status)) => Action::Status(status_of(status.rax, leaf)?),
        Some(WireAction::Delay(delay)) if (1..=MAX_DELAY_MS).contains(&delay.ms) => {
            Action::Delay(Duration::from_millis(delay.ms.into()))
        }
        Some(WireAction::Delay(delay)) => {
            let reason = format!("{}, allowed are 1 to {MAX_DELAY_MS}", delay.ms);
            return Err(InvalidField::new("delay.ms", reason));
        }
        Some(WireAction::LoseReply(_)) => Action::LoseReply,
        Some(WireAction::Cut(_)) => Action::Cut,
        Some(WireAction::Abort(abort)) => Action::Abort { after: abort.after },
    })
}

/// The status to answer with, if it is one that the leaf may answer in any state: any other would
/// make the module say something about its state that is not so.
fn status_of(rax: u64, leaf: Option<Leaf>) -> Result<Option<CompletionStatus>, InvalidField> {
    let refuse = |reason: String| Err(InvalidField::new("status.rax", reason));
    let Some(leaf) = leaf else {
        return match rax {
            0 => Ok(None),
            _ => refuse("a certain status needs a leaf; 0 is the usual one of each".to_owned()),
        };
    };
    let may = CompletionStatus::transient(leaf);
    let asked = CompletionStatus(rax);
    let found = may
        .iter()
        .find(|status| rax == 0 || **status == asked || asked.details() == 0 && status.is(asked));
    match found {
        Some(status) => Ok(Some(*status)),
        None if may.is_empty() => refuse(format!("{leaf} has no status for being busy")),
        None => {
            let may: Vec<String> = may.iter().map(ToString::to_string).collect();
            refuse(format!(
                "{leaf} does not answer {asked} for others at work, but {}",
                may.join(", ")
            ))
        }
    }
}

/// The guest addresses of run `run` of a call, when its leaf names one: RCX with a TDX level in its
/// low bits, or without.
pub(super) fn guest_range(call: &tdx_defs::Seamcall, run: u32) -> Option<Range<u64>> {
    let stride = call.repeat.map_or(0, |repeat| repeat.rcx_stride);
    let rcx = call
        .rcx
        .wrapping_add_signed(stride.wrapping_mul(run.into()));
    let bytes = match call.leaf {
        Leaf::MEM_PAGE_ADD
        | Leaf::MEM_PAGE_AUG
        | Leaf::MEM_SEPT_ADD
        | Leaf::MEM_RANGE_BLOCK
        | Leaf::MEM_RANGE_UNBLOCK
        | Leaf::MEM_PAGE_REMOVE
        | Leaf::MEM_PAGE_RELOCATE
        | Leaf::MEM_PAGE_PROMOTE
        | Leaf::MEM_PAGE_DEMOTE
        | Leaf::MEM_SEPT_REMOVE
        | Leaf::MEM_SEPT_RD => PAGE_SIZE << (9 * (rcx & 7).min(4)),
        Leaf::MR_EXTEND => 256,
        Leaf::MEM_RD | Leaf::MEM_WR => 8,
        _ => return None,
    };
    // Level bits and reserved bits aside.
    let gpa = rcx & 0x000F_FFFF_FFFF_FFF8;
    Some(gpa..gpa.saturating_add(bytes))
}

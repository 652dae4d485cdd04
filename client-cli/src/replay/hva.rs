//! Where guest memory lay in the host's address space.
//!
//! Unmap events carry host virtual addresses and nothing else. A page that was unmapped and is
//! touched again faults again, so a fault on a page known from before, shortly behind an unmap,
//! votes for `start of the unmap - address of the page`.

use std::collections::{HashMap, HashSet};

use tdx_defs::PAGE_SIZE;

/// Faults behind an unmap that vote.
const WINDOW: usize = 64;
/// Unmaps that are asked; enough for a vote, and a bound for long recordings.
const MAX_UNMAPS: usize = 4096;
/// Without a vote the lowest unmapped address, rounded down to this, is guest address 0.
const FALLBACK_ALIGN: u64 = 1 << 30;
/// Without unmaps: where user memory maps usually lie on x86-64, and a low place for guests that
/// are too large for that.
const DEFAULT_BASES: [u64; 2] = [0x7f00_0000_0000, 0x1_0000_0000];
/// User addresses end here on four-level hosts.
const USER_END: u64 = 1 << 47;

/// Host virtual address of guest physical address 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HvaBase {
    /// The address; page aligned.
    pub base: u64,
    /// Where it comes from.
    pub source: HvaSource,
}

/// Where an [`HvaBase`] comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HvaSource {
    /// `--hva-base`.
    Given,
    /// The recording.
    Inferred,
    /// Nowhere: there is no unmap in the recording, so any will do.
    None,
}

impl HvaSource {
    /// As in the report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Given => "given",
            Self::Inferred => "inferred",
            Self::None => "none",
        }
    }
}

/// What the inference needs to know of an event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A touch of the page at this guest physical address, without the SHARED bit.
    Touch(u64),
    /// An unmap that starts at this host virtual address.
    Unmap(u64),
}

/// Infers the base from the events; `guest_end` is the end of the highest slot.
pub(super) fn infer(steps: &[Step], guest_end: u64) -> HvaBase {
    let inferred = |base| HvaBase {
        base,
        source: HvaSource::Inferred,
    };
    if let Some(base) = vote(steps) {
        return inferred(base);
    }
    let unmaps = steps.iter().filter_map(|step| match step {
        Step::Unmap(start) => Some(*start),
        Step::Touch(_) => None,
    });
    match unmaps.min() {
        Some(lowest) => inferred(lowest & !(FALLBACK_ALIGN - 1)),
        None => HvaBase {
            base: default_base(guest_end),
            source: HvaSource::None,
        },
    }
}

fn default_base(guest_end: u64) -> u64 {
    let fits = |base: &u64| {
        base.checked_add(guest_end)
            .is_some_and(|end| end <= USER_END)
    };
    DEFAULT_BASES
        .into_iter()
        .find(fits)
        .unwrap_or(DEFAULT_BASES[1])
}

fn vote(steps: &[Step]) -> Option<u64> {
    let mut votes: HashMap<u64, u32> = HashMap::new();
    let mut touched: HashSet<u64> = HashSet::new();
    let mut unmaps = 0;
    for (at, step) in steps.iter().enumerate() {
        match *step {
            Step::Touch(page) => {
                touched.insert(page);
            }
            Step::Unmap(start) if unmaps < MAX_UNMAPS => {
                unmaps += 1;
                for base in candidates(start, &steps[at + 1..], &touched) {
                    *votes.entry(base).or_default() += 1;
                }
            }
            Step::Unmap(_) => {}
        }
    }
    // Memory of a VM is mapped with large alignment, so that breaks a tie; then the lower one.
    let rank =
        |(base, count): &(u64, u32)| (*count, base.trailing_zeros().min(30), u64::MAX - base);
    votes.into_iter().max_by_key(rank).map(|(base, _)| base)
}

/// Each base at most once for an unmap: a page that faults twice is no better evidence.
fn candidates(start: u64, behind: &[Step], touched: &HashSet<u64>) -> HashSet<u64> {
    behind
        .iter()
        .filter_map(|step| match step {
            Step::Touch(page) => Some(page),
            Step::Unmap(_) => None,
        })
        .take(WINDOW)
        .filter(|page| touched.contains(page))
        .filter_map(|page| start.checked_sub(*page))
        .filter(|base| base % PAGE_SIZE == 0)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use Step::{Touch, Unmap};

    const BASE: u64 = 0x7fa1_be00_0000;

    #[test]
    fn the_base_with_most_votes_wins() {
        for (case, steps, base, source) in [
            (
                "one page unmapped and touched again",
                vec![
                    Touch(0x1000),
                    Touch(0x2000),
                    Unmap(BASE + 0x2000),
                    Touch(0x2000),
                ],
                BASE,
                HvaSource::Inferred,
            ),
            (
                "pages touched for the first time do not vote",
                vec![
                    Touch(0x2000),
                    Unmap(BASE + 0x2000),
                    Touch(0x9000),
                    Touch(0x2000),
                ],
                BASE,
                HvaSource::Inferred,
            ),
            (
                "several unmaps against a chance hit",
                vec![
                    Touch(0x1000),
                    Touch(0x2000),
                    Touch(0x5000),
                    Unmap(BASE + 0x2000),
                    Touch(0x5000),
                    Touch(0x2000),
                    Unmap(BASE + 0x1000),
                    Touch(0x1000),
                ],
                BASE,
                HvaSource::Inferred,
            ),
            (
                "no vote: the lowest unmap, down to 1 GiB",
                vec![Touch(0x1000), Unmap(BASE + 0x9000), Unmap(BASE + 0x3000)],
                BASE & !(FALLBACK_ALIGN - 1),
                HvaSource::Inferred,
            ),
            (
                "no unmap",
                vec![Touch(0x1000)],
                DEFAULT_BASES[0],
                HvaSource::None,
            ),
        ] {
            assert_eq!(infer(&steps, 1 << 30), HvaBase { base, source }, "{case}");
        }
    }

    #[test]
    fn a_large_guest_gets_a_low_base() {
        assert_eq!(infer(&[], 1 << 46).base, DEFAULT_BASES[1]);
    }
}

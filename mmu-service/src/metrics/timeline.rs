//! The latest batches, for people who watch.
//!
//! A ring of a fixed size: whoever looks too rarely misses some, and sees by the numbers that it
//! did. Writers hold the lock for one move.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tdp_mmu::SeamError;
use tdx_defs::{CompletionStatus, Leaf};

/// Batches that are remembered.
pub(crate) const REMEMBERED: usize = 1024;
/// Leaves that one batch shows by name.
const SHOWN_LEAVES: usize = 6;

/// How a batch ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// With success, or this first other status.
    Answered(CompletionStatus),
    /// It certainly did not run.
    NotSent,
    /// It may have run.
    Unknown,
    /// The module started anew.
    Restarted,
}

impl Outcome {
    pub(super) fn failed(error: &SeamError) -> Self {
        match error {
            SeamError::NotSent { .. } => Self::NotSent,
            SeamError::Unknown { .. } => Self::Unknown,
            SeamError::Restarted { .. } => Self::Restarted,
        }
    }
}

/// One batch.
#[derive(Debug, Clone)]
pub(crate) struct Event {
    /// Counts up from 1.
    pub(crate) number: u64,
    /// When its answer came, in milliseconds of the Unix epoch.
    pub(crate) at_ms: u64,
    /// "stream" or "rpc".
    pub(crate) via: &'static str,
    /// Different leaves in the order of their first call, with the calls in the message; at most
    /// six.
    pub(crate) leaves: Vec<(Leaf, u32)>,
    /// More leaves than are listed.
    pub(crate) has_more: bool,
    /// SEAMCALLs that ran, repeats taken one by one.
    pub(crate) ran: u64,
    /// How it ended.
    pub(crate) outcome: Outcome,
    /// From handing it over to its answer.
    pub(crate) took: Duration,
}

impl Event {
    pub(super) fn new(
        via: &'static str,
        calls: impl Iterator<Item = Leaf>,
        ran: u64,
        outcome: Outcome,
        took: Duration,
    ) -> Self {
        let mut leaves: Vec<(Leaf, u32)> = Vec::new();
        let mut has_more = false;
        for leaf in calls {
            match leaves.iter().rposition(|(listed, _)| *listed == leaf) {
                Some(at) => leaves[at].1 += 1,
                None if leaves.len() < SHOWN_LEAVES => leaves.push((leaf, 1)),
                None => has_more = true,
            }
        }
        let at = SystemTime::now().duration_since(UNIX_EPOCH);
        let at_ms = at.map_or(0, |at| u64::try_from(at.as_millis()).unwrap_or(u64::MAX));
        Self {
            number: 0,
            at_ms,
            via,
            leaves,
            has_more,
            ran,
            outcome,
            took,
        }
    }
}

/// The ring.
#[derive(Debug, Default)]
pub(crate) struct Timeline(Mutex<Ring>);

#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<Event>,
    last: u64,
}

impl Timeline {
    pub(super) fn push(&self, mut event: Event) {
        let mut ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ring.last += 1;
        event.number = ring.last;
        if ring.events.len() == REMEMBERED {
            ring.events.pop_front();
        }
        ring.events.push_back(event);
    }

    /// The newest `limit` batches of those behind number `after`, ascending, and the last number.
    pub(crate) fn after(&self, after: u64, limit: usize) -> (Vec<Event>, u64) {
        let ring = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let newer = ring
            .events
            .iter()
            .rev()
            .take_while(|event| event.number > after);
        let mut events: Vec<Event> = newer.take(limit).cloned().collect();
        events.reverse();
        (events, ring.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn event(calls: &[Leaf]) -> Event {
        let ok = Outcome::Answered(CompletionStatus::SUCCESS);
        Event::new("stream", calls.iter().copied(), 1, ok, Duration::ZERO)
    }

    #[test]
    fn a_batch_lists_its_leaves_once_and_not_too_many() {
        let many: Vec<Leaf> = (0..20).map(Leaf).collect();
        let listed = event(&[Leaf::MEM_SEPT_ADD, Leaf::MEM_PAGE_AUG, Leaf::MEM_SEPT_ADD]);
        let expected = [(Leaf::MEM_SEPT_ADD, 2), (Leaf::MEM_PAGE_AUG, 1)];
        assert_eq!(
            (&listed.leaves[..], listed.has_more),
            (&expected[..], false)
        );
        let listed = event(&many);
        assert_eq!((listed.leaves.len(), listed.has_more), (SHOWN_LEAVES, true));
    }

    #[test]
    fn the_ring_forgets_the_oldest_and_answers_the_newest() {
        let timeline = Timeline::default();
        for _ in 0..REMEMBERED + 10 {
            timeline.push(event(&[]));
        }
        let last = REMEMBERED as u64 + 10;
        let numbers = |after, limit| {
            let (events, newest) = timeline.after(after, limit);
            assert_eq!(newest, last);
            events.iter().map(|event| event.number).collect::<Vec<_>>()
        };
        assert_eq!(numbers(last - 2, 10), [last - 1, last]);
        assert_eq!(numbers(0, 3), [last - 2, last - 1, last]);
        assert_eq!(numbers(0, usize::MAX).first(), Some(&11));
        assert!(numbers(last, 10).is_empty());
    }
}

//! Which faults are traced: decided before a span is made, because making one costs more than the
//! fault itself.
//!
//! A caller that says "sampled" is always heard, elsewhere ([`crate::propagate`]). The gate is for
//! the rest: one in so many is let through, by count and not by chance, so that a slow trickle is
//! seen as well as a flood. What was not traced and turns out to be slow, failed or busy gets a
//! span afterwards ([`crate::late`]).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// One in N is let through. Clones share the count.
#[derive(Debug, Clone)]
pub struct Gate {
    every: u64,
    slow_ns: u64,
    passed: Arc<AtomicU64>,
}

impl Gate {
    /// A gate that opens for the first and then for every `every`th; 0 keeps it closed. What takes
    /// `slow` or longer is worth a span afterwards.
    pub fn new(every: u32, slow: Duration) -> Self {
        Self {
            every: every.into(),
            slow_ns: u64::try_from(slow.as_nanos()).unwrap_or(u64::MAX),
            passed: Arc::default(),
        }
    }

    /// Whether to trace an operation on `weight` faults that nobody asked to be traced. Never while
    /// spans are not exported.
    #[inline]
    pub fn admits(&self, weight: usize) -> bool {
        crate::is_recording() && self.count(u64::try_from(weight).unwrap_or(u64::MAX))
    }

    /// Whether something that took this many nanoseconds is worth a span although it was not
    /// admitted.
    #[inline]
    pub(crate) fn is_slow(&self, elapsed_ns: u64) -> bool {
        elapsed_ns >= self.slow_ns
    }

    /// Counts `weight`; true when the count reached or passed a multiple of N.
    fn count(&self, weight: u64) -> bool {
        if self.every == 0 || weight == 0 {
            return false;
        }
        let before = self.passed.fetch_add(weight, Ordering::Relaxed);
        // The number of multiples below, rounded up: the very first one counts.
        before.div_ceil(self.every) < before.saturating_add(weight).div_ceil(self.every)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_in_n_is_let_through_however_the_faults_are_grouped() {
        for (every, weights, expected) in [
            (1, &[1; 4][..], &[true; 4][..]),
            (3, &[1; 7], &[true, false, false, true, false, false, true]),
            (0, &[1, 5], &[false, false]),
            (100, &[40, 40, 40, 40], &[true, false, true, false]),
            (10, &[4096, 4096, 0], &[true, true, false]),
        ] {
            let gate = Gate::new(every, Duration::ZERO);
            let admitted: Vec<bool> = weights.iter().map(|&weight| gate.count(weight)).collect();
            assert_eq!(admitted, expected, "1 in {every} of {weights:?}");
        }
    }

    #[test]
    fn a_gate_is_closed_while_nothing_is_exported() {
        assert!(!Gate::new(1, Duration::ZERO).admits(1));
    }

    #[test]
    fn slow_begins_at_the_threshold() {
        let gate = Gate::new(1, Duration::from_millis(10));
        assert!(!gate.is_slow(9_999_999));
        assert!(gate.is_slow(10_000_000));
    }
}

//! When refused callers come back: one after the other, and not all together.
//!
//! A refusal costs about as much as a short call. Callers that all come back after the same delay
//! would make the service busy with refusing them, the more of them there are. So each gets a time of
//! its own, and as many come back within the shortest delay as there are places.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Longest delay, in microseconds: however many wait, one that comes late finds out soon.
const LONGEST_US: u64 = 2_000_000;

/// The times that were given out.
#[derive(Debug)]
pub(super) struct Returns {
    begun: Instant,
    /// Time of the next return, in microseconds since `begun`.
    next_us: AtomicU64,
    /// Shortest delay.
    least_us: u64,
    /// Between two returns.
    apart_us: u64,
}

impl Returns {
    /// Delays from `least` on, `places` of them within that time.
    pub(super) fn new(least: Duration, places: usize) -> Self {
        let least_us = u64::try_from(least.as_micros()).unwrap_or(LONGEST_US);
        Self {
            begun: Instant::now(),
            next_us: AtomicU64::new(0),
            least_us,
            apart_us: least_us / (places.max(1) as u64),
        }
    }

    /// How long the caller that is refused now shall wait.
    pub(super) fn delay(&self) -> Duration {
        let now = u64::try_from(self.begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        Duration::from_micros(self.delay_at(now))
    }

    fn delay_at(&self, now_us: u64) -> u64 {
        let at = |next: u64| {
            let (first, last) = (now_us + self.least_us, now_us + LONGEST_US);
            next.clamp(first, last.max(first))
        };
        let taken = self
            .next_us
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |next| {
                Some(at(next) + self.apart_us)
            });
        at(taken.unwrap_or_else(|next| next)) - now_us
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn callers_come_back_one_after_the_other_and_within_a_bound() {
        let returns = Returns::new(Duration::from_millis(50), 10);
        let delays: Vec<u64> = (0..4).map(|_| returns.delay_at(1000)).collect();
        assert_eq!(delays, [50_000, 55_000, 60_000, 65_000]);
        // Time has passed: the queue is as much shorter.
        assert_eq!(returns.delay_at(11_000), 60_000);
        let last = (0..10_000).map(|_| returns.delay_at(11_000)).last();
        assert_eq!(last, Some(LONGEST_US));
        // All of them have come back.
        assert_eq!(returns.delay_at(10_000_000), 50_000);
    }

    #[test]
    fn as_many_as_there_are_places_come_back_within_the_shortest_delay() {
        let returns = Returns::new(Duration::from_millis(50), 32);
        let within = (0..1000)
            .map(|_| returns.delay_at(0))
            .filter(|delay| *delay < 100_000);
        assert_eq!(within.count(), 33);
    }
}

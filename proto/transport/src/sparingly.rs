//! Log lines that a stranger can cause, a few each second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Lines in one second.
const LINES: u64 = 10;
/// Low bits that count the lines of a second.
const COUNT_BITS: u32 = 16;

/// Says which lines to write: whoever is refused must not be able to fill a disk.
#[derive(Debug)]
pub(crate) struct Sparingly {
    start: Instant,
    /// The second, with the lines in it in the low bits.
    now: AtomicU64,
    left_out: AtomicU64,
}

impl Sparingly {
    pub(crate) fn new() -> Self {
        Self {
            start: Instant::now(),
            now: AtomicU64::new(0),
            left_out: AtomicU64::new(0),
        }
    }

    /// Whether to write a line, and how many were left out since the last one.
    pub(crate) fn ask(&self) -> Option<u64> {
        self.ask_at(self.start.elapsed().as_secs())
    }

    fn ask_at(&self, second: u64) -> Option<u64> {
        let begun = second << COUNT_BITS;
        let taken = self
            .now
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                let now = now.max(begun);
                let lines = now & ((1 << COUNT_BITS) - 1);
                (lines < LINES).then_some(now + 1)
            });
        if taken.is_ok() {
            Some(self.left_out.swap(0, Ordering::Relaxed))
        } else {
            self.left_out.fetch_add(1, Ordering::Relaxed);
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_has_its_lines_and_the_next_tells_what_was_left_out() {
        let log = Sparingly::new();
        for second in [0, 1, 7] {
            let first = log.ask_at(second);
            assert_eq!(first, Some(if second == 0 { 0 } else { 100 }), "{second}");
            for _ in 1..LINES {
                assert_eq!(log.ask_at(second), Some(0));
            }
            for _ in 0..100 {
                assert_eq!(log.ask_at(second), None);
            }
        }
    }
}

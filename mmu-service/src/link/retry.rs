//! How often and how long a batch that may be lost is sent again, and what a refusal means for it.
//!
//! Units: pauses are real time.

use std::hash::{BuildHasher as _, Hasher as _, RandomState};
use std::time::{Duration, Instant};

use tonic::{Code, Status};

/// First pause, doubled by each failure.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
/// Longest pause before jitter.
const LONGEST_PAUSE: Duration = Duration::from_secs(1);

/// What may be spent on reaching a module that does not answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Budget {
    /// Failures in a row.
    pub(crate) attempts: u32,
    /// Time since the first of them.
    pub(crate) time: Duration,
}

/// The failures since the last sign of progress.
#[derive(Debug)]
pub(super) struct Retry {
    budget: Budget,
    failures: u32,
    since: Option<Instant>,
}

impl Retry {
    pub(super) fn new(budget: Budget) -> Self {
        Self {
            budget,
            failures: 0,
            since: None,
        }
    }

    /// The module answered: the budget is whole again.
    pub(super) fn progress(&mut self) {
        self.failures = 0;
        self.since = None;
    }

    /// Leaves one attempt.
    pub(super) fn spend(&mut self) {
        self.failures = self.budget.attempts;
    }

    /// Counts a failure. The pause before the next attempt, or `None` once the budget is spent.
    pub(super) fn failed(&mut self, now: Instant) -> Option<Duration> {
        self.failures = self.failures.saturating_add(1);
        let since = *self.since.get_or_insert(now);
        if self.failures >= self.budget.attempts || now.duration_since(since) >= self.budget.time {
            return None;
        }
        Some(pause(
            self.failures,
            RandomState::new().build_hasher().finish(),
        ))
    }
}

/// The pause after `failures` in a row: exponential up to a bound, then half of it by chance, so
/// that callers that lost the module together do not come back together.
fn pause(failures: u32, chance: u64) -> Duration {
    let doublings = failures.saturating_sub(1).min(16);
    let whole = FIRST_PAUSE
        .saturating_mul(1 << doublings)
        .min(LONGEST_PAUSE);
    let half = whole / 2;
    let nanos = u64::try_from(half.as_nanos()).unwrap_or(u64::MAX);
    half + Duration::from_nanos(chance % nanos.saturating_add(1))
}

/// What a gRPC error says about the batch that it answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing ran; worth another attempt later.
    Overloaded,
    /// It may have run. The same sequence number may be sent again.
    Lost,
    /// The module does not know the session: it forgot it, or never saw its first batch. A batch
    /// that was not lost before has not run, and may run under a new session.
    NoSession,
    /// Nothing ran, and nothing will.
    Refused,
}

/// Judges a gRPC error.
pub(super) fn judge(status: &Status) -> Verdict {
    match status.code() {
        Code::ResourceExhausted => Verdict::Overloaded,
        Code::NotFound => Verdict::NoSession,
        Code::InvalidArgument
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::Unauthenticated
        | Code::FailedPrecondition
        | Code::OutOfRange
        | Code::Unimplemented => Verdict::Refused,
        // tonic reports an expired deadline as CANCELLED, so that is no statement about the batch.
        Code::Ok
        | Code::Cancelled
        | Code::Unknown
        | Code::DeadlineExceeded
        | Code::Aborted
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => Verdict::Lost,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_grow_to_a_bound_and_are_spread() {
        for (failures, shortest_ms, longest_ms) in [
            (1, 5, 10),
            (2, 10, 20),
            (4, 40, 80),
            (9, 500, 1000),
            (u32::MAX, 500, 1000),
        ] {
            for chance in [0, 1, 12_345_678_901, u64::MAX] {
                let pause = pause(failures, chance);
                assert!(
                    pause >= Duration::from_millis(shortest_ms),
                    "{failures}: {pause:?}"
                );
                assert!(
                    pause <= Duration::from_millis(longest_ms),
                    "{failures}: {pause:?}"
                );
            }
        }
    }

    #[test]
    fn the_budget_ends_by_attempts_or_by_time_and_progress_refills_it() {
        let budget = Budget {
            attempts: 3,
            time: Duration::from_secs(10),
        };
        let start = Instant::now();
        let mut retry = Retry::new(budget);
        assert!(retry.failed(start).is_some());
        assert!(retry.failed(start).is_some());
        assert_eq!(retry.failed(start), None, "attempts");
        retry.progress();
        assert!(retry.failed(start).is_some());
        assert_eq!(retry.failed(start + budget.time), None, "time");
    }

    #[test]
    fn an_expired_deadline_says_nothing_about_the_batch() {
        for (status, verdict) in [
            (Status::cancelled("Timeout expired"), Verdict::Lost),
            (Status::unavailable("connection reset"), Verdict::Lost),
            (Status::resource_exhausted("busy"), Verdict::Overloaded),
            (Status::invalid_argument("calls[0].leaf"), Verdict::Refused),
        ] {
            assert_eq!(judge(&status), verdict, "{status}");
        }
    }
}

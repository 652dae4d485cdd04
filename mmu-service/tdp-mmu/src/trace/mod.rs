//! Tracepoints: what the kernel's `kvm` and `kvmmmu` events would say, kept in a bounded ring.
//!
//! Source: arch/x86/kvm/mmu/mmutrace.h, arch/x86/kvm/trace.h, include/trace/events/kvm.h.
//! While tracing is off an event costs one relaxed load; its fields are not even computed.

mod event;

use std::collections::VecDeque;
// Not shuttle's: whether somebody watches must not be a point where threads switch.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

pub use event::{Event, PageText, error_code};

/// Most events that a ring can hold.
pub const MAX_EVENTS: usize = 1 << 20;

#[derive(Debug, Default)]
struct Ring {
    events: VecDeque<Event>,
    limit: usize,
    lost: u64,
}

/// The events of one VM.
#[derive(Debug, Default)]
pub(crate) struct Tracer {
    enabled: AtomicBool,
    ring: Mutex<Ring>,
}

impl Tracer {
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records an event, if somebody watches.
    #[inline]
    pub(crate) fn emit(&self, event: impl FnOnce() -> Event) {
        if self.enabled.load(Ordering::Relaxed) {
            self.record(event);
        }
    }

    #[inline]
    pub(crate) fn is_on(&self) -> bool {
        self.enabled.load(Ordering::Relaxed)
    }

    /// Out of line, so that what nobody watches costs its caller no registers.
    #[cold]
    #[inline(never)]
    fn record(&self, event: impl FnOnce() -> Event) {
        let event = event();
        let mut ring = self.ring();
        // As in ftrace's ring, the oldest goes.
        if ring.events.len() >= ring.limit {
            ring.events.pop_front();
            ring.lost += 1;
        }
        if ring.limit > 0 {
            ring.events.push_back(event);
        }
    }

    /// Begins to record at most `limit` events; 0 ends it. What was recorded stays.
    pub(crate) fn set_limit(&self, limit: usize) {
        let mut ring = self.ring();
        ring.limit = limit.min(MAX_EVENTS);
        while ring.events.len() > ring.limit.max(1) && limit != 0 {
            ring.events.pop_front();
            ring.lost += 1;
        }
        self.enabled.store(limit != 0, Ordering::Relaxed);
    }

    /// The events since the last time, and how many were lost.
    pub(crate) fn take(&self) -> (Vec<Event>, u64) {
        let mut ring = self.ring();
        let lost = std::mem::take(&mut ring.lost);
        (ring.events.drain(..).collect(), lost)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn age(hva: u64) -> Event {
        Event::TestAgeHva { hva }
    }

    #[test]
    fn the_ring_keeps_the_newest_and_counts_what_it_lost() {
        let tracer = Tracer::default();
        tracer.emit(|| unreachable!("nobody watches"));
        tracer.set_limit(2);
        (0..5).for_each(|hva| tracer.emit(|| age(hva)));
        assert_eq!(tracer.take(), (vec![age(3), age(4)], 3));
        assert_eq!(tracer.take(), (vec![], 0));
        tracer.set_limit(0);
        tracer.emit(|| unreachable!("nobody watches any more"));
    }
}

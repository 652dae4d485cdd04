//! The memory that recorded answers take: of one session, and of all.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tdx_defs::SeamcallResult;

/// What a recorded answer takes beside its results: its place in the window.
const ANSWER_BYTES: u64 = 96;

/// Bytes that the answer of a batch with so many calls takes at most.
pub(crate) fn bytes_of(calls: usize) -> u64 {
    ANSWER_BYTES + (calls * size_of::<SeamcallResult>()) as u64
}

/// What is taken of the memory for answers.
#[derive(Debug)]
pub(crate) struct ReplayMemory {
    taken: AtomicU64,
    /// Of all sessions.
    pub(crate) limit: u64,
    /// Of one session.
    pub(crate) session_limit: u64,
}

impl ReplayMemory {
    pub(crate) fn new(limit: u64, session_limit: u64) -> Arc<Self> {
        Arc::new(Self {
            taken: AtomicU64::new(0),
            limit,
            session_limit,
        })
    }

    /// Bytes that answers take now, or may take when their batches have run.
    pub(crate) fn taken(&self) -> u64 {
        self.taken.load(Ordering::Relaxed)
    }

    /// Takes `bytes`, unless the limit of all sessions is in the way.
    pub(crate) fn take(self: &Arc<Self>, bytes: u64) -> Option<Room> {
        self.taken
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |taken| {
                taken
                    .checked_add(bytes)
                    .filter(|taken| *taken <= self.limit)
            })
            .ok()?;
        Some(Room {
            memory: Arc::clone(self),
            bytes,
        })
    }
}

/// Memory that was taken; given back when dropped.
#[derive(Debug)]
pub(crate) struct Room {
    memory: Arc<ReplayMemory>,
    bytes: u64,
}

impl Room {
    /// Bytes that it is.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Gives back what is above `bytes`.
    pub(crate) fn shrink(&mut self, bytes: u64) {
        let over = self.bytes.saturating_sub(bytes);
        self.bytes -= over;
        self.memory.taken.fetch_sub(over, Ordering::Relaxed);
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.shrink(0);
    }
}

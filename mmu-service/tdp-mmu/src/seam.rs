//! How the core reaches the TDX module: ordered batches out, results back.
//!
//! The core is synchronous. [`SeamPort::submit`] hands a batch over and returns a [`Ticket`];
//! [`Ticket::wait`] blocks until the module has answered. A test answers from the module core in
//! the same process, the service from a gRPC stream.

use tdx_defs::{Seamcall, SeamcallResult};

/// One ordered batch for the module.
#[derive(Debug, Clone)]
pub struct Batch {
    /// Logical processor that executes it.
    pub lp: u32,
    /// Which way it should travel.
    pub via: Via,
    /// Leave out the calls behind the first one that ends with ERROR set.
    pub stop_on_error: bool,
    /// Its place among batches that are sent before those in front of them are answered.
    pub chain: Option<Chain>,
    /// At most [`MAX_CALLS`], each run at most [`MAX_REPEAT`] long.
    pub calls: Vec<Seamcall>,
}

/// A place in a chain of batches. Link 0 runs; another one runs if the link before it ran whole,
/// and else it runs nothing and has no results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chain {
    /// From [`SeamPort::chain`].
    pub id: u64,
    /// From 0.
    pub link: u32,
}

/// Most calls that the core puts into one batch.
pub const MAX_CALLS: usize = 4096;
/// Longest run that the core asks for.
pub const MAX_REPEAT: u32 = 4096;

/// The two ways to the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Via {
    /// A call of its own, as propagation mode `kernel` makes for every SEAMCALL.
    Rpc,
    /// A message on the open stream of the logical processor.
    Stream,
}

/// Why a batch has no results.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SeamError {
    /// Certainly nothing ran.
    #[error("the call did not reach the module: {reason}")]
    NotSent {
        /// What stood in the way.
        reason: String,
    },
    /// It may have run, wholly or in part.
    #[error("the outcome of the call is unknown: {reason}")]
    Unknown {
        /// What was lost.
        reason: String,
    },
    /// The module started anew: every TD built before is gone.
    #[error("the module has restarted, its TDs are gone: {reason}")]
    Restarted {
        /// Old and new instance.
        reason: String,
    },
}

type Outcome = Result<Vec<SeamcallResult>, SeamError>;

/// A batch under way.
#[must_use = "wait for the module's answer"]
pub struct Ticket(State);

enum State {
    Ready(Outcome),
    Pending(Box<dyn FnOnce() -> Outcome + Send>),
}

impl Ticket {
    /// A batch that is answered already.
    pub fn ready(outcome: Result<Vec<SeamcallResult>, SeamError>) -> Self {
        Self(State::Ready(outcome))
    }

    /// A batch whose answer `wait` blocks for.
    pub fn pending(
        wait: impl FnOnce() -> Result<Vec<SeamcallResult>, SeamError> + Send + 'static,
    ) -> Self {
        Self(State::Pending(Box::new(wait)))
    }

    /// Blocks until the batch is answered: one result for each call that ran.
    pub fn wait(self) -> Result<Vec<SeamcallResult>, SeamError> {
        match self.0 {
            State::Ready(outcome) => outcome,
            State::Pending(wait) => wait(),
        }
    }
}

/// A way to one instance of the module.
pub trait SeamPort: Send + Sync {
    /// Sends a batch. Batches of one logical processor run in the order of their submission;
    /// the call may block while too many are under way.
    fn submit(&self, batch: Batch) -> Ticket;

    /// Number of a new chain; `None` where batches do not mind what became of those before them.
    fn chain(&self) -> Option<u64> {
        None
    }
}

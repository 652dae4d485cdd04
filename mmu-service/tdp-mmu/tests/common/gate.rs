//! A place where one thread waits until another lets it go on.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A test that fails on one side of a gate must not leave the other side there for ever.
const PATIENCE: Duration = Duration::from_secs(120);

/// Closed until [`Gate::open`].
#[derive(Debug, Default)]
pub(crate) struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    arrived: bool,
    is_open: bool,
}

impl Gate {
    /// Says that it is there, and waits until the gate is opened.
    pub(crate) fn pass(&self) {
        self.change(|state| state.arrived = true);
        self.wait(|state| state.is_open);
    }

    /// Waits until somebody is at the gate.
    pub(crate) fn wait_for_arrival(&self) {
        self.wait(|state| state.arrived);
    }

    /// Waits until the gate is opened, without being somebody who arrives.
    pub(crate) fn wait_until_open(&self) {
        self.wait(|state| state.is_open);
    }

    /// Lets through who is there and who comes later.
    pub(crate) fn open(&self) {
        self.change(|state| state.is_open = true);
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap_or_else(PoisonError::into_inner));
        self.changed.notify_all();
    }

    fn wait(&self, holds: impl Fn(&State) -> bool) {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let (_state, waited) = self
            .changed
            .wait_timeout_while(state, PATIENCE, |state| !holds(state))
            .unwrap_or_else(PoisonError::into_inner);
        assert!(!waited.timed_out(), "nobody came, or nobody opened");
    }
}

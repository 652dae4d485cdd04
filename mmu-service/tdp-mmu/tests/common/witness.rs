//! What is asked of a scenario, and what it shows, while somebody plays it by name.
//!
//! A test plays its scenario in both propagation modes and looks at the calls. `mmuctl scenario`
//! plays the same function in one mode and wants to see those calls, too.

use std::cell::{Cell, RefCell};

use tdp_mmu::Mode;

thread_local! {
    static ASKED: Cell<Option<Mode>> = const { Cell::new(None) };
    static CALLS: RefCell<Vec<String>> = const { RefCell::new(Vec::new()) };
}

/// The modes to play a scenario in: the one that is asked for, or both.
pub(crate) fn modes() -> Vec<Mode> {
    match ASKED.get() {
        Some(mode) => vec![mode],
        None => vec![Mode::Kernel, Mode::Batched],
    }
}

/// The mode that is asked for, for a scenario to which it makes no difference.
pub(crate) fn mode_or(mode: Mode) -> Mode {
    ASKED.get().unwrap_or(mode)
}

/// Shows calls, in short, to whoever plays the scenario.
pub(crate) fn show(calls: impl IntoIterator<Item = String>) {
    if ASKED.get().is_some() {
        CALLS.with_borrow_mut(|shown| shown.extend(calls));
    }
}

/// Takes back what was shown: a scenario that is played again and again shows its last round.
pub(crate) fn take() -> Vec<String> {
    CALLS.take()
}

/// Plays a scenario in one mode: what came of it, and the calls that it looked at.
pub(crate) fn watch<T>(mode: Mode, play: impl FnOnce() -> T) -> (T, Vec<String>) {
    take();
    ASKED.set(Some(mode));
    let played = play();
    ASKED.set(None);
    (played, take())
}

//! Locks and atomics, from the standard library or, for exploring interleavings, from shuttle.

#[cfg(not(feature = "shuttle"))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};

#[cfg(feature = "shuttle")]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread,
};

/// Locks, whatever happened to an earlier holder: the data behind our mutexes is valid between
/// any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Waits until `blocked` turns false; whoever changes the condition notifies under the mutex.
pub(crate) fn wait_while<'a, T>(
    condvar: &Condvar,
    mut guard: MutexGuard<'a, T>,
    mut blocked: impl FnMut(&mut T) -> bool,
) -> MutexGuard<'a, T> {
    while blocked(&mut guard) {
        guard = condvar
            .wait(guard)
            .unwrap_or_else(std::sync::PoisonError::into_inner);
    }
    guard
}

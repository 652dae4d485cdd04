//! A bound on what is in flight, for threads that block.
//!
//! The callers of the link are ordinary threads, so the bound is a counter under a mutex with a
//! condition variable. The permit travels with the batch and comes back when it is dropped.

use std::sync::{Arc, Condvar, Mutex, PoisonError};

/// So many permits at a time.
#[derive(Debug)]
pub(super) struct Window {
    free: Mutex<usize>,
    returned: Condvar,
}

/// One place in the window.
#[derive(Debug)]
pub(super) struct Permit(Arc<Window>);

impl Window {
    /// A window of `size` places, at least one.
    pub(super) fn new(size: usize) -> Arc<Self> {
        Arc::new(Self {
            free: Mutex::new(size.max(1)),
            returned: Condvar::new(),
        })
    }

    /// Waits for a place.
    pub(super) fn acquire(self: &Arc<Self>) -> Permit {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        while *free == 0 {
            free = self
                .returned
                .wait(free)
                .unwrap_or_else(PoisonError::into_inner);
        }
        *free -= 1;
        Permit(Arc::clone(self))
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        *self.0.free.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        self.0.returned.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_full_window_holds_the_next_caller_back_until_a_permit_returns() {
        let window = Window::new(2);
        let (first, _second) = (window.acquire(), window.acquire());
        let (tell, told) = mpsc::channel();
        let waiter = std::thread::spawn({
            let window = Arc::clone(&window);
            move || {
                let permit = window.acquire();
                tell.send(()).unwrap();
                drop(permit);
            }
        });
        assert_eq!(told.try_recv(), Err(mpsc::TryRecvError::Empty));
        drop(first);
        told.recv().unwrap();
        waiter.join().unwrap();
    }
}

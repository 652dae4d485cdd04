//! A bound on what is in flight.
//!
//! The permit travels with the batch and comes back when it is dropped. Who waits for one drives
//! the link's I/O: the answer that brings it back may need that.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::io::Io;

/// So many permits at a time.
#[derive(Debug)]
pub(super) struct Window(Arc<Semaphore>);

/// One place in the window.
#[derive(Debug)]
pub(super) struct Permit(
    #[expect(dead_code, reason = "gives the place back when dropped")] Option<OwnedSemaphorePermit>,
);

impl Window {
    /// A window of `size` places, at least one.
    pub(super) fn new(size: usize) -> Self {
        Self(Arc::new(Semaphore::new(size.max(1))))
    }

    /// Waits for a place.
    pub(super) fn acquire(&self, io: &Io) -> Permit {
        let permit = Arc::clone(&self.0).try_acquire_owned();
        // Never closed, so there is one in the end.
        Permit(
            permit
                .or_else(|_| io.drive(Arc::clone(&self.0).acquire_owned()))
                .ok(),
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn a_full_window_holds_the_next_caller_back_until_a_permit_returns() {
        let (io, _stand_in) = Io::start().unwrap();
        let window = Arc::new(Window::new(2));
        let (first, _second) = (window.acquire(&io), window.acquire(&io));
        let (tell, told) = mpsc::channel();
        let waiter = std::thread::spawn({
            let (window, io) = (Arc::clone(&window), Arc::clone(&io));
            move || {
                let permit = window.acquire(&io);
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

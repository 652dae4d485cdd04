//! Who runs the link's I/O: the thread that waits for an answer, so that an answer wakes nobody
//! else on its way.
//!
//! All I/O is on one single-threaded runtime, which any thread may drive and one at a time does. A
//! caller that waits drives it. Callers that wait beside it are woken by its driver, and one of them
//! drives on when it leaves. While no caller comes, the *stand-in* drives: a thread of the link,
//! which watches the module, answers its keepalive and serves whoever waits in an async task. It
//! stands back as long as callers come.
//!
//! Invariants
//! - D1  Whatever is under way is driven within [`STAND_BACK`]: by a caller, or by the stand-in.
//! - D2  Work on the runtime takes no lock of the core: its driver may hold them.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, Thread};
use std::time::Duration;

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::sync::Notify;

/// How long the stand-in waits for the next caller before it drives. What nobody waits for (a look
/// at the module's health, a keepalive) may be late by this.
const STAND_BACK: Duration = Duration::from_millis(10);

/// The link's runtime.
pub(super) struct Io {
    /// Taken when this is dropped.
    runtime: Option<Runtime>,
    /// How often a caller drove or waited.
    calls: AtomicU64,
    /// The stand-in drives, or is about to.
    stands_in: AtomicBool,
    /// Asks the stand-in to leave.
    wanted: Notify,
    stopped: AtomicBool,
}

/// Ends the stand-in when it is dropped.
pub(super) struct StandIn {
    io: Arc<Io>,
    thread: Thread,
}

impl Io {
    /// A runtime and its stand-in.
    pub(super) fn start() -> io::Result<(Arc<Self>, StandIn)> {
        let io = Arc::new(Self {
            runtime: Some(Builder::new_current_thread().enable_all().build()?),
            calls: AtomicU64::new(0),
            stands_in: AtomicBool::new(false),
            wanted: Notify::new(),
            stopped: AtomicBool::new(false),
        });
        let thread = thread::Builder::new().name("module-link".into()).spawn({
            let io = Arc::clone(&io);
            move || io.stand_in()
        })?;
        let thread = thread.thread().clone();
        Ok((Arc::clone(&io), StandIn { io, thread }))
    }

    fn runtime(&self) -> &Runtime {
        let Some(runtime) = &self.runtime else {
            unreachable!("taken by drop only");
        };
        runtime
    }

    /// For tasks.
    pub(super) fn handle(&self) -> &Handle {
        self.runtime().handle()
    }

    /// Waits for `work`, and drives all I/O unless another thread does. Not from an async task.
    pub(super) fn drive<F: Future>(&self, work: F) -> F::Output {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if self.stands_in.load(Ordering::Acquire) {
            self.wanted.notify_one();
        }
        self.runtime().block_on(work)
    }

    /// Hands what was queued to the sockets, and takes what is there.
    pub(super) fn pump(&self) {
        self.drive(tokio::task::yield_now());
    }

    fn stand_in(&self) {
        loop {
            self.stands_in.store(true, Ordering::Release);
            self.runtime().block_on(self.wanted.notified());
            self.stands_in.store(false, Ordering::Release);
            loop {
                let before = self.calls.load(Ordering::Relaxed);
                thread::park_timeout(STAND_BACK);
                if self.stopped.load(Ordering::Acquire) {
                    return;
                }
                if self.calls.load(Ordering::Relaxed) == before {
                    break;
                }
            }
        }
    }
}

impl Drop for Io {
    fn drop(&mut self) {
        // The last holder may be an async task, which must not wait for a runtime to end.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        self.io.stopped.store(true, Ordering::Release);
        self.io.wanted.notify_one();
        self.thread.unpark();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use tokio::sync::oneshot;

    use super::*;

    /// A task that answers what it is asked, until the sender is dropped.
    fn echo(io: &Io) -> tokio::sync::mpsc::UnboundedSender<oneshot::Sender<thread::ThreadId>> {
        let (asks, mut asked) =
            tokio::sync::mpsc::unbounded_channel::<oneshot::Sender<thread::ThreadId>>();
        io.handle().spawn(async move {
            while let Some(answer) = asked.recv().await {
                let _ = answer.send(thread::current().id());
            }
        });
        asks
    }

    fn ask(
        asks: &tokio::sync::mpsc::UnboundedSender<oneshot::Sender<thread::ThreadId>>,
    ) -> oneshot::Receiver<thread::ThreadId> {
        let (answer, answered) = oneshot::channel();
        asks.send(answer).unwrap();
        answered
    }

    #[test]
    fn work_goes_on_while_no_caller_drives() {
        let (io, _stand_in) = Io::start().unwrap();
        let asks = echo(&io);
        for _ in 0..3 {
            // The stand-in has left for this one, and must come back by itself.
            io.pump();
            let (tell, told) = mpsc::channel();
            let answered = ask(&asks);
            io.handle().spawn(async move {
                tell.send(answered.await.unwrap()).unwrap();
            });
            let by = told.recv().unwrap();
            assert_ne!(by, thread::current().id());
        }
    }

    #[test]
    fn callers_that_wait_side_by_side_are_all_answered() {
        let (io, _stand_in) = Io::start().unwrap();
        let asks = echo(&io);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2_000 {
                        io.drive(ask(&asks)).unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn a_caller_that_comes_again_drives_by_itself() {
        let (io, _stand_in) = Io::start().unwrap();
        let asks = echo(&io);
        // How soon the stand-in makes way is the scheduler's affair.
        let own = (0..1_000_000).any(|_| io.drive(ask(&asks)) == Ok(thread::current().id()));
        assert!(own);
    }

    #[test]
    fn the_last_holder_may_be_an_async_task() {
        let (io, stand_in) = Io::start().unwrap();
        let asks = echo(&io);
        let other = Builder::new_current_thread().build().unwrap();
        other.block_on(async move {
            drop(stand_in);
            drop(io);
        });
        // The task goes with its runtime, which the stand-in may hold a moment longer.
        while !asks.is_closed() {
            thread::yield_now();
        }
    }
}

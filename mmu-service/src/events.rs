//! The tracepoints of a VM, for whoever watches.
//!
//! The core keeps a ring and knows neither clocks nor readers. Operations take it out when they
//! end, a timer while they run, and every reader gets a bounded queue of its own: one that does
//! not read loses its oldest records and is told how many.
//!
//! Invariants
//! - E1  Sequence numbers of a VM only grow; a gap is a loss, and is told.
//! - E2  The core records only while somebody watches.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::Instant;

use mirror_proto::mmu as wire;
use tdp_mmu::{Event, Vm};
use tokio::sync::Notify;
use tonic::Status;

use crate::registry::VmEntry;
use crate::status;

/// Readers of one VM at a time.
const MAX_WATCHERS: usize = 16;
/// Records in one message.
const MESSAGE_RECORDS: usize = 512;

/// Nanoseconds since the service first asked.
pub(crate) fn now_ns() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    let elapsed = START.get_or_init(Instant::now).elapsed();
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands the events of one VM on.
#[derive(Default)]
pub(crate) struct EventHub {
    /// Whether there is a reader: what most operations ask.
    watched: AtomicBool,
    readers: Mutex<Readers>,
}

#[derive(Default)]
struct Readers {
    /// Sequence number of the last record.
    last: u64,
    queues: Vec<Arc<Queue>>,
    closed: bool,
}

/// What one reader has not read yet.
struct Queue {
    limit: usize,
    waiting: Mutex<VecDeque<Record>>,
    changed: Notify,
}

struct Record {
    sequence: u64,
    time_ns: u64,
    event: Event,
    /// Lost between the record before and this one.
    lost: u64,
}

impl EventHub {
    /// Takes what the core has recorded. Cheap when nobody watches.
    pub(crate) fn collect(&self, vm: &Vm) {
        if !self.watched.load(Ordering::Acquire) {
            return;
        }
        // Held over both steps, so that records keep their order.
        let mut readers = lock(&self.readers);
        readers.take(vm);
    }

    /// Sequence number of the last record that was taken out; 0 before the first.
    pub(crate) fn last(&self) -> u64 {
        lock(&self.readers).last
    }

    /// The VM is gone: readers get what waits for them, and the end.
    pub(crate) fn close(&self) {
        let mut readers = lock(&self.readers);
        readers.closed = true;
        for queue in readers.queues.drain(..) {
            queue.changed.notify_one();
        }
        self.watched.store(false, Ordering::Release);
    }

    /// A new reader, of what happens from now on, for at most `limit` records.
    pub(crate) fn watch(entry: &Arc<VmEntry>, limit: usize) -> Result<Watch, Status> {
        let hub = &entry.events;
        let mut readers = lock(&hub.readers);
        if readers.closed {
            return Err(status::unknown_vm(entry.id));
        }
        if readers.queues.len() >= MAX_WATCHERS {
            return Err(status::too_many_watchers(MAX_WATCHERS));
        }
        // What an earlier reader left in the ring is nobody's.
        readers.take(&entry.vm);
        let queue = Arc::new(Queue {
            limit,
            waiting: Mutex::default(),
            changed: Notify::new(),
        });
        readers.queues.push(Arc::clone(&queue));
        readers.set_ring(&entry.vm);
        hub.watched.store(true, Ordering::Release);
        Ok(Watch {
            hub: Arc::clone(hub),
            entry: Arc::downgrade(entry),
            queue,
        })
    }
}

impl Readers {
    fn take(&mut self, vm: &Vm) {
        let (events, lost) = vm.take_events();
        if events.is_empty() {
            self.last += lost;
            return;
        }
        let time_ns = now_ns();
        let first = self.last + lost + 1;
        self.last += lost + events.len() as u64;
        for queue in &self.queues {
            let mut waiting = lock(&queue.waiting);
            for (sequence, &event) in (first..).zip(&events) {
                let lost = if sequence == first { lost } else { 0 };
                let record = Record {
                    sequence,
                    time_ns,
                    event,
                    lost,
                };
                waiting.push_back(record);
                if waiting.len() > queue.limit
                    && let Some(oldest) = waiting.pop_front()
                    && let Some(next) = waiting.front_mut()
                {
                    next.lost += oldest.lost + 1;
                }
            }
            drop(waiting);
            queue.changed.notify_one();
        }
    }

    /// The ring holds what the most patient reader holds.
    fn set_ring(&self, vm: &Vm) {
        let limits = self.queues.iter().map(|queue| queue.limit);
        vm.trace(limits.max().unwrap_or(0));
    }
}

/// One reader. Dropping it ends its part.
pub(crate) struct Watch {
    hub: Arc<EventHub>,
    /// A reader does not keep a VM in its place.
    entry: Weak<VmEntry>,
    queue: Arc<Queue>,
}

impl Watch {
    /// The next records, at most [`MESSAGE_RECORDS`]; `None` when there are none now.
    pub(crate) fn next(&self) -> Option<wire::WatchEventsResponse> {
        let mut waiting = lock(&self.queue.waiting);
        let lost = waiting.front()?.lost;
        let mut records = Vec::new();
        while records.len() < MESSAGE_RECORDS {
            // A loss stands in front of a message.
            let goes_on = |record: &Record| records.is_empty() || record.lost == 0;
            let Some(record) = waiting.front().filter(|record| goes_on(record)) else {
                break;
            };
            records.push(wire::TraceRecord {
                sequence: record.sequence,
                time_ns: record.time_ns,
                name: record.event.name().to_owned(),
                text: record.event.to_string(),
            });
            waiting.pop_front();
        }
        Some(wire::WatchEventsResponse { records, lost })
    }

    /// Returns when there may be more.
    pub(crate) async fn changed(&self) {
        self.queue.changed.notified().await;
    }

    /// Takes out what an operation that still runs has recorded. `false` when the VM is gone.
    pub(crate) fn collect(&self) -> bool {
        match self.entry.upgrade() {
            Some(entry) => {
                self.hub.collect(&entry.vm);
                !lock(&self.hub.readers).closed
            }
            None => false,
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut readers = lock(&self.hub.readers);
        readers
            .queues
            .retain(|queue| !Arc::ptr_eq(queue, &self.queue));
        if let Some(entry) = self.entry.upgrade() {
            readers.set_ring(&entry.vm);
        }
        if readers.queues.is_empty() {
            self.hub.watched.store(false, Ordering::Release);
        }
    }
}

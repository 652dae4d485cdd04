//! Threads for the core, bounded, and the orderly end.
//!
//! An operation of the core blocks, so each gets a thread while it works. It runs to its end
//! whatever its caller does: a page-table change that is half made is worse than one in vain.

use std::sync::Arc;
use std::time::Duration;

use tdp_mmu::{Vm, VmError};
use telemetry::Gate;
use tokio::sync::{Semaphore, watch};
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::task::TaskTracker;
use tonic::Status;
use tracing::Span;

use crate::config::{Limits, size};
use crate::link::{self, LinkState, ModuleLink};
use crate::metrics::{Costs, Metrics};
use crate::registry::{Registry, VmEntry};
use crate::status;
use crate::store::Store;

/// How long an operation may wait for a thread.
const THREAD_WAIT: Duration = Duration::from_secs(5);

/// What all handlers share.
pub(crate) struct Shell {
    pub(crate) limits: Limits,
    pub(crate) link: Arc<ModuleLink>,
    pub(crate) vms: Registry,
    /// What outlives the service, if anything does.
    pub(crate) store: Option<Arc<Store>>,
    pub(crate) metrics: Arc<Metrics>,
    /// Which faults are traced.
    pub(crate) gate: Gate,
    threads: Arc<Semaphore>,
    running: TaskTracker,
    draining: watch::Sender<bool>,
}

impl Shell {
    pub(crate) fn new(
        limits: Limits,
        gate: Gate,
        link: Arc<ModuleLink>,
        metrics: Arc<Metrics>,
        store: Option<Arc<Store>>,
    ) -> Arc<Self> {
        Arc::new(Self {
            vms: Registry::new(limits.max_vms, limits.max_vm_operations, store.is_none()),
            store,
            threads: Arc::new(Semaphore::new(size(limits.max_operations))),
            running: TaskTracker::new(),
            draining: watch::Sender::new(false),
            limits,
            gate,
            link,
            metrics,
        })
    }

    /// The VM with this id, for an operation that changes or uses its memory.
    pub(crate) fn live_vm(&self, vm_id: u64) -> Result<Arc<VmEntry>, Status> {
        let entry = self.vms.get(vm_id)?;
        entry.check_alive()?;
        Ok(entry)
    }

    /// Runs `work` on a thread of its own, inside `span`.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        span: Span,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Status> {
        if *self.draining.borrow() {
            return Err(status::draining());
        }
        let thread = timeout(THREAD_WAIT, Arc::clone(&self.threads).acquire_owned()).await;
        let Ok(Ok(thread)) = thread else {
            return Err(status::overloaded(self.limits.max_operations));
        };
        let running = self.running.spawn_blocking(move || {
            let _thread = thread;
            span.in_scope(|| link::operation(work))
        });
        // Only a panic of the core ends here; the runtime has printed it.
        running
            .await
            .map_err(|_| status::internal("the operation broke off, see the log"))
    }

    /// Runs one operation of a VM, counts what it did, and turns its refusal into a status.
    pub(crate) async fn operate<T: Costs + Send + 'static>(
        &self,
        entry: &Arc<VmEntry>,
        span: Span,
        work: impl FnOnce(&Vm) -> Result<T, VmError> + Send + 'static,
    ) -> Result<T, Status> {
        let Some(share) = entry.operation() else {
            return Err(status::vm_overloaded(
                entry.id,
                self.limits.max_vm_operations,
            ));
        };
        let entry = Arc::clone(entry);
        let metrics = Arc::clone(&self.metrics);
        // Counted there and not here: the operation ends whether or not its caller still waits.
        let counted = move || {
            let _share = share;
            let outcome = work(&entry.vm);
            if let Ok(Some(counts)) = outcome.as_ref().map(Costs::costs) {
                metrics.did(counts);
            }
            // Before the answer: who asked finds what it did in the stream of events.
            entry.events.collect(&entry.vm);
            outcome
        };
        self.run(span, counted)
            .await?
            .map_err(|error| status::of_vm(&error))
    }

    /// Starts a task that the end of the service waits for.
    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        drop(self.running.spawn(task));
    }

    /// Becomes true when the service is about to end.
    pub(crate) fn draining(&self) -> watch::Receiver<bool> {
        self.draining.subscribe()
    }

    /// From here on nothing new is taken on.
    pub(crate) fn start_draining(&self) {
        self.draining.send_replace(true);
        self.running.close();
    }

    /// Waits for what is running, then gives every VM's pages and keys back to the module, which
    /// outlives this service; VMs whose state is kept stay for the next one. Stops at `deadline`
    /// and says what is left.
    pub(crate) async fn finish(self: &Arc<Self>, deadline: Instant) {
        if timeout_at(deadline, self.running.wait()).await.is_err() {
            tracing::warn!(
                operations = self.running.len(),
                "operations are still running"
            );
        }
        if self.store.is_some() {
            tracing::info!(vms = self.vms.all().len(), "VMs are kept for the next run");
            return;
        }
        let mut releases = tokio::task::JoinSet::new();
        if let LinkState::Down { reason, .. } = &*self.link.state().borrow() {
            tracing::warn!(%reason, "the module is away, VMs are not released");
            return;
        }
        for entry in self
            .vms
            .all()
            .into_iter()
            .filter(|entry| entry.lost().is_none())
        {
            let shell = Arc::clone(self);
            releases.spawn(async move {
                let Ok(thread) = Arc::clone(&shell.threads).acquire_owned().await else {
                    return;
                };
                let released = tokio::task::spawn_blocking(move || {
                    let _thread = thread;
                    release(&entry);
                    shell.vms.remove(entry.id);
                });
                let _ = released.await;
            });
        }
        let all = async { while releases.join_next().await.is_some() {} };
        if timeout_at(deadline, all).await.is_err() {
            let left: Vec<u64> = self.vms.all().iter().map(|entry| entry.id).collect();
            tracing::warn!(
                ?left,
                "VMs are not released, the module keeps their pages and keys"
            );
        }
    }
}

fn release(entry: &VmEntry) {
    match entry.vm.destroy() {
        Ok((_, 0)) => tracing::info!(vm = entry.id, "VM released"),
        Ok((_, leaked)) => tracing::warn!(vm = entry.id, leaked, "VM released, pages leaked"),
        Err(error) => tracing::warn!(vm = entry.id, %error, "VM not released"),
    }
}

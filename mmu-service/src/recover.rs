//! The VMs of an earlier process, made again before the service serves.
//!
//! First nothing of that process may still be on its way: its sessions are ended in the module,
//! which waits for what is in work and refuses what comes late. Then the core reads the module.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tdp_mmu::{LedgerError, Recovery, Settled, Vm, VmError};
use tdx_defs::GpaLayout;

use crate::link::{Attachment, LinkError, LinkState, operation};
use crate::registry::Origin;
use crate::shell::Shell;
use crate::store::{Kept, Store};

/// Pause before a recovery that failed begins anew.
const PAUSE: Duration = Duration::from_millis(500);

/// Why a recovery did not come to its end.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the sessions of an earlier process cannot be ended")]
    Sessions(#[source] LinkError),
    #[error("the state cannot be read")]
    State(#[from] LedgerError),
    #[error("the module cannot be read")]
    Module(#[from] VmError),
    #[error("the recovery broke off, see the log")]
    Broken,
}

/// Recovers the VMs as soon as the module is there, and opens the registry. Tries until it
/// succeeds or the service ends.
pub(crate) async fn run(shell: Arc<Shell>, store: Arc<Store>) {
    let mut draining = shell.draining();
    let mut link = shell.link.state();
    loop {
        let attachment = loop {
            if let LinkState::Up(attachment) = &*link.borrow_and_update() {
                break Arc::clone(attachment);
            }
            tokio::select! {
                changed = link.changed() => if changed.is_err() { return },
                _ = draining.wait_for(|draining| *draining) => return,
            }
        };
        match recover(&shell, &store, &attachment).await {
            Ok(()) => return shell.vms.open(),
            Err(error) => {
                let error = crate::cli::chain(&error);
                tracing::error!(error, "VMs are not recovered yet");
            }
        }
        tokio::select! {
            () = tokio::time::sleep(PAUSE) => {}
            _ = draining.wait_for(|draining| *draining) => return,
        }
    }
}

async fn recover(
    shell: &Arc<Shell>,
    store: &Arc<Store>,
    attachment: &Arc<Attachment>,
) -> Result<(), Failure> {
    let started = Instant::now();
    let earlier = store.begin_sessions(shell.link.name())?;
    for prefix in &earlier {
        shell
            .link
            .end_sessions(prefix)
            .await
            .map_err(Failure::Sessions)?;
    }
    let (shell, store_there) = (Arc::clone(shell), Arc::clone(store));
    let attachment = Arc::clone(attachment);
    let work = move || operation(|| recover_all(&shell, &store_there, &attachment));
    let vms = tokio::task::spawn_blocking(work)
        .await
        .map_err(|_| Failure::Broken)??;
    store.end_sessions(&earlier)?;
    tracing::info!(vms, took = ?started.elapsed(), "VMs recovered");
    Ok(())
}

/// Every VM of the state; how many are there again.
fn recover_all(
    shell: &Arc<Shell>,
    store: &Arc<Store>,
    attachment: &Arc<Attachment>,
) -> Result<usize, Failure> {
    let host = attachment.host();
    host.keep_in(store.pool(attachment.instance()));
    let split = store.split(attachment.instance())?;
    let port = shell.link.port(attachment);
    let recovery = Recovery::begin(Arc::clone(host), port, &split)?;
    let mut over: HashMap<String, Arc<Attachment>> = HashMap::new();
    // Entered when all are there: a recovery that breaks off begins anew with none.
    let mut there = Vec::new();
    for kept in store.all()? {
        let Kept {
            id,
            request,
            instance,
            record,
        } = kept;
        let (layout, ledger) = (GpaLayout::new(record.config.gpaw), store.ledger(id));
        if instance != attachment.instance() {
            if record.going {
                store.remove(id)?;
                continue;
            }
            // Its TD is gone with that run; what it was called and why it is dead stay.
            let ended = over
                .entry(instance)
                .or_insert_with_key(|instance| Arc::new(attachment.earlier(instance)));
            let port = shell.link.port(ended);
            let vm = Vm::kept_in(Arc::clone(ended.host()), port, record.config, ledger);
            there.push((id, request.label, vm, layout, Arc::clone(ended)));
            continue;
        }
        match recovery.vm(record, ledger)? {
            Settled::Gone { leaked } => {
                tracing::info!(vm = id, leaked, "VM taken down, as was under way");
                if leaked == 0 {
                    store.remove(id)?;
                }
            }
            Settled::Vm(vm, report) => {
                let dead = vm.bugs().reason();
                tracing::info!(
                    vm = id,
                    label = request.label,
                    tables = report.tables,
                    pages = report.leaves,
                    unblocked = report.unblocked,
                    removed = report.removed,
                    entries = report.audit.entries,
                    mismatches = report.audit.mismatches,
                    dead,
                    "VM recovered"
                );
                shell.metrics.did(&report.counts);
                there.push((id, request.label, *vm, layout, Arc::clone(attachment)));
            }
        }
    }
    let count = there.len();
    shell.vms.continue_after(store.last_id()?);
    for (id, label, vm, layout, attachment) in there {
        let origin = Origin {
            label,
            layout,
            attachment,
        };
        shell.vms.restore(id, vm, origin);
    }
    Ok(count)
}

//! What a run has seen so far, shared by its VMs and the one who strikes.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use mirror_proto::module::FaultTotals;
use tokio::sync::watch;

use super::plan::Phase;

/// How many failures are kept word by word.
const KEPT: usize = 8;

/// Counts.
#[derive(Debug, Default, Clone)]
pub(super) struct Counts {
    /// Requests that were answered, one way or the other.
    pub(super) operations: u64,
    pub(super) succeeded: u64,
    /// Typed errors by reason.
    pub(super) refused: BTreeMap<String, u64>,
    /// Requests whose connection broke under a kill of the MMU service.
    pub(super) disconnected: u64,
    /// Kills of the module, aborts included.
    pub(super) module_kills: u64,
    pub(super) mmu_kills: u64,
    /// Connections that a strike cut, lost replies included.
    pub(super) cuts: u64,
    /// Times that both services worked again after a kill.
    pub(super) recoveries: u64,
    /// What was under way at strikes.
    pub(super) during: BTreeMap<&'static str, u64>,
    /// Strikes whose call did not come.
    pub(super) missed: u64,
    /// VMs that died with a module.
    pub(super) vms_lost: u64,
    /// VMs that KVM would call bugged, with the reasons of the first.
    pub(super) vms_bugged: u64,
    pub(super) bugged: Vec<String>,
    pub(super) audits: u64,
    pub(super) entries: u64,
    pub(super) mismatches: u64,
    /// Requests without an answer in time.
    pub(super) hung: u64,
    /// Answers that no caller should get.
    pub(super) broken: u64,
    /// The first failures, word by word.
    pub(super) failures: Vec<String>,
    /// Of modules that are gone.
    faults_before: u64,
    /// Of this one.
    faults_now: u64,
}

impl Counts {
    pub(super) fn fail(&mut self, what: String) {
        tracing::warn!(what, "chaos");
        if self.failures.len() < KEPT {
            self.failures.push(what);
        }
    }

    /// What the module says that its rules have done.
    pub(super) fn saw_faults(&mut self, totals: &FaultTotals) {
        self.faults_now = totals.statuses + totals.delays + totals.lost_replies + totals.cuts;
    }

    /// The module is gone, its numbers with it; one of them was the reason.
    pub(super) fn module_gone(&mut self) {
        self.faults_before += std::mem::take(&mut self.faults_now);
        self.module_kills += 1;
    }

    /// Every fault that was brought about, kills included.
    pub(super) fn faults_injected(&self) -> u64 {
        self.faults_before + self.faults_now + self.module_kills + self.mmu_kills
    }
}

/// The tally.
#[derive(Debug)]
pub(super) struct Tally {
    counts: Mutex<Counts>,
    /// What each VM is at.
    at: Mutex<Vec<Option<Phase>>>,
    /// How often the MMU service was killed; odd while it is away.
    away: watch::Sender<u64>,
}

impl Tally {
    pub(super) fn new(vms: usize) -> Self {
        Self {
            counts: Mutex::default(),
            at: Mutex::new(vec![None; vms]),
            away: watch::Sender::new(0),
        }
    }

    pub(super) fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// VM `worker` begins or ends something.
    pub(super) fn set_phase(&self, worker: usize, phase: Option<Phase>) {
        self.at.lock().unwrap_or_else(PoisonError::into_inner)[worker] = phase;
    }

    /// What is under way: that of `worker` if anything, else that of another.
    pub(super) fn under_way(&self, worker: usize) -> Phase {
        let at = self.at.lock().unwrap_or_else(PoisonError::into_inner);
        at[worker]
            .or_else(|| at.iter().flatten().next().copied())
            .unwrap_or(Phase::Other)
    }

    /// A service goes away, or is back.
    pub(super) fn set_away(&self, away: bool) {
        self.away.send_modify(|count| {
            if (*count % 2 == 1) != away {
                *count += 1;
            }
        });
    }

    /// Changes whenever a service goes or comes.
    pub(super) fn era(&self) -> u64 {
        *self.away.borrow()
    }

    /// Completes when both services are there.
    pub(super) async fn there(&self) {
        // The sender is part of this: it cannot be gone.
        let _ = self.away.subscribe().wait_for(|count| count % 2 == 0).await;
    }
}

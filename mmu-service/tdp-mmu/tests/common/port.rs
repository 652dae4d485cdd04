//! The way to the module core in this process: every call recorded, answers spoilt on request.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::gate::Gate;

use tdp_mmu::{Batch, Chain, SeamError, SeamPort, Ticket};
use tdx_defs::{CompletionStatus, Leaf, Seamcall, SeamcallResult};
use tdx_module::{LpId, Module};

/// A call that the port carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Call {
    pub(crate) leaf: Leaf,
    pub(crate) rcx: u64,
    pub(crate) status: CompletionStatus,
}

/// What happens to a call instead of being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// The module answers this and does nothing.
    Answer(CompletionStatus),
    /// It runs, and the answer of its message is lost.
    LoseAnswer,
    /// It does not run, and nobody knows.
    LoseCall,
    /// It runs while a host interrupt is pending.
    Interrupt,
    /// Its message is never sent.
    Refuse,
}

/// Spoils calls of one leaf.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rule {
    pub(crate) leaf: Leaf,
    /// Only calls with this RCX.
    pub(crate) rcx: Option<u64>,
    /// Calls that still pass first.
    pub(crate) skip: u32,
    /// Calls to spoil behind them.
    pub(crate) times: u32,
    pub(crate) effect: Effect,
}

impl Rule {
    /// Spoils the next call of `leaf`.
    pub(crate) fn next(leaf: Leaf, effect: Effect) -> Self {
        Self {
            leaf,
            rcx: None,
            skip: 0,
            times: 1,
            effect,
        }
    }

    /// Answers busy to the next `times` calls of `leaf`.
    pub(crate) fn busy(leaf: Leaf, times: u32) -> Self {
        Self {
            times,
            ..Self::next(leaf, Effect::Answer(CompletionStatus::OPERAND_BUSY))
        }
    }
}

/// When a hook acts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    /// Before the module sees the call.
    Before,
    /// When it has answered, before the caller knows.
    Answered,
}

/// One call of a leaf at which a test does something, in the thread that makes the call.
pub(crate) struct Hook {
    leaf: Leaf,
    /// Only calls with this RCX.
    rcx: Option<u64>,
    /// Calls that pass first.
    skip: u32,
    when: When,
    act: Act,
}

type Act = Box<dyn FnOnce() + Send>;

impl Hook {
    /// Acts at the next call of `leaf`.
    pub(crate) fn at(leaf: Leaf, when: When, act: impl FnOnce() + Send + 'static) -> Self {
        Self {
            leaf,
            rcx: None,
            skip: 0,
            when,
            act: Box::new(act),
        }
    }

    /// Only at a call with this RCX.
    pub(crate) fn rcx(self, rcx: u64) -> Self {
        Self {
            rcx: Some(rcx),
            ..self
        }
    }

    /// Lets so many calls pass first.
    pub(crate) fn skip(self, skip: u32) -> Self {
        Self { skip, ..self }
    }
}

/// Calls of one leaf that succeeded.
const LEAVES: usize = 64;

pub(crate) struct Port {
    module: Arc<Module>,
    log: Mutex<Vec<Call>>,
    recording: AtomicBool,
    rules: Mutex<Vec<Rule>>,
    hooks: Mutex<Vec<Hook>>,
    /// Whether there are rules or hooks.
    any_rules: AtomicBool,
    batches: AtomicU64,
    /// Whether batches may be sent in chains, and the last link that ran whole.
    chaining: AtomicBool,
    chains: AtomicU64,
    last_link: Mutex<Option<Chain>>,
    succeeded: [AtomicU64; LEAVES],
}

/// How a message ended before its last call.
enum Cut {
    Unknown,
}

impl Port {
    pub(crate) fn new(module: Arc<Module>) -> Self {
        Self {
            module,
            log: Mutex::default(),
            recording: AtomicBool::new(true),
            rules: Mutex::default(),
            hooks: Mutex::default(),
            any_rules: AtomicBool::new(false),
            batches: AtomicU64::new(0),
            chaining: AtomicBool::new(false),
            chains: AtomicU64::new(0),
            last_link: Mutex::default(),
            succeeded: [const { AtomicU64::new(0) }; LEAVES],
        }
    }

    pub(crate) fn inject(&self, rule: Rule) {
        lock(&self.rules).push(rule);
        self.any_rules.store(true, Ordering::SeqCst);
    }

    /// Does something at a call.
    pub(crate) fn hook(&self, hook: Hook) {
        lock(&self.hooks).push(hook);
        self.any_rules.store(true, Ordering::SeqCst);
    }

    /// Holds the next call of `leaf` with this RCX, if one is given, until the gate is opened.
    pub(crate) fn gate(&self, leaf: Leaf, rcx: Option<u64>, when: When) -> Arc<Gate> {
        let gate = Arc::new(Gate::default());
        let passing = Arc::clone(&gate);
        let hook = Hook::at(leaf, when, move || passing.pass());
        self.hook(Hook { rcx, ..hook });
        gate
    }

    /// Takes chains of batches from now on.
    pub(crate) fn take_chains(&self) {
        self.chaining.store(true, Ordering::SeqCst);
    }

    /// As [`run`](Self::run), in its place of a chain.
    fn run_link(&self, batch: &Batch) -> Result<Vec<SeamcallResult>, SeamError> {
        let Some(place) = batch.chain else {
            return self.run(batch);
        };
        let mut last = lock(&self.last_link);
        let before = place.link.checked_sub(1);
        if before.is_some_and(|link| *last != Some(Chain { link, ..place })) {
            return Ok(Vec::new());
        }
        *last = None;
        let results = self.run(batch)?;
        let whole = results.len() == batch.calls.len()
            && batch
                .calls
                .iter()
                .zip(&results)
                .all(|(call, result)| result.completed == call.count());
        *last = whole.then_some(place);
        Ok(results)
    }

    /// Forgets hooks and rules; how many rules had something left to spoil.
    pub(crate) fn clear_rules(&self) -> usize {
        self.any_rules.store(false, Ordering::SeqCst);
        lock(&self.hooks).clear();
        let rules = std::mem::take(&mut *lock(&self.rules));
        rules
            .iter()
            .filter(|rule| rule.times != 0 && rule.times != u32::MAX)
            .count()
    }

    /// Whether calls are kept; counts are in any case.
    pub(crate) fn record(&self, on: bool) {
        self.recording.store(on, Ordering::SeqCst);
    }

    /// Whether a call of `leaf` has been answered since the calls were last taken.
    pub(crate) fn has_called(&self, leaf: Leaf) -> bool {
        lock(&self.log).iter().any(|call| call.leaf == leaf)
    }

    /// The calls since the last time, in order, runs expanded.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut *lock(&self.log))
    }

    /// Messages since the last time.
    pub(crate) fn take_batches(&self) -> u64 {
        self.batches.swap(0, Ordering::SeqCst)
    }

    /// How many calls of a leaf succeeded since the start.
    pub(crate) fn succeeded(&self, leaf: Leaf) -> u64 {
        self.succeeded
            .get(usize::from(leaf.0))
            .map_or(0, |count| count.load(Ordering::SeqCst))
    }

    fn run(&self, batch: &Batch) -> Result<Vec<SeamcallResult>, SeamError> {
        self.batches.fetch_add(1, Ordering::SeqCst);
        let mut results = Vec::with_capacity(batch.calls.len());
        for call in &batch.calls {
            let outcome = self.run_one(LpId(batch.lp), call);
            let result = outcome.map_err(|Cut::Unknown| SeamError::Unknown {
                reason: "answer lost".into(),
            })?;
            results.push(result);
            if batch.stop_on_error && result.status().is_error() {
                break;
            }
        }
        Ok(results)
    }

    /// One call, or a run call by call when somebody watches.
    fn run_one(&self, lp: LpId, call: &Seamcall) -> Result<SeamcallResult, Cut> {
        let watched =
            self.recording.load(Ordering::SeqCst) || self.any_rules.load(Ordering::SeqCst);
        if !watched {
            pause();
            let result = self.module.seamcall(lp, call);
            pause();
            self.count(call.leaf, result.completed);
            return Ok(result);
        }
        let mut single = Seamcall {
            repeat: None,
            ..call.clone()
        };
        let mut stepping = call.clone();
        let mut completed = 0;
        let mut result = SeamcallResult::default();
        for _ in 0..call.count() {
            (single.rcx, single.r8, single.r9) = (stepping.rcx, stepping.r8, stepping.r9);
            result = self.run_single(lp, &single)?;
            if result.rax != CompletionStatus::SUCCESS.0 {
                break;
            }
            completed += 1;
            stepping.step();
        }
        Ok(SeamcallResult {
            completed,
            ..result
        })
    }

    fn run_single(&self, lp: LpId, call: &Seamcall) -> Result<SeamcallResult, Cut> {
        self.act(call, When::Before);
        let effect = self.effect_on(call);
        let result = match effect {
            Some(Effect::LoseCall) => return Err(Cut::Unknown),
            Some(Effect::Answer(status)) => SeamcallResult {
                rax: status.0,
                ..SeamcallResult::default()
            },
            _ => {
                pause();
                self.module
                    .set_interrupt_pending(effect == Some(Effect::Interrupt), 0);
                let result = self.module.seamcall(lp, call);
                self.module.set_interrupt_pending(false, 0);
                pause();
                result
            }
        };
        self.count(
            call.leaf,
            u32::from(result.rax == CompletionStatus::SUCCESS.0),
        );
        if self.recording.load(Ordering::SeqCst) {
            let status = result.status();
            lock(&self.log).push(Call {
                leaf: call.leaf,
                rcx: call.rcx,
                status,
            });
        }
        self.act(call, When::Answered);
        match effect {
            Some(Effect::LoseAnswer) => Err(Cut::Unknown),
            _ => Ok(result),
        }
    }

    /// Does what is to be done at this call.
    fn act(&self, call: &Seamcall, when: When) {
        if !self.any_rules.load(Ordering::SeqCst) {
            return;
        }
        let mut due = Vec::new();
        {
            let mut hooks = lock(&self.hooks);
            let mut at = 0;
            while at < hooks.len() {
                let hook = &mut hooks[at];
                let meant = hook.leaf == call.leaf
                    && hook.when == when
                    && hook.rcx.is_none_or(|rcx| rcx == call.rcx);
                if meant && hook.skip == 0 {
                    due.push(hooks.remove(at).act);
                    continue;
                }
                hook.skip -= u32::from(meant);
                at += 1;
            }
        }
        // Nothing is locked: the call may wait here while others go on.
        due.into_iter().for_each(|act| act());
    }

    fn count(&self, leaf: Leaf, good: u32) {
        if let Some(count) = self.succeeded.get(usize::from(leaf.0)) {
            count.fetch_add(good.into(), Ordering::SeqCst);
        }
    }

    /// The rule that this call meets, used up by one.
    fn effect_on(&self, call: &Seamcall) -> Option<Effect> {
        if !self.any_rules.load(Ordering::SeqCst) {
            return None;
        }
        let mut rules = lock(&self.rules);
        for rule in rules
            .iter_mut()
            .filter(|rule| rule.effect != Effect::Refuse)
        {
            let meant = rule.leaf == call.leaf
                && rule.rcx.is_none_or(|rcx| rcx == call.rcx)
                && rule.times != 0;
            if !meant {
                continue;
            }
            if rule.skip > 0 {
                rule.skip -= 1;
                continue;
            }
            rule.times -= u32::from(rule.times != u32::MAX);
            return Some(rule.effect);
        }
        None
    }

    /// Whether a message is not to be sent.
    fn refused(&self, batch: &Batch) -> bool {
        let mut rules = lock(&self.rules);
        let rule = rules.iter_mut().find(|rule| {
            rule.effect == Effect::Refuse
                && rule.times != 0
                && batch.calls.iter().any(|call| call.leaf == rule.leaf)
        });
        match rule {
            Some(rule) if rule.skip > 0 => {
                rule.skip -= 1;
                false
            }
            Some(rule) => {
                rule.times -= 1;
                true
            }
            None => false,
        }
    }
}

impl SeamPort for Port {
    fn submit(&self, batch: Batch) -> Ticket {
        if self.any_rules.load(Ordering::SeqCst) && self.refused(&batch) {
            return Ticket::ready(Err(SeamError::NotSent {
                reason: "refused by the test".into(),
            }));
        }
        Ticket::ready(self.run_link(&batch))
    }

    fn chain(&self) -> Option<u64> {
        self.chaining
            .load(Ordering::SeqCst)
            .then(|| self.chains.fetch_add(1, Ordering::SeqCst))
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Under shuttle other threads get their turn around every call.
#[cfg(feature = "shuttle")]
fn pause() {
    shuttle::thread::yield_now();
}

#[cfg(not(feature = "shuttle"))]
fn pause() {}

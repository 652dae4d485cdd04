//! Decides what a batch meets. Pure: no clock, no runtime; chances come from the seeds of the rules.
//!
//! Invariants
//! - F1  The same rules and the same batches in the same order make the same decisions.
//! - F2  Rules do not see each other: each counts every run that its leaf and range match.

use std::time::Duration;

use tdx_defs::{CompletionStatus, Leaf, Seamcall};

use super::rule::{Action, MILLION, Rule, When, guest_range};

/// Rules that may be there at a time.
pub(crate) const MAX_RULES: usize = 64;
/// Longest wait of one batch, whatever many rules say.
const LONGEST_WAIT: Duration = Duration::from_millis(super::rule::MAX_DELAY_MS as u64);

/// A rule with its state.
#[derive(Debug)]
pub(crate) struct Armed {
    pub(crate) id: u64,
    pub(crate) rule: Rule,
    pub(crate) matched: u64,
    pub(crate) fired: u64,
    chances: fastrand::Rng,
}

/// How often each action was carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Totals {
    pub(crate) statuses: u64,
    pub(crate) delays: u64,
    pub(crate) lost_replies: u64,
    pub(crate) cuts: u64,
}

/// What one batch meets. The default is nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Verdict {
    /// Waits so long before anything else.
    pub(crate) delay: Option<Duration>,
    /// The process ends before the batch runs.
    pub(crate) abort_before: bool,
    /// The batch does not run, the stream ends.
    pub(crate) cut: bool,
    /// The first run that is not made and what is answered instead: call and run, both from 0.
    pub(crate) statuses: Vec<Instead>,
    /// The process ends when the batch has run.
    pub(crate) abort_after: bool,
    /// The batch runs, its answer is not sent.
    pub(crate) lose_reply: bool,
}

/// A run that is answered without being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Instead {
    /// Which call of the batch, from 0.
    pub(crate) call: usize,
    /// Which run of it, from 0.
    pub(crate) run: u32,
    pub(crate) status: CompletionStatus,
}

/// The rules that are there.
#[derive(Debug, Default)]
pub(crate) struct Engine {
    rules: Vec<Armed>,
    last_id: u64,
    totals: Totals,
}

impl Armed {
    /// Counts a run that may match. Whether the rule fires.
    fn meets(&mut self, leaf: Leaf, call: &Seamcall, run: u32) -> bool {
        if let Some(range) = &self.rule.gpa {
            let overlaps = guest_range(call, run)
                .is_some_and(|touched| touched.start < range.end && range.start < touched.end);
            if !overlaps {
                return false;
            }
        }
        if !self.rule.speaks_for(leaf) {
            return false;
        }
        self.matched += 1;
        let due = match self.rule.when {
            When::Nth(nth) => self.matched >= nth,
            // Drawn for each match, whether or not the rule may still fire: the sequence goes on.
            When::Chance(chance) => self.chances.u32(..MILLION) < chance,
        };
        let fires = due && self.fired < self.rule.times;
        self.fired += u64::from(fires);
        fires
    }
}

impl Engine {
    /// Adds a rule; answers its id, or `None` when there are [`MAX_RULES`].
    pub(crate) fn add(&mut self, rule: Rule) -> Option<u64> {
        if self.rules.len() >= MAX_RULES {
            return None;
        }
        self.last_id += 1;
        self.rules.push(Armed {
            id: self.last_id,
            matched: 0,
            fired: 0,
            chances: fastrand::Rng::with_seed(rule.seed),
            rule,
        });
        Some(self.last_id)
    }

    /// Takes rules away, all of them for an empty list; answers how many there were.
    pub(crate) fn clear(&mut self, ids: &[u64]) -> usize {
        let before = self.rules.len();
        self.rules
            .retain(|armed| !ids.is_empty() && !ids.contains(&armed.id));
        before - self.rules.len()
    }

    /// The rules, in the order in which they came.
    pub(crate) fn rules(&self) -> &[Armed] {
        &self.rules
    }

    /// What was carried out.
    pub(crate) fn totals(&self) -> Totals {
        self.totals
    }

    /// What a batch meets that is about to run.
    pub(crate) fn decide(&mut self, calls: &[Seamcall]) -> Verdict {
        let mut verdict = Verdict::default();
        for armed in &mut self.rules {
            for (at, call) in calls.iter().enumerate() {
                if armed.rule.leaf.is_some_and(|leaf| leaf != call.leaf) {
                    continue;
                }
                for run in 0..call.count() {
                    if !armed.meets(call.leaf, call, run) {
                        continue;
                    }
                    match armed.rule.action {
                        Action::Status(status) => {
                            let usual = CompletionStatus::transient(call.leaf).first().copied();
                            if let Some(status) = status.or(usual) {
                                verdict.answer(at, run, status);
                            }
                        }
                        Action::Delay(time) => {
                            let sum = verdict.delay.unwrap_or_default().saturating_add(time);
                            verdict.delay = Some(sum.min(LONGEST_WAIT));
                        }
                        Action::LoseReply => verdict.lose_reply = true,
                        Action::Cut => verdict.cut = true,
                        Action::Abort { after: false } => verdict.abort_before = true,
                        Action::Abort { after: true } => verdict.abort_after = true,
                    }
                    if let Action::Status(_) = armed.rule.action {
                        // The call ends with it: the runs behind it are not made.
                        break;
                    }
                }
            }
        }
        self.totals.count(&verdict);
        verdict
    }
}

impl Verdict {
    /// Of two answers for one call the earlier one counts: the call ends there.
    fn answer(&mut self, call: usize, run: u32, status: CompletionStatus) {
        let new = Instead { call, run, status };
        match self.statuses.iter_mut().find(|known| known.call == call) {
            Some(known) if known.run <= run => {}
            Some(known) => *known = new,
            None => self.statuses.push(new),
        }
    }

    /// What is answered instead of a run of this call.
    pub(crate) fn instead(&self, call: usize) -> Option<Instead> {
        self.statuses
            .iter()
            .find(|instead| instead.call == call)
            .copied()
    }
}

impl Totals {
    fn count(&mut self, verdict: &Verdict) {
        self.delays += u64::from(verdict.delay.is_some());
        if verdict.cut {
            // Nothing else happens to it.
            self.cuts += 1;
            return;
        }
        self.statuses += verdict.statuses.len() as u64;
        self.lost_replies += u64::from(verdict.lose_reply);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tdx_defs::Repeat;

    const BUSY: CompletionStatus = CompletionStatus::OPERAND_BUSY;

    fn rule(leaf: Option<Leaf>, when: When, action: Action) -> Rule {
        Rule {
            leaf,
            gpa: None,
            when,
            seed: 7,
            times: match when {
                When::Nth(_) => 1,
                When::Chance(_) => u64::MAX,
            },
            action,
        }
    }

    fn aug(gpa: u64, count: u32) -> Seamcall {
        Seamcall::new(Leaf::MEM_PAGE_AUG).rcx(gpa).repeated(Repeat {
            count,
            rcx_stride: 0x1000,
            r8_stride: 0x1000,
            r9_stride: 0,
        })
    }

    #[test]
    fn the_nth_run_is_met_inside_a_repeat_and_once() {
        let mut engine = Engine::default();
        let busy = Action::Status(None);
        engine
            .add(rule(Some(Leaf::MEM_PAGE_AUG), When::Nth(5), busy))
            .unwrap();
        let track = Seamcall::new(Leaf::MEM_TRACK);
        assert_eq!(
            engine.decide(&[track.clone(), aug(0, 3)]),
            Verdict::default()
        );
        let verdict = engine.decide(&[track, aug(0x3000, 8)]);
        let status = CompletionStatus::transient(Leaf::MEM_PAGE_AUG)[0];
        assert_eq!(
            verdict.instead(1),
            Some(Instead {
                call: 1,
                run: 1,
                status
            })
        );
        assert_eq!(verdict.instead(0), None);
        assert_eq!(engine.decide(&[aug(0, 100)]), Verdict::default());
        assert_eq!(engine.totals().statuses, 1);
    }

    #[test]
    fn a_range_is_matched_by_what_the_run_touches() {
        for (gpa, end, leaf, meets) in [
            (0x2000, 0x3000, Leaf::MEM_PAGE_AUG, true),
            (0x3000, 0x4000, Leaf::MEM_PAGE_AUG, false),
            (0, 0x2000, Leaf::MEM_PAGE_AUG, false),
            // No guest address.
            (0, u64::MAX, Leaf::MEM_TRACK, false),
        ] {
            let mut engine = Engine::default();
            engine.add(Rule {
                gpa: Some(gpa..end),
                ..rule(None, When::Nth(1), Action::Cut)
            });
            let call = Seamcall::new(leaf).rcx(0x2000);
            assert_eq!(engine.decide(&[call]).cut, meets, "{gpa:#x} {leaf}");
        }
        // A table of level 1 covers 2 MiB.
        let mut engine = Engine::default();
        engine.add(Rule {
            gpa: Some(0x1F_F000..0x20_0000),
            ..rule(None, When::Nth(1), Action::Cut)
        });
        assert!(
            engine
                .decide(&[Seamcall::new(Leaf::MEM_SEPT_ADD).rcx(1)])
                .cut
        );
    }

    #[test]
    fn chances_repeat_with_their_seed() {
        let decisions = |seed| {
            let mut engine = Engine::default();
            engine.add(Rule {
                seed,
                ..rule(None, When::Chance(MILLION / 4), Action::LoseReply)
            });
            (0..400)
                .map(|_| engine.decide(&[aug(0, 1)]).lose_reply)
                .collect::<Vec<_>>()
        };
        assert_eq!(decisions(1), decisions(1));
        assert_ne!(decisions(1), decisions(2));
        let fired = decisions(1).iter().filter(|fired| **fired).count();
        assert!((60..140).contains(&fired), "{fired} of 400 at a quarter");
    }

    #[test]
    fn the_earliest_answer_of_a_call_counts_and_delays_have_a_bound() {
        let mut engine = Engine::default();
        let leaf = Some(Leaf::MEM_PAGE_AUG);
        for nth in [7, 3, 5] {
            engine.add(rule(leaf, When::Nth(nth), Action::Status(Some(BUSY))));
            let long = Action::Delay(Duration::from_secs(9));
            engine.add(rule(leaf, When::Nth(1), long));
        }
        let verdict = engine.decide(&[aug(0, 9)]);
        assert_eq!(verdict.instead(0).unwrap().run, 2);
        assert_eq!(verdict.statuses.len(), 1);
        assert_eq!(verdict.delay, Some(LONGEST_WAIT));
    }

    #[test]
    fn rules_are_bounded_and_go_by_id() {
        let mut engine = Engine::default();
        let ids: Vec<_> =
            std::iter::from_fn(|| engine.add(rule(None, When::Nth(1), Action::Cut))).collect();
        assert_eq!(ids.len(), MAX_RULES);
        assert_eq!(engine.clear(&ids[..2]), 2);
        assert_eq!(engine.clear(&ids[..2]), 0);
        assert_eq!(engine.clear(&[]), MAX_RULES - 2);
        // An id is not used again.
        assert_eq!(
            engine.add(rule(None, When::Nth(1), Action::Cut)),
            Some(MAX_RULES as u64 + 1)
        );
    }

    #[test]
    fn a_leaf_that_meets_nobody_is_never_busy() {
        let mut engine = Engine::default();
        engine.add(rule(None, When::Chance(MILLION), Action::Status(None)));
        let verdict = engine.decide(&[Seamcall::new(Leaf::SYS_INFO), aug(0, 1)]);
        assert_eq!(verdict.instead(0), None);
        assert!(verdict.instead(1).is_some());
    }
}

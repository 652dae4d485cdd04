//! What a run ends with.

use std::time::Duration;

use serde_json::{Value, json};

use super::tally::Counts;
use super::{Growth, Plan};
use crate::error::Error;
use crate::output::{Answer, pairs};

/// The result of a run.
#[derive(Debug)]
pub struct Report {
    plan: Plan,
    rounds: u64,
    counts: Counts,
    leaked_pages: u64,
    memory: Growth,
    took: Duration,
}

impl Report {
    pub(super) fn new(
        plan: &Plan,
        rounds: u64,
        counts: Counts,
        leaked_pages: u64,
        memory: Growth,
        took: Duration,
    ) -> Self {
        Self {
            plan: *plan,
            rounds,
            counts,
            leaked_pages,
            memory,
            took,
        }
    }

    /// The command that plays the same rounds again.
    fn again(&self) -> String {
        let operations = self.rounds * (self.plan.vms * super::OPS_A_ROUND) as u64;
        format!(
            "mmuctl chaos run --seed {} --vms {} --operations {operations}",
            self.plan.seed, self.plan.vms
        )
    }

    /// Whether everything was as it has to be.
    fn verdict(&self) -> Option<Error> {
        let counts = &self.counts;
        let found: Vec<String> = [
            (counts.mismatches, "mismatches"),
            (self.leaked_pages, "pages or key ids leaked"),
            (counts.hung, "requests without an answer"),
            (counts.broken, "answers that nobody should get"),
        ]
        .into_iter()
        .filter(|(count, _)| *count > 0)
        .map(|(count, what)| format!("{count} {what}"))
        .chain(counts.failures.iter().cloned())
        .collect();
        (!found.is_empty()).then(|| Error::Chaos {
            found: found.join("; "),
            again: self.again(),
        })
    }

    fn json(&self) -> Value {
        let counts = &self.counts;
        json!({
            "seed": self.plan.seed,
            "vms": self.plan.vms,
            "rounds": self.rounds,
            "operations": counts.operations,
            "succeeded": counts.succeeded,
            "refused": counts.refused,
            "disconnected": counts.disconnected,
            "hung": counts.hung,
            "faults_injected": counts.faults_injected(),
            "kills": counts.module_kills + counts.mmu_kills,
            "kills_of": { "mmu": counts.mmu_kills, "module": counts.module_kills },
            "cuts": counts.cuts,
            "during": counts.during,
            "missed": counts.missed,
            "recoveries": counts.recoveries,
            "vms_lost": counts.vms_lost,
            "vms_bugged": counts.vms_bugged,
            "bugged": counts.bugged,
            "leaked_pages": self.leaked_pages,
            "audit": {
                "audits": counts.audits,
                "entries": counts.entries,
                "mismatches": counts.mismatches,
            },
            "failures": counts.failures,
            "memory_growth_bytes": { "mmu": self.memory.mmu, "module": self.memory.module },
            "rss_bytes": self.memory.last.map(|last| json!({ "mmu": last.mmu, "module": last.module })),
            "elapsed_s": self.took.as_secs_f64(),
            "again": self.again(),
        })
    }

    /// The answer of the command.
    pub fn answer(&self) -> Answer {
        let counts = &self.counts;
        let by = |map: Vec<String>| match &map[..] {
            [] => "none".to_owned(),
            some => some.join(", "),
        };
        let during = counts.during.iter().map(|(what, n)| format!("{what} {n}"));
        let refused = counts.refused.iter().map(|(what, n)| format!("{what} {n}"));
        let text = pairs([
            ("seed", self.plan.seed.to_string()),
            ("rounds", self.rounds.to_string()),
            ("operations", counts.operations.to_string()),
            ("refused", by(refused.collect())),
            ("disconnected", counts.disconnected.to_string()),
            ("hung", counts.hung.to_string()),
            ("faults injected", counts.faults_injected().to_string()),
            (
                "kills",
                format!(
                    "{} MMU service, {} module",
                    counts.mmu_kills, counts.module_kills
                ),
            ),
            ("connections cut", counts.cuts.to_string()),
            ("struck during", by(during.collect())),
            ("recoveries", counts.recoveries.to_string()),
            (
                "audit",
                format!(
                    "{} entries, {} mismatches",
                    counts.entries, counts.mismatches
                ),
            ),
            ("pages leaked", self.leaked_pages.to_string()),
            (
                "memory growth",
                format!(
                    "{} KiB MMU service, {} KiB module",
                    self.memory.mmu >> 10,
                    self.memory.module >> 10
                ),
            ),
            ("elapsed", format!("{:.1} s", self.took.as_secs_f64())),
            ("again", self.again()),
        ]);
        Answer {
            verdict: self.verdict(),
            ..Answer::new(self.json(), text)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chaos::Length;

    fn report(counts: Counts, leaked_pages: u64) -> Report {
        let plan = Plan {
            seed: 7,
            vms: 4,
            length: Length::Rounds(2),
        };
        let memory = Growth::default();
        Report::new(&plan, 2, counts, leaked_pages, memory, Duration::ZERO)
    }

    #[test]
    fn a_run_that_found_something_says_how_to_repeat_it() {
        let one = |change: fn(&mut Counts)| {
            let mut counts = Counts::default();
            change(&mut counts);
            counts
        };
        assert!(report(Counts::default(), 0).answer().verdict.is_none());
        for (counts, leaked, what) in [
            (one(|counts| counts.mismatches = 3), 0, "3 mismatches"),
            (
                one(|counts| counts.hung = 1),
                0,
                "1 requests without an answer",
            ),
            (one(|counts| counts.broken = 1), 0, "1 answers that nobody"),
            (Counts::default(), 5, "5 pages or key ids leaked"),
        ] {
            let error = report(counts, leaked).answer().verdict.unwrap();
            let text = error.to_string();
            assert!(text.contains(what), "{text}");
            assert!(
                text.contains("chaos run --seed 7 --vms 4 --operations 48"),
                "{text}"
            );
            assert_eq!(error.exit_code(), 1);
        }
    }
}

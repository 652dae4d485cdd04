//! What was the same, and where the model differs first.

use serde_json::{Value, json};

use crate::output::{Table, pairs};

/// Differences, and skipped steps, that a report lists.
const MAX_LISTED: usize = 50;
/// Characters of a step's title in a table.
const TITLE: usize = 48;

/// What came of a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// The same events in the same order.
    Same,
    /// The same events in another order.
    Reordered,
    /// Something else.
    Different(Difference),
    /// Not compared; why.
    Skipped(String),
}

/// The first thing that differs in a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// An event, a statistic, the errno or the answer.
    pub what: String,
    /// As recorded.
    pub expected: String,
    /// As the model has it.
    pub got: String,
}

impl Difference {
    /// A value that is another one.
    pub fn new(what: impl Into<String>, expected: impl ToString, got: impl ToString) -> Self {
        Self {
            what: what.into(),
            expected: expected.to_string(),
            got: got.to_string(),
        }
    }
}

#[derive(Debug, Clone)]
struct Place {
    file: String,
    step: u64,
    title: String,
}

/// What came of all steps so far.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Steps of all files.
    pub steps: u64,
    /// Steps with the same events in the same order.
    pub same: u64,
    /// Steps with the same events in another order.
    pub reordered: u64,
    /// Steps with something else.
    pub different: u64,
    /// Steps that were not compared.
    pub skipped: u64,
    differences: Vec<(Place, Difference)>,
    reasons: Vec<(Place, String)>,
}

impl Report {
    /// One more step.
    pub fn add(&mut self, file: &str, step: &super::Step, verdict: Verdict) {
        self.steps += 1;
        let place = || Place {
            file: file.to_owned(),
            step: step.number,
            title: step.title.clone(),
        };
        match verdict {
            Verdict::Same => self.same += 1,
            Verdict::Reordered => self.reordered += 1,
            Verdict::Different(difference) => {
                self.different += 1;
                if self.differences.len() < MAX_LISTED {
                    self.differences.push((place(), difference));
                }
            }
            Verdict::Skipped(reason) => {
                self.skipped += 1;
                if self.reasons.len() < MAX_LISTED {
                    self.reasons.push((place(), reason));
                }
            }
        }
    }

    /// As one object.
    pub fn to_json(&self) -> Value {
        let place =
            |place: &Place| json!({ "file": place.file, "step": place.step, "title": place.title });
        let differences = self.differences.iter().map(|(at, difference)| {
            let mut json = place(at);
            json["what"] = json!(difference.what);
            json["expected"] = json!(difference.expected);
            json["got"] = json!(difference.got);
            json
        });
        let reasons = self.reasons.iter().map(|(at, reason)| {
            let mut json = place(at);
            json["reason"] = json!(reason);
            json
        });
        json!({
            "steps": self.steps,
            "same": self.same,
            "reordered": self.reordered,
            "different": self.different,
            "skipped": self.skipped,
            "first_differences": differences.collect::<Vec<_>>(),
            "first_skipped": reasons.collect::<Vec<_>>(),
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let rows = [
            ("steps", self.steps),
            ("same", self.same),
            ("reordered", self.reordered),
            ("different", self.different),
            ("skipped", self.skipped),
        ];
        let mut text = pairs(rows.map(|(name, count)| (name, count.to_string())));
        let title = |place: &Place| place.title.chars().take(TITLE).collect::<String>();
        if !self.differences.is_empty() {
            let mut table = Table::new(&[
                "file",
                ">step",
                "what was done",
                "differs",
                "recorded",
                "model",
            ]);
            for (at, difference) in &self.differences {
                table.row([
                    at.file.clone(),
                    at.step.to_string(),
                    title(at),
                    difference.what.clone(),
                    difference.expected.clone(),
                    difference.got.clone(),
                ]);
            }
            text = format!("{text}\n{table}");
        }
        if !self.reasons.is_empty() {
            let mut table = Table::new(&["file", ">step", "what was done", "skipped because"]);
            for (at, reason) in &self.reasons {
                table.row([
                    at.file.clone(),
                    at.step.to_string(),
                    title(at),
                    reason.clone(),
                ]);
            }
            text = format!("{text}\n{table}");
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_counts_and_lists() {
        let mut report = Report::default();
        let step = super::super::Step {
            number: 7,
            title: "MADVISE DONTNEED".into(),
            ..Default::default()
        };
        report.add("a", &step, Verdict::Same);
        report.add("a", &step, Verdict::Reordered);
        report.add("a", &step, Verdict::Skipped("unknown".into()));
        for _ in 0..60 {
            let difference = Difference::new("errno", 0, 22);
            report.add("b", &step, Verdict::Different(difference));
        }
        let json = report.to_json();
        let sums =
            ["steps", "same", "reordered", "different", "skipped"].map(|key| json[key].as_u64());
        assert_eq!(sums, [63, 1, 1, 60, 1].map(Some));
        assert_eq!(json["first_differences"].as_array().unwrap().len(), 50);
        let first = json!({
            "file": "b", "step": 7, "title": "MADVISE DONTNEED",
            "what": "errno", "expected": "0", "got": "22",
        });
        assert_eq!(json["first_differences"][0], first);
        assert_eq!(json["first_skipped"][0]["reason"], "unknown");
        assert!(report.text().contains("MADVISE DONTNEED"));
    }
}

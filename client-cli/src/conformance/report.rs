//! What passed, and where the answers differ first.

use serde_json::{Value, json};

use crate::output::{Table, pairs};

/// Differences that a report lists.
const MAX_LISTED: usize = 50;

/// The first place where a sequence is answered in another way than recorded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The sequence.
    pub id: String,
    /// Number of the step; as many as there are steps when the state at the end differs.
    pub step: usize,
    /// Leaf, guest event or hook; `final` for the state at the end.
    pub leaf: String,
    /// Register, or what of the state.
    pub field: String,
    /// As recorded.
    pub expected: String,
    /// As answered.
    pub got: String,
}

/// What became of the sequences so far.
#[derive(Debug, Clone, Default)]
pub struct Report {
    /// Sequences played.
    pub sequences: u64,
    /// Steps played.
    pub steps: u64,
    /// Sequences that were answered as recorded.
    pub passed: u64,
    /// Sequences that were not.
    pub failed: u64,
    differences: Vec<Difference>,
}

impl Report {
    /// One more sequence, of which `steps` steps were played.
    pub fn add(&mut self, steps: usize, outcome: Result<(), Difference>) {
        self.sequences += 1;
        self.steps += steps as u64;
        match outcome {
            Ok(()) => self.passed += 1,
            Err(difference) => {
                self.failed += 1;
                if self.differences.len() < MAX_LISTED {
                    self.differences.push(difference);
                }
            }
        }
    }

    /// As one object.
    pub fn to_json(&self) -> Value {
        let first: Vec<Value> = self
            .differences
            .iter()
            .map(|difference| {
                json!({
                    "id": difference.id,
                    "step": difference.step,
                    "leaf": difference.leaf,
                    "field": difference.field,
                    "expected": difference.expected,
                    "got": difference.got,
                })
            })
            .collect();
        json!({
            "sequences": self.sequences,
            "steps": self.steps,
            "passed": self.passed,
            "failed": self.failed,
            "first_failures": first,
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let rows = [
            ("sequences", self.sequences),
            ("steps", self.steps),
            ("passed", self.passed),
            ("failed", self.failed),
        ];
        let sums = pairs(rows.map(|(name, count)| (name, count.to_string())));
        if self.differences.is_empty() {
            return sums;
        }
        let mut table = Table::new(&["sequence", ">step", "call", "field", "expected", "got"]);
        for difference in &self.differences {
            table.row([
                difference.id.clone(),
                difference.step.to_string(),
                difference.leaf.clone(),
                difference.field.clone(),
                difference.expected.clone(),
                difference.got.clone(),
            ]);
        }
        format!("{sums}\n{table}")
    }
}

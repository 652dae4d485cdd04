//! A figure beside its floor.

use std::time::Duration;

use serde_json::{Map, Value, json};

use crate::local::ProcessMemory;
use crate::output::Table;
use crate::tally::Tally;

/// One thing measured beside another.
#[derive(Debug, Clone)]
pub struct Figure {
    name: &'static str,
    floor: &'static str,
    ops: u64,
    ns_per_op: f64,
    floor_ns_per_op: f64,
    /// Messages to the module, where they are counted.
    rpcs: Option<u64>,
    more: Map<String, Value>,
    /// Said below the table.
    notes: Vec<String>,
}

/// Nanoseconds for each of `ops`.
#[expect(
    clippy::cast_precision_loss,
    reason = "times and counts are far below 2^52"
)]
pub(super) fn ns_per_op(time: Duration, ops: u64) -> f64 {
    time.as_nanos() as f64 / ops.max(1) as f64
}

/// The middle one; of an even number the mean of the two in the middle.
pub(super) fn median(samples: impl IntoIterator<Item = f64>) -> f64 {
    let mut samples: Vec<f64> = samples.into_iter().collect();
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    match samples.len() {
        0 => f64::NAN,
        odd if odd % 2 == 1 => samples[middle],
        _ => f64::midpoint(samples[middle - 1], samples[middle]),
    }
}

impl Figure {
    /// `name` beside `floor`, both in nanoseconds an operation, medians over `samples`.
    pub(super) fn new(
        (name, floor): (&'static str, &'static str),
        ops: u64,
        samples: &[(f64, f64)],
    ) -> Self {
        Self {
            name,
            floor,
            ops,
            ns_per_op: median(samples.iter().map(|sample| sample.0)),
            floor_ns_per_op: median(samples.iter().map(|sample| sample.1)),
            rpcs: None,
            more: Map::new(),
            notes: Vec::new(),
        }
    }

    /// What the operations cost in calls and messages.
    pub(super) fn counts(mut self, tally: &Tally) -> Self {
        self.rpcs = Some(tally.rpcs);
        for (name, value) in tally.to_json() {
            if name != "rpcs" {
                self.more.insert(name, value);
            }
        }
        self
    }

    /// Messages to the module.
    pub(super) fn messages(mut self, rpcs: u64) -> Self {
        self.rpcs = Some(rpcs);
        self
    }

    /// One more value.
    pub(super) fn with(mut self, name: &str, value: impl Into<Value>) -> Self {
        self.more.insert(name.to_owned(), value.into());
        self
    }

    /// A sentence below the table.
    pub(super) fn note(mut self, note: String) -> Self {
        self.notes.push(note);
        self
    }

    /// What is measured.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Operations, and nanoseconds each of figure and floor.
    #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
    pub(super) fn point(&self) -> (f64, [f64; 2]) {
        (self.ops as f64, [self.ns_per_op, self.floor_ns_per_op])
    }

    /// The figure in units of its floor.
    pub fn ratio(&self) -> f64 {
        self.ns_per_op / self.floor_ns_per_op
    }

    /// As an object.
    pub fn to_json(&self, memory: Option<ProcessMemory>) -> Value {
        let mut json = json!({
            "name": self.name,
            "floor": self.floor,
            "ops": self.ops,
            "ns_per_op": self.ns_per_op,
            "floor_ns_per_op": self.floor_ns_per_op,
            "ratio": self.ratio(),
            "rpcs": self.rpcs,
            "rss_bytes": {
                "mmu": memory.map(|memory| memory.mmu),
                "module": memory.map(|memory| memory.module),
            },
        });
        if let Value::Object(members) = &mut json {
            members.extend(self.more.clone());
        }
        json
    }

    /// Figures as a table for people.
    pub fn table(figures: &[Self]) -> String {
        let mut table = Table::new(&[
            "measured",
            ">ops",
            ">ns each",
            "beside",
            ">ns each",
            ">ratio",
            ">messages",
        ]);
        for figure in figures {
            table.row([
                figure.name.to_owned(),
                figure.ops.to_string(),
                format!("{:.1}", figure.ns_per_op),
                figure.floor.to_owned(),
                format!("{:.1}", figure.floor_ns_per_op),
                format!("{:.2}", figure.ratio()),
                figure
                    .rpcs
                    .map_or_else(String::new, |rpcs| rpcs.to_string()),
            ]);
        }
        let mut text = table.to_string();
        for note in figures.iter().flat_map(|figure| &figure.notes) {
            text.push('\n');
            text.push_str(note);
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_ignores_what_is_far_out() {
        assert_eq!(median([3.0, 1.0, 900.0]), 3.0);
        assert_eq!(median([1.0, 2.0, 4.0, 900.0]), 3.0);
        assert!(median([]).is_nan());
    }

    #[test]
    fn a_figure_is_told_in_units_of_its_floor() {
        let samples = [(30.0, 10.0), (20.0, 10.0), (40.0, 20.0)];
        let figure = Figure::new(("a", "b"), 7, &samples).with("more", 1);
        let json = figure.to_json(None);
        assert_eq!(
            (&json["ns_per_op"], &json["ratio"]),
            (&30.0.into(), &3.0.into())
        );
        assert_eq!((&json["ops"], &json["more"]), (&7.into(), &1.into()));
        assert!(Figure::table(&[figure]).contains("3.00"));
    }
}

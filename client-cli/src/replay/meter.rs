//! How a replay went, over time: rates and latencies in bounded memory.
//!
//! Units: nanoseconds. A bin of the timeline grows when the run does, a latency falls into one of a
//! fixed number of classes, so a replay of any length takes the same few kilobytes.

use std::time::Duration;

/// Bins of a timeline.
const BINS: usize = 240;
/// Width of a bin at first.
const FIRST_WIDTH_NS: u64 = 1_000_000;
/// Latency classes in each power of two.
const CLASSES: usize = 16;
/// Powers of two: up to about a quarter of an hour.
const POWERS: usize = 40;

/// What happened while one bin lasted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bin {
    /// Faults that were answered.
    pub faults: u64,
    /// Messages to the module for them.
    pub messages: u64,
}

/// Counts over time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Timeline {
    width_ns: u64,
    bins: Vec<Bin>,
}

impl Default for Timeline {
    fn default() -> Self {
        Self {
            width_ns: FIRST_WIDTH_NS,
            bins: Vec::new(),
        }
    }
}

impl Timeline {
    /// Adds what happened at a time.
    pub fn add(&mut self, at_ns: u64, what: Bin) {
        while at_ns / self.width_ns >= BINS as u64 {
            self.widen();
        }
        let at = usize::try_from(at_ns / self.width_ns).unwrap_or(BINS - 1);
        if self.bins.len() <= at {
            self.bins.resize(at + 1, Bin::default());
        }
        self.bins[at].faults += what.faults;
        self.bins[at].messages += what.messages;
    }

    /// Width of a bin.
    pub fn width_ns(&self) -> u64 {
        self.width_ns
    }

    /// From the start on.
    pub fn bins(&self) -> &[Bin] {
        &self.bins
    }

    fn widen(&mut self) {
        self.width_ns *= 2;
        self.bins = self
            .bins
            .chunks(2)
            .map(|pair| Bin {
                faults: pair.iter().map(|bin| bin.faults).sum(),
                messages: pair.iter().map(|bin| bin.messages).sum(),
            })
            .collect();
    }
}

/// How many things took how long, exact to a sixteenth.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Latencies {
    classes: Vec<u64>,
    longest_ns: u64,
}

impl Default for Latencies {
    fn default() -> Self {
        Self {
            classes: vec![0; CLASSES * POWERS],
            longest_ns: 0,
        }
    }
}

impl Latencies {
    /// Counts one.
    pub fn add(&mut self, took: Duration) {
        let ns = u64::try_from(took.as_nanos()).unwrap_or(u64::MAX);
        self.longest_ns = self.longest_ns.max(ns);
        self.classes[class_of(ns)] += 1;
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.classes.iter().sum()
    }

    /// The longest one.
    pub fn longest_ns(&self) -> u64 {
        self.longest_ns
    }

    /// The upper end of the class below which this share of all lies; 0 without any.
    pub fn quantile_ns(&self, share: f64) -> u64 {
        let wanted = (self.count() as f64 * share).ceil();
        let mut seen = 0;
        for (class, &count) in self.classes.iter().enumerate() {
            seen += count;
            if count > 0 && seen as f64 >= wanted {
                return end_of(class).min(self.longest_ns);
            }
        }
        0
    }

    /// Classes that are not empty, and the empty ones between them: first, end, count.
    pub fn classes(&self) -> Vec<(u64, u64, u64)> {
        let used = |count: &u64| *count > 0;
        let (Some(first), Some(last)) = (
            self.classes.iter().position(used),
            self.classes.iter().rposition(used),
        ) else {
            return Vec::new();
        };
        (first..=last)
            .map(|class| {
                let start = if class == 0 { 0 } else { end_of(class - 1) };
                (start, end_of(class), self.classes[class])
            })
            .collect()
    }
}

/// Each power of two is cut into equal classes.
fn class_of(ns: u64) -> usize {
    let power = ns.max(1).ilog2();
    let within = ((u128::from(ns.max(1)) - (1 << power)) * CLASSES as u128) >> power;
    let class = power as usize * CLASSES + usize::try_from(within).unwrap_or(0);
    class.min(CLASSES * POWERS - 1)
}

/// The first value above a class.
fn end_of(class: usize) -> u64 {
    let (power, within) = (class / CLASSES, class % CLASSES);
    let start = 1u64 << power;
    // Small powers have more classes than values.
    start + (start * (within as u64 + 1)).div_ceil(CLASSES as u64)
}

/// What a replay measures while it runs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meter {
    /// When faults were answered.
    pub timeline: Timeline,
    /// From the sending of a message of faults to its answer, waiting in line included.
    pub messages: Latencies,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_timeline_keeps_its_sums_however_long_the_run() {
        let mut timeline = Timeline::default();
        let one = Bin {
            faults: 3,
            messages: 1,
        };
        for at_ns in [
            0,
            1,
            999_999,
            1_000_000,
            239_999_999,
            240_000_000,
            86_400_000_000_000,
        ] {
            timeline.add(at_ns, one);
            assert!(timeline.bins().len() <= BINS);
        }
        let faults: u64 = timeline.bins().iter().map(|bin| bin.faults).sum();
        assert_eq!(faults, 21);
        assert_eq!(timeline.bins()[0].faults, 18);
        assert!(timeline.width_ns() * BINS as u64 > 86_400_000_000_000);
    }

    #[test]
    fn a_latency_lies_in_its_class_and_classes_are_narrow() {
        for ns in [0, 1, 2, 3, 7, 100, 1_000, 35_000, 1_048_576, 999_999_999] {
            let mut latencies = Latencies::default();
            latencies.add(Duration::from_nanos(ns));
            let [(start, end, 1)] = latencies.classes()[..] else {
                panic!("{ns}");
            };
            assert!(start <= ns && ns < end, "{ns} in {start}..{end}");
            assert!(ns < 32 || end - start <= start / 16 + 1, "{start}..{end}");
            assert_eq!(latencies.longest_ns(), ns);
            assert_eq!(latencies.quantile_ns(0.5), ns.min(end));
        }
    }

    #[test]
    fn quantiles_split_the_count() {
        let mut latencies = Latencies::default();
        assert_eq!(latencies.quantile_ns(0.5), 0);
        for us in 1..=100 {
            latencies.add(Duration::from_micros(us));
        }
        assert_eq!(latencies.count(), 100);
        for (share, us) in [(0.5, 50), (0.9, 90), (0.99, 99), (1.0, 100)] {
            let found = latencies.quantile_ns(share) / 1000;
            assert!((us..=us + us / 16 + 1).contains(&found), "{share}: {found}");
        }
        latencies.add(Duration::from_secs(100_000));
        assert_eq!(latencies.quantile_ns(1.0).min(1), 1);
    }
}

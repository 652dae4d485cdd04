//! The zero-step defence: a host that lets the guest fault again and again without a step forward
//! is kept from doing so.
//!
//! Source: TDX module source, td_exit_stepping.c, `td_exit_epf_stepping_log` and
//! `td_entry_stepping_filter`.
//!
//! Model: there is no instruction pointer. Every event of the guest counts as a step forward,
//! except one that says that it happened at the same place, and an access that is made again.

use tdx_defs::Gpa;

/// EPT violations at one place that raise no suspicion.
const THRESHOLD: u8 = 6;
/// Addresses that are remembered.
const REMEMBERED: usize = 32;

/// What a vCPU remembers of its EPT violations.
#[derive(Debug, Default)]
pub(super) struct ZeroStep {
    violations: u8,
    suspects: Vec<Gpa>,
}

impl ZeroStep {
    /// The guest made a step.
    pub(super) fn step_forward(&mut self) {
        self.violations = 0;
        self.suspects.clear();
    }

    /// A TD exit for an EPT violation of a private address.
    pub(super) fn violation(&mut self, gpa: Gpa) {
        if self.violations < THRESHOLD {
            self.violations += 1;
        } else if self.suspects.len() < REMEMBERED && !self.suspects.contains(&gpa) {
            self.suspects.push(gpa);
        }
    }

    /// Addresses that have to be usable before the next entry.
    pub(super) fn suspects(&self) -> &[Gpa] {
        &self.suspects
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seventh_violation_at_one_place_is_remembered_once() {
        let mut defence = ZeroStep::default();
        for count in 1..=9 {
            defence.violation(Gpa::new(0x2000));
            assert_eq!(defence.suspects().len(), usize::from(count > 6), "{count}");
        }
        for page in 0..100 {
            defence.violation(Gpa::new(page * 0x1000));
        }
        assert_eq!(defence.suspects().len(), REMEMBERED);
        defence.step_forward();
        assert!(defence.suspects().is_empty());
    }
}

//! EPT violations: what the guest or the host gets to see of them.
//!
//! Source: TDX module source, td_ept_violation.c, and the exit qualification formats of td_exit.c.

use tdx_defs::{Gpa, Gpr, Gprs};

use super::cpu::{Cpu, Event, Leave, Leaving};
use super::step::Vector;
use super::vcpu_state::LastExit;
use crate::sept::{SeptEntry, Walk};

/// Exit reason of an EPT violation.
pub(crate) const EPT_VIOLATION: u32 = 48;

/// Raw exit qualification: a linear address is known, and the access was to its translation.
pub(super) const GLA_VALID: u64 = 0b11 << 7;
/// Bits of the exit qualification that the host does not see.
const HIDDEN: u64 = 0x1F80 | 0xFFFF_FFFF << 32;
/// An access that writes.
const WRITE: u64 = 1 << 1;
/// Where the rights of the entry stand in an exit qualification.
const RIGHTS_SHIFT: u32 = 3;

/// Type of an extended exit qualification.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Extended {
    None = 0,
    Accept = 1,
    AttributesWrite = 5,
    PendingPage = 6,
}

impl Cpu<'_> {
    /// An EPT violation with its raw exit qualification.
    pub(super) fn ept_violation(&self, gpa: Gpa, qualification: u64) -> Event {
        let config = &self.inside.config;
        if self.inside.is_too_wide(gpa) && qualification & GLA_VALID == GLA_VALID {
            return Ok(Self::inject(Vector::PF));
        }
        if config.is_shared(gpa) {
            return Err(violation_exit(gpa, qualification, Extended::None, 0));
        }
        let walk = self.inside.td.sept().walk(config.root_level, gpa, 0);
        let acceptable = walk.is_some_and(|walk| walk.value.state().is_acceptable());
        if acceptable && !config.pending_ve_disable() {
            return Ok(self.inject_ve(EPT_VIOLATION, qualification, gpa));
        }
        self.inside.vcpu.guest().zero_step.violation(gpa);
        let extended = if acceptable {
            Extended::PendingPage
        } else {
            Extended::None
        };
        Err(violation_exit(gpa, qualification, extended, 0))
    }

    /// The exit of a guest call that found an entry that it cannot use at `walk`.
    pub(super) fn details_exit(
        gpa: Gpa,
        requested: u8,
        walk: &Walk<'_>,
        entry: SeptEntry,
        extended: Extended,
    ) -> Leave {
        let state = entry.state();
        let information = u64::from(requested)
            | u64::from(walk.slot.level) << 3
            | u64::from(state.public().0) << 6
            | u64::from(state.is_leaf()) << 14;
        let rights = entry.0 & 0b111;
        violation_exit(gpa, WRITE | rights << RIGHTS_SHIFT, extended, information)
    }

    /// The exit of a guest call that cannot use an entry and says no more.
    pub(super) fn plain_exit(gpa: Gpa, qualification: u64) -> Leave {
        violation_exit(gpa, qualification, Extended::None, 0)
    }
}

fn violation_exit(gpa: Gpa, qualification: u64, extended: Extended, information: u64) -> Leave {
    let regs = Gprs::default()
        .with(Gpr::Rax, EPT_VIOLATION.into())
        .with(Gpr::Rcx, qualification & !HIDDEN)
        .with(Gpr::Rdx, extended as u64 | information << 32)
        .with(Gpr::R8, gpa.frame().base().get());
    Leaving::with(regs, LastExit::AsyncFault)
}

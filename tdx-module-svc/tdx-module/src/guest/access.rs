//! Memory accesses of the guest: through the TLB, or by a walk that fills it.
//!
//! Source: the processor's use of the Secure EPT; TDX module source, td_ept_violation.c for what
//! follows a failed walk.
//!
//! A cached translation is used without a walk, as in hardware, also while its page is blocked.
//! Beside that, the model looks whether the page is still mapped there: if not, a TLB flush is
//! missing, and the access is reported instead of served.

use tdx_defs::{Gpa, Hpa, PAGE_SIZE};

use super::cpu::{Cpu, Event, Leave};
use super::ops::AccessKind;
use super::step::{GuestError, GuestStep, Resumed, Violation};
use super::tlb::Translation;
use super::violation::GLA_VALID;
use crate::memory::Integrity;
use crate::pamt::PageSize;
use crate::sept::SeptState;

/// Bytes that one access carries at most.
pub const MAX_ACCESS: usize = 4096;

/// A translated address, or what happened instead.
pub(super) enum Translated {
    To(Hpa, PageSize),
    Instead(GuestStep),
}

impl Cpu<'_> {
    pub(super) fn read(&mut self, gpa: Gpa, len: usize) -> Event {
        if let Some(impossible) = check_access(gpa, len) {
            return Ok(impossible);
        }
        let mut data = vec![0; len];
        match self.translate(gpa, AccessKind::Read)? {
            Translated::Instead(step) => return Ok(step),
            Translated::To(hpa, _) => self.load(gpa, hpa, &mut data)?,
        }
        self.step_forward();
        Ok(GuestStep::Resumed(Resumed {
            data,
            ..Resumed::default()
        }))
    }

    pub(super) fn write(&mut self, gpa: Gpa, data: &[u8]) -> Event {
        if let Some(impossible) = check_access(gpa, data.len()) {
            return Ok(impossible);
        }
        match self.translate(gpa, AccessKind::Write)? {
            Translated::Instead(step) => return Ok(step),
            Translated::To(hpa, size) => self.store(gpa, hpa, size, data)?,
        }
        self.step_forward();
        Ok(GuestStep::Resumed(Resumed::default()))
    }

    pub(super) fn execute(&mut self, gpa: Gpa) -> Event {
        match self.translate(gpa, AccessKind::Execute)? {
            Translated::Instead(step) => return Ok(step),
            Translated::To(hpa, _) => self.load(gpa, hpa, &mut [0])?,
        }
        self.step_forward();
        Ok(GuestStep::Resumed(Resumed::default()))
    }

    /// Reads private memory.
    pub(super) fn load(&self, gpa: Gpa, hpa: Hpa, data: &mut [u8]) -> Result<(), Leave> {
        match self.module.private.read(hpa, data) {
            Integrity::Good => Ok(()),
            Integrity::Poisoned => Err(self.poisoned(gpa, hpa)),
        }
    }

    /// Writes private memory. The line that is written is read first.
    fn store(&self, gpa: Gpa, hpa: Hpa, size: PageSize, data: &[u8]) -> Result<(), Leave> {
        let module = self.module;
        if let Some(entry) = module.pamt.entry(hpa, size) {
            entry.set_content(true);
        }
        match module.private.write(hpa, data) {
            Integrity::Good => Ok(()),
            Integrity::Poisoned => Err(self.poisoned(gpa, hpa)),
        }
    }

    fn poisoned(&self, gpa: Gpa, hpa: Hpa) -> Leave {
        let page = hpa.frame().base();
        self.machine_check(Violation::MachineCheck { gpa, page })
    }

    /// Translates an address, shared or private.
    pub(super) fn translate(&mut self, gpa: Gpa, kind: AccessKind) -> Result<Translated, Leave> {
        let tdr = self.inside.td.tdr();
        if !self.inside.is_private(gpa) {
            return self.fault(gpa, kind, 0).map(Translated::Instead);
        }
        if let Some(cached) = self.tlb.find(tdr, gpa) {
            return Ok(match self.check_still_mapped(gpa, cached) {
                Ok(()) => translated(gpa, cached),
                Err(violation) => {
                    self.module.violations.count(violation);
                    Translated::Instead(GuestStep::Violated(violation))
                }
            });
        }
        let root_level = self.inside.config.root_level;
        let walk = self.inside.td.sept().walk(root_level, gpa, 0);
        match walk {
            Some(walk) if walk.value.has_rights() && walk.value.is_leaf() => {
                let (page, level) = (walk.value.page(), walk.slot.level);
                Ok(translated(gpa, self.tlb.fill(tdr, gpa, page, level)))
            }
            walk => {
                let rights = walk.map_or(0, |walk| walk.value.0 & 0b111);
                self.fault(gpa, kind, rights).map(Translated::Instead)
            }
        }
    }

    /// A failed walk: an EPT violation with the qualification that the processor reports.
    fn fault(&self, gpa: Gpa, kind: AccessKind, rights: u64) -> Event {
        let mut state = self.inside.vcpu.guest();
        // The same access again is the same instruction.
        if state.faulted != Some((kind, gpa)) {
            state.zero_step.step_forward();
            state.faulted = Some((kind, gpa));
        }
        drop(state);
        self.ept_violation(gpa, access_bit(kind) | rights << 3 | GLA_VALID)
    }

    /// Whether the page of a cached translation is still mapped at its address. Blocking does not
    /// matter: the page stays the TD's until the processor has been flushed.
    fn check_still_mapped(&self, gpa: Gpa, cached: Translation) -> Result<(), Violation> {
        let td = &self.inside.td;
        let found =
            td.sept()
                .walk_through_blocked(self.inside.config.root_level, gpa, cached.level);
        let usable = [SeptState::MAPPED, SeptState::BLOCKED];
        let same = found.is_some_and(|walk| {
            walk.slot.level == cached.level
                && walk.value.page() == cached.page
                && usable.contains(&walk.value.state())
        });
        if same {
            Ok(())
        } else {
            let page = cached.page;
            Err(Violation::StaleTranslation { gpa, page })
        }
    }
}

fn access_bit(kind: AccessKind) -> u64 {
    match kind {
        AccessKind::Read => 1,
        AccessKind::Write => 1 << 1,
        AccessKind::Execute => 1 << 2,
    }
}

fn translated(gpa: Gpa, translation: Translation) -> Translated {
    // Leaves have the three levels of page sizes.
    let size = PageSize::of_level(translation.level).unwrap_or(PageSize::Small);
    let offset = gpa.get() & (size.bytes() - 1);
    Translated::To(Hpa::new(translation.page.get() | offset), size)
}

/// What is wrong with the extent of an access.
fn check_access(gpa: Gpa, len: usize) -> Option<GuestStep> {
    let offset = gpa.get() & (PAGE_SIZE - 1);
    let fits = len > 0 && len <= MAX_ACCESS && offset + len as u64 <= PAGE_SIZE;
    (!fits).then_some(GuestStep::Impossible(GuestError::AccessAcrossPages {
        gpa,
        len,
    }))
}

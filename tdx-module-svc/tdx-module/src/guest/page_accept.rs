//! TDG.MEM.PAGE.ACCEPT: the guest takes a page that its host gave it, and it is zeroed.
//!
//! Source: TDX module source, tdg_mem_page_accept.c. RCX level 0 or 1 and GPA.
//!
//! Model: a refusal for host priority never becomes the exit TDX_HOST_PRIORITY_BUSY_TIMEOUT: there
//! is no clock here.

use tdx_defs::{CompletionStatus as Status, Hpa, OperandId};

use super::cpu::{Cpu, Leave};
use super::violation::Extended;
use crate::checks::SeptOperand;
use crate::conditions::HOST_VECTOR;
use crate::pamt::PageSize;
use crate::sept::{SeptEntry, SeptState};

impl Cpu<'_> {
    pub(super) fn page_accept(&mut self, rcx: u64) -> Result<Result<(), Status>, Leave> {
        let invalid = Status::OPERAND_INVALID.with(OperandId::RCX);
        let Ok(operand) = SeptOperand::decode(rcx, 0, 1) else {
            return Ok(Err(invalid));
        };
        let (gpa, config) = (operand.gpa, &self.inside.config);
        if !self.inside.is_private(gpa) {
            return Ok(Err(invalid));
        }
        let sept = self.inside.td.sept();
        let Some(walk) = sept.walk(config.root_level, gpa, operand.level) else {
            return Ok(Err(Status::TD_FATAL));
        };
        let level = walk.slot.level;
        let accepted = Status::PAGE_ALREADY_ACCEPTED.with_details(level.into());
        let exit = |entry| Self::details_exit(gpa, operand.level, &walk, entry, Extended::Accept);
        if level != operand.level {
            if walk.value.state().is_accessible() {
                return Ok(Err(accepted));
            }
            return Err(exit(walk.value));
        }
        let Some(held) = walk.slot.try_lock_for_guest() else {
            return Ok(Err(Status::OPERAND_BUSY.with(OperandId::RCX)));
        };
        let entry = held.value();
        let state = entry.state();
        if state != SeptState::FREE && !entry.is_leaf() {
            return Ok(Err(Status::PAGE_SIZE_MISMATCH.with_details(level.into())));
        }
        if state.is_accessible() {
            return Ok(Err(accepted));
        }
        if !state.is_acceptable() {
            return Err(exit(entry));
        }
        match self.zero(entry, level) {
            Zeroed::Whole(page) => {
                held.commit(self.module.format.entry(SeptState::MAPPED, page));
                Ok(Ok(()))
            }
            // The guest makes the call again after the interrupt.
            Zeroed::Part(entry) => {
                held.commit(entry);
                Err(Self::interrupt(HOST_VECTOR))
            }
        }
    }

    /// Zeroes a pending page in steps of 4 KiB, from the accept counter of its entry on, until an
    /// interrupt is pending.
    fn zero(&self, entry: SeptEntry, level: u8) -> Zeroed {
        let page = entry.page_at(level);
        let size = PageSize::of_level(level).unwrap_or(PageSize::Small);
        let metadata = self.module.pamt.entry(page, size);
        let stored = metadata.is_some_and(|metadata| metadata.has_content());
        let first = if level == 0 {
            0
        } else {
            entry.accept_counter()
        };
        for (check, number) in (0..).zip(first..size.pages()) {
            if stored {
                self.module.private.take(page.frame().offset(number));
            }
            let is_last = number + 1 == size.pages();
            if !is_last && self.module.conditions.interrupt_pending(check) {
                return Zeroed::Part(entry.with_accept_counter(number + 1));
            }
        }
        if let Some(metadata) = metadata {
            metadata.set_content(false);
        }
        Zeroed::Whole(page)
    }
}

/// How far zeroing a page came.
enum Zeroed {
    Whole(Hpa),
    /// The entry with its accept counter.
    Part(SeptEntry),
}

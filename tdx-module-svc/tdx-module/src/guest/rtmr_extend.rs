//! TDG.MR.RTMR.EXTEND: extends one of the four run-time measurements.
//!
//! Source: TDX module source, tdg_mr_rtmr_extend.c. RCX address of 48 bytes, RDX index.

use tdx_defs::{CompletionStatus as Status, Gpa, Gpr, Gprs, OperandId};

use super::access::Translated;
use super::cpu::{Access, Cpu, Leave};
use super::ops::AccessKind;
use crate::locks::{LockMode, Side};
use crate::measure::{DIGEST_SIZE, RTMRS};

/// Alignment of the data in bytes.
const ALIGNMENT: u64 = 64;

impl Cpu<'_> {
    pub(super) fn rtmr_extend(&mut self, regs: &Gprs) -> Result<Access, Leave> {
        let refused = |status| Ok(Access::Done(Err(status)));
        let gpa = Gpa::new(regs[Gpr::Rcx]);
        let private = self.inside.is_private(gpa);
        if !gpa.is_aligned(ALIGNMENT) || !private {
            return refused(Status::OPERAND_INVALID.with(OperandId::RCX));
        }
        let mut data = [0; DIGEST_SIZE];
        match self.translate(gpa, AccessKind::Read)? {
            Translated::Instead(step) => return Ok(Access::Instead(step)),
            Translated::To(hpa, _) => self.load(gpa, hpa, &mut data)?,
        }
        let index = usize::try_from(regs[Gpr::Rdx]).ok();
        let Some(index) = index.filter(|index| *index < RTMRS) else {
            return refused(Status::OPERAND_INVALID.with(OperandId::RDX));
        };
        let rtmrs = self.inside.td.rtmrs();
        if rtmrs
            .lock
            .acquire(LockMode::Exclusive, Side::Guest)
            .is_err()
        {
            return refused(Status::OPERAND_BUSY.with(OperandId::RTMR));
        }
        rtmrs.extend(index, &data);
        rtmrs.lock.release(LockMode::Exclusive);
        Ok(Access::Done(Ok(())))
    }
}

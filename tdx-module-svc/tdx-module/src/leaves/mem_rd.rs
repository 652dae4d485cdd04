//! TDH.MEM.RD: reads 8 bytes of a debuggable TD's private memory.
//!
//! Source: TDX module source, tdh_mem_rd_wr.c. RCX GPA, RDX TDR; outputs R8 the bytes, entry
//! details in RCX and RDX on a Secure EPT error.

use tdx_defs::{CompletionStatus as Status, Gpa, Hpa, Leaf, OperandId, TdAttributes};

use super::mr_extend::address_in;
use crate::checks::{OpStateLock, Running, check_integrity, invalid, with_details};
use crate::dispatch::{Cx, Fail, Outcome, Regs};
use crate::locks::{LockGuard, LockMode};
use crate::sept::EntryLock;
use crate::td::Td;

/// What is read or written at once, and its alignment.
const WORD: usize = size_of::<u64>();

pub(crate) fn mem_rd(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let (gpa, rdx) = (
        Gpa::new(std::mem::take(&mut regs.rcx)),
        std::mem::take(&mut regs.rdx),
    );
    regs.r8 = 0;
    let td = cx.lock_tdr(rdx, OperandId::RDX, LockMode::Shared)?;
    let running = td.check_state(cx, Leaf::MEM_RD, OpStateLock::Shared)?;
    let target = DebugTarget::find(&running, Leaf::MEM_RD, gpa)?;
    regs.r8 = target.read(cx)?;
    Ok(())
}

/// A word of private memory that the host may access, with the locks that keep it in place.
pub(super) struct DebugTarget<'t> {
    pub(super) hpa: Hpa,
    pub(super) entry: EntryLock<'t>,
    pub(super) td: &'t Td,
    _tree: LockGuard<'t>,
}

impl<'t> DebugTarget<'t> {
    pub(super) fn find(running: &Running<'t>, leaf: Leaf, gpa: Gpa) -> Result<Self, Fail> {
        let attributes = running.config.attributes;
        if !attributes.contains(TdAttributes::DEBUG) {
            return Err(Status::TD_NON_DEBUG.into());
        }
        if leaf == Leaf::MEM_WR && attributes.contains(TdAttributes::MIGRATABLE) {
            return Err(Status::DEBUG_MEM_NOT_WRITABLE.into());
        }
        if !gpa.is_aligned(WORD as u64) {
            return Err(invalid(OperandId::RCX));
        }
        let tree = running.lock_tree(LockMode::Shared)?;
        running.check_gpa(gpa)?;
        let found = running.walk_towards(gpa, 0)?;
        let level = found.slot.level;
        if !found.value.has_rights() || !found.value.is_leaf() {
            let status = Status::EPT_ENTRY_NOT_PRESENT.with(OperandId::RCX);
            return Err(with_details(status, found.value, level));
        }
        let entry = running.lock_entry(found)?;
        if !entry.value().state().allows(leaf) {
            let status = Status::EPT_ENTRY_STATE_INCORRECT.with(OperandId::RCX);
            return Err(with_details(status, entry.value(), level));
        }
        let hpa = address_in(entry.value().page(), gpa, level);
        Ok(Self {
            hpa,
            entry,
            td: running.td,
            _tree: tree,
        })
    }

    pub(super) fn read(&self, cx: &Cx<'_>) -> Result<u64, Fail> {
        let mut word = [0; WORD];
        check_integrity(self.td, cx.module.private.read(self.hpa, &mut word))?;
        Ok(u64::from_le_bytes(word))
    }
}

//! The trees of L2 VMs: tables beside those of the TD's own tree.
//!
//! Source: TDX module source, helpers.c `l2_sept_walk`, sept_manager.c
//! `set_arch_l2_septe_details_in_vmm_regs`.
//!
//! An entry of the TD's own tree that links a table says by alias flags which L2 VMs have a table
//! there, too. The lock of that entry guards the entries of the L2 trees at the same place.
//!
//! Model: pages are never mapped for an L2 VM, as only a guest with L2 VMs does that. Entries are
//! kept in the encoding of the TD's own tree and shown in that of L2 trees.

use tdx_defs::{CompletionStatus as Status, OperandId};

use super::{Running, SeptOperand, busy, inconsistent};
use crate::Module;
use crate::dispatch::{Fail, Regs};
use crate::locks::LockMode;
use crate::pamt::{EntryGuard, PageSize};
use crate::sept::{SeptEntry, SeptState, Walk};

/// L2 VMs that a TD may have.
pub(crate) const L2_VMS: std::ops::RangeInclusive<u8> = 1..=3;
/// Public states of L2 entries.
const L2_FREE: u64 = 64;
const L2_NL_BLOCKED: u64 = 193;
const L2_NL_MAPPED: u64 = 196;

/// The register that names the page for an L2 VM, as an operand.
pub(crate) fn l2_operand(vm: u8) -> OperandId {
    OperandId(OperandId::R8.0 + u32::from(vm))
}

impl Regs {
    /// R9 to R11, by L2 VM.
    pub(crate) fn l2_page(&mut self, vm: u8) -> &mut u64 {
        match vm {
            1 => &mut self.r9,
            2 => &mut self.r10,
            _ => &mut self.r11,
        }
    }
}

impl<'t> Running<'t> {
    /// The L2 VMs that exist.
    pub(crate) fn l2_vms(&self) -> std::ops::RangeInclusive<u8> {
        1..=self.config.num_l2_vms
    }

    /// The walk in the tree of an L2 VM; stopping early is an error.
    pub(crate) fn walk_l2(&self, vm: u8, operand: SeptOperand) -> Result<Walk<'t>, Fail> {
        let sept = self.td.l2_sept(vm).ok_or_else(inconsistent)?;
        let walk = sept
            .walk(self.config.root_level, operand.gpa, operand.level)
            .ok_or_else(inconsistent)?;
        if walk.slot.level == operand.level {
            Ok(walk)
        } else {
            Err(l2_fail(Status::L2_SEPT_WALK_FAILED, vm, &walk))
        }
    }

    /// The entry of an L2 tree beside an aliased entry.
    pub(crate) fn l2_alias(&self, vm: u8, operand: SeptOperand) -> Result<Walk<'t>, Fail> {
        let sept = self.td.l2_sept(vm).ok_or_else(inconsistent)?;
        sept.walk_through_blocked(self.config.root_level, operand.gpa, operand.level)
            .filter(|walk| walk.slot.level == operand.level && walk.value.state().is_non_leaf())
            .ok_or_else(inconsistent)
    }

    /// Moves the entries of L2 trees along with an aliased entry that is blocked or unblocked.
    pub(crate) fn change_l2(
        &self,
        module: &Module,
        entry: SeptEntry,
        operand: SeptOperand,
        change: fn(SeptState) -> SeptState,
    ) -> Result<(), Fail> {
        for vm in self.l2_vms().filter(|vm| entry.is_aliased(*vm)) {
            let alias = self.l2_alias(vm, operand)?;
            let state = change(alias.value.state());
            let value = module.format.entry(state, alias.value.page());
            alias.slot.write_alone(value);
        }
        Ok(())
    }
}

/// Tables of L2 trees that are taken away together with the table behind an entry, locked.
pub(crate) struct L2Tables<'m> {
    tables: Vec<(u8, Walk<'m>, EntryGuard<'m>)>,
}

impl<'m> L2Tables<'m> {
    /// Locks the tables beside an aliased entry.
    pub(crate) fn lock(
        module: &'m Module,
        running: &Running<'m>,
        entry: SeptEntry,
        operand: SeptOperand,
    ) -> Result<Self, Fail> {
        let mut tables = Vec::new();
        for vm in running.l2_vms().filter(|vm| entry.is_aliased(*vm)) {
            let alias = running.l2_alias(vm, operand)?;
            let page = module
                .pamt
                .entry(alias.value.page(), PageSize::Small)
                .ok_or_else(inconsistent)?;
            let guard = page
                .try_lock(LockMode::Exclusive)
                .map_err(|_| busy(OperandId::RCX))?;
            tables.push((vm, alias, guard));
        }
        Ok(Self { tables })
    }

    /// Their number.
    pub(crate) fn len(&self) -> u64 {
        self.tables.len() as u64
    }

    /// Unlinks and frees them; the registers name their pages.
    pub(crate) fn remove(self, running: &Running<'_>, regs: &mut Regs) {
        for (vm, alias, guard) in self.tables {
            alias.slot.write_alone(SeptEntry::FREE);
            if let Some(sept) = running.td.l2_sept(vm) {
                sept.drop_child(alias.slot);
            }
            guard.entry().free();
            running.td.remove_children(1);
            if regs.version > 0 {
                *regs.l2_page(vm) = alias.value.page().get();
            }
        }
    }
}

/// A status with VM and level, and the description of the entry of an L2 tree.
pub(crate) fn l2_fail(status: Status, vm: u8, walk: &Walk<'_>) -> Fail {
    let level = u64::from(walk.slot.level);
    let (rcx, state) = match walk.value.state() {
        SeptState::NL_MAPPED => (walk.value.architectural(), L2_NL_MAPPED),
        SeptState::NL_BLOCKED => (0, L2_NL_BLOCKED),
        _ => (SeptEntry::FREE.architectural(), L2_FREE),
    };
    Fail {
        status: status.with_details(u32::from(vm) << 16 | u32::from(walk.slot.level)),
        details: Some([rcx, u64::from(vm) << 16 | state << 8 | level]),
    }
}

//! The TD that a call is about: its root page locked, its state checked.
//!
//! Source: TDX module source, helpers.c `check_any_td_state_map_tdcs_and_lock`.

use std::ops::Deref;
use std::sync::Arc;

use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, OperandId, PageType};

use super::{Taken, busy, inconsistent};
use crate::dispatch::{Cx, Fail};
use crate::locks::{LockGuard, LockMode};
use crate::pamt::{EntryGuard, PageLock, PageSize};
use crate::platform::Release;
use crate::td::{Lifecycle, OpState, Td, TdConfig};

/// A TD whose TDR is locked.
pub(crate) struct LockedTd<'c> {
    td: TdRef<'c>,
    release: Release,
    _tdr: TdrLock<'c>,
}

/// The TD of a run, or another one.
enum TdRef<'c> {
    OfRun(&'c Td),
    Own(Arc<Td>),
}

/// By a walk to an operand, or by the owner field of a page.
#[expect(dead_code, reason = "held for their locks")]
enum TdrLock<'c> {
    Explicit(PageLock<'c>),
    Implicit(EntryGuard<'c>),
}

impl Deref for LockedTd<'_> {
    type Target = Td;

    fn deref(&self) -> &Td {
        match &self.td {
            TdRef::OfRun(td) => td,
            TdRef::Own(td) => td,
        }
    }
}

impl Cx<'_> {
    /// TDR: the operand that names a TD.
    pub(crate) fn lock_tdr(
        &self,
        hpa: u64,
        operand: OperandId,
        mode: LockMode,
    ) -> Result<LockedTd<'_>, Fail> {
        let page = self.module.lock_page(hpa, operand, mode, PageType::TDR)?;
        self.locked_td(Hpa::new(hpa), TdrLock::Explicit(page))
    }

    /// IMPLICIT-TDR: the TD that owns a page, which the caller holds.
    pub(crate) fn lock_owner(&self, tdr: Hpa, mode: LockMode) -> Result<LockedTd<'_>, Fail> {
        let entry = self
            .module
            .pamt
            .entry(tdr, PageSize::Small)
            .ok_or_else(inconsistent)?;
        let guard = entry.try_lock(mode).map_err(|_| busy(OperandId::TDR))?;
        self.locked_td(tdr, TdrLock::Implicit(guard))
    }

    fn locked_td<'c>(&'c self, tdr: Hpa, lock: TdrLock<'c>) -> Result<LockedTd<'c>, Fail> {
        let td = match self.td.get() {
            Some(td) if td.tdr() == tdr && !td.is_retired() => TdRef::OfRun(td),
            _ => {
                let td = self.module.tds.get(tdr).ok_or_else(inconsistent)?;
                let _ = self.td.set(td.clone());
                TdRef::Own(td)
            }
        };
        Ok(LockedTd {
            td,
            release: self.module.config.release,
            _tdr: lock,
        })
    }

    /// Counts pages of a type that came into use.
    pub(crate) fn count_used(&self, page_type: PageType, pages: u64) {
        self.module
            .counters
            .add(self.lp, page_type, pages.cast_signed());
    }

    /// Counts pages of a type that became free.
    pub(crate) fn count_freed(&self, page_type: PageType, pages: u64) {
        self.module
            .counters
            .add(self.lp, page_type, -pages.cast_signed());
    }

    /// The package of the processor that executes.
    pub(crate) fn package(&self) -> u32 {
        self.module.config.package_of(self.lp)
    }

    /// A taken page becomes the TD's: type, owner, CHLDCNT, usage.
    pub(crate) fn give_page(&self, page: &Taken<'_>, page_type: PageType, size: PageSize, td: &Td) {
        page.entry.assign(page_type, td.tdr());
        td.add_children(size.pages());
        self.count_used(page_type, size.pages());
    }
}

/// Whether a leaf takes the OP_STATE lock.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum OpStateLock {
    /// Shared, while the leaf runs.
    Shared,
    /// Not at all: the TDR is held exclusively.
    None,
}

/// An initialised TD in a state that allows the leaf.
#[must_use = "OP_STATE is released when this is dropped"]
pub(crate) struct Running<'t> {
    pub(crate) td: &'t Td,
    pub(crate) op_state: OpState,
    pub(crate) config: &'t TdConfig,
    pub(super) release: Release,
    /// Bits that no private address of the TD has.
    pub(super) not_private: u64,
    /// Bound of GPAs that the platform sets, in bits.
    pub(crate) platform_maxpa: Option<u8>,
    _lock: Option<LockGuard<'t>>,
}

impl LockedTd<'_> {
    /// Keeps the lock of a TDR that was reached through its owner field: the 4 KiB entry alone.
    pub(crate) fn keep_lock(self) {
        std::mem::forget(self._tdr);
    }

    /// STATE up to the number of control pages.
    pub(crate) fn check_usable(&self, tdcs_pages: u8) -> Result<(), Fail> {
        if self.is_fatal() {
            return Err(Status::TD_FATAL.into());
        }
        if self.lifecycle() != Lifecycle::KeysConfigured {
            return Err(Status::TD_KEYS_NOT_CONFIGURED.into());
        }
        if self.num_tdcx() < tdcs_pages {
            return Err(Status::TDCS_NOT_ALLOCATED.into());
        }
        Ok(())
    }

    /// The last check of STATE: OP_STATE allows the leaf.
    pub(crate) fn check_op_state(&self, leaf: Leaf) -> Result<OpState, Fail> {
        let state = self.op_state();
        if state.allows(leaf) {
            return Ok(state);
        }
        // Release 1.5.05 leaves the low half zero; later ones put the state there.
        let value = match self.release {
            Release::R1_5_05 => 0,
            Release::R1_5_34 => u32::from(state.number()),
        };
        Err(Status::OP_STATE_INCORRECT.with_details(value).into())
    }

    /// STATE: the TD is usable and in a state that allows the leaf.
    pub(crate) fn check_state(
        &self,
        cx: &Cx<'_>,
        leaf: Leaf,
        lock: OpStateLock,
    ) -> Result<Running<'_>, Fail> {
        self.check_usable(cx.module.config.tdcs_pages)?;
        let guard = match lock {
            OpStateLock::None => None,
            OpStateLock::Shared => Some(
                self.op_state_lock
                    .try_lock(LockMode::Shared)
                    .map_err(|_| busy(OperandId::OP_STATE))?,
            ),
        };
        let op_state = self.check_op_state(leaf)?;
        let config = self.config().ok_or_else(inconsistent)?;
        // Release 1.5.05 knows no bound of GPAs below the TD's address width.
        let platform_maxpa = (self.release == Release::R1_5_34).then_some(cx.module.config.maxpa);
        let release = self.release;
        Ok(Running {
            td: self,
            op_state,
            config,
            release,
            not_private: config.not_private(platform_maxpa),
            platform_maxpa,
            _lock: guard,
        })
    }
}

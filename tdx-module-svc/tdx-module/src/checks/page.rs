//! Operands that name memory: pages that TDs own or may own, and memory of the host.
//!
//! Source: TDX module source, helpers.c `check_and_lock_explicit_4k_private_hpa` and
//! `shared_hpa_check_with_pwr_2_alignment`.

use tdx_defs::{CompletionStatus as Status, Hpa, OperandId, PAGE_SIZE, PageType};

use super::{busy, inconsistent, invalid};
use crate::Module;
use crate::dispatch::Fail;
use crate::locks::LockMode;
use crate::pamt::{EntryGuard, HeldRange, PageLock, PageSize, PamtEntry, PamtError, Want};
use crate::sept::SeptEntry;

impl Module {
    /// The address of an operand in host memory without its key id, unless it has too many bits.
    pub(crate) fn host_address(&self, hpa: u64) -> Option<Hpa> {
        (hpa >> self.config.maxpa == 0).then(|| Hpa::new(hpa & !self.config.hkid_mask()))
    }

    /// Checks an operand in host memory: aligned, not the module's own, not under a private key.
    pub(crate) fn check_host_memory(
        &self,
        hpa: u64,
        align: u64,
        operand: OperandId,
    ) -> Result<Hpa, Fail> {
        let plain = self.host_address(hpa).ok_or(invalid(operand))?;
        let private = self.config.is_private_hkid(self.config.hkid_of(hpa));
        if private || !plain.is_aligned(align) || self.config.seamrr.contains(&plain.get()) {
            return Err(invalid(operand));
        }
        Ok(plain)
    }

    /// The address of a page operand: aligned, without key id.
    fn check_page_address(&self, hpa: u64, align: u64, operand: OperandId) -> Result<Hpa, Fail> {
        let keyless = hpa & self.config.hkid_mask() == 0 && hpa >> self.config.maxpa == 0;
        if !keyless || !hpa.is_multiple_of(align) {
            return Err(invalid(operand));
        }
        Ok(Hpa::new(hpa))
    }

    /// PAGE without a type: the page of a 4 KiB operand at whatever size it lives.
    pub(crate) fn lock_any_page(
        &self,
        hpa: u64,
        operand: OperandId,
        mode: LockMode,
        want: Want,
    ) -> Result<PageLock<'_>, Fail> {
        let hpa = self.check_page_address(hpa, PAGE_SIZE, operand)?;
        self.pamt
            .lock_page(hpa, PageSize::Small, mode, want)
            .map_err(|e| pamt_fail(e, operand))
    }

    /// PAGE: a 4 KiB page operand of an expected type.
    pub(crate) fn lock_page(
        &self,
        hpa: u64,
        operand: OperandId,
        mode: LockMode,
        expected: PageType,
    ) -> Result<PageLock<'_>, Fail> {
        // Only a page that is about to be taken needs its entry to exist.
        let take = mode == LockMode::Exclusive && expected == PageType::NDA;
        let want = if take { Want::Take } else { Want::Look };
        let page = self.lock_any_page(hpa, operand, mode, want)?;
        if page.size() != PageSize::Small || page.page_type() != expected {
            return Err(Status::PAGE_METADATA_INCORRECT.with(operand).into());
        }
        Ok(page)
    }

    /// PAGE for a free page that the leaf is about to take.
    pub(crate) fn lock_free_page(&self, hpa: u64, operand: OperandId) -> Result<Taken<'_>, Fail> {
        let page = self.lock_page(hpa, operand, LockMode::Exclusive, PageType::NDA)?;
        Ok(Taken {
            entry: page.entry().ok_or_else(inconsistent)?,
            hpa: Hpa::new(hpa),
            _page: page,
        })
    }

    /// PAGE2M: a free 2 MiB range that the leaf is about to take.
    pub(crate) fn lock_free_range(&self, hpa: u64, operand: OperandId) -> Result<Taken<'_>, Fail> {
        let address = self.check_page_address(hpa, PageSize::Large.bytes(), operand)?;
        let page = self
            .pamt
            .lock_page(address, PageSize::Large, LockMode::Exclusive, Want::Take)
            .map_err(|e| pamt_fail(e, operand))?;
        let free = page.size() == PageSize::Large && page.page_type() == PageType::NDA;
        if !free || !self.pamt.small_pages_are_free(address) {
            return Err(Status::PAGE_METADATA_INCORRECT.with(operand).into());
        }
        Ok(Taken {
            entry: page.entry().ok_or_else(inconsistent)?,
            hpa: address,
            _page: page,
        })
    }

    /// The metadata of what hangs at a Secure EPT entry: a page of the entry's size or a table.
    pub(crate) fn entry_behind(&self, entry: SeptEntry, level: u8) -> Result<&PamtEntry, Fail> {
        let size = if entry.is_leaf() {
            PageSize::of_level(level)
        } else {
            Some(PageSize::Small)
        };
        let page = if entry.is_leaf() {
            entry.page_at(level)
        } else {
            entry.page()
        };
        size.and_then(|size| self.pamt.entry(page, size))
            .ok_or_else(inconsistent)
    }
}

fn pamt_fail(error: PamtError, operand: OperandId) -> Fail {
    match error {
        PamtError::OutsideTdmr => Status::OPERAND_ADDR_RANGE_ERROR.with(operand).into(),
        PamtError::Busy => busy(operand),
    }
}

/// A free page, locked for the leaf that is going to use it.
pub(crate) struct Taken<'m> {
    /// Its address.
    pub(crate) hpa: Hpa,
    /// Its metadata.
    pub(crate) entry: &'m PamtEntry,
    _page: PageLock<'m>,
}

/// Free 4 KiB pages for the calls of a run. While they come from one 2 MiB range, the range is
/// held and only the page itself is locked anew.
pub(crate) struct FreePages<'m> {
    module: &'m Module,
    range: Option<HeldRange<'m>>,
}

impl<'m> FreePages<'m> {
    pub(crate) fn new(module: &'m Module) -> Self {
        Self {
            module,
            range: None,
        }
    }

    /// PAGE for a free page that the leaf is about to take.
    pub(crate) fn lock(&mut self, hpa: u64, operand: OperandId) -> Result<EntryGuard<'m>, Fail> {
        let address = self.module.check_page_address(hpa, PAGE_SIZE, operand)?;
        if let Some(entry) = self.range.as_ref().and_then(|range| range.entry(address)) {
            let guard = entry
                .try_lock(LockMode::Exclusive)
                .map_err(|_| busy(operand))?;
            if entry.page_type() != PageType::NDA {
                return Err(Status::PAGE_METADATA_INCORRECT.with(operand).into());
            }
            return Ok(guard);
        }
        // The old range goes first: the new page may lie in a larger page that it is part of.
        self.let_go();
        let page = self
            .module
            .lock_page(hpa, operand, LockMode::Exclusive, PageType::NDA)?;
        let (guard, range) = page.split(address).ok_or_else(inconsistent)?;
        self.range = Some(range);
        Ok(guard)
    }

    /// Lets go of the range.
    pub(crate) fn let_go(&mut self) {
        self.range = None;
    }
}

/// 4 KiB pages for the calls of a run that only look at them. While they come from one 2 MiB range,
/// the range is held and only the page itself is locked anew.
pub(crate) struct SamePages<'m> {
    module: &'m Module,
    range: Option<HeldRange<'m>>,
}

impl<'m> SamePages<'m> {
    pub(crate) fn new(module: &'m Module) -> Self {
        Self {
            module,
            range: None,
        }
    }

    /// PAGE: a page of an expected type, locked shared and let go at once.
    pub(crate) fn check(
        &mut self,
        hpa: Hpa,
        operand: OperandId,
        expected: PageType,
    ) -> Result<(), Fail> {
        let hpa = self
            .module
            .check_page_address(hpa.get(), PAGE_SIZE, operand)?;
        if let Some(entry) = self.range.as_ref().and_then(|range| range.entry(hpa)) {
            let _page = entry
                .try_lock(LockMode::Shared)
                .map_err(|_| busy(operand))?;
            if entry.page_type() != expected {
                return Err(Status::PAGE_METADATA_INCORRECT.with(operand).into());
            }
            return Ok(());
        }
        self.range = None;
        let page = self
            .module
            .lock_page(hpa.get(), operand, LockMode::Shared, expected)?;
        self.range = page.split(hpa).map(|(_, range)| range);
        Ok(())
    }
}

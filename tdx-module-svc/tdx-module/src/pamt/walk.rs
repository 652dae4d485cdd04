//! The PAMT walk: from the 1 GiB entry down to the size that is asked for, locking on the way.
//!
//! Source: TDX module source, pamt_manager.c, `pamt_walk`. Entries above the target are held
//! shared. An entry in use stops the walk; where the caller wants an exclusive lock, the shared
//! one of that entry is promoted.

use tdx_defs::{Hpa, PAGE_SHIFT, PageType};

use super::{EntryGuard, PamtEntry};
use super::{GibArrays, LARGE_SHIFT, PageSize, Pamt, TdmrPamt, index};
use crate::locks::{Busy, LockMode};

/// Why a page could not be locked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PamtError {
    /// Outside the initialised part of every TDMR.
    OutsideTdmr,
    /// An entry on the way is held by somebody else.
    Busy,
}

impl From<Busy> for PamtError {
    fn from(_: Busy) -> Self {
        Self::Busy
    }
}

/// What the caller is going to do with the page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Want {
    /// Take it, when it is free: its entry has to exist.
    Take,
    /// Look at it: a page whose entry was never needed is free (or reserved) without one.
    Look,
}

/// A page with its lock, or a page whose entry does not exist yet.
#[derive(Debug)]
enum Target<'p> {
    Locked(EntryGuard<'p>),
    Untouched(PageType),
}

/// A page that the walk reached, locked until this is dropped.
#[derive(Debug)]
#[must_use = "the locks are released when this is dropped"]
pub(crate) struct PageLock<'p> {
    // Dropped in this order: the target before the entries above it.
    target: Target<'p>,
    parents: [Option<EntryGuard<'p>>; 2],
    size: PageSize,
    /// The 4 KiB entries of the range, where the walk reached one of them.
    block: Option<&'p [PamtEntry]>,
}

/// A 2 MiB range whose 4 KiB pages are reached without another walk: the entries above are held
/// shared, as by a walk to one of them.
#[derive(Debug)]
pub(crate) struct HeldRange<'p> {
    first: u64,
    block: &'p [PamtEntry],
    _parents: [Option<EntryGuard<'p>>; 2],
}

impl<'p> HeldRange<'p> {
    /// The entry of a page, if it lies in the range.
    pub(crate) fn entry(&self, hpa: Hpa) -> Option<&'p PamtEntry> {
        let inside = hpa.get() >> LARGE_SHIFT == self.first >> LARGE_SHIFT;
        if inside {
            self.block.get(index(hpa.get(), PAGE_SHIFT))
        } else {
            None
        }
    }
}

impl<'p> PageLock<'p> {
    /// Size at which the walk ended.
    pub(crate) fn size(&self) -> PageSize {
        self.size
    }

    /// Lets go of all but a 4 KiB page itself, whose range stays held in the other half.
    pub(crate) fn split(self, hpa: Hpa) -> Option<(EntryGuard<'p>, HeldRange<'p>)> {
        match (self.target, self.block) {
            (Target::Locked(guard), Some(block)) => {
                let range = HeldRange {
                    first: hpa.get(),
                    block,
                    _parents: self.parents,
                };
                Some((guard, range))
            }
            _ => None,
        }
    }

    /// Keeps every lock beyond this value; [`Pamt::release_kept`] gives them back. Only a
    /// 4 KiB page that was walked to in shared mode is kept.
    pub(crate) fn keep(self) {
        let Self {
            target, parents, ..
        } = self;
        std::mem::forget((target, parents));
    }

    /// Type of the page.
    pub(crate) fn page_type(&self) -> PageType {
        match &self.target {
            Target::Locked(guard) => guard.entry().page_type(),
            Target::Untouched(page_type) => *page_type,
        }
    }

    /// The entry, unless the page was never touched.
    pub(crate) fn entry(&self) -> Option<&'p PamtEntry> {
        match &self.target {
            Target::Locked(guard) => Some(guard.entry()),
            Target::Untouched(_) => None,
        }
    }
}

impl Pamt {
    /// Walks to the entry of `hpa` at size `to`, or to the larger page that covers it.
    pub(crate) fn lock_page(
        &self,
        hpa: Hpa,
        to: PageSize,
        mode: LockMode,
        want: Want,
    ) -> Result<PageLock<'_>, PamtError> {
        let (tdmr, gib) = self.usable_tdmr(hpa).ok_or(PamtError::OutsideTdmr)?;
        let giant = tdmr.giant.get(gib).ok_or(PamtError::OutsideTdmr)?;
        let slot = tdmr.gibs.get(gib).ok_or(PamtError::OutsideTdmr)?;

        let giant = match stop_or_pass(giant, PageSize::Giant, to, mode)? {
            Step::Stop(guard) => return Ok(PageLock::at(guard, PageSize::Giant)),
            Step::Pass(guard) => guard,
        };
        let arrays = match want {
            Want::Take => Some(slot.get_or_init(GibArrays::new)),
            Want::Look => slot.get(),
        };
        let Some(arrays) = arrays else {
            let kind = if to == PageSize::Small {
                tdmr.untouched(hpa.get())
            } else {
                PageType::NDA
            };
            return Ok(PageLock::untouched(kind, to, [Some(giant), None]));
        };
        let large = &arrays.large[index(hpa.get(), LARGE_SHIFT)];
        let large = match stop_or_pass(large, PageSize::Large, to, mode)? {
            Step::Stop(guard) => {
                let mut lock = PageLock::at(guard, PageSize::Large);
                lock.parents[0] = Some(giant);
                return Ok(lock);
            }
            Step::Pass(guard) => guard,
        };
        let parents = [Some(large), Some(giant)];
        Self::lock_small(tdmr, arrays, hpa, mode, want, parents)
    }

    /// Releases the shared locks of a 4 KiB page and of the entries above it.
    pub(crate) fn release_kept(&self, hpa: Hpa) {
        for size in [PageSize::Small, PageSize::Large, PageSize::Giant] {
            if let Some(entry) = self.entry(hpa, size) {
                entry.release(LockMode::Shared);
            }
        }
    }

    fn lock_small<'p>(
        tdmr: &'p TdmrPamt,
        arrays: &'p GibArrays,
        hpa: Hpa,
        mode: LockMode,
        want: Want,
        parents: [Option<EntryGuard<'p>>; 2],
    ) -> Result<PageLock<'p>, PamtError> {
        let block = match want {
            Want::Take => Some(tdmr.small_block(arrays, hpa.get())),
            Want::Look => arrays.small[index(hpa.get(), LARGE_SHIFT)].get(),
        };
        let Some(block) = block else {
            let kind = tdmr.untouched(hpa.get());
            return Ok(PageLock::untouched(kind, PageSize::Small, parents));
        };
        let guard = block[index(hpa.get(), PAGE_SHIFT)].try_lock(mode)?;
        let target = Target::Locked(guard);
        Ok(PageLock {
            target,
            parents,
            size: PageSize::Small,
            block: Some(block),
        })
    }

    /// Whether all 4 KiB pages of a 2 MiB range are free. The caller holds the 2 MiB entry
    /// exclusively, so that nobody is inside.
    pub(crate) fn small_pages_are_free(&self, hpa: Hpa) -> bool {
        let Some((tdmr, gib)) = self.usable_tdmr(hpa) else {
            return false;
        };
        let first = hpa.get() >> LARGE_SHIFT << LARGE_SHIFT;
        let block = tdmr.gibs.get(gib).and_then(|slot| slot.get());
        match block.and_then(|arrays| arrays.small[index(first, LARGE_SHIFT)].get()) {
            Some(block) => block.iter().all(|entry| entry.page_type() == PageType::NDA),
            None => {
                let end = first + (1 << LARGE_SHIFT);
                !tdmr
                    .reserved
                    .iter()
                    .any(|area| area.start < end && first < area.end)
            }
        }
    }
}

impl<'p> PageLock<'p> {
    fn at(guard: EntryGuard<'p>, size: PageSize) -> Self {
        Self {
            target: Target::Locked(guard),
            parents: [None, None],
            size,
            block: None,
        }
    }

    fn untouched(
        page_type: PageType,
        size: PageSize,
        parents: [Option<EntryGuard<'p>>; 2],
    ) -> Self {
        Self {
            target: Target::Untouched(page_type),
            parents,
            size,
            block: None,
        }
    }
}

enum Step<'p> {
    Stop(EntryGuard<'p>),
    Pass(EntryGuard<'p>),
}

/// Locks an entry of `size` on the way to `to`: shared to pass it, as `mode` says to stop at it.
fn stop_or_pass(
    entry: &PamtEntry,
    size: PageSize,
    to: PageSize,
    mode: LockMode,
) -> Result<Step<'_>, Busy> {
    let guard = entry.try_lock(LockMode::Shared)?;
    if size != to && entry.page_type() == PageType::NDA {
        return Ok(Step::Pass(guard));
    }
    match mode {
        LockMode::Shared => Ok(Step::Stop(guard)),
        LockMode::Exclusive => guard.promote().map(Step::Stop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::platform::PlatformConfig;

    const PAGE: Hpa = Hpa::new(0x4020_0000);

    fn pamt() -> Pamt {
        Pamt::new(&PlatformConfig::conformance())
    }

    #[test]
    fn a_small_page_holds_its_large_range_shared() {
        let pamt = pamt();
        let take = |size, mode| pamt.lock_page(PAGE, size, mode, Want::Take);
        let page = take(PageSize::Small, LockMode::Exclusive).unwrap();
        assert_eq!(
            (page.size(), page.page_type()),
            (PageSize::Small, PageType::NDA)
        );
        assert_eq!(
            take(PageSize::Large, LockMode::Exclusive).unwrap_err(),
            PamtError::Busy,
            "the range"
        );
        assert!(take(PageSize::Large, LockMode::Shared).is_ok());
        drop(page);
        assert!(take(PageSize::Large, LockMode::Exclusive).is_ok());
    }

    #[test]
    fn the_walk_stops_at_a_large_page() {
        let pamt = pamt();
        let large = pamt.entry(PAGE, PageSize::Large).unwrap();
        large.assign(PageType::REG, Hpa::new(0x4000_0000));
        let page = pamt
            .lock_page(PAGE, PageSize::Small, LockMode::Exclusive, Want::Take)
            .unwrap();
        assert_eq!(
            (page.size(), page.page_type()),
            (PageSize::Large, PageType::REG)
        );
        assert!(large.try_lock(LockMode::Shared).is_err());
    }

    #[test]
    fn only_initialised_memory_has_pages() {
        let pamt = pamt();
        for (hpa, kind) in [
            (0x4000_0000, Ok(PageType::NDA)),
            (0x7000_0000, Ok(PageType::RSVD)),
            (0x70FF_F000, Ok(PageType::RSVD)),
            (0x7100_0000, Ok(PageType::NDA)),
            (0x3FFF_F000, Err(PamtError::OutsideTdmr)),
            (0x8000_0000, Err(PamtError::OutsideTdmr)),
            (0x1_8000_0000, Err(PamtError::OutsideTdmr)),
        ] {
            for want in [Want::Look, Want::Take] {
                let page = pamt.lock_page(Hpa::new(hpa), PageSize::Small, LockMode::Shared, want);
                assert_eq!(page.map(|page| page.page_type()), kind, "{hpa:#x} {want:?}");
            }
        }
    }

    #[test]
    fn a_range_with_a_used_or_reserved_page_is_not_free() {
        let pamt = pamt();
        assert!(pamt.small_pages_are_free(PAGE));
        assert!(!pamt.small_pages_are_free(Hpa::new(0x7000_0000)));
        let inside = pamt
            .entry(Hpa::new(PAGE.get() + 0x5000), PageSize::Small)
            .unwrap();
        inside.assign(PageType::REG, Hpa::new(0x4000_0000));
        assert!(!pamt.small_pages_are_free(PAGE));
    }
}

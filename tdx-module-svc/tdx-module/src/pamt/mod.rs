//! Metadata of physical memory (PAMT).
//!
//! Source: TDX module source, pamt_manager.c. Each TDMR has one entry for every 1 GiB, 2 MiB and
//! 4 KiB. A page lives at exactly one size: where an entry is in use, those above and below are
//! free.
//!
//! Entries are 16 bytes each, as in the real arrays. The 2 MiB and 4 KiB arrays come into being in
//! blocks of 512 when a page inside is first taken, so that an idle TDMR costs next to nothing. They
//! never cost more than the real ones: 16 bytes for every 4 KiB of the TDMRs.
//!
//! Model: making a block takes the `OnceLock` of that block; a second processor that arrives in
//! that moment waits for the zeroing of 8 KiB. The real arrays are there from the start.

mod entry;
mod scan;
mod walk;

use std::ops::Range;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use tdx_defs::{Hpa, PAGE_SHIFT, PageType};

use crate::platform::{PlatformConfig, Tdmr};

pub(crate) use entry::{EntryGuard, PamtEntry};
pub use scan::PageInfo;
pub(crate) use walk::{HeldRange, PageLock, PamtError, Want};

const GIB_SHIFT: u32 = 30;
const LARGE_SHIFT: u32 = 21;
/// Entries in one block of the 2 MiB and 4 KiB arrays.
const BLOCK: usize = 512;

/// Size of a page in the PAMT: 0, 1, 2 as the register formats number them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PageSize {
    /// 4 KiB.
    Small,
    /// 2 MiB.
    Large,
    /// 1 GiB.
    Giant,
}

impl PageSize {
    /// The size of a Secure EPT leaf at a level, as far as one exists.
    pub(crate) fn of_level(level: u8) -> Option<Self> {
        [Self::Small, Self::Large, Self::Giant]
            .get(usize::from(level))
            .copied()
    }

    /// The number in register formats.
    pub fn number(self) -> u64 {
        match self {
            Self::Small => 0,
            Self::Large => 1,
            Self::Giant => 2,
        }
    }

    /// 4 KiB units.
    pub fn pages(self) -> u64 {
        1 << (9 * self.number())
    }

    /// Bytes.
    pub fn bytes(self) -> u64 {
        self.pages() << PAGE_SHIFT
    }

    /// The next smaller size.
    pub(crate) fn smaller(self) -> Option<Self> {
        match self {
            Self::Small => None,
            Self::Large => Some(Self::Small),
            Self::Giant => Some(Self::Large),
        }
    }
}

/// A block of 4 KiB entries.
type SmallBlock = Box<[PamtEntry]>;

/// The arrays of one GiB.
#[derive(Debug)]
struct GibArrays {
    large: Box<[PamtEntry]>,
    small: Box<[OnceLock<SmallBlock>]>,
}

impl GibArrays {
    fn new() -> Self {
        Self {
            large: (0..BLOCK).map(|_| PamtEntry::default()).collect(),
            small: (0..BLOCK).map(|_| OnceLock::new()).collect(),
        }
    }
}

/// The PAMT of one TDMR.
#[derive(Debug)]
struct TdmrPamt {
    base: u64,
    size: u64,
    reserved: Vec<Range<u64>>,
    /// Bytes from `base` on whose PAMT is initialised.
    initialized: AtomicU64,
    /// Taken while TDH.SYS.TDMR.INIT works on this TDMR.
    init_lock: crate::locks::Lock,
    giant: Box<[PamtEntry]>,
    gibs: Box<[OnceLock<GibArrays>]>,
}

impl TdmrPamt {
    fn new(tdmr: &Tdmr) -> Self {
        let gibs = tdmr.size >> GIB_SHIFT;
        Self {
            base: tdmr.base.get(),
            size: tdmr.size,
            reserved: tdmr.reserved.clone(),
            initialized: AtomicU64::new(if tdmr.initialized { tdmr.size } else { 0 }),
            init_lock: crate::locks::Lock::default(),
            giant: (0..gibs).map(|_| PamtEntry::default()).collect(),
            gibs: (0..gibs).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The usable part ends here: what is initialised, rounded down to 1 GiB.
    fn usable(&self) -> u64 {
        self.initialized.load(Ordering::Relaxed) >> GIB_SHIFT << GIB_SHIFT
    }

    /// The type that a page has while its entry does not exist.
    fn untouched(&self, hpa: u64) -> PageType {
        let reserved = self.reserved.iter().any(|area| area.contains(&hpa));
        if reserved {
            PageType::RSVD
        } else {
            PageType::NDA
        }
    }

    fn small_block<'p>(&'p self, gib: &'p GibArrays, hpa: u64) -> &'p SmallBlock {
        gib.small[index(hpa, LARGE_SHIFT)].get_or_init(|| {
            let first = hpa >> LARGE_SHIFT << LARGE_SHIFT;
            (0..BLOCK as u64)
                .map(|page| PamtEntry::of_type(self.untouched(first + (page << PAGE_SHIFT))))
                .collect()
        })
    }
}

/// Position in a block of 512.
fn index(hpa: u64, shift: u32) -> usize {
    (hpa >> shift & 0x1FF) as usize
}

/// Metadata of all physical memory that TDs may own.
#[derive(Debug)]
pub(crate) struct Pamt {
    tdmrs: Vec<TdmrPamt>,
}

/// Outcome of one step of TDH.SYS.TDMR.INIT.
pub(crate) enum InitStep {
    /// The address is not the base of a TDMR.
    NoTdmr,
    /// Another processor initialises the TDMR.
    Busy,
    /// There was nothing left to do.
    Done,
    /// End of the usable part.
    Next(Hpa),
}

impl Pamt {
    pub(crate) fn new(config: &PlatformConfig) -> Self {
        Self {
            tdmrs: config.tdmrs.iter().map(TdmrPamt::new).collect(),
        }
    }

    /// The TDMR whose usable part holds `hpa`, and the offset of the address in it.
    fn usable_tdmr(&self, hpa: Hpa) -> Option<(&TdmrPamt, usize)> {
        self.tdmrs.iter().find_map(|tdmr| {
            let offset = hpa.get().checked_sub(tdmr.base)?;
            let gib = usize::try_from(offset >> GIB_SHIFT).ok()?;
            (offset < tdmr.usable()).then_some((tdmr, gib))
        })
    }

    /// The entry of a page of a known size, which a Secure EPT entry or an owner field named.
    pub(crate) fn entry(&self, hpa: Hpa, size: PageSize) -> Option<&PamtEntry> {
        let (tdmr, gib) = self.usable_tdmr(hpa)?;
        let addr = hpa.get();
        if size == PageSize::Giant {
            return tdmr.giant.get(gib);
        }
        let arrays = tdmr.gibs.get(gib)?.get_or_init(GibArrays::new);
        if size == PageSize::Large {
            return arrays.large.get(index(addr, LARGE_SHIFT));
        }
        tdmr.small_block(arrays, addr).get(index(addr, PAGE_SHIFT))
    }

    /// The entry and size of the page in use that covers `hpa`, if there is one. Takes no lock.
    pub(crate) fn used_page(&self, hpa: Hpa) -> Option<(&PamtEntry, PageSize)> {
        let (tdmr, gib) = self.usable_tdmr(hpa)?;
        let giant = tdmr.giant.get(gib)?;
        if giant.is_used() {
            return Some((giant, PageSize::Giant));
        }
        let arrays = tdmr.gibs.get(gib)?.get()?;
        let at = index(hpa.get(), LARGE_SHIFT);
        let large = arrays.large.get(at)?;
        if large.is_used() {
            return Some((large, PageSize::Large));
        }
        let small = arrays
            .small
            .get(at)?
            .get()?
            .get(index(hpa.get(), PAGE_SHIFT))?;
        small.is_used().then_some((small, PageSize::Small))
    }

    /// Initialises the PAMT of the next 4 MiB of the TDMR at `base`.
    pub(crate) fn initialize_step(&self, base: u64) -> InitStep {
        const STEP: u64 = 1024 << PAGE_SHIFT;
        let Some(tdmr) = self.tdmrs.iter().find(|tdmr| tdmr.base == base) else {
            return InitStep::NoTdmr;
        };
        let Ok(_alone) = tdmr.init_lock.try_lock(crate::locks::LockMode::Exclusive) else {
            return InitStep::Busy;
        };
        let done = tdmr.initialized.load(Ordering::Relaxed);
        if done >= tdmr.size {
            return InitStep::Done;
        }
        tdmr.initialized.store(done + STEP, Ordering::Relaxed);
        InitStep::Next(Hpa::new(tdmr.base + tdmr.usable()))
    }
}

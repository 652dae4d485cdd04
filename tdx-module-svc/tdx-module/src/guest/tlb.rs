//! A logical processor's TLB: translations of private addresses, bounded in number.
//!
//! Source: TDX module source, helpers.c `flush_td_asid`, tdh_vp_enter.c. As in hardware the TLB
//! belongs to the processor and its entries say whose they are. Here the TD is named by its TDR;
//! flushing takes away every translation of one TD.
//!
//! Units: an entry covers 4 KiB, 2 MiB or 1 GiB, by its level 0 to 2.

use tdx_defs::{Gpa, Hpa, PAGE_SHIFT};

/// Entries for 4 KiB pages, and for larger ones.
const SMALL: usize = 256;
const LARGE: usize = 32;

/// A cached translation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// The TD.
    pub tdr: Hpa,
    /// First address that it translates.
    pub gpa: Gpa,
    /// The page.
    pub page: Hpa,
    /// Its level as the module counts, 0 to 2.
    pub level: u8,
}

/// Translations, each in the place that its address has.
#[derive(Debug, Default)]
pub(super) struct Tlb {
    /// Made at the first fill: most processors never run a guest.
    small: Vec<Option<Translation>>,
    large: Vec<Option<Translation>>,
}

fn first_address(gpa: Gpa, level: u8) -> Gpa {
    Gpa::new(gpa.get() >> shift(level) << shift(level))
}

fn shift(level: u8) -> u32 {
    PAGE_SHIFT + 9 * u32::from(level)
}

fn place(gpa: Gpa, level: u8, places: usize) -> usize {
    // Truncation does no harm: only the low bits count.
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the low bits choose the place"
    )]
    let number = (gpa.get() >> shift(level)) as usize;
    number % places
}

impl Tlb {
    /// The translation that covers an address of a TD.
    pub(super) fn find(&self, tdr: Hpa, gpa: Gpa) -> Option<Translation> {
        (0..=2).find_map(|level| {
            let (entries, places) = match level {
                0 => (&self.small, SMALL),
                _ => (&self.large, LARGE),
            };
            let entry = (*entries.get(place(gpa, level, places))?)?;
            let same = entry.tdr == tdr && entry.level == level;
            (same && entry.gpa == first_address(gpa, level)).then_some(entry)
        })
    }

    /// Caches a translation of the page that covers `gpa`; another one may have to go.
    pub(super) fn fill(&mut self, tdr: Hpa, gpa: Gpa, page: Hpa, level: u8) -> Translation {
        let translation = Translation {
            tdr,
            gpa: first_address(gpa, level),
            page,
            level,
        };
        let (entries, places) = match level {
            0 => (&mut self.small, SMALL),
            _ => (&mut self.large, LARGE),
        };
        entries.resize(places, None);
        entries[place(gpa, level, places)] = Some(translation);
        translation
    }

    /// Flushes a TD's translations.
    pub(super) fn flush(&mut self, tdr: Hpa) {
        for entry in self.small.iter_mut().chain(&mut self.large) {
            if entry.is_some_and(|entry| entry.tdr == tdr) {
                *entry = None;
            }
        }
    }

    /// Everything that is cached.
    pub(super) fn all(&self) -> Vec<Translation> {
        let entries = self.small.iter().chain(&self.large);
        entries.filter_map(|entry| *entry).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: Hpa = Hpa::new(0x1000);
    const B: Hpa = Hpa::new(0x2000);
    const PAGE: Hpa = Hpa::new(0x4000_0000);

    #[test]
    fn a_translation_covers_its_page_and_its_td_only() {
        let mut tlb = Tlb::default();
        tlb.fill(A, Gpa::new(0x20_1234), PAGE, 1);
        tlb.fill(A, Gpa::new(0x5678), PAGE, 0);
        for (tdr, gpa, level) in [
            (A, 0x20_0000, Some(1)),
            (A, 0x3F_FFFF, Some(1)),
            (A, 0x40_0000, None),
            (A, 0x5000, Some(0)),
            (A, 0x6000, None),
            (B, 0x5000, None),
        ] {
            let found = tlb.find(tdr, Gpa::new(gpa)).map(|entry| entry.level);
            assert_eq!(found, level, "{gpa:#x}");
        }
    }

    #[test]
    fn flushing_takes_one_td_and_filling_is_bounded() {
        let mut tlb = Tlb::default();
        for page in 0..1000 {
            tlb.fill(A, Gpa::new(page << PAGE_SHIFT), PAGE, 0);
        }
        assert_eq!(tlb.all().len(), SMALL);
        tlb.fill(B, Gpa::new(0), PAGE, 2);
        tlb.flush(A);
        assert_eq!(tlb.all().len(), 1);
        assert!(tlb.find(B, Gpa::new(0x3FFF_FFFF)).is_some());
    }
}

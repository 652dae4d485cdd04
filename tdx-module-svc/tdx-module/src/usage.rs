//! How much of the platform is in use.
//!
//! Counting happens on every page, so each logical processor counts for itself and a reader sums.

use std::sync::atomic::{AtomicI64, Ordering};

use crossbeam_utils::CachePadded;
use tdx_defs::PageType;

/// The types of pages in use.
const TYPES: [PageType; 5] = [
    PageType::REG,
    PageType::TDR,
    PageType::TDCX,
    PageType::TDVPR,
    PageType::EPT,
];

/// Resources in use.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage {
    /// Private key ids of TDs, the global one not counted.
    pub hkids_in_use: u32,
    /// Pages by type in 4 KiB units, free and reserved ones left out.
    pub pages: Vec<(PageType, u64)>,
}

/// Pages in use by type, spread over logical processors.
#[derive(Debug)]
pub(crate) struct Counters {
    by_lp: Box<[CachePadded<[AtomicI64; TYPES.len()]>]>,
}

impl Counters {
    pub(crate) fn new(logical_processors: u32) -> Self {
        Self {
            by_lp: (0..logical_processors.max(1))
                .map(|_| CachePadded::default())
                .collect(),
        }
    }

    /// Adds (or takes away) 4 KiB units of a type.
    pub(crate) fn add(&self, lp: u32, page_type: PageType, pages: i64) {
        let own = &self.by_lp[lp as usize % self.by_lp.len()];
        if let Some(at) = TYPES.iter().position(|known| *known == page_type) {
            own[at].fetch_add(pages, Ordering::Relaxed);
        }
    }

    /// The sums.
    pub(crate) fn pages(&self) -> Vec<(PageType, u64)> {
        let count = |at: usize| {
            let sum: i64 = self
                .by_lp
                .iter()
                .map(|own| own[at].load(Ordering::Relaxed))
                .sum();
            // A reader that runs beside calls may see a page freed before it sees it taken.
            u64::try_from(sum).unwrap_or(0)
        };
        TYPES
            .iter()
            .enumerate()
            .map(|(at, page_type)| (*page_type, count(at)))
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_may_be_taken_by_one_processor_and_freed_by_another() {
        let counters = Counters::new(2);
        counters.add(0, PageType::EPT, 3);
        counters.add(1, PageType::EPT, -2);
        counters.add(7, PageType::NDA, 9);
        assert_eq!(counters.pages().last(), Some(&(PageType::EPT, 1)));
        assert_eq!(
            counters.pages().iter().map(|(_, pages)| pages).sum::<u64>(),
            1
        );
    }
}

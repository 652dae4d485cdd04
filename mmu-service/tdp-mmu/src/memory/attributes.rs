//! KVM_MEMORY_ATTRIBUTE_PRIVATE, frame by frame.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_vm_set_mem_attributes()`, `mem_attr_array`. A frame without
//! an entry is shared. The kernel keeps an xarray over all frames; here ranges hold the truth and
//! each slot has a bitmap, so that a fault reads one bit without a lock.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::OnceLock;

use tdx_defs::Gfn;

use crate::sync::atomic::{AtomicU64, Ordering};

/// The private frames of a VM, as disjoint ranges that do not touch: start → end.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct PrivateRanges(BTreeMap<u64, u64>);

impl PrivateRanges {
    /// From disjoint ranges that do not touch: start → end.
    pub(crate) fn from_parts(parts: BTreeMap<u64, u64>) -> Self {
        Self(parts)
    }

    /// The ranges: start → end.
    pub(crate) fn into_parts(self) -> BTreeMap<u64, u64> {
        self.0
    }

    pub(crate) fn contains(&self, gfn: Gfn) -> bool {
        let at = gfn.get();
        self.0
            .range(..=at)
            .next_back()
            .is_some_and(|(_, &end)| at < end)
    }

    /// Whether every frame of `range` has the attribute `private`.
    pub(crate) fn is_all(&self, range: &Range<u64>, private: bool) -> bool {
        let covering = self.0.range(..range.end).next_back();
        match covering {
            Some((&start, &end)) if private => start <= range.start && end >= range.end,
            None => !private,
            Some((_, &end)) => !private && end <= range.start,
        }
    }

    /// Gives every frame of `range` the attribute.
    pub(crate) fn set(&mut self, range: Range<u64>, private: bool) {
        let Range { mut start, mut end } = range;
        // Cut out, keeping what sticks out on both sides, then insert merged.
        let touching: Vec<(u64, u64)> = self
            .0
            .range(..=end)
            .rev()
            .take_while(|&(_, &to)| to >= start)
            .map(|(&from, &to)| (from, to))
            .collect();
        for (from, to) in touching {
            self.0.remove(&from);
            if private {
                start = start.min(from);
                end = end.max(to);
            } else {
                if from < start {
                    self.0.insert(from, start);
                }
                if to > end {
                    self.0.insert(end, to);
                }
            }
        }
        if private {
            self.0.insert(start, end);
        }
    }

    /// The private parts of `range`.
    pub(crate) fn within(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let before = self
            .0
            .range(..range.start)
            .next_back()
            .map(|(&from, &to)| (from, to));
        let inside = self.0.range(range.clone()).map(|(&from, &to)| (from, to));
        before
            .into_iter()
            .chain(inside)
            .map(move |(from, to)| from.max(range.start)..to.min(range.end))
            .filter(|part| part.start < part.end)
    }
}

/// Pages of one lazily made part of a bitmap: 4 KiB of bits.
const PART_PAGES: u64 = 32_768;

/// Which pages of a slot are private: one bit a page.
pub(crate) struct PrivateBits {
    parts: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl PrivateBits {
    pub(crate) fn new(pages: u64) -> Self {
        Self {
            parts: (0..pages.div_ceil(PART_PAGES))
                .map(|_| OnceLock::new())
                .collect(),
        }
    }

    pub(crate) fn get(&self, page: u64) -> bool {
        let part = self
            .parts
            .get((page / PART_PAGES) as usize)
            .and_then(OnceLock::get);
        let at = page % PART_PAGES;
        part.is_some_and(|words| {
            words[(at / 64) as usize].load(Ordering::Acquire) >> (at % 64) & 1 != 0
        })
    }

    pub(crate) fn set(&self, range: Range<u64>, private: bool) {
        let mut at = range.start;
        while at < range.end {
            let part_end = (at / PART_PAGES + 1) * PART_PAGES;
            let end = range.end.min(part_end);
            if let Some(part) = self.parts.get((at / PART_PAGES) as usize)
                && (private || part.get().is_some())
            {
                let words =
                    part.get_or_init(|| (0..PART_PAGES / 64).map(|_| AtomicU64::new(0)).collect());
                let base = at / PART_PAGES * PART_PAGES;
                set_bits(words, at - base..end - base, private);
            }
            at = end;
        }
    }
}

fn set_bits(words: &[AtomicU64], range: Range<u64>, value: bool) {
    let mut at = range.start;
    while at < range.end {
        let end = range.end.min((at / 64 + 1) * 64);
        let mask = (u64::MAX >> (64 - (end - at))) << (at % 64);
        let word = &words[(at / 64) as usize];
        if value {
            word.fetch_or(mask, Ordering::AcqRel);
        } else {
            word.fetch_and(!mask, Ordering::AcqRel);
        }
        at = end;
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ranges_merge_and_split() {
        let mut ranges = PrivateRanges::default();
        ranges.set(10..20, true);
        ranges.set(20..30, true);
        assert_eq!(ranges.0, BTreeMap::from([(10, 30)]), "neighbours merge");
        ranges.set(15..25, false);
        assert_eq!(
            ranges.0,
            BTreeMap::from([(10, 15), (25, 30)]),
            "a hole splits"
        );
        assert!(ranges.is_all(&(15..25), false) && ranges.is_all(&(11..15), true));
        assert!(!ranges.is_all(&(14..16), true) && !ranges.is_all(&(14..16), false));
    }

    proptest! {
        #[test]
        fn ranges_and_bits_agree_with_a_set(
            changes in prop::collection::vec((0usize..300, 1usize..100, any::<bool>()), 1..40),
        ) {
            let mut model = [false; 400];
            let mut ranges = PrivateRanges::default();
            let bits = PrivateBits::new(400);
            for (start, len, private) in changes {
                let range = start as u64..(start + len) as u64;
                let same = model[start..start + len].iter().all(|&p| p == private);
                prop_assert_eq!(ranges.is_all(&range, private), same);
                model[start..start + len].fill(private);
                ranges.set(range.clone(), private);
                bits.set(range, private);
            }
            let parts: Vec<_> = ranges.within(0..400).collect();
            let listed: Vec<bool> =
                (0..400).map(|gfn| parts.iter().any(|part| part.contains(&gfn))).collect();
            prop_assert_eq!(&listed[..], &model[..]);
            for (gfn, &private) in (0u64..).zip(&model) {
                prop_assert_eq!(ranges.contains(Gfn::new(gfn)), private);
                prop_assert_eq!(bits.get(gfn), private);
            }
        }
    }
}

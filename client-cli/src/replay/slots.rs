//! Memory slots that cover the touched addresses of a recording.
//!
//! A recording does not say how the VM's memory was laid out. RAM and ROM lie far apart, holes
//! inside RAM are small: so touched 2 MiB regions with less than 512 MiB between them share a
//! slot.

use crate::args::AddressRange;

/// Granularity of slots, in bytes.
const REGION: u64 = 2 << 20;
/// Largest hole inside a slot, in bytes.
const GAP: u64 = 512 << 20;
/// More slots than this are joined further.
const MAX_SLOTS: usize = 256;

/// One memory slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SlotPlan {
    /// Its number, from 0.
    pub id: u32,
    /// Guest physical addresses, without the SHARED bit.
    pub range: AddressRange,
}

/// Slots for pages given by their base addresses, in any order.
pub(super) fn layout(pages: impl IntoIterator<Item = u64>) -> Vec<SlotPlan> {
    let mut regions: Vec<u64> = pages.into_iter().map(|page| page / REGION).collect();
    regions.sort_unstable();
    regions.dedup();
    let mut gap = GAP;
    loop {
        let ranges = cluster(&regions, gap);
        if ranges.len() <= MAX_SLOTS {
            return (0..)
                .zip(ranges)
                .map(|(id, range)| SlotPlan { id, range })
                .collect();
        }
        gap = gap.saturating_mul(2);
    }
}

fn cluster(regions: &[u64], gap: u64) -> Vec<AddressRange> {
    let mut ranges: Vec<AddressRange> = Vec::new();
    for region in regions {
        let start = region * REGION;
        match ranges.last_mut() {
            Some(last) if start - last.end <= gap => last.end = start + REGION,
            _ => ranges.push(AddressRange {
                start,
                end: start + REGION,
            }),
        }
    }
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;

    const M: u64 = 1 << 20;
    const G: u64 = 1 << 30;

    #[test]
    fn regions_that_are_near_share_a_slot() {
        for (case, pages, want) in [
            ("nothing", vec![], vec![]),
            ("one page", vec![0x20_1000], vec![(2 * M, 4 * M)]),
            (
                "unsorted and twice",
                vec![4 * M, 0, 0x1000],
                vec![(0, 6 * M)],
            ),
            ("a gap of 512 MiB", vec![0, 514 * M], vec![(0, 516 * M)]),
            (
                "a wider gap",
                vec![0, 516 * M],
                vec![(0, 2 * M), (516 * M, 518 * M)],
            ),
            (
                "RAM and ROM",
                vec![0, 3 * M, 0xffff_f000],
                vec![(0, 4 * M), (4 * G - 2 * M, 4 * G)],
            ),
        ] {
            let slots = layout(pages);
            let ranges: Vec<_> = slots
                .iter()
                .map(|slot| (slot.range.start, slot.range.end))
                .collect();
            assert_eq!(ranges, want, "{case}");
            assert!((0..).zip(&slots).all(|(id, slot)| slot.id == id), "{case}");
        }
    }

    #[test]
    fn scattered_memory_is_joined_until_the_slots_are_few() {
        let pages = (0..2000).map(|index| index * G);
        let slots = layout(pages.clone());
        assert!((1..=MAX_SLOTS).contains(&slots.len()), "{}", slots.len());
        for page in pages {
            assert!(
                slots
                    .iter()
                    .any(|slot| slot.range.start <= page && page < slot.range.end)
            );
        }
    }
}

//! Sorted page ranges of guest physical memory.

use crate::args::AddressRange;
use tdx_defs::PAGE_SIZE;

/// Joins pages, given by their sorted base addresses, into ranges.
pub(super) fn join(pages: impl IntoIterator<Item = u64>) -> Vec<AddressRange> {
    let mut ranges: Vec<AddressRange> = Vec::new();
    for start in pages {
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = start + PAGE_SIZE,
            _ => ranges.push(AddressRange {
                start,
                end: start + PAGE_SIZE,
            }),
        }
    }
    ranges
}

/// What `whole` covers outside `holes`, which are sorted.
pub(super) fn subtract(whole: AddressRange, holes: &[AddressRange]) -> Vec<AddressRange> {
    let mut left = Vec::new();
    let mut start = whole.start;
    for hole in holes.iter().filter_map(|hole| hole.intersect(whole)) {
        if start < hole.start {
            left.push(AddressRange {
                start,
                end: hole.start,
            });
        }
        start = hole.end;
    }
    if start < whole.end {
        left.push(AddressRange {
            start,
            end: whole.end,
        });
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(start: u64, end: u64) -> AddressRange {
        AddressRange { start, end }
    }

    #[test]
    fn neighbouring_pages_become_one_range() {
        assert_eq!(
            join([0, 0x1000, 0x3000, 0x4000]),
            [range(0, 0x2000), range(0x3000, 0x5000)]
        );
    }

    #[test]
    fn holes_are_cut_out() {
        let whole = range(0x1000, 0x9000);
        for (case, holes, want) in [
            ("none", vec![], vec![whole]),
            (
                "at the start",
                vec![range(0, 0x2000)],
                vec![range(0x2000, 0x9000)],
            ),
            (
                "at the end",
                vec![range(0x8000, 0xa000)],
                vec![range(0x1000, 0x8000)],
            ),
            (
                "inside",
                vec![range(0x2000, 0x3000), range(0x5000, 0x6000)],
                vec![
                    range(0x1000, 0x2000),
                    range(0x3000, 0x5000),
                    range(0x6000, 0x9000),
                ],
            ),
            ("all of it", vec![range(0, 0x10000)], vec![]),
        ] {
            assert_eq!(subtract(whole, &holes), want, "{case}");
        }
    }
}

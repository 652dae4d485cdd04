//! What a recording of a boot must come to, counted from its text and from nothing else.

use std::collections::BTreeSet;
use std::io::BufRead as _;

use client_cli::trace;

use crate::common::data;

/// Guest memory that stays private where only a part is: half of RAM, in pieces that begin and end
/// inside 1 GiB and 2 MiB regions, and the firmware.
pub(crate) const RANGES: &str = "0-d01000,a000000-20000000,30033000-40000000,ffe00000-100000000";

/// Counts of a recording whose memory is private in some ranges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Expected {
    pub(crate) events: u64,
    pub(crate) vcpus: u64,
    /// Distinct pages: each is mapped by the first touch of it.
    pub(crate) pages: u64,
    /// Those of them that are private.
    pub(crate) private: u64,
    /// Touches of private pages behind the first one.
    pub(crate) private_again: u64,
    /// Mirror tables below the root that private pages need, at four levels.
    pub(crate) tables: u64,
}

impl Expected {
    /// Touches that find their page mapped.
    pub(crate) fn again(&self) -> u64 {
        self.events - self.pages
    }
}

/// `--private` and its ranges.
pub(crate) fn ranges(private: &str) -> Vec<(u64, u64)> {
    let hex = |word: &str| u64::from_str_radix(word, 16).unwrap();
    match private {
        "all" => vec![(0, u64::MAX)],
        "none" => Vec::new(),
        ranges => ranges
            .split(',')
            .map(|range| range.split_once('-').unwrap())
            .map(|(start, end)| (hex(start), hex(end)))
            .collect(),
    }
}

/// vCPU and address of each event.
pub(crate) fn touches(file: &str) -> Vec<(u64, u64)> {
    let lines = trace::open(&data(file)).unwrap().lines();
    let lines = lines.map(|line| line.unwrap());
    lines
        .filter(|line| line.contains("kvm_page_fault:"))
        .map(|line| {
            let after = |key| {
                let mut words = line.split_whitespace().skip_while(|word| *word != key);
                words.nth(1).unwrap().to_owned()
            };
            let address = after("address");
            let address = u64::from_str_radix(address.trim_start_matches("0x"), 16).unwrap();
            (after("vcpu").parse().unwrap(), address)
        })
        .collect()
}

/// Counts the touches.
pub(crate) fn expected(touches: &[(u64, u64)], private: &str) -> Expected {
    let ranges = ranges(private);
    let is_private = |address: u64| {
        ranges
            .iter()
            .any(|&(start, end)| (start..end).contains(&address))
    };
    let vcpus: BTreeSet<u64> = touches.iter().map(|&(vcpu, _)| vcpu).collect();
    let mut frames = [BTreeSet::new(), BTreeSet::new()];
    let mut private_touches = 0;
    for &(_, address) in touches {
        let private = is_private(address);
        private_touches += u64::from(private);
        frames[usize::from(private)].insert(address >> 12);
    }
    let [shared, private] = frames;
    let tables = [9, 18, 27].map(|shift| {
        let tables: BTreeSet<u64> = private.iter().map(|frame| frame >> shift).collect();
        tables.len() as u64
    });
    Expected {
        events: touches.len() as u64,
        vcpus: vcpus.len() as u64,
        pages: (shared.len() + private.len()) as u64,
        private: private.len() as u64,
        private_again: private_touches - private.len() as u64,
        tables: tables.iter().sum(),
    }
}

/// The derivation itself, against what is written beside the recordings.
#[test]
fn counts_of_the_recordings_are_those_written_down_with_them() {
    for (file, events, pages) in [
        ("boot-small.trace", 5_000, 5_000),
        ("boot-1g-2vcpu.trace.zst", 180_129, 180_111),
        ("boot-1g-2vcpu-noinit.trace.zst", 182_342, 182_235),
        ("boot-1g-2vcpu.touch.zst", 279_540, 180_111),
    ] {
        let touches = touches(file);
        let all = expected(&touches, "all");
        assert_eq!(
            (all.events, all.pages, all.private),
            (events, pages, pages),
            "{file}"
        );
        let some = expected(&touches, RANGES);
        assert_eq!((some.events, some.pages), (events, pages), "{file}");
        assert!(
            some.private > 494 && some.private < pages - 494,
            "{file}: {some:?}"
        );
        let none = expected(&touches, "none");
        assert_eq!((none.private, none.tables), (0, 0), "{file}");
    }
}

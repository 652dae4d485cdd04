//! `--private`: which guest memory of a recording becomes private memory of a TD.

use std::str::FromStr;

use tdx_defs::PAGE_SIZE;

use super::number::{NumberError, hex_number};

/// More ranges than this are refused.
const MAX_RANGES: usize = 1024;

/// Which addresses are private.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PrivateMemory {
    /// Every page, unless the recorded address has the SHARED bit.
    #[default]
    All,
    /// No page: each access gets the SHARED bit.
    None,
    /// These ranges, ascending, apart from each other; the rest is shared.
    Ranges(Vec<AddressRange>),
}

/// Bytes from `start` up to `end`, which is left out. Both are page aligned, `start` is below.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct AddressRange {
    /// First byte.
    pub start: u64,
    /// The byte behind the last one.
    pub end: u64,
}

impl AddressRange {
    /// What both ranges cover.
    pub fn intersect(self, other: Self) -> Option<Self> {
        let range = Self {
            start: self.start.max(other.start),
            end: self.end.min(other.end),
        };
        (range.start < range.end).then_some(range)
    }

    /// Number of bytes.
    pub fn size(self) -> u64 {
        self.end - self.start
    }
}

/// Text that does not say which memory is private.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PrivateError {
    /// A range without its dash.
    #[error("{text:?} is not \"all\", \"none\" or START-END")]
    Form {
        /// As given.
        text: String,
    },
    /// A bound that is no number.
    #[error("bound of range {range:?}: {source}")]
    Bound {
        /// As given.
        range: String,
        /// What is wrong.
        source: NumberError,
    },
    /// A bound inside a page.
    #[error(
        "bound {value:#x} of range {range:?} is not a multiple of the page size {PAGE_SIZE:#x}"
    )]
    Unaligned {
        /// As given.
        range: String,
        /// The bound.
        value: u64,
    },
    /// A range without bytes.
    #[error("range {range:?} is empty: the end is exclusive and must be above the start")]
    Empty {
        /// As given.
        range: String,
    },
    /// Two ranges share bytes.
    #[error("ranges {first:#x}-{first_end:#x} and {second:#x}-{second_end:#x} overlap")]
    Overlap {
        /// Start of the lower one.
        first: u64,
        /// Its end.
        first_end: u64,
        /// Start of the upper one.
        second: u64,
        /// Its end.
        second_end: u64,
    },
    /// Too many of them.
    #[error("{count} ranges are above the limit of {MAX_RANGES}")]
    TooMany {
        /// How many.
        count: usize,
    },
}

impl FromStr for PrivateMemory {
    type Err = PrivateError;

    fn from_str(text: &str) -> Result<Self, PrivateError> {
        match text {
            "all" => return Ok(Self::All),
            "none" => return Ok(Self::None),
            _ => {}
        }
        let mut ranges = text.split(',').map(range).collect::<Result<Vec<_>, _>>()?;
        if ranges.len() > MAX_RANGES {
            return Err(PrivateError::TooMany {
                count: ranges.len(),
            });
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[1].start < pair[0].end {
                return Err(PrivateError::Overlap {
                    first: pair[0].start,
                    first_end: pair[0].end,
                    second: pair[1].start,
                    second_end: pair[1].end,
                });
            }
        }
        Ok(Self::Ranges(ranges))
    }
}

pub(super) fn range(text: &str) -> Result<AddressRange, PrivateError> {
    let given = || text.to_owned();
    let (start, end) = text
        .split_once('-')
        .ok_or_else(|| PrivateError::Form { text: given() })?;
    let bound = |text: &str| {
        let value = hex_number(text.trim()).map_err(|source| PrivateError::Bound {
            range: given(),
            source,
        })?;
        match value % PAGE_SIZE {
            0 => Ok(value),
            _ => Err(PrivateError::Unaligned {
                range: given(),
                value,
            }),
        }
    };
    let range = AddressRange {
        start: bound(start)?,
        end: bound(end)?,
    };
    if range.start >= range.end {
        return Err(PrivateError::Empty { range: given() });
    }
    Ok(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_all_none_or_sorted_ranges() {
        let ranges = |bounds: &[(u64, u64)]| {
            PrivateMemory::Ranges(
                bounds
                    .iter()
                    .map(|&(start, end)| AddressRange { start, end })
                    .collect(),
            )
        };
        for (text, want) in [
            ("all", PrivateMemory::All),
            ("none", PrivateMemory::None),
            ("0-1000", ranges(&[(0, 0x1000)])),
            (
                "0x2000-0x3000,0-0x1000",
                ranges(&[(0, 0x1000), (0x2000, 0x3000)]),
            ),
            (
                "1000-2000,2000-3000",
                ranges(&[(0x1000, 0x2000), (0x2000, 0x3000)]),
            ),
            ("0-1G", ranges(&[(0, 1 << 30)])),
        ] {
            assert_eq!(text.parse(), Ok(want), "{text}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_range_is_named() {
        for (text, want) in [
            ("", "is not \"all\""),
            ("some", "is not \"all\""),
            ("0-1000,", "is not \"all\""),
            ("0-zz", "\"zz\" is not a number"),
            ("0-123", "bound 0x123 of range \"0-123\" is not a multiple"),
            ("1000-1000", "is empty"),
            ("2000-1000", "is empty"),
            ("0-3000,2000-4000", "overlap"),
        ] {
            let error = text.parse::<PrivateMemory>().unwrap_err().to_string();
            assert!(error.contains(want), "{text}: {error}");
        }
    }
}

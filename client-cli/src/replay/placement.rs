//! Which tree a recorded access goes to.
//!
//! A recording of a plain guest has addresses without a SHARED bit, so the caller says what is
//! private. A recording of a TD carries the bit itself, and keeps it.

use tdx_defs::{GpaLayout, Gpaw, PAGE_SIZE, Visibility};

use crate::args::PrivateMemory;

/// The rule for one replay.
#[derive(Debug, Clone)]
pub(super) struct Placement {
    layout: GpaLayout,
    private: PrivateMemory,
}

/// Where one access goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Placed {
    /// The address as the guest uses it, with the SHARED bit for shared memory.
    pub(super) gpa: u64,
    /// First byte of its page, without the SHARED bit.
    pub(super) page: u64,
    /// Which tree.
    pub(super) visibility: Visibility,
}

impl Placement {
    pub(super) fn new(gpaw: Gpaw, private: PrivateMemory) -> Self {
        Self {
            layout: GpaLayout::new(gpaw),
            private,
        }
    }

    /// `None` for an address that is wider than the guest's.
    pub(super) fn place(&self, address: u64) -> Option<Placed> {
        if address >> self.layout.width() != 0 {
            return None;
        }
        let shared_bit = 1 << self.layout.shared_bit();
        let plain = address & !shared_bit;
        let visibility = if address & shared_bit != 0 || !self.is_private(plain) {
            Visibility::Shared
        } else {
            Visibility::Private
        };
        let gpa = match visibility {
            Visibility::Private => plain,
            Visibility::Shared => plain | shared_bit,
        };
        Some(Placed {
            gpa,
            page: plain & !(PAGE_SIZE - 1),
            visibility,
        })
    }

    pub(super) fn private(&self) -> &PrivateMemory {
        &self.private
    }

    fn is_private(&self, plain: u64) -> bool {
        match &self.private {
            PrivateMemory::All => true,
            PrivateMemory::None => false,
            PrivateMemory::Ranges(ranges) => {
                let behind = ranges.partition_point(|range| range.start <= plain);
                behind > 0 && plain < ranges[behind - 1].end
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_sends_accesses_to_its_tree() {
        use Visibility::{Private, Shared};
        let ranges: PrivateMemory = "1000-3000,5000-6000".parse().unwrap();
        let bit47 = 1 << 47;
        let bit51 = 1 << 51;
        for (case, gpaw, private, address, want) in [
            (
                "all",
                Gpaw::W48,
                PrivateMemory::All,
                0x1234,
                Some((0x1234, 0x1000, Private)),
            ),
            (
                "all, recorded as shared",
                Gpaw::W48,
                PrivateMemory::All,
                bit47 | 0x1234,
                Some((bit47 | 0x1234, 0x1000, Shared)),
            ),
            (
                "none",
                Gpaw::W48,
                PrivateMemory::None,
                0x1234,
                Some((bit47 | 0x1234, 0x1000, Shared)),
            ),
            (
                "in a range",
                Gpaw::W48,
                ranges.clone(),
                0x2fff,
                Some((0x2fff, 0x2000, Private)),
            ),
            (
                "behind a range",
                Gpaw::W48,
                ranges.clone(),
                0x3000,
                Some((bit47 | 0x3000, 0x3000, Shared)),
            ),
            (
                "before all",
                Gpaw::W48,
                ranges.clone(),
                0xfff,
                Some((bit47 | 0xfff, 0, Shared)),
            ),
            (
                "five levels",
                Gpaw::W52,
                ranges,
                bit51 | 0x5000,
                Some((bit51 | 0x5000, 0x5000, Shared)),
            ),
            (
                "bit 47 of a wide guest",
                Gpaw::W52,
                PrivateMemory::All,
                bit47,
                Some((bit47, bit47, Private)),
            ),
            ("too wide", Gpaw::W48, PrivateMemory::All, 1 << 48, None),
            (
                "a virtual address",
                Gpaw::W52,
                PrivateMemory::All,
                0xffff_ffff_8100_0000,
                None,
            ),
        ] {
            let placed = Placement::new(gpaw, private).place(address);
            let want = want.map(|(gpa, page, visibility)| Placed {
                gpa,
                page,
                visibility,
            });
            assert_eq!(placed, want, "{case}");
        }
    }
}

//! Which bit of a guest physical address says "shared".
//!
//! Source: `kvm_gfn_direct_bits()`, `kvm_is_addr_direct()`, arch/x86/kvm/mmu.h; TDX module ABI,
//! CONFIG_FLAGS.GPAW.

use crate::{Gfn, Gpa, Level, PAGE_SHIFT};

/// Guest physical address width of a TD.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Gpaw {
    /// 48 bits, 4-level tables, SHARED bit 47.
    #[default]
    W48,
    /// 52 bits, 5-level tables, SHARED bit 51.
    W52,
}

/// Whether an address names memory that the host may read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Visibility {
    /// Guest memory under the TD's key, mapped by the module.
    Private,
    /// Memory that host and guest both see, mapped by KVM's direct root.
    Shared,
}

/// The address layout of one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct GpaLayout {
    gpaw: Gpaw,
}

impl GpaLayout {
    /// The layout for an address width.
    pub const fn new(gpaw: Gpaw) -> Self {
        Self { gpaw }
    }

    /// The width.
    pub const fn gpaw(self) -> Gpaw {
        self.gpaw
    }

    /// Width in bits: 48 or 52.
    pub const fn width(self) -> u32 {
        match self.gpaw {
            Gpaw::W48 => 48,
            Gpaw::W52 => 52,
        }
    }

    /// Number of the SHARED bit: 47 or 51.
    pub const fn shared_bit(self) -> u32 {
        self.width() - 1
    }

    /// The SHARED bit as an address mask.
    pub const fn shared_mask(self) -> u64 {
        1 << self.shared_bit()
    }

    /// The SHARED bit as a frame-number mask: `gfn_direct_bits`.
    pub const fn direct_bits(self) -> u64 {
        1 << (self.shared_bit() - PAGE_SHIFT)
    }

    /// Frames that are addressable without the SHARED bit.
    pub const fn gfn_limit(self) -> u64 {
        self.direct_bits()
    }

    /// Level of the root tables.
    pub const fn root_level(self) -> Level {
        match self.gpaw {
            Gpaw::W48 => Level::L512G,
            Gpaw::W52 => Level::L256T,
        }
    }

    /// Splits an address into frame and visibility. The offset in the page is dropped.
    pub const fn split(self, gpa: Gpa) -> (Gfn, Visibility) {
        let frame = gpa.frame().get();
        if frame & self.direct_bits() != 0 {
            (Gfn::new(frame & !self.direct_bits()), Visibility::Shared)
        } else {
            (Gfn::new(frame), Visibility::Private)
        }
    }

    /// The address by which the guest reaches `gfn`.
    pub const fn join(self, gfn: Gfn, visibility: Visibility) -> Gpa {
        match visibility {
            Visibility::Private => gfn.base(),
            Visibility::Shared => Gfn::new(gfn.get() | self.direct_bits()).base(),
        }
    }

    /// Whether the frame carries the SHARED bit (`kvm_is_gfn_alias`).
    pub const fn is_alias(self, gfn: Gfn) -> bool {
        gfn.get() & self.direct_bits() != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn split_separates_visibility_from_frame() {
        let narrow = GpaLayout::new(Gpaw::W48);
        let wide = GpaLayout::new(Gpaw::W52);
        for (case, layout, gpa, frame, visibility) in [
            ("first private page", narrow, 0x1000, 1, Visibility::Private),
            (
                "its shared alias",
                narrow,
                (1 << 47) + 0x1000,
                1,
                Visibility::Shared,
            ),
            ("offset is dropped", narrow, 0x1fff, 1, Visibility::Private),
            (
                "bit 47 is an ordinary bit at 52",
                wide,
                1 << 47,
                1 << 35,
                Visibility::Private,
            ),
            (
                "shared alias at 52",
                wide,
                (1 << 51) + 0x1000,
                1,
                Visibility::Shared,
            ),
        ] {
            assert_eq!(
                layout.split(Gpa::new(gpa)),
                (Gfn::new(frame), visibility),
                "{case}"
            );
            assert_eq!(
                layout.join(Gfn::new(frame), visibility).frame(),
                Gpa::new(gpa).frame()
            );
        }
    }

    #[test]
    fn root_index_of_the_first_shared_page() {
        for (gpaw, index) in [(Gpaw::W48, 256), (Gpaw::W52, 8)] {
            let layout = GpaLayout::new(gpaw);
            let shift = 9 * (layout.root_level().get() - 1);
            assert_eq!((layout.direct_bits() >> shift) & 0x1ff, index);
        }
    }
}

//! One shadow page-table entry (SPTE), bit for bit as KVM writes it on a TDX host.
//!
//! Source: arch/x86/kvm/mmu/spte.h and spte.c, `make_spte()`, `make_nonleaf_spte()`,
//! `kvm_mmu_set_ept_masks()`. FROZEN_SPTE was called REMOVED_SPTE before the mirror roots were
//! merged; the number is the same.
//!
//! Units: an entry holds a `Pfn` in bits 51:12.

use tdx_defs::{Hpa, Level, Pfn};

/// Readable; also KVM's generic "user" bit.
pub(crate) const READ: u64 = 1 << 0;
/// Writable.
pub(crate) const WRITE: u64 = 1 << 1;
/// Executable.
pub(crate) const EXEC: u64 = 1 << 2;
/// Memory type write-back.
const MT_WB: u64 = 6 << 3;
/// The guest's PAT is ignored: set in ordinary VMs, clear for TDs.
const IPAT: u64 = 1 << 6;
/// Large leaf.
pub(crate) const LARGE: u64 = 1 << 7;
/// Accessed.
pub(crate) const ACCESSED: u64 = 1 << 8;
/// Dirty.
pub(crate) const DIRTY: u64 = 1 << 9;
/// The only test for presence that KVM uses.
pub(crate) const MMU_PRESENT: u64 = 1 << 11;
/// The host's own mapping is writable.
pub(crate) const HOST_WRITABLE: u64 = 1 << 57;
/// KVM may make the entry writable without a fault of its own.
pub(crate) const MMU_WRITABLE: u64 = 1 << 58;
/// Suppress #VE.
pub(crate) const SUPPRESS_VE: u64 = 1 << 63;
/// Bits 51:12.
pub(crate) const PFN_MASK: u64 = 0x000F_FFFF_FFFF_F000;

/// SHADOW_NONPRESENT_VALUE: what every entry of a fresh table holds. Zero would be an MMIO SPTE.
pub(crate) const NP: u64 = SUPPRESS_VE;
/// FROZEN_SPTE: a change of the entry is in flight, other walkers retry.
pub(crate) const FROZEN: u64 = NP | 0x5A0;
/// What tells an MMIO SPTE: suppress-#VE clear, and RWX.
const MMIO_MASK: u64 = SUPPRESS_VE | RWX;
const RWX: u64 = READ | WRITE | EXEC;
/// An ordinary VM's MMIO SPTE is writable and executable but not readable, which is an EPT
/// misconfiguration (VMX_EPT_MISCONFIG_WX_VALUE). In a TD's all three are clear, so that the
/// processor raises #VE in the guest.
const MMIO_WX: u64 = WRITE | EXEC;
/// MMIO generation: low 8 bits at 10:3, high 11 bits at 62:52.
const MMIO_GEN_LOW_SHIFT: u32 = 3;
const MMIO_GEN_HIGH_SHIFT: u32 = 52;
/// MMIO_SPTE_GEN_MASK: 19 bits.
pub(crate) const MMIO_GEN_MASK: u32 = 0x7_FFFF;

/// What an entry is, for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SpteKind {
    /// Nothing.
    NotPresent,
    /// A change is in flight.
    Frozen,
    /// Link to a table.
    Table,
    /// Mapped page.
    Leaf,
    /// Remembered absence of memory.
    Mmio,
}

impl std::fmt::Display for SpteKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NotPresent => "np",
            Self::Frozen => "frozen",
            Self::Table => "table",
            Self::Leaf => "leaf",
            Self::Mmio => "mmio",
        })
    }
}

/// The kind of an entry of `level`.
pub(crate) fn kind(spte: u64, level: Level) -> SpteKind {
    if spte == FROZEN {
        SpteKind::Frozen
    } else if is_leaf(spte, level) {
        SpteKind::Leaf
    } else if is_present(spte) {
        SpteKind::Table
    } else if is_mmio(spte) {
        SpteKind::Mmio
    } else {
        SpteKind::NotPresent
    }
}

pub(crate) const fn is_present(spte: u64) -> bool {
    spte & MMU_PRESENT != 0
}

/// Present, and no table below it.
pub(crate) const fn is_leaf(spte: u64, level: Level) -> bool {
    is_present(spte) && (level.get() == 1 || spte & LARGE != 0)
}

/// Present, and a table below it.
pub(crate) const fn is_table(spte: u64, level: Level) -> bool {
    is_present(spte) && !is_leaf(spte, level)
}

/// The match of an MMIO value (`kvm_mmu_set_mmio_spte_mask`), a TD's or an ordinary VM's: an
/// all-zero entry is one. Everything else that KVM writes has bit 63 set.
pub(crate) const fn is_mmio(spte: u64) -> bool {
    matches!(spte & MMIO_MASK, 0 | MMIO_WX)
}

/// Whether an access through the entry can raise #VE by mistake: suppress-#VE is clear, and it is
/// no MMIO value.
pub(crate) const fn may_raise_ve(spte: u64) -> bool {
    spte & SUPPRESS_VE == 0 && !is_mmio(spte)
}

/// Present, readable, writable and executable, as the module maps every private page.
pub(crate) const fn is_private_leaf(spte: u64) -> bool {
    is_present(spte) && spte & RWX == RWX
}

pub(crate) const fn pfn(spte: u64) -> Pfn {
    Pfn::new((spte & PFN_MASK) >> tdx_defs::PAGE_SHIFT)
}

/// make_nonleaf_spte.
pub(crate) const fn nonleaf(table: Hpa) -> u64 {
    SUPPRESS_VE | MMU_PRESENT | ACCESSED | READ | WRITE | EXEC | table.get()
}

/// How a leaf comes about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeafTraits {
    /// The host maps the page writable.
    pub(crate) map_writable: bool,
    /// Made ahead of an access: "accessed" stays clear.
    pub(crate) prefetch: bool,
}

/// make_spte for a 4 KiB leaf of a TD (guest PAT honoured, A/D bits on).
pub(crate) const fn leaf_4k(pfn: Pfn, traits: LeafTraits) -> u64 {
    let mut spte = SUPPRESS_VE | MMU_PRESENT | MT_WB | READ | EXEC | pfn.base().get();
    if !traits.prefetch {
        spte |= ACCESSED;
    }
    if traits.map_writable {
        spte |= WRITE | DIRTY | HOST_WRITABLE | MMU_WRITABLE;
    }
    spte
}

/// What else decides about a leaf of a direct root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DirectTraits {
    /// The guest's PAT is ignored.
    pub(crate) ignore_pat: bool,
    /// Huge leaves are not executable (NX huge page mitigation).
    pub(crate) nx_huge_pages: bool,
    /// Somebody tracks writes of the frame.
    pub(crate) write_tracked: bool,
}

/// make_spte for a leaf of a direct root. `page` is the page of the leaf's first frame.
pub(crate) fn leaf(level: Level, page: Pfn, traits: LeafTraits, direct: DirectTraits) -> u64 {
    let mut spte = leaf_4k(page, traits);
    if level > Level::L4K {
        spte |= LARGE;
        if direct.nx_huge_pages {
            spte &= !EXEC;
        }
    }
    if direct.ignore_pat {
        spte |= IPAT;
    }
    if direct.write_tracked {
        spte &= !(WRITE | DIRTY | MMU_WRITABLE);
    }
    spte
}

/// make_small_spte: entry `index` of the table that replaces `huge`, a leaf above `level`.
pub(crate) fn small(huge: u64, level: Level, index: u64) -> u64 {
    let spte = huge + index * level.bytes();
    if level > Level::L4K {
        return spte;
    }
    // The mitigation is about huge pages only, so the small ones may execute again.
    spte & !LARGE | EXEC
}

/// make_huge_spte: the leaf of `level` that stands for the table whose first leaf is `small`.
pub(crate) fn huge(small: u64, level: Level, nx_huge_pages: bool) -> u64 {
    let spte = small & !(PFN_MASK & (level.bytes() - 1)) | LARGE;
    if nx_huge_pages { spte & !EXEC } else { spte }
}

/// Whether a changed leaf leaves something in TLBs that must go
/// (`leaf_spte_change_needs_tlb_flush`).
pub(crate) const fn needs_flush(old: u64, new: u64) -> bool {
    old & MMU_WRITABLE != 0 && new & MMU_WRITABLE == 0
}

/// make_mmio_spte: of a TD (`is_td`), or of an ordinary VM.
pub(crate) const fn mmio(gpa: u64, generation: u32, is_td: bool) -> u64 {
    let generation = (generation & MMIO_GEN_MASK) as u64;
    let value = if is_td { 0 } else { MMIO_WX };
    value
        | (gpa & PFN_MASK)
        | (generation & 0xFF) << MMIO_GEN_LOW_SHIFT
        | (generation >> 8) << MMIO_GEN_HIGH_SHIFT
}

/// get_mmio_spte_generation.
pub(crate) const fn mmio_generation(spte: u64) -> u32 {
    let low = (spte >> MMIO_GEN_LOW_SHIFT & 0xFF) as u32;
    let high = (spte >> MMIO_GEN_HIGH_SHIFT & 0x7FF) as u32;
    high << 8 | low
}

/// Access of a fault, as `is_access_allowed()` judges it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Access {
    pub(crate) write: bool,
    pub(crate) exec: bool,
}

impl Access {
    /// is_access_allowed.
    pub(crate) const fn allowed_by(self, spte: u64) -> bool {
        if self.exec {
            spte & EXEC != 0
        } else if self.write {
            spte & WRITE != 0
        } else {
            spte & READ != 0
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_are_kvms_bit_for_bit() {
        let page = Pfn::new(0x40001);
        let traits = |map_writable, prefetch| LeafTraits {
            map_writable,
            prefetch,
        };
        for (case, value, expected) in [
            ("np", NP, 0x8000_0000_0000_0000),
            ("frozen", FROZEN, 0x8000_0000_0000_05A0),
            (
                "table",
                nonleaf(Hpa::new(0x5000_3000)),
                0x8000_0000_5000_3907,
            ),
            (
                "leaf",
                leaf_4k(page, traits(true, false)),
                0x8600_0000_4000_1B37,
            ),
            (
                "prefaulted leaf",
                leaf_4k(page, traits(true, true)),
                0x8600_0000_4000_1A37,
            ),
            (
                "read-only leaf",
                leaf_4k(page, traits(false, false)),
                0x8000_0000_4000_1935,
            ),
        ] {
            assert_eq!(value, expected, "{case}: {value:#x}");
        }
    }

    #[test]
    fn kinds_follow_presence_level_and_the_large_bit() {
        let leaf = leaf_4k(
            Pfn::new(1),
            LeafTraits {
                map_writable: true,
                prefetch: false,
            },
        );
        for (case, spte, level, expected) in [
            ("np", NP, Level::L4K, SpteKind::NotPresent),
            ("frozen", FROZEN, Level::L2M, SpteKind::Frozen),
            (
                "table",
                nonleaf(Hpa::new(0x1000)),
                Level::L2M,
                SpteKind::Table,
            ),
            ("leaf", leaf, Level::L4K, SpteKind::Leaf),
            ("large leaf", leaf | LARGE, Level::L2M, SpteKind::Leaf),
            ("zero", 0, Level::L4K, SpteKind::Mmio),
            (
                "mmio",
                mmio(0x1000, 0x7_FFFF, true),
                Level::L4K,
                SpteKind::Mmio,
            ),
            (
                "misconfiguration",
                mmio(0x1000, 0x7_FFFF, false),
                Level::L4K,
                SpteKind::Mmio,
            ),
        ] {
            assert_eq!(kind(spte, level), expected, "{case}");
        }
    }

    #[test]
    fn leaves_of_the_direct_root_are_kvms_bit_for_bit() {
        let page = Pfn::new(0x40200);
        let writable = LeafTraits {
            map_writable: true,
            prefetch: false,
        };
        let td = DirectTraits {
            ignore_pat: false,
            nx_huge_pages: false,
            write_tracked: false,
        };
        let ordinary = DirectTraits {
            ignore_pat: true,
            ..td
        };
        let nx = DirectTraits {
            nx_huge_pages: true,
            ..td
        };
        let tracked = DirectTraits {
            write_tracked: true,
            ..td
        };
        for (case, level, direct, expected) in [
            ("4K", Level::L4K, td, 0x8600_0000_4020_0B37),
            ("2M", Level::L2M, td, 0x8600_0000_4020_0BB7),
            ("1G", Level::L1G, td, 0x8600_0000_4020_0BB7),
            ("ordinary", Level::L4K, ordinary, 0x8600_0000_4020_0B77),
            ("NX 2M", Level::L2M, nx, 0x8600_0000_4020_0BB3),
            ("NX 4K", Level::L4K, nx, 0x8600_0000_4020_0B37),
            ("tracked", Level::L4K, tracked, 0x8200_0000_4020_0935),
        ] {
            let value = leaf(level, page, writable, direct);
            assert_eq!(value, expected, "{case}: {value:#x}");
        }
    }

    #[test]
    fn split_and_recovery_undo_each_other() {
        let big = 0x8600_0000_4000_0BB7;
        assert_eq!(small(big, Level::L4K, 3), 0x8600_0000_4000_3B37);
        assert_eq!(small(big, Level::L2M, 3), 0x8600_0000_4060_0BB7);
        let nx = big & !EXEC;
        assert_eq!(small(nx, Level::L4K, 0), 0x8600_0000_4000_0B37);
        assert_eq!(small(nx, Level::L2M, 0), nx);
        for index in [0, 3, 511] {
            let child = small(big, Level::L4K, index);
            assert_eq!(huge(child, Level::L2M, false), big);
            assert_eq!(huge(child, Level::L2M, true), nx);
        }
    }

    #[test]
    fn mmio_entries_keep_their_generation() {
        for generation in [0, 1, 0xFF, 0x100, 0x7_FFFF] {
            for is_td in [true, false] {
                let spte = mmio(0x1234_5000, generation, is_td);
                assert!(is_mmio(spte) && !is_present(spte));
                assert_eq!(mmio_generation(spte), generation);
                assert_eq!(spte & 0x000F_FFFF_FFFF_F000, 0x1234_5000);
            }
        }
        assert_eq!(mmio(0x1000_0000, 0xA, false), 0x1000_0056);
    }
}

//! What an entry says, in the two forms that hardware knows.
//!
//! Source: arch/x86/kvm/mmu/spte.h; the masks of `kvm_mmu_reset_all_pte_masks()` (NPT) and
//! `kvm_mmu_set_ept_masks()` (EPT). Memory type and user bits have no counterpart and are left out.

/// Which hardware walks the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// AMD.
    Npt,
    /// Intel, and the model.
    Ept,
}

const FRAME: u64 = 0x000F_FFFF_FFFF_F000;
const NOT_PRESENT: u64 = 1 << 63;
/// FROZEN_SPTE of 6.18 and of 7.2, without bit 63.
const FROZEN: [u64; 2] = [0x5A0, 0x1A0];
const WRITE: u64 = 1 << 1;
const HUGE: u64 = 1 << 7;
const MMU_PRESENT: u64 = 1 << 11;
const NPT_NX: u64 = 1 << 63;
const EPT_EXEC: u64 = 1 << 2;

/// An entry without its page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    NotPresent,
    Frozen,
    Mmio,
    Table,
    Leaf(Rights),
}

/// Bits of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Rights {
    pub(super) write: bool,
    pub(super) exec: bool,
    host_writable: bool,
    mmu_writable: bool,
    accessed: bool,
    dirty: bool,
}

/// An entry as both forms would show it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spte {
    pub(super) kind: Kind,
    /// The table or page, a frame number.
    pub(super) page: Option<u64>,
}

impl Format {
    /// From the first table that a trace links: only one of the two has the accessed bit there.
    pub(super) fn of_table(spte: u64) -> Self {
        let (npt, ept) = (1 << 5, 1 << 8);
        if spte & ept != 0 && spte & npt == 0 {
            Self::Ept
        } else {
            Self::Npt
        }
    }

    /// Reads an entry of a level.
    pub(super) fn decode(self, spte: u64, level: u64) -> Spte {
        let without_nx = spte & !NOT_PRESENT;
        let (kind, has_page) = if without_nx == 0 {
            (Kind::NotPresent, false)
        } else if FROZEN.contains(&without_nx) {
            (Kind::Frozen, false)
        } else if spte & MMU_PRESENT == 0 {
            (Kind::Mmio, false)
        } else if level == 1 || spte & HUGE != 0 {
            (Kind::Leaf(self.rights(spte)), true)
        } else {
            (Kind::Table, true)
        };
        Spte {
            kind,
            page: has_page.then_some((spte & FRAME) >> 12),
        }
    }

    fn rights(self, spte: u64) -> Rights {
        let bit = |bit: u32| spte >> bit & 1 != 0;
        let write = spte & WRITE != 0;
        match self {
            Self::Npt => Rights {
                write,
                exec: spte & NPT_NX == 0,
                host_writable: bit(9),
                mmu_writable: bit(10),
                accessed: bit(5),
                dirty: bit(6),
            },
            Self::Ept => Rights {
                write,
                exec: spte & EPT_EXEC != 0,
                host_writable: bit(57),
                mmu_writable: bit(58),
                accessed: bit(8),
                dirty: bit(9),
            },
        }
    }
}

impl Spte {
    /// In words, with accessed and dirty.
    pub(super) fn new_text(self) -> String {
        self.text(true)
    }

    /// In words, without what hardware sets while nobody looks.
    pub(super) fn old_text(self) -> String {
        self.text(false)
    }

    fn text(self, hardware: bool) -> String {
        let rights = match self.kind {
            Kind::NotPresent => return "np".into(),
            Kind::Frozen => return "frozen".into(),
            Kind::Mmio => return "mmio".into(),
            Kind::Table => return "table".into(),
            Kind::Leaf(rights) => rights,
        };
        let mut text = String::from("leaf:");
        for (is_set, letter) in [
            (rights.write, 'w'),
            (rights.exec, 'x'),
            (rights.host_writable, 'h'),
            (rights.mmu_writable, 'm'),
            (hardware && rights.accessed, 'a'),
            (hardware && rights.dirty, 'd'),
        ] {
            if is_set {
                text.push(letter);
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_says_the_same_in_both_forms() {
        for (npt, ept, level, text) in [
            (0x8000_0000_0000_0000, 0x8000_0000_0000_0000, 1, "np"),
            (0, 0x8000_0000_0000_0000, 1, "np"),
            (0x8000_0000_0000_05A0, 0x8000_0000_0000_05A0, 1, "frozen"),
            (0x8000_0000_0000_01A0, 0x8000_0000_0000_05A0, 2, "frozen"),
            (0x1_46CD_2827, 0x1_46CD_2907, 4, "table"),
            (0x1_4766_2E67, 0x0600_0001_4766_2B37, 1, "leaf:wxhmad"),
            (0x1_4766_2E65, 0x0600_0001_4766_2B35, 1, "leaf:xhmad"),
            (0x1_4800_0EE7, 0x0600_0001_4800_0BB7, 2, "leaf:wxhmad"),
            (
                0x8000_0001_4800_0EE7,
                0x0600_0001_4800_0BB3,
                2,
                "leaf:whmad",
            ),
        ] {
            let (npt, ept) = (
                Format::Npt.decode(npt, level),
                Format::Ept.decode(ept, level),
            );
            assert_eq!((npt.new_text(), ept.new_text()), (text.into(), text.into()));
            assert_eq!(npt.page, ept.page, "{text}");
        }
        assert_eq!(Format::of_table(0x1_46CD_2827), Format::Npt);
        assert_eq!(Format::of_table(0x1_46CD_2907), Format::Ept);
    }

    #[test]
    fn what_hardware_sets_is_not_in_an_old_value() {
        let used = Format::Npt.decode(0x1_4766_2E67, 1);
        let fresh = Format::Npt.decode(0x1_4766_2E07, 1);
        assert_eq!(used.old_text(), fresh.old_text());
        assert_ne!(used.new_text(), fresh.new_text());
    }
}

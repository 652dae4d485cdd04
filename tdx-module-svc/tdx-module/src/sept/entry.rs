//! The Secure EPT entry: one 64-bit word in the module's encoding.
//!
//! Source: TDX module source, x86_defs.h and sept_manager.h. Bits 2:0 R W X, 5:3 memory type,
//! 6 IPAT, 7 PS, 8 A, 9 D, 10 user execute, 11 TDEL (entry lock), 51:12 page, 52 TDHP (host
//! priority), 53 TDEX, 54 TDBW, 55 TDB, 56 TDP, 63 suppress #VE.
//!
//! Model: entries never hold key id bits. Release 1.5.34 stores them and takes them out again
//! whenever an entry is shown, so nobody can tell.

use tdx_defs::Hpa;

use super::states::SeptState;
use crate::platform::Release;

const RIGHTS: u64 = 0b111;
const USER_EXECUTE: u64 = 1 << 10;
const MEMORY_TYPE: u64 = 0b111 << 3;
const WRITE_BACK: u64 = 6 << 3;
const IPAT: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const ACCESSED: u64 = 1 << 8;
const DIRTY: u64 = 1 << 9;
const HPA: u64 = 0x000F_FFFF_FFFF_F000;
/// TDAL1 to TDAL3, bits 58 to 60; VM number 1 has the first.
const FIRST_ALIAS: u32 = 57;
const ALIASES: u64 = 0b111 << 58;
/// Bits 20:12 of the entry of a pending 2 MiB page.
const ACCEPT_COUNTER: u64 = 0x1F_F000;
const SUPPRESS_VE: u64 = 1 << 63;

/// TDEL: somebody works on the entry.
pub(super) const LOCKED: u64 = 1 << 11;
/// TDHP: a host call found the entry locked, and a guest has to let it go first.
pub(super) const HOST_PRIORITY: u64 = 1 << 52;

/// The bits of an entry that a state encoding sets: D, then TDEX to TDP, then IPAT and PS.
const fn spread(encoding: u8) -> u64 {
    let encoding = encoding as u64;
    (encoding & 1) << 9 | (encoding >> 1 & 0xF) << 53 | (encoding >> 5 & 0b11) << 6
}

/// The state encoding of an entry.
const fn gather(entry: u64) -> u8 {
    let bits = (entry >> 9 & 1) | (entry >> 53 & 0xF) << 1 | (entry >> 6 & 0b11) << 5;
    (bits & 0x7F) as u8
}

/// Writes and shows entries as a release does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct EntryFormat {
    /// What the access rights of a present entry look like.
    rights: u64,
}

impl EntryFormat {
    pub(crate) fn new(release: Release) -> Self {
        let rights = match release {
            Release::R1_5_05 => RIGHTS,
            Release::R1_5_34 => RIGHTS | USER_EXECUTE,
        };
        Self { rights }
    }

    /// An entry in `state` that points to `page`.
    pub(crate) fn entry(self, state: SeptState, page: Hpa) -> SeptEntry {
        let mut word = SUPPRESS_VE | (page.get() & HPA) | spread(state.encoding());
        if word & IPAT != 0 {
            word |= WRITE_BACK;
        }
        if state.is_present() {
            word |= self.rights;
        }
        SeptEntry(word)
    }
}

/// A Secure EPT entry as a value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct SeptEntry(pub(crate) u64);

impl SeptEntry {
    /// The initial value of every entry.
    pub(crate) const FREE: Self = Self(0x80E0_0000_0000_0000);

    /// The state.
    pub(crate) fn state(self) -> SeptState {
        SeptState::decode(gather(self.0))
    }

    /// The page behind a leaf, or the table behind a link.
    pub(crate) fn page(self) -> Hpa {
        Hpa::new(self.0 & HPA)
    }

    /// The page behind a leaf of a known level. A pending 2 MiB page keeps its accept counter in
    /// the low bits of its address.
    pub(crate) fn page_at(self, level: u8) -> Hpa {
        let size = tdx_defs::PAGE_SIZE << (9 * u32::from(level));
        Hpa::new(self.0 & HPA & !(size - 1))
    }

    /// 4 KiB parts of a pending 2 MiB page that are zeroed already.
    pub(crate) fn accept_counter(self) -> u64 {
        (self.0 & ACCEPT_COUNTER) >> 12
    }

    /// The entry of a pending 2 MiB page with another accept counter.
    pub(crate) fn with_accept_counter(self, parts: u64) -> Self {
        Self(self.0 & !ACCEPT_COUNTER | parts << 12 & ACCEPT_COUNTER)
    }

    /// Whether the processor may use it at all.
    pub(crate) fn has_rights(self) -> bool {
        self.0 & RIGHTS != 0
    }

    /// Bit 7: a page rather than a table.
    pub(crate) fn is_leaf(self) -> bool {
        self.0 & PS != 0
    }

    /// TDEL: whether somebody holds it.
    pub(crate) fn is_locked(self) -> bool {
        self.0 & LOCKED != 0
    }

    /// Whether the tree of an L2 VM (1 to 3) has a table beside the one behind this entry.
    pub(crate) fn is_aliased(self, vm: u8) -> bool {
        self.0 >> (FIRST_ALIAS + u32::from(vm)) & 1 != 0
    }

    /// The entry with an alias more.
    pub(crate) fn with_alias(self, vm: u8) -> Self {
        Self(self.0 | 1 << (FIRST_ALIAS + u32::from(vm)))
    }

    /// The entry with the aliases of another one.
    pub(crate) fn with_aliases_of(self, other: Self) -> Self {
        Self(self.0 | other.0 & ALIASES)
    }

    /// Whether a walk goes on below the entry.
    pub(crate) fn is_passable(self) -> bool {
        self.has_rights() && !self.is_leaf()
    }

    /// The value without what may differ between entries that are merged into a large one.
    pub(crate) fn merge_view(self) -> u64 {
        self.0 & !(ACCESSED | DIRTY | HOST_PRIORITY)
    }

    /// What the host is shown in RCX.
    pub(crate) fn architectural(self) -> u64 {
        let state = self.state();
        if state.is_leaf() {
            self.0 & (RIGHTS | MEMORY_TYPE | IPAT | PS | USER_EXECUTE | HPA | SUPPRESS_VE)
        } else if state.is_non_leaf() {
            self.0 & (RIGHTS | USER_EXECUTE | PS)
        } else {
            SUPPRESS_VE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_have_the_values_of_the_module() {
        let page = Hpa::new(0x4002_0000);
        for (state, old, new, shown) in [
            (
                SeptState::FREE,
                0x80E0_0000_0000_0000,
                0x80E0_0000_0000_0000,
                1 << 63,
            ),
            (
                SeptState::MAPPED,
                0x8000_0000_4002_00F7,
                0x8000_0000_4002_04F7,
                0x8000_0000_4002_00F7,
            ),
            (
                SeptState::BLOCKED,
                0x8080_0000_4002_00F0,
                0x8080_0000_4002_00F0,
                0x8000_0000_4002_00F0,
            ),
            (
                SeptState::PENDING,
                0x8100_0000_4002_00F0,
                0x8100_0000_4002_00F0,
                0x8000_0000_4002_00F0,
            ),
            (
                SeptState::NL_MAPPED,
                0x8000_0000_4002_0007,
                0x8000_0000_4002_0407,
                0x7,
            ),
            (
                SeptState::NL_BLOCKED,
                0x8080_0000_4002_0000,
                0x8080_0000_4002_0000,
                0,
            ),
        ] {
            let page = if state == SeptState::FREE {
                Hpa::new(0)
            } else {
                page
            };
            let entry = EntryFormat::new(Release::R1_5_05).entry(state, page);
            assert_eq!(entry.0, old, "{state:?}");
            assert_eq!(entry.state(), state);
            assert_eq!(entry.architectural(), shown, "{state:?}");
            assert_eq!(
                EntryFormat::new(Release::R1_5_34).entry(state, page).0,
                new,
                "{state:?}"
            );
        }
        assert_eq!(SeptEntry::FREE.state(), SeptState::FREE);
    }
}

//! States of a Secure EPT entry: encoding, flags, and the leaves that each allows.
//!
//! Source: TDX module source, sept_state_lookup. A test compares the table with the published one
//! (tests/data/sept-states.csv).
//!
//! The encoding is seven bits of the entry: bit 0 D, 1 TDEX, 2 TDBW, 3 TDB, 4 TDP, 5 IPAT, 6 PS.
//! D takes part only where a state of write-blocking export needs it.
//!
//! Model: non-blocking export is off, as in the plain configuration of the module, so its seven
//! states are listed for the record and never recognised in an entry.

use tdx_defs::{Leaf, PublicState};

/// A state, by its position in the table of states.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct SeptState(u8);

/// What hangs at an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    None,
    NonLeaf,
    Leaf,
}

/// One line of the table.
struct Row {
    name: &'static str,
    encoding: u8,
    public: PublicState,
    kind: Kind,
    /// `g` guest accessible, `f` fully accessible, `a` guest may accept, `b` blocked, `w` write
    /// blocked, `p` pending, `t` TLB tracking required, `e` exported.
    flags: &'static str,
    /// Letters of [`LEAVES`] and [`GUEST_LEAVES`].
    leaves: &'static str,
}

const fn row(
    name: &'static str,
    encoding: u8,
    public: u8,
    kind: Kind,
    flags: &'static str,
    leaves: &'static str,
) -> Row {
    Row {
        name,
        encoding,
        public: PublicState(public),
        kind,
        flags,
        leaves,
    }
}

/// Host leaves and their letter in the table.
const LEAVES: &[(Leaf, u8)] = &[
    (Leaf::MEM_PAGE_ADD, b'A'),
    (Leaf::MEM_SEPT_ADD, b'S'),
    (Leaf::MEM_PAGE_RELOCATE, b'L'),
    (Leaf::MEM_PAGE_AUG, b'G'),
    (Leaf::MEM_RANGE_BLOCK, b'B'),
    (Leaf::MEM_RD, b'R'),
    (Leaf::MEM_WR, b'W'),
    (Leaf::MEM_PAGE_DEMOTE, b'D'),
    (Leaf::MR_EXTEND, b'E'),
    (Leaf::MEM_PAGE_PROMOTE, b'P'),
    (Leaf::MEM_SEPT_RD, b'T'),
    (Leaf::MEM_PAGE_REMOVE, b'M'),
    (Leaf::MEM_SEPT_REMOVE, b'N'),
    (Leaf::MEM_RANGE_UNBLOCK, b'U'),
];

/// TDCALL leaves and their letter in the table.
#[cfg(test)]
const GUEST_LEAVES: &[(&str, u8)] = &[
    ("TDG.MEM.PAGE.ACCEPT", b'a'),
    ("TDG.MEM.PAGE.ATTR.RD", b'r'),
    ("TDG.MEM.PAGE.ATTR.WR", b'w'),
];

#[rustfmt::skip]
const STATES: [Row; 23] = [
    row("FREE", 0x0E, 0, Kind::None, "--------", "AS-G------T------"),
    row("REMOVED", 0x0C, 5, Kind::None, "--------", "---G------T------"),
    row("NL_MAPPED", 0x00, 132, Kind::NonLeaf, "------t-", "-S--B----PT-N----"),
    row("NL_BLOCKED", 0x08, 129, Kind::NonLeaf, "---b--t-", "---------PT-NU---"),
    row("MAPPED", 0x60, 4, Kind::Leaf, "gf----t-", "--L-BRWDE-TM---rw"),
    row("BLOCKED", 0x68, 1, Kind::Leaf, "---b--t-", "--L----D--TM-U---"),
    row("BLOCKEDW", 0x64, 8, Kind::Leaf, "g---w-t-", "--L-BR----TM---r-"),
    row("EXPORTED_BLOCKEDW", 0x66, 9, Kind::Leaf, "g---w--e", "--L--R----T----r-"),
    row("EXPORTED_DIRTY", 0x63, 11, Kind::Leaf, "gf----te", "--L--RW---T----rw"),
    row("EXPORTED_DIRTY_BLOCKEDW", 0x67, 12, Kind::Leaf, "g---w-te", "--L--R----T----r-"),
    row("EXPORTED", 0x66, 24, Kind::Leaf, "gf----te", "--L-BRW---T----rw"),
    row("EXPORTED_MODIFIED", 0x62, 25, Kind::Leaf, "gf----te", "--L-BRW---T----rw"),
    row("EXPORTED_BLOCKED", 0x02, 26, Kind::Leaf, "---b--te", "--L-------TM-U---"),
    row("EXPORTED_REMOVED", 0x04, 27, Kind::Leaf, "-------e", "---G------T------"),
    row("PENDING", 0x70, 2, Kind::Leaf, "--a--pt-", "--L-B--D--TM--arw"),
    row("PENDING_BLOCKED", 0x78, 3, Kind::Leaf, "---b-pt-", "--L----D--TM-U---"),
    row("PENDING_BLOCKEDW", 0x74, 16, Kind::Leaf, "----wpt-", "--L-B-----TM---r-"),
    row("PENDING_EXPORTED_BLOCKEDW", 0x76, 17, Kind::Leaf, "----wp-e", "--L-------T----r-"),
    row("PENDING_EXPORTED_DIRTY", 0x73, 19, Kind::Leaf, "--a--pte", "--L-------T---arw"),
    row("PENDING_EXPORTED_DIRTY_BLOCKEDW", 0x77, 20, Kind::Leaf, "----wpte", "--L-------T----r-"),
    row("PENDING_EXPORTED", 0x16, 29, Kind::Leaf, "--a--pte", "--L-B-----T---arw"),
    row("PENDING_EXPORTED_MODIFIED", 0x12, 30, Kind::Leaf, "--a--pte", "--L-B-----T---arw"),
    row("PENDING_EXPORTED_BLOCKED", 0x14, 31, Kind::Leaf, "---b-p-e", "--L-------TM-U---"),
];

/// The leaves by number: a bit for each state.
const MASKS: [u32; 64] = {
    let mut masks = [0; 64];
    let mut at = 0;
    while at < LEAVES.len() {
        let (leaf, letter) = LEAVES[at];
        let mut state = 0;
        while state < STATES.len() {
            if has(STATES[state].leaves, letter) {
                masks[leaf.0 as usize] |= 1 << state;
            }
            state += 1;
        }
        at += 1;
    }
    masks
};

/// Letters of [`Row::flags`], by bit of [`FLAGS`].
const FLAG_LETTERS: &[u8; 8] = b"gfabwpte";
const ACCESSIBLE: u8 = 1;
const ACCEPTABLE: u8 = 1 << 2;
const BLOCKED: u8 = 1 << 3;
const PENDING: u8 = 1 << 5;
const TRACKED: u8 = 1 << 6;

/// The flags by state.
const FLAGS: [u8; STATES.len()] = {
    let mut flags = [0; STATES.len()];
    let mut state = 0;
    while state < STATES.len() {
        let mut bit = 0;
        while bit < FLAG_LETTERS.len() {
            if has(STATES[state].flags, FLAG_LETTERS[bit]) {
                flags[state] |= 1 << bit;
            }
            bit += 1;
        }
        state += 1;
    }
    flags
};

/// States by encoding.
const DECODED: [SeptState; 128] = {
    // Combinations that no state has behave as free of rights and leaf: they are never written.
    let mut decoded = [SeptState(0); 128];
    let mut state: u8 = 0;
    while (state as usize) < STATES.len() {
        let row = &STATES[state as usize];
        let non_blocking_export = row.public.0 >= 24 && row.public.0 <= 31;
        if !non_blocking_export {
            decoded[row.encoding as usize] = SeptState(state);
            if !uses_dirty(row) {
                decoded[(row.encoding | 1) as usize] = SeptState(state);
            }
        }
        state += 1;
    }
    decoded
};

const fn has(letters: &str, letter: u8) -> bool {
    let letters = letters.as_bytes();
    let mut at = 0;
    while at < letters.len() {
        if letters[at] == letter {
            return true;
        }
        at += 1;
    }
    false
}

/// States that the D bit tells apart.
const fn uses_dirty(row: &Row) -> bool {
    has(row.flags, b'e')
}

impl SeptState {
    /// Nothing mapped.
    pub const FREE: Self = Self(0);
    /// Removed while an import runs.
    pub const REMOVED: Self = Self(1);
    /// Link to a Secure EPT page.
    pub const NL_MAPPED: Self = Self(2);
    /// Blocked link.
    pub const NL_BLOCKED: Self = Self(3);
    /// Page that the guest can use.
    pub const MAPPED: Self = Self(4);
    /// Page that was mapped and is blocked.
    pub const BLOCKED: Self = Self(5);
    /// Page that the guest has not accepted.
    pub const PENDING: Self = Self(14);
    /// Page that was pending and is blocked.
    pub const PENDING_BLOCKED: Self = Self(15);

    fn row(self) -> &'static Row {
        &STATES[usize::from(self.0)]
    }

    fn has_flag(self, flag: u8) -> bool {
        FLAGS[usize::from(self.0)] & flag != 0
    }

    /// The state that seven bits of an entry say.
    pub(crate) fn decode(encoding: u8) -> Self {
        DECODED[usize::from(encoding & 0x7F)]
    }

    /// The seven bits.
    pub(crate) fn encoding(self) -> u8 {
        self.row().encoding
    }

    /// The ABI name.
    pub fn name(self) -> &'static str {
        self.row().name
    }

    /// The number in RDX bits 15:8.
    pub fn public(self) -> PublicState {
        self.row().public
    }

    /// Whether a page hangs at the entry.
    pub fn is_leaf(self) -> bool {
        self.row().kind == Kind::Leaf
    }

    /// Whether a Secure EPT page hangs at the entry.
    pub fn is_non_leaf(self) -> bool {
        self.row().kind == Kind::NonLeaf
    }

    /// Whether a scan for removal counts the entry as free.
    pub fn is_vacant(self) -> bool {
        self.row().kind == Kind::None
    }

    /// Whether the entry is blocked.
    pub fn is_blocked(self) -> bool {
        self.has_flag(BLOCKED)
    }

    /// Whether the page waits for the guest, blocked or not.
    pub fn is_pending(self) -> bool {
        self.has_flag(PENDING)
    }

    /// Whether changing the entry needs TLB tracking, when the TD's state does, too.
    pub fn needs_tlb_tracking(self) -> bool {
        self.has_flag(TRACKED)
    }

    /// Whether the processor's walk passes or uses the entry.
    pub(crate) fn is_present(self) -> bool {
        self == Self::NL_MAPPED || self.has_flag(ACCESSIBLE)
    }

    /// Whether the guest can use the page.
    pub(crate) fn is_accessible(self) -> bool {
        self.has_flag(ACCESSIBLE)
    }

    /// Whether the guest may accept the page.
    pub(crate) fn is_acceptable(self) -> bool {
        self.has_flag(ACCEPTABLE)
    }

    /// Whether the state allows a TDCALL leaf, by its letter in the table.
    pub(crate) fn allows_guest(self, letter: u8) -> bool {
        has(self.row().leaves, letter)
    }

    /// Whether the state allows a leaf.
    pub fn allows(self, leaf: Leaf) -> bool {
        MASKS
            .get(usize::from(leaf.0))
            .is_some_and(|mask| mask >> self.0 & 1 != 0)
    }

    /// The state after TDH.MEM.RANGE.BLOCK.
    pub(crate) fn blocked(self) -> Self {
        match self {
            Self::NL_MAPPED => Self::NL_BLOCKED,
            state if state.is_pending() => Self::PENDING_BLOCKED,
            _ => Self::BLOCKED,
        }
    }

    /// The state after TDH.MEM.RANGE.UNBLOCK.
    pub(crate) fn unblocked(self) -> Self {
        match self {
            Self::NL_BLOCKED => Self::NL_MAPPED,
            Self::PENDING_BLOCKED => Self::PENDING,
            Self::BLOCKED => Self::MAPPED,
            state => state,
        }
    }
}

impl std::fmt::Debug for SeptState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_agrees_with_the_published_one() {
        /// What the published table has and this one leaves out: prose, and migration leaves.
        const LEFT_OUT: [&str; 8] = [
            "description",
            "group",
            "TDH.EXPORT.BLOCKW",
            "TDH.EXPORT.RESTORE",
            "TDH.EXPORT.MEM",
            "TDH.EXPORT.UNBLOCKW",
            "TDH.IMPORT.MEM",
            "checked",
        ];
        let mut lines = include_str!("../../tests/data/sept-states.csv").lines();
        let header: Vec<_> = lines.next().unwrap().split(',').collect();
        assert_eq!(lines.clone().count(), STATES.len());
        let unknown = header.iter().filter(|column| LEFT_OUT.contains(column));
        assert_eq!(unknown.count(), LEFT_OUT.len());
        let mut cells = 0;
        for (line, row) in lines.zip(&STATES) {
            let flag = |letter| if has(row.flags, letter) { "yes" } else { "no" };
            for (column, value) in header.iter().zip(line.split(',')) {
                let expected = match *column {
                    "state" => row.name.to_owned(),
                    "encoding" => format!("0x{:02X}", row.encoding),
                    "public_state" => row.public.0.to_string(),
                    "kind" => match row.kind {
                        Kind::None => "none".to_owned(),
                        Kind::NonLeaf => "non-leaf".to_owned(),
                        Kind::Leaf => "leaf".to_owned(),
                    },
                    "guest_accessible" => flag(b'g').to_owned(),
                    "guest_fully_accessible" => flag(b'f').to_owned(),
                    "guest_acceptable" => flag(b'a').to_owned(),
                    "blocked" => flag(b'b').to_owned(),
                    "write_blocked" => flag(b'w').to_owned(),
                    "pending" => flag(b'p').to_owned(),
                    "tlb_tracking_required" => flag(b't').to_owned(),
                    "exported" => flag(b'e').to_owned(),
                    leaf => match letter_of(leaf) {
                        Some(letter) if has(row.leaves, letter) => "yes".to_owned(),
                        Some(_) => "no".to_owned(),
                        None if LEFT_OUT.contains(&leaf) => continue,
                        None => panic!("unknown column {leaf}"),
                    },
                };
                assert_eq!(*value, expected, "{}: {column}", row.name);
                cells += 1;
            }
        }
        assert_eq!(
            cells,
            STATES.len() * (12 + LEAVES.len() + GUEST_LEAVES.len())
        );
    }

    fn letter_of(leaf: &str) -> Option<u8> {
        let host = LEAVES.iter().find(|(known, _)| known.name() == Some(leaf));
        let guest = GUEST_LEAVES.iter().find(|(known, _)| *known == leaf);
        host.map(|row| row.1).or(guest.map(|row| row.1))
    }

    #[test]
    fn named_states_stand_where_their_constants_say() {
        for (state, name) in [
            (SeptState::FREE, "FREE"),
            (SeptState::REMOVED, "REMOVED"),
            (SeptState::NL_MAPPED, "NL_MAPPED"),
            (SeptState::NL_BLOCKED, "NL_BLOCKED"),
            (SeptState::MAPPED, "MAPPED"),
            (SeptState::BLOCKED, "BLOCKED"),
            (SeptState::PENDING, "PENDING"),
            (SeptState::PENDING_BLOCKED, "PENDING_BLOCKED"),
        ] {
            assert_eq!(state.name(), name);
            assert_eq!(SeptState::decode(state.encoding()), state);
        }
    }

    #[test]
    fn blocking_and_unblocking_are_inverse() {
        for state in [SeptState::NL_MAPPED, SeptState::MAPPED, SeptState::PENDING] {
            assert!(state.blocked().is_blocked());
            assert_eq!(state.blocked().unblocked(), state);
        }
    }
}

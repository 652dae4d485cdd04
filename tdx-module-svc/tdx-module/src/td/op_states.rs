//! TDCS.OP_STATE: the states of a TD's operation and the leaves that each allows.
//!
//! Source: TDX module source, op_state_lookup. A test compares the tables with the published ones
//! (tests/data/op-states.csv).
//!
//! Transitions: UNINITIALIZED to INITIALIZED by TDH.MNG.INIT, INITIALIZED to RUNNABLE by
//! TDH.MR.FINALIZE. The others belong to migration and are not entered.

use tdx_defs::Leaf;

/// State of a TD's operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names of the ABI say it all")]
pub enum OpState {
    Uninitialized = 0,
    Initialized = 1,
    Runnable = 2,
    LiveExport = 3,
    PausedExport = 4,
    PostExport = 5,
    MemoryImport = 6,
    StateImport = 7,
    PostImport = 8,
    LiveImport = 9,
    FailedImport = 10,
    StartImport = 11,
    StartExport = 12,
}

/// Every state with its ABI name, by number, and the flags of [`OpState`]: `t` blocked entries
/// need TLB tracking, `i` initialised, `f` finalised.
const STATES: [(OpState, &str, &str); 13] = [
    (OpState::Uninitialized, "UNINITIALIZED", "---"),
    (OpState::Initialized, "INITIALIZED", "-i-"),
    (OpState::Runnable, "RUNNABLE", "tif"),
    (OpState::LiveExport, "LIVE_EXPORT", "tif"),
    (OpState::PausedExport, "PAUSED_EXPORT", "-if"),
    (OpState::PostExport, "POST_EXPORT", "-if"),
    (OpState::MemoryImport, "MEMORY_IMPORT", "-if"),
    (OpState::StateImport, "STATE_IMPORT", "-if"),
    (OpState::PostImport, "POST_IMPORT", "-if"),
    (OpState::LiveImport, "LIVE_IMPORT", "tif"),
    (OpState::FailedImport, "FAILED_IMPORT", "-i-"),
    (OpState::StartImport, "START_IMPORT", "---"),
    (OpState::StartExport, "START_EXPORT", "tif"),
];

/// Which states allow a leaf: one letter a state, by number.
const ALLOWED: &[(Leaf, &str)] = &[
    (Leaf::VP_ENTER, "--xx-----x--x"),
    (Leaf::MNG_ADDCX, "x------------"),
    (Leaf::MEM_PAGE_ADD, "-x-----------"),
    (Leaf::MEM_SEPT_ADD, "-xxx--xxxx--x"),
    (Leaf::VP_ADDCX, "-x-----x-----"),
    (Leaf::MEM_PAGE_RELOCATE, "-xxxxx--xx--x"),
    (Leaf::MEM_PAGE_AUG, "-xxx-----x--x"),
    (Leaf::MEM_RANGE_BLOCK, "-xxxxx--xx--x"),
    (Leaf::VP_CREATE, "-x-----x-----"),
    (Leaf::MNG_RD, "-xxxxxxxxxx-x"),
    (Leaf::MEM_RD, "-xxxxxxxxxx-x"),
    (Leaf::MNG_WR, "-xxx--xxxxx-x"),
    (Leaf::MEM_WR, "-xxx--xxxxx-x"),
    (Leaf::MEM_PAGE_DEMOTE, "-xxxxx--xx--x"),
    (Leaf::MR_EXTEND, "-x-----------"),
    (Leaf::MR_FINALIZE, "-x-----------"),
    (Leaf::VP_FLUSH, "xxxxxxxxxxxxx"),
    (Leaf::MNG_INIT, "x------------"),
    (Leaf::VP_INIT, "-x-----------"),
    (Leaf::MEM_PAGE_PROMOTE, "-xxxxx--xx--x"),
    (Leaf::MEM_SEPT_RD, "-xxxxxxxxxx-x"),
    (Leaf::VP_RD, "-xxxxxxxxxx-x"),
    (Leaf::MEM_PAGE_REMOVE, "-xxxxx--xxx-x"),
    (Leaf::MEM_SEPT_REMOVE, "-xxxxxxxxxx-x"),
    (Leaf::MEM_TRACK, "-xxxxxxxxx--x"),
    (Leaf::MEM_RANGE_UNBLOCK, "-xxxxx--xx--x"),
    (Leaf::VP_WR, "-xxx--xxxxx-x"),
];

/// The table above by leaf number: a bit for each state.
const MASKS: [u16; 64] = {
    let mut masks = [0; 64];
    let mut row = 0;
    while row < ALLOWED.len() {
        let (leaf, letters) = ALLOWED[row];
        let letters = letters.as_bytes();
        let mut state = 0;
        while state < letters.len() {
            if letters[state] == b'x' {
                masks[leaf.0 as usize] |= 1 << state;
            }
            state += 1;
        }
        row += 1;
    }
    masks
};

impl OpState {
    /// The state of a number that was stored from one.
    pub(crate) fn from_number(number: u8) -> Self {
        STATES
            .get(usize::from(number))
            .map_or(Self::Uninitialized, |row| row.0)
    }

    /// The number in TDCS.OP_STATE.
    pub fn number(self) -> u8 {
        self as u8
    }

    /// The ABI name.
    pub fn name(self) -> &'static str {
        STATES[usize::from(self.number())].1
    }

    /// Whether the state allows a leaf.
    pub fn allows(self, leaf: Leaf) -> bool {
        MASKS
            .get(usize::from(leaf.0))
            .is_some_and(|mask| mask >> self.number() & 1 != 0)
    }

    /// Whether entries have to be blocked and tracked before they are changed.
    pub fn needs_tlb_tracking(self) -> bool {
        self.has(b't')
    }

    /// Whether TDH.MNG.INIT, or an import in its place, has been done.
    pub fn is_initialized(self) -> bool {
        self.has(b'i')
    }

    /// Whether the TD's measurement is complete.
    pub fn is_finalized(self) -> bool {
        self.has(b'f')
    }

    fn has(self, flag: u8) -> bool {
        STATES[usize::from(self.number())]
            .2
            .as_bytes()
            .contains(&flag)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_agree_with_the_published_ones() {
        let mut lines = include_str!("../../tests/data/op-states.csv").lines();
        let header: Vec<_> = lines.next().unwrap().split(',').collect();
        assert_eq!(lines.clone().count(), STATES.len());
        // Migration and service TDs are left out.
        let is_left_out = |column: &str| {
            const AREAS: [&str; 6] = [
                "TDH.SERVTD.",
                "TDH.EXPORT.",
                "TDH.IMPORT.",
                "TDH.MEM.SCAN.",
                "TDH.MIG.",
                "TDG.SERVTD.",
            ];
            let flags = ["export_in_progress", "import_in_progress", "checked"];
            flags.contains(&column) || AREAS.iter().any(|area| column.starts_with(area))
        };
        let mut cells = 0;
        for (row, line) in lines.enumerate() {
            let (state, name, _) = STATES[row];
            for (column, value) in header.iter().zip(line.split(',')) {
                let known = match *column {
                    "op_state" => name == value,
                    "value" => value.parse() == Ok(state.number()),
                    "tlb_tracking_required" => state.needs_tlb_tracking() == (value == "yes"),
                    "any_initialized" => state.is_initialized() == (value == "yes"),
                    "any_finalized" => state.is_finalized() == (value == "yes"),
                    leaf => match leaf.parse::<Leaf>() {
                        Ok(leaf) => state.allows(leaf) == (value == "yes"),
                        Err(_) if is_left_out(leaf) => continue,
                        Err(unknown) => panic!("{unknown}"),
                    },
                };
                assert!(known, "{name}: {column} is {value}");
                cells += 1;
            }
        }
        assert_eq!(cells, STATES.len() * (5 + ALLOWED.len()));
    }
}

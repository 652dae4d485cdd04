//! What the page gets. Addresses and entries are text in hex: a script has no 64-bit numbers.

use mirror_proto::mmu as wire;
use serde::Serialize;
use tdp_mmu::MapCell;
use tdx_defs::PublicState;

use crate::metrics::{Event, Outcome};
use crate::registry::VmEntry;

/// An address or an entry.
pub(super) fn hex(value: u64) -> String {
    format!("{value:#x}")
}

#[derive(Serialize)]
pub(super) struct Overview {
    pub(super) version: &'static str,
    pub(super) jaeger_url: String,
    pub(super) module: Module,
    /// The first ones by id.
    pub(super) vms: Vec<VmRow>,
    pub(super) vms_total: usize,
}

#[derive(Serialize)]
pub(super) struct Module {
    pub(super) up: bool,
    pub(super) instance: Option<String>,
    pub(super) reason: Option<String>,
    pub(super) host_pages_in_use: u64,
}

#[derive(Serialize)]
pub(super) struct VmRow {
    pub(super) id: u64,
    pub(super) label: String,
    pub(super) state: String,
    pub(super) reason: Option<String>,
    pub(super) mode: &'static str,
    pub(super) vcpus: u32,
    pub(super) hkid: Option<u32>,
    pub(super) pages_4k: u64,
    pub(super) pages_2m: u64,
    pub(super) pages_1g: u64,
    pub(super) page_table_bytes: u64,
    /// Bytes of all slots.
    pub(super) slot_bytes: u64,
}

impl VmRow {
    pub(super) fn of(entry: &VmEntry, info: &tdp_mmu::VmInfo) -> Self {
        let (state, reason) = match entry.lost() {
            Some(reason) => ("dead", Some(reason)),
            None => (info.state, info.reason.clone()),
        };
        Self {
            id: entry.id,
            label: entry.label.clone(),
            state: state.to_owned(),
            reason,
            mode: match info.mode {
                tdp_mmu::Mode::Batched => "batched",
                tdp_mmu::Mode::Kernel => "kernel",
            },
            vcpus: info.vcpus,
            hkid: info.hkid,
            pages_4k: info.pages_4k,
            pages_2m: info.pages_2m,
            pages_1g: info.pages_1g,
            page_table_bytes: entry.vm.held().page_table_bytes,
            slot_bytes: info.slots.iter().map(|slot| slot.size).sum(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct VmPage {
    #[serde(flatten)]
    pub(super) row: VmRow,
    pub(super) tdr: String,
    pub(super) mrtd: Option<String>,
    /// Number of the SHARED bit.
    pub(super) shared_bit: u32,
    /// The first ones by address.
    pub(super) slots: Vec<SlotRow>,
    pub(super) slots_total: usize,
    /// First byte behind the last slot.
    pub(super) memory_end: String,
}

#[derive(Serialize)]
pub(super) struct SlotRow {
    pub(super) slot_id: u32,
    pub(super) gpa: String,
    pub(super) size: String,
    pub(super) guest_memfd: bool,
}

#[derive(Serialize)]
pub(super) struct Map {
    pub(super) gpa: String,
    pub(super) cell: String,
    pub(super) cells: usize,
    /// One in so many leaf entries was read.
    pub(super) sampled: u64,
    /// Neighbours that are alike, in ascending order.
    pub(super) runs: Vec<Run>,
}

/// What a cell is, as the legend names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    None,
    Free,
    Shared,
    Private,
    Pending,
    Blocked,
    Frozen,
    Mixed,
}

/// Cells that are alike; pages are those of one of them.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Run {
    pub(super) n: usize,
    pub(super) state: State,
    pub(super) slot: u64,
    pub(super) private: u64,
    pub(super) shared: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sept: Option<&'static str>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub(super) differs: bool,
}

impl Run {
    fn of(cell: &MapCell) -> Self {
        Self {
            n: 1,
            state: state_of(cell),
            slot: cell.slot,
            private: cell.private,
            shared: cell.shared,
            sept: cell.sept.and_then(PublicState::name),
            differs: cell.differs,
        }
    }
}

fn state_of(cell: &MapCell) -> State {
    if cell.frozen > 0 {
        return State::Frozen;
    }
    match cell.sept {
        Some(PublicState::BLOCKED | PublicState::PENDING_BLOCKED) => return State::Blocked,
        Some(PublicState::PENDING) => return State::Pending,
        Some(PublicState::MAPPED) => return State::Private,
        _ => {}
    }
    match (cell.private > 0, cell.shared > 0, cell.slot > 0) {
        (true, true, _) => State::Mixed,
        (true, false, _) => State::Private,
        (false, true, _) => State::Shared,
        (false, false, true) => State::Free,
        (false, false, false) => State::None,
    }
}

/// Joins neighbours that are alike.
pub(super) fn runs(cells: &[MapCell]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for cell in cells {
        let mut next = Run::of(cell);
        match runs.last_mut() {
            Some(last)
                if {
                    next.n = last.n;
                    *last == next
                } =>
            {
                last.n += 1
            }
            _ => {
                next.n = 1;
                runs.push(next);
            }
        }
    }
    runs
}

#[derive(Serialize)]
pub(super) struct Walk {
    pub(super) gpa: String,
    pub(super) root: &'static str,
    /// Whether the module was asked.
    pub(super) asked: bool,
    pub(super) mapped: bool,
    pub(super) private_attribute: bool,
    pub(super) entries: Vec<WalkRow>,
}

#[derive(Serialize)]
pub(super) struct WalkRow {
    pub(super) level: u32,
    pub(super) index: u32,
    pub(super) spte: String,
    pub(super) kind: String,
    pub(super) hpa: String,
    pub(super) external_hpa: String,
    pub(super) sept_entry: Option<String>,
    pub(super) sept_state: Option<String>,
    pub(super) sept_hpa: Option<String>,
    pub(super) differs: bool,
}

/// Bits 51:12 of a Secure EPT entry.
const HPA_MASK: u64 = 0x000F_FFFF_FFFF_F000;

impl WalkRow {
    fn of(entry: &wire::WalkEntry, asked: bool) -> Self {
        let state = (!entry.sept_state.is_empty()).then(|| entry.sept_state.clone());
        let is_leaf = entry.kind == "leaf";
        // The module shows where a page lies, and not where its tables do.
        let page = entry
            .sept_entry
            .filter(|_| is_leaf)
            .map(|sept| sept & HPA_MASK);
        let agrees = match (&*entry.kind, state.as_deref()) {
            ("table", Some("NL_MAPPED")) | ("np", Some("FREE") | None) => true,
            ("leaf", Some("PENDING" | "MAPPED")) => page == Some(entry.hpa),
            _ => false,
        };
        Self {
            level: entry.level,
            index: entry.index,
            spte: hex(entry.spte),
            kind: entry.kind.clone(),
            hpa: hex(entry.hpa),
            external_hpa: hex(entry.external_hpa),
            sept_entry: entry.sept_entry.map(hex),
            sept_state: state,
            sept_hpa: page.map(hex),
            differs: asked && !agrees,
        }
    }
}

impl Walk {
    pub(super) fn of(gpa: u64, walk: &wire::GetWalkResponse, module: bool) -> Self {
        let is_mirror = walk.root() == wire::Root::Mirror;
        let asked = is_mirror && module;
        Self {
            gpa: hex(gpa),
            root: if is_mirror { "mirror" } else { "direct" },
            asked,
            mapped: walk.mapped,
            private_attribute: walk.private_attribute,
            entries: walk
                .entries
                .iter()
                .map(|entry| WalkRow::of(entry, asked))
                .collect(),
        }
    }
}

#[derive(Serialize)]
pub(super) struct Batches {
    /// Number of the newest batch.
    pub(super) last: u64,
    /// Ascending by number.
    pub(super) batches: Vec<BatchRow>,
    pub(super) round_trips: RoundTrips,
}

#[derive(Serialize)]
pub(super) struct RoundTrips {
    /// Upper bounds, in seconds.
    pub(super) bounds: Vec<f64>,
    /// Round trips up to each bound and above the one before; the last number is above all.
    pub(super) counts: Vec<u64>,
}

impl RoundTrips {
    pub(super) fn of((cumulative, all): (Vec<(f64, u64)>, u64)) -> Self {
        let (bounds, sums): (Vec<f64>, Vec<u64>) = cumulative.into_iter().unzip();
        let before = std::iter::once(0).chain(sums.iter().copied());
        let counts = sums
            .iter()
            .copied()
            .chain([all])
            .zip(before)
            // A batch that lands meanwhile may be in one number and not yet in the other.
            .map(|(sum, before)| sum.saturating_sub(before))
            .collect();
        Self { bounds, counts }
    }
}

#[derive(Serialize)]
pub(super) struct BatchRow {
    pub(super) number: u64,
    pub(super) at_ms: u64,
    pub(super) via: &'static str,
    /// Name and calls in the message.
    pub(super) leaves: Vec<(String, u32)>,
    pub(super) more: bool,
    pub(super) ran: u64,
    pub(super) status: String,
    /// "success", "other" (an answer that is no error), "busy", "error" or "lost".
    pub(super) kind: &'static str,
    pub(super) took_us: u64,
}

impl From<Event> for BatchRow {
    fn from(event: Event) -> Self {
        let (status, kind) = match event.outcome {
            Outcome::Answered(status) => {
                let kind = match status {
                    status if status.is_success() => "success",
                    status if status.is_busy() => "busy",
                    status if status.is_error() => "error",
                    _ => "other",
                };
                (status.code().name().unwrap_or_else(|| hex(status.0)), kind)
            }
            Outcome::NotSent => ("not sent".to_owned(), "lost"),
            Outcome::Unknown => ("outcome unknown".to_owned(), "lost"),
            Outcome::Restarted => ("module restarted".to_owned(), "lost"),
        };
        Self {
            number: event.number,
            at_ms: event.at_ms,
            via: event.via,
            leaves: event
                .leaves
                .iter()
                .map(|(leaf, calls)| (leaf.to_string(), *calls))
                .collect(),
            more: event.has_more,
            ran: event.ran,
            status,
            kind,
            took_us: u64::try_from(event.took.as_micros()).unwrap_or(u64::MAX),
        }
    }
}

#[derive(Serialize)]
pub(super) struct FaultAnswer {
    pub(super) ret_pf: &'static str,
    pub(super) root: &'static str,
    pub(super) level: u32,
    pub(super) hpa: String,
    /// Leaf and status, in order.
    pub(super) seamcalls: Vec<(String, String)>,
    pub(super) rpcs: u64,
    pub(super) trace_id: Option<String>,
}

#[derive(Serialize)]
pub(super) struct ConvertAnswer {
    /// Leaf and calls.
    pub(super) seamcalls: Vec<(String, u64)>,
    pub(super) rpcs: u64,
    pub(super) kicks: u64,
    pub(super) flushes: u64,
    pub(super) pages_zapped: u64,
    pub(super) trace_id: Option<String>,
}

#[derive(Serialize)]
pub(super) struct AuditAnswer {
    pub(super) entries: u64,
    pub(super) leaves: u64,
    pub(super) tables: u64,
    pub(super) frozen: u64,
    pub(super) mismatches: u64,
    pub(super) first_mismatches: Vec<MismatchRow>,
    pub(super) trace_id: Option<String>,
}

#[derive(Serialize)]
pub(super) struct MismatchRow {
    pub(super) gpa: String,
    pub(super) level: u32,
    pub(super) reason: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cell(private: u64, shared: u64, sept: Option<PublicState>) -> MapCell {
        MapCell {
            slot: 1,
            private,
            shared,
            sept,
            ..MapCell::default()
        }
    }

    #[test]
    fn a_cell_has_the_state_that_matters_most() {
        let frozen = MapCell {
            frozen: 1,
            ..cell(4, 0, None)
        };
        for (cell, state) in [
            (MapCell::default(), State::None),
            (cell(0, 0, None), State::Free),
            (cell(0, 3, None), State::Shared),
            (cell(3, 0, None), State::Private),
            (cell(3, 1, None), State::Mixed),
            (cell(1, 0, Some(PublicState::PENDING)), State::Pending),
            (cell(1, 0, Some(PublicState::MAPPED)), State::Private),
            (
                cell(1, 0, Some(PublicState::PENDING_BLOCKED)),
                State::Blocked,
            ),
            (cell(0, 0, Some(PublicState::FREE)), State::Free),
            (frozen, State::Frozen),
        ] {
            assert_eq!(state_of(&cell), state, "{cell:?}");
        }
    }

    #[test]
    fn neighbours_that_are_alike_are_one_run() {
        let (one, two) = (cell(1, 0, None), cell(2, 0, None));
        let lengths: Vec<_> = runs(&[one, one, two, one])
            .iter()
            .map(|run| (run.n, run.private))
            .collect();
        assert_eq!(lengths, [(2, 1), (1, 2), (1, 1)]);
        assert!(runs(&[]).is_empty());
    }

    #[test]
    fn cumulative_counts_are_taken_apart() {
        let trips = RoundTrips::of((vec![(0.1, 3), (0.2, 3), (0.4, 8)], 9));
        assert_eq!(trips.counts, [3, 0, 5, 1]);
    }
}

//! The guest's address space in cells of 2 MiB: how much of each is mapped, and in which root.
//!
//! A map has a bounded number of cells. Where slots are larger, a cell stands for more: its size
//! doubles until they fit.

use mirror_proto::mmu::{DumpTreeRequest, Root, TreeEntry};

use super::plan::Plan;
use crate::args::AddressRange;
use crate::client::Client;
use crate::error::Error;

/// Cells at most, all slots together.
const MAX_CELLS: u64 = 8192;
/// Smallest cell, in bytes.
const CELL: u64 = 2 << 20;

/// What a cell holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cell {
    /// Bytes of it that are private memory.
    pub private: u64,
    /// Bytes mapped in the mirror root.
    pub mirror: u64,
    /// Bytes mapped in the direct root.
    pub direct: u64,
}

/// The cells of one slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotMap {
    /// Guest physical addresses.
    pub range: AddressRange,
    /// From its start on; the last one may be cut.
    pub cells: Vec<Cell>,
}

/// All slots.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressMap {
    /// Bytes of a cell.
    pub cell_size: u64,
    /// Ascending.
    pub slots: Vec<SlotMap>,
}

impl AddressMap {
    /// The slots of a plan, with nothing mapped.
    pub fn new(plan: &Plan) -> Self {
        let mut cell_size = CELL;
        let cells = |size: u64| -> u64 {
            plan.slots
                .iter()
                .map(|slot| slot.range.size().div_ceil(size))
                .sum()
        };
        // A slot has one cell at least, and slots are fewer than cells.
        while cells(cell_size) > MAX_CELLS && cell_size < 1 << 52 {
            cell_size *= 2;
        }
        let slots = plan
            .slots
            .iter()
            .map(|slot| SlotMap {
                range: slot.range,
                cells: vec![
                    Cell::default();
                    usize::try_from(slot.range.size().div_ceil(cell_size)).unwrap_or(0)
                ],
            })
            .collect();
        let mut map = Self { cell_size, slots };
        for &range in &plan.private {
            map.spread(range, |cell, bytes| cell.private += bytes);
        }
        map
    }

    /// The same slots with what a VM has mapped.
    pub async fn of_vm(client: &Client, vm_id: u64, plan: &Plan) -> Result<Self, Error> {
        const CALL: &str = "DumpTree";
        let mut map = Self::new(plan);
        let message = DumpTreeRequest {
            vm_id,
            root: Root::Unspecified.into(),
            min_level: 1,
        };
        let mut stream = client
            .long(CALL, message, async |mut mmu, request| {
                mmu.dump_tree(request).await
            })
            .await?;
        while let Some(answer) = client.next(CALL, &mut stream).await? {
            answer.entries.iter().for_each(|entry| map.add(entry));
        }
        Ok(map)
    }

    /// Bytes mapped in the mirror and in the direct root.
    pub fn mapped(&self) -> (u64, u64) {
        let cells = || self.slots.iter().flat_map(|slot| &slot.cells);
        (
            cells().map(|cell| cell.mirror).sum(),
            cells().map(|cell| cell.direct).sum(),
        )
    }

    fn add(&mut self, entry: &TreeEntry) {
        if entry.kind != "leaf" || !(1..=3).contains(&entry.level) {
            return;
        }
        let page = 1u64 << (12 + 9 * (entry.level - 1));
        let size = page.saturating_mul(entry.count);
        let range = AddressRange {
            start: entry.gpa,
            end: entry.gpa.saturating_add(size),
        };
        match entry.root() {
            Root::Mirror => self.spread(range, |cell, bytes| cell.mirror += bytes),
            Root::Direct => self.spread(range, |cell, bytes| cell.direct += bytes),
            Root::Unspecified => {}
        }
    }

    /// Gives each cell its part of a range.
    fn spread(&mut self, range: AddressRange, mut add: impl FnMut(&mut Cell, u64)) {
        let size = self.cell_size;
        for slot in &mut self.slots {
            let Some(part) = slot.range.intersect(range) else {
                continue;
            };
            let first = (part.start - slot.range.start) / size;
            let last = (part.end - 1 - slot.range.start) / size;
            for at in first..=last {
                let cell = AddressRange {
                    start: slot.range.start + at * size,
                    end: slot.range.start + (at + 1) * size,
                };
                let place = usize::try_from(at).unwrap_or(usize::MAX);
                if let (Some(bytes), Some(cell)) = (cell.intersect(part), slot.cells.get_mut(place))
                {
                    add(cell, bytes.size());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::hva::{HvaBase, HvaSource};
    use super::super::slots::SlotPlan;
    use super::*;

    fn plan(slots: &[(u64, u64)], private: &[(u64, u64)]) -> Plan {
        let range = |&(start, end): &(u64, u64)| AddressRange { start, end };
        Plan {
            vcpus: vec![0],
            slots: (0..)
                .zip(slots)
                .map(|(id, slot)| SlotPlan {
                    id,
                    range: range(slot),
                })
                .collect(),
            private: private.iter().map(range).collect(),
            hva: HvaBase {
                base: 0,
                source: HvaSource::None,
            },
            segments: Vec::new(),
            out_of_range: 0,
            unmap_outside: 0,
        }
    }

    fn leaf(root: Root, level: u32, gpa: u64, count: u64) -> TreeEntry {
        TreeEntry {
            root: root.into(),
            level,
            gpa,
            count,
            kind: "leaf".into(),
            ..TreeEntry::default()
        }
    }

    #[test]
    fn what_is_mapped_falls_into_its_cells() {
        let plan = plan(
            &[(0, 8 << 20), (1 << 30, (1 << 30) + (2 << 20))],
            &[(0, 4 << 20)],
        );
        let mut map = AddressMap::new(&plan);
        assert_eq!(map.cell_size, CELL);
        // Two pages on each side of a border between cells.
        map.add(&leaf(Root::Mirror, 1, (2 << 20) - 0x2000, 4));
        map.add(&leaf(Root::Direct, 2, 4 << 20, 2));
        map.add(&leaf(Root::Mirror, 1, 1 << 30, 512));
        // Tables, and what lies outside of every slot, do not count.
        map.add(&TreeEntry {
            kind: "table".into(),
            ..leaf(Root::Mirror, 2, 0, 1)
        });
        map.add(&leaf(Root::Direct, 1, 1 << 40, 1));
        let cells = &map.slots[0].cells;
        assert_eq!(cells.len(), 4);
        let of = |at: usize| (cells[at].private, cells[at].mirror, cells[at].direct);
        assert_eq!(of(0), (CELL, 0x2000, 0));
        assert_eq!(of(1), (CELL, 0x2000, 0));
        assert_eq!(of(2), (0, 0, CELL));
        assert_eq!(map.slots[1].cells[0].mirror, CELL);
        assert_eq!(map.mapped(), (0x4000 + CELL, 2 * CELL));
    }

    #[test]
    fn large_guests_have_larger_cells_and_no_more_of_them() {
        for (size, cell_size) in [(16 << 30, CELL), (1 << 40, 128 << 20), (1 << 47, 16 << 30)] {
            let map = AddressMap::new(&plan(&[(0, size)], &[(0, size)]));
            assert_eq!(map.cell_size, cell_size, "{size:#x}");
            assert!(map.slots[0].cells.len() as u64 <= MAX_CELLS);
            let private: u64 = map.slots[0].cells.iter().map(|cell| cell.private).sum();
            assert_eq!(private, size);
        }
    }
}

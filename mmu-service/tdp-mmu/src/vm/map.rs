//! A picture of the address space: what lies in so many neighbouring cells. Changes nothing.
//!
//! Both trees are walked, not the pages: a part without a table costs one look at the entry that
//! would link it. The work has a bound whatever the VM holds: when the leaf tables of the range
//! have more entries than [`LEAF_READS`], every n-th entry is read and stands for n.

use std::ops::Range;

use tdx_defs::{Gfn, Hpa, Level, PAGE_SHIFT, PublicState, SeptView};

use super::Vm;
use super::inspect::agrees;
use crate::error::VmError;
use crate::mmu::arena::{ENTRIES, TableId};
use crate::mmu::role::RootKind;
use crate::mmu::spte::{self, SpteKind};
use crate::sync::atomic::Ordering;
use crate::tdx::calls;

/// Most cells of one picture.
pub const MAX_MAP_CELLS: usize = 4096;
/// Leaf entries that are read for one picture: 16 GiB of pages exactly.
const LEAF_READS: u64 = 4 << 20;

/// What one cell holds, in 4 KiB pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MapCell {
    /// Pages that a memory slot covers.
    pub slot: u64,
    /// Pages that the mirror root maps.
    pub private: u64,
    /// Pages that the direct root maps.
    pub shared: u64,
    /// Pages below entries whose change is in flight.
    pub frozen: u64,
    /// State of the module's entry, for cells of one page that were asked about; `None` where the
    /// module has no table for it.
    pub sept: Option<PublicState>,
    /// Mirror and module do not agree, for cells that were asked about.
    pub differs: bool,
}

/// A picture of the address space.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    /// In ascending order.
    pub cells: Vec<MapCell>,
    /// One in so many leaf entries was read; 1 means that the numbers are exact.
    pub sampled: u64,
}

/// What a VM holds at the moment.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// Present leaves of 4 KiB, 2 MiB and 1 GiB, both trees.
    pub pages: [u64; 3],
    /// Bytes of mirror and direct tables.
    pub page_table_bytes: u64,
    /// Key id, while one is assigned.
    pub hkid: Option<u32>,
    /// TD root page.
    pub tdr: Hpa,
}

impl Vm {
    /// What `cells` neighbouring pieces of `cell_size` bytes from `gpa` on hold. With `module`,
    /// which needs cells of one page, also what TDH.MEM.SEPT.RD says about each.
    ///
    /// The address is without the SHARED bit and aligned to the cell size, a power of two. Cells
    /// above the guest's addresses are left out.
    pub fn map(
        &self,
        gpa: u64,
        cell_size: u64,
        cells: usize,
        module: bool,
    ) -> Result<Map, VmError> {
        self.map_reading(gpa, cell_size, cells, module, LEAF_READS)
    }

    /// [`Vm::map`] with a bound on the leaf entries that are read.
    fn map_reading(
        &self,
        gpa: u64,
        cell_size: u64,
        cells: usize,
        module: bool,
        reads: u64,
    ) -> Result<Map, VmError> {
        let page = 1 << PAGE_SHIFT;
        if !cell_size.is_power_of_two() || cell_size < page {
            let reason = format!("{cell_size:#x} is not a power of two from {page:#x} on");
            return Err(VmError::invalid("cell", reason));
        }
        if gpa & (cell_size - 1) != 0 {
            let reason = format!("{gpa:#x} is not aligned to cells of {cell_size:#x}");
            return Err(VmError::invalid("gpa", reason));
        }
        let limit = self.mmu.layout.gfn_limit();
        let first = gpa >> PAGE_SHIFT;
        if first >= limit {
            let end = limit << PAGE_SHIFT;
            let reason = format!("{gpa:#x} is not below {end:#x}, the end without SHARED bit");
            return Err(VmError::invalid("gpa", reason));
        }
        if !(1..=MAX_MAP_CELLS).contains(&cells) {
            let reason = format!("{cells} is outside 1..={MAX_MAP_CELLS}");
            return Err(VmError::invalid("cells", reason));
        }
        if module && cell_size != page {
            let reason = format!("{cell_size:#x}, the module is asked about single pages");
            return Err(VmError::invalid("cell", reason));
        }
        let shift = cell_size.trailing_zeros() - PAGE_SHIFT;
        let fitting = (limit - first).div_ceil(1 << shift).min(cells as u64);
        // At most MAX_MAP_CELLS.
        let cells = vec![MapCell::default(); usize::try_from(fitting).unwrap_or(0)];
        let range = first..(first + (fitting << shift)).min(limit);
        let mut picture = Picture {
            cells,
            range,
            shift,
        };
        self.paint_slots(&mut picture);
        // With the module's answers the write side is held, as in an audit: nothing moves between
        // the two, and no call of a vCPU finds the module's tree lock taken by a look.
        let held = module.then(|| self.mmu.lock.write());
        let sampled = self.paint_trees(&mut picture, reads);
        if module {
            self.paint_module(&mut picture)?;
        }
        drop(held);
        Ok(Map {
            cells: picture.cells,
            sampled,
        })
    }

    fn paint_slots(&self, picture: &mut Picture) {
        for slot in self.slots.overlapping(&picture.range) {
            picture.add(slot.gfns.clone(), |cell, pages| cell.slot += pages);
        }
    }

    /// Returns the sampling distance.
    fn paint_trees(&self, picture: &mut Picture, reads: u64) -> u64 {
        let _rcu = crossbeam_epoch::pin();
        let roots = [RootKind::Direct, RootKind::Mirror]
            .map(|kind| self.mmu.root_of(kind).map(|root| (kind, root)));
        let mut leaf_tables = Vec::new();
        for (kind, root) in roots.into_iter().flatten() {
            let top = (root, self.mmu.arena.level(root), 0);
            self.paint_upper(kind, top, picture, &mut leaf_tables);
        }
        let entries = leaf_tables.len() as u64 * ENTRIES as u64;
        let distance = entries
            .div_ceil(reads)
            .next_power_of_two()
            .min(ENTRIES as u64);
        for (kind, table, base) in leaf_tables {
            self.paint_leaves(kind, table, base, distance, picture);
        }
        distance
    }

    /// Paints what tables above level 1 map by themselves, and lists the leaf tables.
    fn paint_upper(
        &self,
        kind: RootKind,
        (table, level, base): (TableId, Level, u64),
        picture: &mut Picture,
        leaf_tables: &mut Vec<(RootKind, TableId, u64)>,
    ) {
        let Some(below) = level.child() else {
            leaf_tables.push((kind, table, base));
            return;
        };
        let root_bits = match self.mmu.arena.header(table).role().level() {
            top if top == self.mmu.layout.root_level() => self.mmu.root_bits(table),
            _ => 0,
        };
        let pages = level.pages();
        let first = picture.range.start.saturating_sub(base) / pages;
        let end = picture.range.end.saturating_sub(base).div_ceil(pages);
        for at in first..end.min(ENTRIES as u64) {
            let gfn = base + at * pages;
            let slot = self.mmu.slot(table, level, Gfn::new(gfn), root_bits);
            let entry = self.mmu.read(slot);
            if spte::is_table(entry, level) {
                if let Some(linked) = TableId::linked_by(entry) {
                    self.paint_upper(kind, (linked, below, gfn), picture, leaf_tables);
                }
            } else {
                picture.add_entry(kind, spte::kind(entry, level), gfn..gfn + pages);
            }
        }
    }

    fn paint_leaves(
        &self,
        kind: RootKind,
        table: TableId,
        base: u64,
        distance: u64,
        picture: &mut Picture,
    ) {
        let entries = self.mmu.arena.entries(table);
        let step = usize::try_from(distance).unwrap_or(ENTRIES);
        for (entry, gfn) in entries.iter().step_by(step).zip((base..).step_by(step)) {
            let entry = entry.load(Ordering::Acquire);
            let found = spte::kind(entry, Level::L4K);
            picture.add_entry(kind, found, gfn..gfn + distance);
        }
    }

    /// Cells are single pages here.
    fn paint_module(&self, picture: &mut Picture) -> Result<(), VmError> {
        let mut seam = self.looking();
        let tdr = self.td.tdr();
        let mut flights = Vec::new();
        for part in (picture.range.start..picture.range.end)
            .collect::<Vec<_>>()
            .chunks(ENTRIES)
        {
            let reads = part
                .iter()
                .map(|&gfn| calls::mem_sept_rd(tdr, Gfn::new(gfn), Level::L4K).into_seamcall());
            flights.push(seam.submit(None, reads.collect()));
        }
        let mut cells = picture.cells.iter_mut();
        for flight in flights {
            // Results first: they end a part, and a cell taken beyond them would be lost.
            for (result, cell) in seam.wait(flight)?.into_iter().zip(cells.by_ref()) {
                cell.sept = result
                    .status()
                    .is_success()
                    .then(|| SeptView::from_regs(result.rcx, result.rdx))
                    .flatten()
                    .map(|view| view.at.state);
                let mirror = match cell {
                    MapCell { frozen: 1.., .. } => SpteKind::Frozen,
                    MapCell { private: 1.., .. } => SpteKind::Leaf,
                    _ => SpteKind::NotPresent,
                };
                // No table for the page in the module is as good as a free entry.
                cell.differs = !agrees(mirror, cell.sept.unwrap_or(PublicState::FREE));
            }
        }
        Ok(())
    }

    /// What the VM holds. Unlike [`Vm::stats`] it waits for no operation.
    pub fn held(&self) -> Held {
        Held {
            pages: self.mmu.pages(),
            page_table_bytes: self.mmu.arena.bytes(),
            hkid: self.td.hkid(),
            tdr: self.td.tdr().base(),
        }
    }
}

/// Cells under the brush.
struct Picture {
    cells: Vec<MapCell>,
    /// Frames.
    range: Range<u64>,
    /// Pages of a cell, as a power of two.
    shift: u32,
}

impl Picture {
    /// Hands each cell the number of its pages that lie in `gfns`.
    fn add(&mut self, gfns: Range<u64>, change: impl Fn(&mut MapCell, u64)) {
        let start = gfns.start.max(self.range.start);
        let end = gfns.end.min(self.range.end);
        if start >= end {
            return;
        }
        let base = self.range.start;
        let (first, last) = ((start - base) >> self.shift, (end - 1 - base) >> self.shift);
        for at in first..=last {
            let cell = base + (at << self.shift);
            let pages = end.min(cell + (1 << self.shift)) - start.max(cell);
            if let Some(cell) = usize::try_from(at)
                .ok()
                .and_then(|at| self.cells.get_mut(at))
            {
                change(cell, pages);
            }
        }
    }

    fn add_entry(&mut self, root: RootKind, kind: SpteKind, gfns: Range<u64>) {
        match (kind, root) {
            (SpteKind::Leaf, RootKind::Mirror) => {
                self.add(gfns, |cell, pages| cell.private += pages);
            }
            (SpteKind::Leaf, RootKind::Direct) => {
                self.add(gfns, |cell, pages| cell.shared += pages);
            }
            (SpteKind::Frozen, _) => self.add(gfns, |cell, pages| cell.frozen += pages),
            (SpteKind::NotPresent | SpteKind::Table | SpteKind::Mmio, _) => {}
        }
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use tdx_defs::{Gpaw, Leaf, Seamcall};

    use super::*;
    use crate::common::{Rig, SLOT_PAGES, map_private, map_shared};
    use crate::vm::Mode;

    const MIB: u64 = 1 << 20;

    /// The cells that are not empty.
    fn painted(map: &Map) -> Vec<(usize, u64, u64)> {
        map.cells
            .iter()
            .enumerate()
            .filter(|(_, cell)| cell.private + cell.shared + cell.frozen != 0)
            .map(|(at, cell)| (at, cell.private, cell.shared))
            .collect()
    }

    #[test]
    fn cells_of_every_size_count_the_pages_of_both_trees() {
        for gpaw in [Gpaw::W48, Gpaw::W52] {
            let rig = Rig::new();
            let vm = rig.empty(Mode::Batched, gpaw);
            map_private(&vm, 3..5);
            map_private(&vm, 511..514);
            map_shared(&vm, 1024..1030);
            map_shared(&vm, 4..5);
            for (case, cell, cells, expected) in [
                ("2 MiB", 2 * MIB, 512, vec![(0, 2, 1), (1, 2, 0), (2, 0, 6)]),
                ("8 MiB", 8 * MIB, 128, vec![(0, 4, 7)]),
                ("1 GiB", 1024 * MIB, 1, vec![(0, 4, 7)]),
                (
                    "4 KiB",
                    4096,
                    600,
                    vec![(3, 1, 0), (4, 0, 1), (511, 1, 0), (512, 1, 0), (513, 1, 0)],
                ),
            ] {
                let map = vm.map(0, cell, cells, false).unwrap();
                assert_eq!(painted(&map), expected, "{case}");
                assert_eq!(map.sampled, 1, "{case}");
                let slot: u64 = map.cells.iter().map(|cell| cell.slot).sum();
                assert_eq!(
                    slot,
                    ((cells as u64 * cell) >> 12).min(SLOT_PAGES),
                    "{case}"
                );
            }
            let behind = vm.map(2 * MIB, 4096, 512, false).unwrap();
            assert_eq!(
                painted(&behind),
                [(0, 1, 0), (1, 1, 0)],
                "from an address on"
            );
        }
    }

    #[test]
    fn entries_are_sampled_where_there_are_too_many() {
        let rig = Rig::new();
        let vm = rig.empty(Mode::Batched, Gpaw::W48);
        map_private(&vm, 0..1024);
        map_private(&vm, 1024..1026);
        for (reads, sampled, private) in [
            (3 * 512, 1, [512, 512, 2]),
            (3 * 512 - 1, 2, [512, 512, 2]),
            (512, 4, [512, 512, 4]),
            (1, 512, [512, 512, 512]),
        ] {
            let map = vm.map_reading(0, 2 * MIB, 4, false, reads).unwrap();
            let found: Vec<u64> = map.cells.iter().map(|cell| cell.private).collect();
            assert_eq!(
                (map.sampled, &found[..3]),
                (sampled, &private[..]),
                "{reads}"
            );
            assert_eq!(found[3], 0, "no table, no pages");
        }
    }

    #[test]
    fn the_module_is_asked_about_single_pages_and_differences_are_marked() {
        let rig = Rig::new();
        let vm = rig.empty(Mode::Batched, Gpaw::W48);
        map_private(&vm, 0..3);
        map_private(&vm, 510..1030);
        let all = vm.map(0, 4096, 1030, true).unwrap().cells;
        for (gfn, cell) in all.iter().enumerate() {
            let mapped = !(3..510).contains(&gfn);
            let expected = if mapped {
                Some(PublicState::PENDING)
            } else {
                Some(PublicState::FREE)
            };
            assert_eq!((cell.sept, cell.differs), (expected, false), "{gfn:#x}");
        }
        let states = |vm: &Vm| {
            let map = vm.map(0, 4096, 512, true).unwrap();
            let cell = |at: usize| (map.cells[at].sept, map.cells[at].differs);
            [cell(0), cell(1), cell(3)]
        };
        let pending = (Some(PublicState::PENDING), false);
        assert_eq!(
            states(&vm),
            [pending, pending, (Some(PublicState::FREE), false)]
        );

        let block = Seamcall::new(Leaf::MEM_RANGE_BLOCK)
            .rcx(0x1000)
            .rdx(vm.info().tdr.get());
        let answer = rig.module.seamcall(tdx_module::LpId(0), &block);
        assert!(answer.status().is_success(), "{:?}", answer.status());
        let blocked = (Some(PublicState::PENDING_BLOCKED), true);
        assert_eq!(
            states(&vm),
            [pending, blocked, (Some(PublicState::FREE), false)]
        );
    }

    #[test]
    fn a_picture_that_cannot_be_is_refused_by_its_field() {
        let rig = Rig::new();
        let vm = rig.empty(Mode::Batched, Gpaw::W48);
        for (gpa, cell, cells, module, field) in [
            (0, 0, 1, false, "cell"),
            (0, 2048, 1, false, "cell"),
            (0, 3 << 12, 1, false, "cell"),
            (0, 2 * MIB, 1, true, "cell"),
            (0x1000, 2 * MIB, 1, false, "gpa"),
            (1 << 47, 4096, 1, false, "gpa"),
            (u64::MAX << 12, 4096, 1, false, "gpa"),
            (0, 4096, 0, false, "cells"),
            (0, 4096, MAX_MAP_CELLS + 1, false, "cells"),
        ] {
            let error = vm.map(gpa, cell, cells, module).unwrap_err();
            assert_eq!(error.field(), Some(field), "{gpa:#x} {cell:#x} {cells}");
        }
        let end = vm.map((1 << 47) - 4096, 4096, 8, false).unwrap();
        assert_eq!(end.cells.len(), 1, "cells above the end are left out");
        assert_eq!(vm.map(0, 1 << 63, 4, false).unwrap().cells.len(), 1);
    }
}

//! Looking: walks, trees, state, counters. Nothing here changes anything.

use std::ops::ControlFlow;

use tdx_defs::{Gpa, Level, PublicState, SeptView, Visibility};

use super::{Mode, Stats, TreeEntry, Vm, VmInfo, Walk, WalkEntry};
use crate::error::VmError;
use crate::mmu::arena::TableId;
use crate::mmu::iter::Step;
use crate::mmu::role::RootKind;
use crate::mmu::spte::{self, SpteKind};
use crate::sync::lock;
use crate::tdx::calls;
use crate::tdx::seam::Seam;
use crate::trace::Event;

impl Vm {
    /// The entries on the path to an address; with `module`, also what TDH.MEM.SEPT.RD says.
    pub fn walk(&self, gpa: u64, module: bool) -> Result<Walk, VmError> {
        let layout = self.mmu.layout;
        if gpa >> layout.width() != 0 {
            let reason = format!("{gpa:#x} is above the guest's {}-bit width", layout.width());
            return Err(VmError::invalid("gpa", reason));
        }
        let (gfn, visibility) = layout.split(Gpa::new(gpa));
        let root = match visibility {
            Visibility::Private => RootKind::Mirror,
            Visibility::Shared => RootKind::Direct,
        };
        let slot = self.slots.find(gfn);
        let private_attribute = self.is_private(slot.as_deref(), gfn);
        let steps = {
            let _rcu = crossbeam_epoch::pin();
            self.mmu
                .root_of(root)
                .map(|root| self.mmu.path(root, gfn))
                .unwrap_or_default()
        };
        let mapped = steps
            .last()
            .is_some_and(|step| spte::is_leaf(step.spte, step.level));
        let mut entries: Vec<WalkEntry> = steps.iter().map(|step| self.walk_entry(step)).collect();
        if module && root == RootKind::Mirror {
            self.read_module(gfn, &mut entries)?;
        }
        Ok(Walk {
            root,
            entries,
            mapped,
            private_attribute,
        })
    }

    /// The mirror's leaf of an address, by a bare walk: what looking at the mirror costs at least.
    pub fn mirror_leaf(&self, gpa: u64) -> Option<u64> {
        let root = self.mmu.root_of(RootKind::Mirror)?;
        let _rcu = crossbeam_epoch::pin();
        let step = self.mmu.last(root, Gpa::new(gpa).frame())?;
        spte::is_leaf(step.spte, step.level).then_some(step.spte)
    }

    fn walk_entry(&self, step: &Step) -> WalkEntry {
        let (hpa, external_hpa) = self.behind(step.spte, step.level);
        WalkEntry {
            level: step.level,
            index: u16::try_from(step.slot.index).unwrap_or(u16::MAX),
            spte: step.spte,
            kind: spte::kind(step.spte, step.level),
            hpa,
            external_hpa,
            sept: None,
            sept_state: None,
        }
    }

    /// Where the table or page of an entry lies, and the module's page behind the table.
    fn behind(&self, entry: u64, level: Level) -> (u64, u64) {
        if !spte::is_present(entry) {
            return (0, 0);
        }
        let external = spte::is_table(entry, level)
            .then(|| TableId::linked_by(entry))
            .flatten()
            .and_then(|table| self.mmu.arena.header(table).external());
        (
            entry & spte::PFN_MASK,
            external.map_or(0, |page| page.base().get()),
        )
    }

    /// A SEAM for looking: always batched, and not counted as work of the VM.
    pub(super) fn looking(&self) -> Seam<'_> {
        Seam::new(&*self.port, Mode::Batched, 0)
    }

    fn read_module(&self, gfn: tdx_defs::Gfn, entries: &mut [WalkEntry]) -> Result<(), VmError> {
        let reads = entries.iter().map(|entry| {
            let base = gfn.align_down(entry.level.pages());
            calls::mem_sept_rd(self.td.tdr(), base, entry.level).into_seamcall()
        });
        let mut seam = self.looking();
        let sent = seam.submit(None, reads.collect());
        // The module walks itself: where its walk fails, the levels below have no answer.
        for (entry, result) in entries.iter_mut().zip(seam.wait(sent)?) {
            if result.status().is_success() {
                entry.sept = Some((result.rcx, result.rdx));
                entry.sept_state =
                    SeptView::from_regs(result.rcx, result.rdx).and_then(|v| v.at.state.name());
            }
        }
        Ok(())
    }

    /// The entries of the trees that are not empty, parents first; neighbours that are alike are
    /// one item.
    pub fn dump_tree(
        &self,
        root: Option<RootKind>,
        min_level: Level,
        visit: &mut dyn FnMut(TreeEntry) -> ControlFlow<()>,
    ) -> Result<(), VmError> {
        let kinds = [RootKind::Direct, RootKind::Mirror];
        for kind in kinds
            .into_iter()
            .filter(|kind| root.is_none_or(|root| root == *kind))
        {
            let Some(table) = self.mmu.root_of(kind) else {
                continue;
            };
            let _rcu = crossbeam_epoch::pin();
            let mut run: Option<TreeEntry> = None;
            let mut flow = ControlFlow::Continue(());
            self.mmu.visit(
                table,
                0..self.mmu.layout.gfn_limit(),
                min_level,
                &mut |at| {
                    if at.spte == spte::NP {
                        return ControlFlow::Continue(());
                    }
                    let (hpa, external_hpa) = self.behind(at.spte, at.level);
                    let kind_of = spte::kind(at.spte, at.level);
                    let entry = TreeEntry {
                        root: kind,
                        level: at.level,
                        gfn: at.gfn,
                        count: 1,
                        spte: at.spte,
                        kind: kind_of,
                        hpa,
                        external_hpa,
                    };
                    if run.as_mut().is_some_and(|run| run.join(&entry)) {
                        return ControlFlow::Continue(());
                    }
                    flow = run
                        .replace(entry)
                        .map_or(ControlFlow::Continue(()), &mut *visit);
                    flow
                },
            );
            if let (ControlFlow::Continue(()), Some(last)) = (flow, run) {
                flow = visit(last);
            }
            if flow.is_break() {
                break;
            }
        }
        Ok(())
    }

    /// What the VM is and has.
    pub fn info(&self) -> VmInfo {
        let bugs = &self.mmu.bugs;
        let state = match (bugs.is_bugged(), bugs.is_dead()) {
            (true, _) => "bugged",
            (false, true) => "dead",
            (false, false) => self.td.state().name(),
        };
        let [pages_4k, pages_2m, pages_1g] = self.mmu.pages();
        VmInfo {
            kind: self.config.kind,
            state,
            reason: bugs.is_dead().then(|| bugs.reason()).flatten(),
            gpaw: self.mmu.layout.gpaw(),
            mode: self.config.mode,
            vcpus: u32::try_from(self.vcpus.load().len()).unwrap_or(u32::MAX),
            hkid: self.td.hkid(),
            tdr: self.td.tdr().base(),
            mrtd: self.td.mrtd(),
            slots: self.slots.all().iter().map(|slot| slot.spec).collect(),
            pages_4k,
            pages_2m,
            pages_1g,
        }
    }

    /// Counters since creation. Waits for operations that are under way.
    pub fn stats(&self) -> Stats {
        let mut counts = lock(&self.counts).clone();
        for vcpu in self.vcpus.load().iter() {
            counts += &lock(&vcpu.run).counts;
        }
        let [pages_4k, pages_2m, pages_1g] = self.mmu.pages();
        Stats {
            remote_tlb_flush_requests: counts.flushes,
            counts,
            pages_4k,
            pages_2m,
            pages_1g,
            nx_lpage_splits: self.mmu.nx_tables(),
            page_table_bytes: self.mmu.arena.bytes(),
        }
    }

    /// Records the tracepoints of this VM, at most `limit` events ([`MAX_EVENTS`] in any case):
    /// when there are more, the oldest go. 0 ends it.
    ///
    /// [`MAX_EVENTS`]: crate::MAX_EVENTS
    pub fn trace(&self, limit: usize) {
        self.mmu.tracer.set_limit(limit);
    }

    /// The events recorded since the last time, oldest first, and how many were lost.
    pub fn take_events(&self) -> (Vec<Event>, u64) {
        self.mmu.tracer.take()
    }

    /// A memory error hits a guest_memfd page: further faults on it exit.
    pub fn poison(&self, gpa: u64) -> Result<(), VmError> {
        let gfn = Gpa::new(gpa).frame();
        let slot = self
            .slots
            .find(gfn)
            .ok_or(VmError::NoMemory(Gpa::new(gpa)))?;
        if let Some(gmem) = &slot.gmem {
            gmem.poison(slot.offset(gfn));
        }
        Ok(())
    }
}

impl TreeEntry {
    /// Takes the next entry into the run, if it is alike and follows.
    fn join(&mut self, next: &Self) -> bool {
        let follows = next.level == self.level
            && next.kind == self.kind
            && self.kind == SpteKind::Leaf
            && next.gfn.get() == self.gfn.get() + self.count * self.level.pages()
            && next.spte == self.spte + self.count * self.level.bytes();
        self.count += u64::from(follows);
        follows
    }
}

/// Whether the module's state fits a mirror entry.
pub(super) fn agrees(kind: SpteKind, state: PublicState) -> bool {
    match kind {
        SpteKind::NotPresent => state == PublicState::FREE,
        SpteKind::Table => state == PublicState::NL_MAPPED,
        SpteKind::Leaf => state == PublicState::PENDING || state == PublicState::MAPPED,
        SpteKind::Frozen | SpteKind::Mmio => false,
    }
}

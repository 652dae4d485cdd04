//! Audit: mirror ⇄ private tree ⇄ PAMT, entry by entry.
//!
//! Every entry of every mirror table is held against TDH.MEM.SEPT.RD, every page behind it
//! against TDH.PHYMEM.PAGE.RDMD, and the number of the TD's pages against TDR.CHLDCNT, so a page
//! that only the module knows of is found too. The write side of mmu_lock is held throughout:
//! nothing moves.

use std::collections::VecDeque;
use std::ops::ControlFlow;

use tdx_defs::{Gfn, Level, PageType, Pfn, Seamcall, SeamcallResult, SeptView, field};

use super::inspect::agrees;
use super::{AuditReport, Mismatch, Vm};
use crate::error::VmError;
use crate::mmu::arena::{ENTRIES, Slot, TableId};
use crate::mmu::role::RootKind;
use crate::mmu::spte::{self, SpteKind};
use crate::sync::lock;
use crate::tdx::calls;
use crate::tdx::seam::{InFlight, Seam};

/// Tables whose answers are under way.
const AHEAD: usize = 4;

/// What a call of an audit message asks about.
#[derive(Clone, Copy)]
enum Question {
    /// The module's entry for a frame.
    Entry { gfn: Gfn, level: Level, spte: u64 },
    /// The PAMT entry of a page.
    Page {
        gfn: Gfn,
        level: Level,
        page: Pfn,
        expected: PageType,
    },
}

impl Vm {
    /// Compares the trees. `progress` gets entries and mismatches so far. Works on a bugged VM. In
    /// an ordinary VM there is nothing to compare.
    pub fn audit(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<AuditReport, VmError> {
        if !self.is_td() {
            return Ok(AuditReport::default());
        }
        let vcpus = self.vcpus.load_full();
        let control_pages: u64 = {
            let tdvps: usize = vcpus.iter().map(|vcpu| lock(&vcpu.run).pages.len()).sum();
            (lock(&self.td.tdcs).len() + tdvps) as u64
        };
        let _held = self.mmu.lock.write();
        let mut audit = Auditing {
            vm: self,
            seam: self.looking(),
            report: AuditReport::default(),
        };
        let mut flights: VecDeque<(Vec<Question>, InFlight)> = VecDeque::new();
        for (table, level, base) in self.mirror_tables() {
            let questions = audit.ask_about(table, level, base);
            let reads = questions
                .iter()
                .map(|question| audit.call(question))
                .collect::<Vec<_>>();
            // Parts keep the answers below the message limit.
            for (questions, reads) in questions.chunks(ENTRIES).zip(reads.chunks(ENTRIES)) {
                let flight = audit.seam.submit(None, reads.to_vec());
                flights.push_back((questions.to_vec(), flight));
            }
            while flights.len() > AHEAD {
                audit.judge_next(&mut flights)?;
            }
            progress(audit.report.entries, audit.report.mismatches);
        }
        while !flights.is_empty() {
            audit.judge_next(&mut flights)?;
        }
        audit.judge_total(control_pages)?;
        progress(audit.report.entries, audit.report.mismatches);
        Ok(audit.report)
    }

    /// Every reachable mirror table, the root first.
    fn mirror_tables(&self) -> Vec<(TableId, Level, Gfn)> {
        let Some(root) = self.mmu.root_of(RootKind::Mirror) else {
            return Vec::new();
        };
        let mut tables = vec![(root, self.mmu.arena.level(root), Gfn::new(0))];
        self.mmu.visit(
            root,
            0..self.mmu.layout.gfn_limit(),
            Level::L2M,
            &mut |at| {
                if spte::is_table(at.spte, at.level) {
                    let linked = TableId::linked_by(at.spte).zip(at.level.child());
                    tables.extend(linked.map(|(table, level)| (table, level, at.gfn)));
                }
                ControlFlow::Continue(())
            },
        );
        tables
    }
}

struct Auditing<'a> {
    vm: &'a Vm,
    seam: Seam<'a>,
    report: AuditReport,
}

impl Auditing<'_> {
    fn ask_about(&mut self, table: TableId, level: Level, base: Gfn) -> Vec<Question> {
        let limit = self.vm.mmu.layout.gfn_limit();
        // Pages behind entries, so that calls of one leaf follow each other.
        let mut questions = Vec::with_capacity(ENTRIES);
        let mut pages = Vec::new();
        for index in 0..ENTRIES {
            let gfn = base.offset(index as u64 * level.pages());
            if gfn.get() >= limit {
                break;
            }
            let spte = self.vm.mmu.read(Slot { table, index });
            questions.push(Question::Entry { gfn, level, spte });
            match spte::kind(spte, level) {
                SpteKind::Leaf => {
                    self.report.leaves += 1;
                    let page = spte::pfn(spte);
                    pages.push(Question::Page {
                        gfn,
                        level,
                        page,
                        expected: PageType::REG,
                    });
                }
                SpteKind::Table => {
                    self.report.tables += 1;
                    let external = TableId::linked_by(spte)
                        .and_then(|table| self.vm.mmu.arena.header(table).external());
                    match external {
                        Some(page) => pages.push(Question::Page {
                            gfn,
                            level,
                            page,
                            expected: PageType::EPT,
                        }),
                        None => self.mismatch(gfn, level, || "the table has no page".into()),
                    }
                }
                SpteKind::Frozen => self.report.frozen += 1,
                SpteKind::NotPresent | SpteKind::Mmio => {}
            }
        }
        questions.append(&mut pages);
        questions
    }

    fn call(&self, question: &Question) -> Seamcall {
        match *question {
            Question::Entry { gfn, level, .. } => {
                calls::mem_sept_rd(self.vm.td.tdr(), gfn, level).into_seamcall()
            }
            Question::Page { page, .. } => calls::phymem_page_rdmd(page).into_seamcall(),
        }
    }

    fn judge_next(
        &mut self,
        flights: &mut VecDeque<(Vec<Question>, InFlight)>,
    ) -> Result<(), VmError> {
        let Some((questions, flight)) = flights.pop_front() else {
            return Ok(());
        };
        let results = self.seam.wait(flight)?;
        let mut answered = 0;
        for (question, result) in questions.iter().zip(&results) {
            self.judge(question, result);
            answered += 1;
        }
        // An error ends a message: the rest of it is asked again.
        let rest = &questions[answered..];
        if !rest.is_empty() && answered > 0 {
            let reads = rest.iter().map(|question| self.call(question)).collect();
            let flight = self.seam.submit(None, reads);
            flights.push_front((rest.to_vec(), flight));
        }
        Ok(())
    }

    fn judge(&mut self, question: &Question, result: &SeamcallResult) {
        match *question {
            Question::Entry { gfn, level, spte } => {
                self.report.entries += 1;
                let view = SeptView::from_regs(result.rcx, result.rdx);
                let kind = spte::kind(spte, level);
                let page_agrees =
                    |view: &SeptView| kind != SpteKind::Leaf || view.page == Some(spte::pfn(spte));
                let fits = result.status().is_success()
                    && view.is_some_and(|view| agrees(kind, view.at.state) && page_agrees(&view));
                if !fits {
                    self.mismatch(gfn, level, || {
                        format!(
                            "mirror {kind} {spte:#x}, module {} {:#x} {:#x}",
                            result.status(),
                            result.rcx,
                            result.rdx
                        )
                    });
                }
            }
            Question::Page {
                gfn,
                level,
                page,
                expected,
            } => {
                let owner = self.vm.td.tdr().base().get();
                let fits = result.status().is_success()
                    && result.rcx == u64::from(expected.0)
                    && result.rdx == owner;
                if !fits {
                    self.mismatch(gfn, level, || {
                        format!(
                            "page {page} should be {expected} of {owner:#x}, PAMT says {} {:#x} {:#x}",
                            result.status(),
                            result.rcx,
                            result.rdx
                        )
                    });
                }
            }
        }
    }

    /// TDR.CHLDCNT counts every page of the TD but the TDR.
    fn judge_total(&mut self, control_pages: u64) -> Result<(), VmError> {
        let read = calls::mng_rd(self.vm.td.tdr(), field::TDR_CHLDCNT);
        let result = self.seam.call(&read)?;
        let expected = control_pages + self.report.tables + self.report.leaves;
        if result.status().is_success() && result.r8 != expected {
            let root_level = self.vm.mmu.layout.root_level();
            self.mismatch(Gfn::new(0), root_level, || {
                format!(
                    "the module counts {} pages of the TD, the host {expected}",
                    result.r8
                )
            });
        }
        Ok(())
    }

    fn mismatch(&mut self, gfn: Gfn, level: Level, reason: impl FnOnce() -> String) {
        self.report.mismatches += 1;
        if self.report.first_mismatches.len() < AuditReport::MAX_LISTED {
            let gpa = gfn.base().get();
            self.report.first_mismatches.push(Mismatch {
                gpa,
                level,
                reason: reason(),
            });
        }
    }
}

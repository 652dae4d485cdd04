//! VMs made again by a process that comes after the one that had them.
//!
//! The module has what matters: the private tree (TDH.MEM.SEPT.RD), whose page is whose
//! (TDH.PHYMEM.PAGE.RDMD), the state of each TD (TDH.MNG.RD). The [`VmRecord`] has what it cannot
//! tell: slots, attributes, settings, and which pages a TD was about to get. From both this makes
//! the host's allocators and every VM, and settles what was under way:
//!
//! | found | becomes |
//! |---|---|
//! | key id or pages announced, no TD | free again |
//! | a TD that is not initialised, or torn down in part | taken down |
//! | a vCPU with a TDVPR, not initialised | finished |
//! | a leaf in a private frame of a slot | a mirror leaf; unblocked if it was blocked |
//! | a leaf anywhere else | blocked, tracked, removed |
//! | an image that was being measured | a dead VM: MRTD is not known |
//! | a record that says "going" | a VM that is taken down |
//!
//! Blocked leaves of private frames are given back to the guest and not removed: the operation
//! that blocked them never came to its end, and their contents are still whole.
//!
//! Invariants
//! - V1  Nothing is handed out before every VM is read: only then is it known what is in use.
//! - V2  A VM comes back alive only if mirror, private tree and PAMT agree entry by entry.

mod pages;
mod remains;
mod settle;
mod tree;
mod vcpus;

use std::sync::Arc;

use tdx_defs::{CompletionStatus, Leaf, PageType, SeamcallResult, field};

use super::create::OP_STATE_RUNNABLE;
use super::{AuditReport, Mode, Vm};
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::host::Host;
use crate::ledger::{Ledger, Note, TdRecord, VmRecord};
use crate::memory::attributes::PrivateRanges;
use crate::seam::{SeamError, SeamPort};
use crate::sync::{lock, thread};
use crate::tdx::calls::{self, Step};
use crate::tdx::seam::Seam;
use pages::Pages;

/// Tries of a call that meets a lock which somebody else holds.
const BUSY_TRIES: u32 = 10_000;

/// The recovery of one host's VMs.
pub struct Recovery {
    host: Arc<Host>,
    port: Arc<dyn SeamPort>,
    pages: Pages,
}

/// What a recovery did about one VM.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Recovered {
    /// Mirror tables made.
    pub tables: u64,
    /// Mirror leaves made.
    pub leaves: u64,
    /// Leaves that were found blocked and given back to the guest.
    pub unblocked: u64,
    /// Leaves that had no right to be there and were removed.
    pub removed: u64,
    /// How mirror, private tree and PAMT compare.
    pub audit: AuditReport,
    /// What it cost.
    pub counts: Counts,
}

/// How a recovery left a VM.
pub enum Settled {
    /// It is there again; dead if its record or the audit says so.
    Vm(Box<Vm>, Box<Recovered>),
    /// It was on its way in or out, and is gone.
    Gone {
        /// Pages that the module did not give back.
        leaked: u64,
    },
}

impl Recovery {
    /// Begins: learns what is in use of the blocks that the host split. Nobody may use `host`
    /// until all VMs have been recovered; what it handed out before is forgotten.
    pub fn begin(
        host: Arc<Host>,
        port: Arc<dyn SeamPort>,
        split: &[tdx_defs::Pfn],
    ) -> Result<Self, VmError> {
        host.reset();
        let pages = Pages::read(&host, &*port, split)?;
        Ok(Self { host, port, pages })
    }

    /// Makes one VM again. An error means that the module cannot be asked: the recovery has to
    /// begin anew.
    pub fn vm(&self, record: VmRecord, ledger: Arc<dyn Ledger>) -> Result<Settled, VmError> {
        let (host, port) = (Arc::clone(&self.host), Arc::clone(&self.port));
        let vm = Vm::kept_in(host, port, record.config.clone(), ledger);
        let mut recovered = Recovered::default();
        let mut seam = Seam::new(&*self.port, Mode::Batched, 0);
        if let Some(td) = &record.td {
            let is_there = match self.pages.is(td.tdr, PageType::TDR) {
                false => Found::Nothing,
                true => self.find(&mut seam, td)?,
            };
            match is_there {
                Found::Nothing => vm.note_end_of_td(),
                Found::Remains => {
                    let leaked = self.take_down(&mut seam, &record)?;
                    if leaked == 0 {
                        vm.note_end_of_td();
                    } else if record.going {
                        return Ok(Settled::Gone { leaked });
                    } else {
                        let reason = format!("{leaked} pages of its TD do not come back");
                        vm.mmu.bugs.kill(Check::Unsettled, || reason);
                    }
                }
                Found::Td { finalized } => self.adopt_td(&mut seam, &vm, td, finalized)?,
            }
        }
        broken(&vm, self.restore(&vm, &record))?;
        if vm.td.hkid().is_some() {
            broken(&vm, self.restore_vcpus(&mut seam, &vm, &record))?;
            self.rebuild(&mut seam, &vm, &mut recovered)?;
        } else {
            broken(&vm, self.restore_plain_vcpus(&vm, &record))?;
        }
        recovered.counts += &seam.counts;
        if record.going {
            let (_, leaked) = vm.destroy()?;
            return Ok(Settled::Gone { leaked });
        }
        if record.measuring && vm.td.hkid().is_some() {
            vm.mmu.bugs.kill(Check::Unsettled, || {
                "the service stopped while the initial image was measured: MRTD is not known".into()
            });
        }
        if let Some(reason) = record.dead {
            vm.mmu.bugs.was_dead(reason);
        }
        if vm.td.hkid().is_some() {
            recovered.audit = vm.audit(&mut |_, _| {})?;
            self.judge(&vm, &recovered.audit);
        }
        Ok(Settled::Vm(Box::new(vm), Box::new(recovered)))
    }

    /// V2.
    fn judge(&self, vm: &Vm, audit: &AuditReport) {
        if let Some(first) = audit.first_mismatches.first() {
            vm.mmu.bugs.kill(Check::Unsettled, || {
                format!(
                    "{} entries do not agree after the restart, the first at {:#x}: {}",
                    audit.mismatches, first.gpa, first.reason
                )
            });
        }
    }

    /// What there is of a TD whose root page is one.
    fn find(&self, seam: &mut Seam<'_>, td: &TdRecord) -> Result<Found, VmError> {
        self.host.hkids.reserve(td.hkid);
        let read = calls::mng_rd(td.tdr, field::TDCS_OP_STATE);
        let result = patiently(seam, &read)?;
        Ok(match (result.status().is_success(), result.r8) {
            (true, OP_STATE_INITIALIZED) => Found::Td { finalized: false },
            (true, OP_STATE_RUNNABLE) => Found::Td { finalized: true },
            _ => Found::Remains,
        })
    }

    fn adopt_td(
        &self,
        seam: &mut Seam<'_>,
        vm: &Vm,
        td: &TdRecord,
        finalized: bool,
    ) -> Result<(), VmError> {
        vm.td.assign(td.tdr, td.hkid);
        let of_td = |page| self.pages.is_owned(page, PageType::TDCX, td.tdr);
        let pages = td.pages.iter().copied().filter(|&page| of_td(page));
        *lock(&vm.td.tdcs) = pages.collect();
        vm.td.set_initialized();
        if finalized {
            vm.td.set_runnable(vm.read_mrtd(seam)?);
        }
        Ok(())
    }

    /// Attributes, slots and settings.
    fn restore(&self, vm: &Vm, record: &VmRecord) -> Result<(), VmError> {
        *lock(&vm.private) = PrivateRanges::from_parts(record.private.clone());
        for &spec in record.slots.values() {
            let range = vm.page_range(("slot.gpa", "slot.size"), spec.gpa, spec.size)?;
            let slot = vm.new_slot(spec, range);
            if spec.log_dirty {
                // Which pages were dirty is not known, so all may be.
                slot.log.enable(slot.gfns.end - slot.gfns.start, true);
            }
            vm.slots.insert(slot);
        }
        let set = |flag: &super::AtomicBool, on| flag.store(on, super::Ordering::Release);
        set(&vm.nx_huge_pages, record.nx_huge_pages);
        set(&vm.exit_hypercall, record.exit_hypercall);
        Ok(())
    }
}

/// TDCS.OP_STATE.
const OP_STATE_INITIALIZED: u64 = 1;

/// What there is of a TD.
enum Found {
    /// Nothing.
    Nothing,
    /// Something that can only be taken down.
    Remains,
    /// A TD that is initialised, or more.
    Td { finalized: bool },
}

/// A call that is made again while the module is busy.
fn patiently(seam: &mut Seam<'_>, step: &Step) -> Result<SeamcallResult, SeamError> {
    let mut tries = 0;
    loop {
        let result = seam.call(step)?;
        tries += 1;
        if !result.status().is_busy() || tries == BUSY_TRIES {
            return Ok(result);
        }
        thread::yield_now();
    }
}

/// A record that does not make sense ends its VM and not the recovery; a module that does not
/// answer ends the recovery.
fn broken(vm: &Vm, outcome: Result<(), VmError>) -> Result<(), VmError> {
    match outcome {
        Err(error @ VmError::Seam(_)) => Err(error),
        Err(error) => {
            vm.mmu.bugs.kill(Check::Unsettled, || {
                format!("the VM cannot be made again: {error}")
            });
            Ok(())
        }
        Ok(()) => Ok(()),
    }
}

/// Whether a call was refused because its work is done already.
fn is_done_already(leaf: Leaf, status: CompletionStatus) -> bool {
    match leaf {
        Leaf::VP_INIT => status.is(CompletionStatus::VCPU_STATE_INCORRECT),
        _ => false,
    }
}

/// Marks that a note was lost which the module can stand in for.
fn note_or_warn(vm: &Vm, note: Note) {
    if let Err(error) = vm.note(note) {
        tracing::warn!(%error, "a recovered state is not written down");
    }
}

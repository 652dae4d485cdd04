//! KVM_RUN: the vCPU loop.
//!
//! Source: arch/x86/kvm/x86.c, `vcpu_run()`, `vcpu_enter_guest()`; arch/x86/kvm/vmx/tdx.c,
//! `tdx_vcpu_run()`, `tdx_handle_exit()`, `tdx_handle_ept_violation()`.
//!
//! There is no guest code: the caller says what the guest does. What it does to shared memory is
//! walked here, in the direct root; everything else goes to the module, which walks the private
//! tables as the processor would. Exits are handled as KVM handles them, and what only user space
//! can answer ends the run.
//!
//! Invariants
//! - G1  The vCPU is inside only while this function runs: it leaves before it returns.
//! - G2  mmu_lock is taken only while the vCPU is outside, so whoever holds it may kick.

use tdx_defs::{CompletionStatus, Gpa, Gpr, Gprs, Leaf, Level, PAGE_SIZE, Seamcall, Visibility};

use super::fault::Roots;
use super::faulting::Faulting;
use super::map_gpa::{self, Next, Vmcall};
use super::vcpu::{Run, Vcpu};
use super::{Fault, RetPf, Vm};
use crate::counts::Counts;
use crate::error::VmError;
use crate::guest::{Entry, GuestOp, GuestPort, GuestStep, MAX_GUEST_ACCESS, Resumed};
use crate::mmu::arena::TableId;
use crate::mmu::spte::{self, Access};
use crate::sync::{MutexGuard, lock, thread};

/// Most things that one run takes.
pub(super) const MAX_OPS: usize = 4096;
/// Things that one message to the module carries: a kick waits for no more.
const CHUNK: usize = 64;
/// Entries that the module may refuse as busy, one after the other.
const ENTRY_TRIES: u32 = 20_000;
/// Exits that one thing may cause, one after the other.
const MAX_EXITS: u32 = 1024;

/// Exit reasons, RAX bits 15:0 of a TD exit.
const EXTERNAL_INTERRUPT: u64 = 1;
const EPT_VIOLATION: u64 = 48;
const TDCALL: u64 = 77;
/// Vector of #VE.
const VE: u8 = 20;
/// Exit qualification of a shared access: what it was, and that a linear address led to it.
const READ: u64 = 1;
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 2;
const TRANSLATED: u64 = 0b11 << 7;

/// What KVM_RUN is asked to do.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct RunRequest {
    /// What the guest does, in order; at most 4096 things.
    pub ops: Vec<GuestOp>,
    /// The answer of user space to the last exit: 0 for a conversion that is done, another number
    /// for one that failed; the value of a read.
    pub answer: u64,
}

/// Why KVM_RUN returned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RunExit {
    /// Everything that was asked is done.
    Done,
    /// KVM_EXIT_HYPERCALL with KVM_HC_MAP_GPA_RANGE: convert, then run again.
    MapGpa {
        /// First byte, without the SHARED bit.
        gpa: u64,
        /// 4 KiB pages, at most 512.
        pages: u64,
        /// What they shall become.
        private: bool,
    },
    /// KVM_EXIT_MMIO, then run again.
    Mmio {
        /// First byte, without the SHARED bit.
        gpa: u64,
        /// 1, 2, 4 or 8.
        len: u8,
        /// What is written; a read without it.
        write: Option<u64>,
    },
    /// The guest halts until an event.
    Hlt,
    /// An event waits for the vCPU: run again.
    Interrupted,
    /// A TD exit that KVM does not know (KVM_EXIT_UNKNOWN): RAX.
    Unknown {
        /// Status and exit reason.
        rax: u64,
    },
    /// KVM_RUN fails: a memory fault with its record, a dead VM, a module that is away.
    Failed(VmError),
}

/// What KVM_RUN did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunReport {
    /// The result of a call that an earlier run had left open, then one for each thing that is
    /// done, in order.
    pub done: Vec<GuestStep>,
    /// Why it returned.
    pub exit: RunExit,
    /// TDH.VP.ENTERs that succeeded.
    pub entries: u64,
    /// What it cost.
    pub counts: Counts,
}

/// How a step of the loop ends it.
type Flow = Result<(), RunExit>;

impl From<VmError> for RunExit {
    fn from(error: VmError) -> Self {
        Self::Failed(error)
    }
}

impl Vm {
    /// KVM_RUN.
    pub fn run_vcpu(
        &self,
        vcpu_id: u32,
        port: &mut dyn GuestPort,
        request: &RunRequest,
    ) -> Result<RunReport, VmError> {
        check(&request.ops)?;
        if !self.is_td() {
            let reason = "an ordinary VM has no module that its vCPUs could enter";
            return Err(VmError::invalid("vm_id", reason));
        }
        let vcpu = self.vcpu(vcpu_id)?;
        let run = lock(&vcpu.run);
        let mut runner = Runner {
            vm: self,
            vcpu: &vcpu,
            run,
            port,
            inside: false,
            done: Vec::with_capacity(request.ops.len()),
            entries: 0,
            counts: Counts::default(),
        };
        self.enter(&vcpu, &mut runner.run)?;
        let exit = runner.go(request).err().unwrap_or(RunExit::Done);
        let exit = match runner.leave() {
            // A failed way out changes nothing about why the run ended, unless it had not.
            Err(left) if exit == RunExit::Done => left,
            _ => exit,
        };
        let counts = std::mem::take(&mut runner.counts);
        runner.run.counts += &counts;
        Ok(RunReport {
            done: runner.done,
            exit,
            entries: runner.entries,
            counts,
        })
    }

    /// An event or a signal for a vCPU: loops that retry for it end, and it leaves the guest.
    pub fn queue_event(&self, vcpu_id: u32) -> Result<(), VmError> {
        self.vcpu(vcpu_id)?.mode.queue_event();
        Ok(())
    }
}

fn check(ops: &[GuestOp]) -> Result<(), VmError> {
    if ops.len() > MAX_OPS {
        let reason = format!("{} operations, the limit is {MAX_OPS}", ops.len());
        return Err(VmError::invalid("ops", reason));
    }
    for op in ops {
        let (gpa, len) = match op {
            GuestOp::Read { gpa, len } => (*gpa, *len),
            GuestOp::Write { gpa, data } => (*gpa, data.len()),
            _ => continue,
        };
        let offset = gpa.get() % PAGE_SIZE;
        if len == 0 || len as u64 > PAGE_SIZE - offset || len > MAX_GUEST_ACCESS {
            let reason = format!("{len} bytes at {gpa} are none or do not lie in one 4 KiB page");
            return Err(VmError::invalid("ops", reason));
        }
    }
    Ok(())
}

struct Runner<'a> {
    vm: &'a Vm,
    vcpu: &'a Vcpu,
    run: MutexGuard<'a, Run>,
    port: &'a mut dyn GuestPort,
    inside: bool,
    done: Vec<GuestStep>,
    entries: u64,
    counts: Counts,
}

impl Runner<'_> {
    fn go(&mut self, request: &RunRequest) -> Flow {
        if let Some(pending) = self.run.vmcall.take() {
            let event = self.vcpu.mode.has_event();
            let layout = &self.vm.mmu.layout.td();
            self.next(map_gpa::complete(pending, request.answer, event, layout))?;
            // The guest gets its answer by the next entry.
            self.go_inside()?;
        }
        // What is done before the first operation ends a call of an earlier run.
        let earlier = self.done.len();
        let mut exits = 0;
        while let Some(op) = request.ops.get(self.done.len() - earlier) {
            if self.vcpu.mode.take_event() {
                return Err(RunExit::Interrupted);
            }
            if self.run.vmcall.is_some() {
                // The guest's call ends with its next entry.
                self.go_inside()?;
                continue;
            }
            let before = self.done.len();
            match self.shared_access(op) {
                Some((access, gpa)) => self.shared(op, gpa, access)?,
                None => self.private(&request.ops[before - earlier..])?,
            }
            exits = if self.done.len() == before {
                exits + 1
            } else {
                0
            };
            if exits == MAX_EXITS {
                return Err(RunExit::Interrupted);
            }
        }
        Ok(())
    }

    /// Whether `op` touches shared memory, and how.
    fn shared_access(&self, op: &GuestOp) -> Option<(Access, Gpa)> {
        let (gpa, write, exec) = match op {
            GuestOp::Read { gpa, .. } => (*gpa, false, false),
            GuestOp::Write { gpa, .. } => (*gpa, true, false),
            GuestOp::Execute { gpa } => (*gpa, false, true),
            GuestOp::Accept { .. } | GuestOp::Tdcall { .. } | GuestOp::Interrupt => return None,
        };
        let layout = self.vm.mmu.layout;
        let is_shared =
            gpa.get() >> layout.width() == 0 && layout.split(gpa).1 == Visibility::Shared;
        is_shared.then_some((Access { write, exec }, gpa))
    }

    /// An access to shared memory: the direct root, as the processor would walk it.
    ///
    /// Model: no translation of shared memory is kept from one access to the next, so every flush
    /// is one that had to be.
    fn shared(&mut self, op: &GuestOp, gpa: Gpa, access: Access) -> Flow {
        let (gfn, _) = self.vm.mmu.layout.split(gpa);
        let direct = self.walked()?;
        let found = {
            let _rcu = crossbeam_epoch::pin();
            self.vm.mmu.last(direct, gfn)
        };
        let Some(step) = found else {
            return Err(RunExit::Failed(VmError::NoMemory(gpa)));
        };
        if spte::is_mmio(step.spte) && step.level == Level::L4K {
            self.done.push(GuestStep::Resumed(Resumed {
                injected: Some(VE),
                ..Resumed::default()
            }));
            return Ok(());
        }
        let present = spte::is_leaf(step.spte, step.level);
        if present && access.allowed_by(step.spte) {
            let in_leaf = gpa.get() & (step.level.bytes() - 1);
            let hpa = spte::pfn(step.spte).base().get() + in_leaf;
            return self.touch(op, hpa);
        }
        let mut qualification = TRANSLATED;
        qualification |= match (access.write, access.exec) {
            (true, _) => WRITE,
            (_, true) => FETCH,
            _ => READ,
        };
        if present {
            qualification |= (step.spte & 0b111) << 3;
        }
        self.leave()?;
        self.fault(Fault {
            gpa: gpa.get(),
            qualification,
            extended: 0,
        })
    }

    /// The access itself.
    fn touch(&mut self, op: &GuestOp, hpa: u64) -> Flow {
        let mut resumed = Resumed::default();
        let touched = match op {
            GuestOp::Read { len, .. } => self
                .port
                .read_shared(hpa, *len)
                .map(|data| resumed.data = data),
            GuestOp::Write { data, .. } => self.port.write_shared(hpa, data),
            _ => Ok(()),
        };
        touched.map_err(VmError::from)?;
        self.done.push(GuestStep::Resumed(resumed));
        Ok(())
    }

    /// What the module plays: from the first of `ops` up to the next shared access or exit.
    fn private(&mut self, ops: &[GuestOp]) -> Flow {
        let mine = ops
            .iter()
            .take(CHUNK)
            .take_while(|op| self.shared_access(op).is_none())
            .count();
        self.go_inside()?;
        let steps = self
            .port
            .play(&ops[..mine])
            .map_err(|error| self.lost(error))?;
        if steps.is_empty() {
            self.is_outside();
            return Err(RunExit::Interrupted);
        }
        for (step, op) in steps.into_iter().zip(ops) {
            match step {
                GuestStep::Exited(regs) => {
                    self.is_outside();
                    return self.exit(op, regs);
                }
                step => self.done.push(step),
            }
        }
        if self.vcpu.mode.is_kicked() {
            self.leave()?;
        }
        Ok(())
    }

    /// tdx_handle_exit.
    fn exit(&mut self, op: &GuestOp, regs: Gprs) -> Flow {
        let rax = regs[Gpr::Rax];
        let status = CompletionStatus(rax);
        if status.is_error() || rax >> 32 != 0 {
            return Err(RunExit::Unknown { rax });
        }
        match rax & 0xFFFF {
            EXTERNAL_INTERRUPT => {
                if *op == GuestOp::Interrupt {
                    self.done.push(GuestStep::Exited(regs));
                }
                Ok(())
            }
            EPT_VIOLATION => self.fault(Fault {
                gpa: regs[Gpr::R8],
                qualification: regs[Gpr::Rcx],
                extended: regs[Gpr::Rdx],
            }),
            TDCALL => {
                let exits = self.vm.exits_hypercall();
                self.next(map_gpa::handle(&regs, &self.vm.mmu.layout.td(), exits))
            }
            _ => Err(RunExit::Unknown { rax }),
        }
    }

    /// tdx_handle_ept_violation; the vCPU is outside.
    fn fault(&mut self, fault: Fault) -> Flow {
        let wanted = self.vm.wanted(0, fault)?;
        self.vm.trace_fault(self.vcpu.id, fault, &wanted);
        let roots = self.roots()?;
        let mut faulting = Faulting::new(self.vm, self.vcpu, roots, self.vm.seam(self.vcpu.lp));
        faulting.push(wanted);
        faulting.finish();
        let ended = faulting.ended.pop();
        self.counts += &faulting.into_seam().counts;
        match ended.map(|ended| ended.result) {
            // The guest does it again; an emulation of a TD ends in #VE when it does.
            Some(Ok(RetPf::Fixed | RetPf::Spurious | RetPf::Retry | RetPf::Emulate)) => Ok(()),
            Some(Ok(RetPf::WriteProtected)) => Ok(()),
            Some(Err(error)) => Err(error.into()),
            Some(Ok(RetPf::Continue | RetPf::Invalid)) | None => {
                let reason = "a fault ended without an answer".to_owned();
                Err(VmError::Dead { reason }.into())
            }
        }
    }

    /// A TDG.VP.VMCALL goes on.
    fn next(&mut self, next: Next) -> Flow {
        match next {
            Next::Enter(vmcall) => {
                self.run.vmcall = Some(vmcall);
                Ok(())
            }
            Next::Exit(vmcall, exit) => {
                self.run.vmcall = Some(vmcall);
                Err(exit)
            }
        }
    }

    /// The direct root that the vCPU walks. While it is inside that is the one it entered with; a
    /// new one is loaded outside, where nothing of the vCPU is held.
    fn walked(&mut self) -> Result<TableId, RunExit> {
        match self.run.root {
            Some(root) if self.inside && !self.vm.mmu.is_obsolete(root) => Ok(root),
            _ => {
                self.leave()?;
                Ok(self.roots()?.direct)
            }
        }
    }

    /// The roots, loaded anew when they have been invalidated.
    fn roots(&mut self) -> Result<Roots, RunExit> {
        Ok(self.vm.roots_of(self.vcpu, &mut self.run)?)
    }

    /// TDH.VP.ENTER, if the vCPU is not inside.
    fn go_inside(&mut self) -> Flow {
        for _ in 0..ENTRY_TRIES {
            if self.inside {
                return Ok(());
            }
            self.vm.alive()?;
            self.roots()?;
            self.try_to_enter()?;
        }
        Err(RunExit::Failed(VmError::Busy {
            leaf: Leaf::VP_ENTER,
            status: CompletionStatus::OPERAND_BUSY,
            tries: ENTRY_TRIES,
        }))
    }

    fn try_to_enter(&mut self) -> Flow {
        self.vm.td.modes.enter(&self.vcpu.mode);
        let mut call = Seamcall {
            rcx: self.run.tdvpr().base().get(),
            ..Seamcall::new(Leaf::VP_ENTER)
        };
        match self.run.vmcall {
            Some(Vmcall::Answered { r10, r11 }) => (call.r10, call.r11) = (r10, r11),
            Some(Vmcall::Lost) => call.r10 = map_gpa::LOST,
            _ => {}
        }
        self.counts.seamcalls.add(Leaf::VP_ENTER, 1);
        match self.port.enter(self.vcpu.lp, call) {
            Ok(Entry::Entered { vmcall }) => {
                self.inside = true;
                self.entries += 1;
                let pending = self.run.vmcall.take();
                // Only the module knows whether the guest had made one that was lost.
                if pending.is_some() && (pending != Some(Vmcall::Lost) || vmcall.is_some()) {
                    // The guest's own call returns only now.
                    self.done.push(GuestStep::Resumed(Resumed {
                        regs: vmcall,
                        ..Resumed::default()
                    }));
                }
                Ok(())
            }
            Ok(Entry::Refused(result)) => {
                self.vcpu.mode.leave();
                let status = result.status();
                if status.is_busy() {
                    thread::yield_now();
                    return Ok(());
                }
                if result.rax == EPT_VIOLATION {
                    // The module's zero-step defence: an exit as if the guest had touched the page again.
                    return self.fault(Fault {
                        gpa: result.r8,
                        qualification: result.rcx,
                        extended: result.rdx,
                    });
                }
                let leaf = Leaf::VP_ENTER;
                Err(RunExit::Failed(VmError::Refused { leaf, status }))
            }
            Err(error) => {
                self.vcpu.mode.leave();
                Err(RunExit::Failed(error.into()))
            }
        }
    }

    /// Makes the vCPU leave, as an interrupt of the host does.
    fn leave(&mut self) -> Flow {
        if !self.inside {
            return Ok(());
        }
        let left = self.port.play(&[GuestOp::Interrupt]);
        self.is_outside();
        left.map(drop)
            .map_err(|error| RunExit::Failed(error.into()))
    }

    fn lost(&mut self, error: crate::seam::SeamError) -> RunExit {
        self.is_outside();
        RunExit::Failed(error.into())
    }

    fn is_outside(&mut self) {
        self.inside = false;
        self.vcpu.mode.leave();
    }
}

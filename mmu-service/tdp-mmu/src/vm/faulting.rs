//! Faults of one vCPU on their way: the loop behind single faults, batches and prefault.
//!
//! Source: arch/x86/kvm/mmu/mmu.c, `kvm_tdp_mmu_page_fault()`; tdp_mmu.c, `kvm_tdp_mmu_map()`;
//! arch/x86/kvm/vmx/tdx.c, `tdx_handle_ept_violation()` (local retry of private faults).
//!
//! Mode `kernel` takes each private fault to its end, one call at a time. Mode `batched` holds
//! entries for many faults, sends them as one message, and settles when the answer comes; up to
//! [`MAX_FLIGHTS`] messages are under way.
//!
//! Invariants
//! - F1  The read side of mmu_lock is held from the first held entry to the last settle, so a
//!   zap never meets a FROZEN mirror entry.
//! - F2  Nobody waits for another vCPU while it holds entries: what is held is settled first.

use std::collections::{HashMap, VecDeque};

use tdx_defs::{CompletionStatus, Gfn, Leaf, Level, Visibility};

use super::fault::Roots;
use super::mmio::Mmio;
use super::resolve::{Early, Page, Resolved};
use super::vcpu::Vcpu;
use super::wanted::{Ended, Mapping, Wanted};
use super::{Mode, RetPf, Vm, spans};
use crate::error::VmError;
use crate::memory::slots::{Lookups, Slot};
use crate::mmu::arena::TableId;
use crate::mmu::direct::{DirectFault, Installed, Target};
use crate::mmu::fast::Fast;
use crate::mmu::lock::ReadGuard;
use crate::mmu::mirror::{Begin, Depth, Extended, Unit};
use crate::mmu::spte::{self, DirectTraits, LeafTraits};
use crate::sync::thread;
use crate::tdx::install::Sent;
use crate::tdx::lifecycle::out_of_memory;
use crate::tdx::seam::Seam;
use crate::trace::Event;

/// Local retries of one fault before the vCPU loop gets it back.
const MAX_TRIES: u32 = if cfg!(feature = "shuttle") {
    64
} else {
    20_000
};
/// Passes of a fault that found no page for a table.
const TOP_UPS: u32 = 32;
/// Messages under way.
const MAX_FLIGHTS: usize = 4;
/// Units that one message joins: eight leaf tables.
const MAX_UNITS: usize = 8;
/// Calls and leaves of one message, before runs are joined.
const MAX_OPS: usize = 4096;

/// What one pass over a fault came to.
enum Pass {
    Ended(Result<RetPf, VmError>, Option<Mapping>),
    /// Emulated without a look at the tables (or #VE in the guest): nothing to count.
    Uncounted,
    /// Its entry is held; the module's answer ends it.
    Held,
    /// Start over at once.
    Again,
    /// Start over when others have moved on.
    Wait,
}

/// A fault whose entry is held: unit of the message, leaf of the unit.
struct Waiting {
    wanted: Wanted,
    tries: u32,
    unit: usize,
    leaf: usize,
}

struct Flight<'a> {
    sent: Sent<'a>,
    waiting: Vec<Waiting>,
}

/// The faults of one operation.
pub(super) struct Faulting<'a> {
    pub(super) vm: &'a Vm,
    vcpu: &'a Vcpu,
    roots: Roots,
    pub(super) slots: Lookups<'a>,
    pub(super) seam: Seam<'a>,
    held: Option<ReadGuard<'a>>,
    units: Vec<Unit<'a>>,
    /// Which unit holds entries of a region of 2 MiB, when there are more than a few.
    by_region: HashMap<u64, usize>,
    /// Tables and leaves of `units`.
    ops: usize,
    waiting: Vec<Waiting>,
    flights: VecDeque<Flight<'a>>,
    todo: VecDeque<(Wanted, u32)>,
    /// The call that was last refused.
    busy: Option<(Leaf, CompletionStatus)>,
    pub(super) ended: Vec<Ended>,
}

impl<'a> Faulting<'a> {
    pub(super) fn new(vm: &'a Vm, vcpu: &'a Vcpu, roots: Roots, seam: Seam<'a>) -> Self {
        Self {
            vm,
            vcpu,
            roots,
            slots: vm.slots.lookups(),
            seam,
            held: None,
            units: Vec::new(),
            by_region: HashMap::new(),
            ops: 0,
            waiting: Vec::new(),
            flights: VecDeque::new(),
            todo: VecDeque::new(),
            busy: None,
            ended: Vec::new(),
        }
    }

    /// The way to the module, with what was counted.
    pub(super) fn into_seam(self) -> Seam<'a> {
        self.seam
    }

    /// Takes one access as far as it goes without waiting for the module.
    pub(super) fn push(&mut self, wanted: Wanted) {
        self.step(wanted, 0);
        self.work();
    }

    /// Sends and settles everything, and takes every access to its end.
    pub(super) fn finish(&mut self) {
        loop {
            self.work();
            if self.units.is_empty() && self.flights.is_empty() {
                break;
            }
            self.settle_all();
        }
        self.held = None;
    }

    fn work(&mut self) {
        while let Some((wanted, tries)) = self.todo.pop_front() {
            self.step(wanted, tries);
        }
    }

    /// One pass, and what it leaves to do.
    fn step(&mut self, wanted: Wanted, tries: u32) {
        match self.pass(wanted, tries) {
            Pass::Held => {}
            Pass::Uncounted => {
                self.ended.push(ended(&wanted, Ok(RetPf::Emulate), None));
            }
            Pass::Ended(result, at) => self.end(wanted, result, at),
            Pass::Again | Pass::Wait if self.must_leave(&wanted) => {
                self.end(wanted, Ok(RetPf::Retry), None);
            }
            Pass::Again | Pass::Wait if tries + 1 >= MAX_TRIES => {
                self.give_up(wanted, tries + 1);
            }
            Pass::Again => {
                spans::retry(wanted.gfn, tries + 1, None);
                self.todo.push_front((wanted, tries + 1));
            }
            Pass::Wait => {
                spans::retry(wanted.gfn, tries + 1, self.busy);
                self.todo.push_front((wanted, tries + 1));
                self.let_others_go_on();
            }
        }
    }

    /// Whether the vCPU loop is to get a fault back that would start over: an event or a signal
    /// waits for the vCPU (`kvm_vcpu_has_events()`, `signal_pending()`), or its slot is on its way
    /// out, which in the kernel waits for the vCPU to let go of the slots.
    fn must_leave(&self, wanted: &Wanted) -> bool {
        let is_going = || {
            let slot = self.vm.slots.find(wanted.gfn);
            slot.is_some_and(|slot| slot.is_going())
        };
        !wanted.prefetch && (self.vcpu.mode.has_event() || is_going())
    }

    /// F2: what is held is settled first; then the others get their turn.
    fn let_others_go_on(&mut self) {
        if !self.units.is_empty() || !self.flights.is_empty() {
            self.settle_all();
            return;
        }
        self.held = None;
        self.vm.invalidation.wait_until_quiet();
        thread::yield_now();
    }

    /// A zap waits until every reader has left: a long operation must not keep it waiting.
    fn let_the_writer_in(&mut self) {
        self.settle_all();
        self.held = None;
    }

    fn end(&mut self, wanted: Wanted, result: Result<RetPf, VmError>, at: Option<Mapping>) {
        let mut result = result;
        let counts = &mut self.seam.counts;
        if !wanted.prefetch {
            match &result {
                Ok(RetPf::Fixed) => counts.pf_fixed += 1,
                Ok(RetPf::Spurious) => counts.pf_spurious += 1,
                Ok(RetPf::Emulate) => counts.pf_emulate += 1,
                // kvm_mmu_write_protect_fault: what somebody tracks is emulated.
                Ok(RetPf::WriteProtected) => result = Ok(RetPf::Emulate),
                _ => {}
            }
        }
        self.ended.push(ended(&wanted, result, at));
    }

    /// What the processor and the MMIO entries decide before the fault is one.
    #[inline(never)]
    fn is_mmio(&self, wanted: &Wanted) -> bool {
        !wanted.prefetch
            && self.vm.meet_mmio(self.vcpu, self.roots.direct, wanted.gfn) != Mmio::Fault
    }

    /// One pass of the fault handler.
    fn pass(&mut self, wanted: Wanted, tries: u32) -> Pass {
        if let Err(error) = self.vm.alive() {
            return Pass::Ended(Err(error), None);
        }
        if self.held.is_some() && self.vm.mmu.lock.is_wanted() {
            self.let_the_writer_in();
        }
        // A fault that starts over has left the processor's part behind.
        let is_shared = wanted.visibility == Visibility::Shared;
        if is_shared && tries == 0 && self.is_mmio(&wanted) {
            return Pass::Uncounted;
        }
        if !wanted.prefetch {
            self.seam.counts.pf_taken += 1;
        }
        if wanted.present && wanted.access.write && self.vm.tracked.contains(wanted.gfn) {
            return Pass::Ended(Ok(RetPf::WriteProtected), None);
        }
        if is_shared
            && wanted.present
            && let Some(installed) = self.fast(&wanted)
        {
            return installed;
        }
        let resolved = match self.vm.resolve(&mut self.slots, &wanted) {
            Ok(resolved) => resolved,
            Err(Early::Ret(RetPf::Retry)) => return Pass::Wait,
            Err(Early::SlotGoing) => return Pass::Ended(Ok(RetPf::Retry), None),
            Err(Early::Ret(ret_pf)) => return Pass::Ended(Ok(ret_pf), None),
            Err(Early::Error(error)) => return Pass::Ended(Err(error), None),
            Err(Early::CopyOnWrite(slot)) => return self.copy_on_write(&slot, wanted.gfn),
        };
        if self.held.is_none() {
            self.held = Some(self.vm.mmu.lock.read(self.vcpu.id));
        }
        if self.vm.mmu.is_obsolete(self.roots.direct) {
            // Only the vCPU loop can load another root.
            return Pass::Ended(Ok(RetPf::Retry), None);
        }
        if self.vm.is_stale(&resolved, wanted.gfn) {
            return Pass::Wait;
        }
        match (wanted.visibility, resolved.page) {
            (Visibility::Shared, _) => self.map_shared(&wanted, &resolved),
            (Visibility::Private, Some(page)) => match self.roots.mirror {
                Some(mirror) => self.map_private(wanted, page, tries, mirror),
                None => Pass::Ended(Ok(RetPf::Invalid), None),
            },
            // resolve() refuses a private frame without a slot.
            (Visibility::Private, None) => Pass::Ended(Ok(RetPf::Invalid), None),
        }
    }

    /// page_fault_can_be_fast, fast_page_fault: present write faults of shared memory only.
    #[inline(never)]
    fn fast(&mut self, wanted: &Wanted) -> Option<Pass> {
        if !wanted.access.write || wanted.prefetch {
            return None;
        }
        let slot = self.vm.slots.find(wanted.gfn);
        if self.vm.is_private(slot.as_deref(), wanted.gfn) {
            return None;
        }
        let logged = slot.as_ref().is_some_and(|slot| slot.log.is_on());
        let _rcu = crossbeam_epoch::pin();
        let mmu = &self.vm.mmu;
        let fast = mmu.fast_page_fault(self.roots.direct, wanted.gfn, wanted.access, logged);
        self.trace_fast(wanted, &fast);
        let (ret_pf, step) = match fast {
            Fast::Fixed(step) => {
                if let Some(slot) = &slot {
                    slot.log.mark(slot.offset(wanted.gfn));
                    // A log that began since the slot was looked at: the leaf is too large for it.
                    // The kernel lets no log begin while a fault has the slot (SRCU).
                    if step.level > Level::L4K && slot.log.is_on() {
                        mmu.take_write_back(&step);
                        return None;
                    }
                }
                (RetPf::Fixed, step)
            }
            Fast::Spurious(step) => (RetPf::Spurious, step),
            Fast::Invalid(_) => return None,
        };
        self.seam.counts.pf_fast += 1;
        let inside = wanted.gfn.get() % step.level.pages();
        let page = spte::pfn(step.spte).offset(inside);
        Some(Pass::Ended(
            Ok(ret_pf),
            Some(Mapping::new(page, step.level)),
        ))
    }

    fn trace_fast(&self, wanted: &Wanted, fast: &Fast) {
        self.vm.mmu.tracer.emit(|| {
            let (step, fixed, spurious) = match *fast {
                Fast::Fixed(step) => (Some(step), true, false),
                Fast::Spurious(step) => (Some(step), false, true),
                Fast::Invalid(step) => (step, false, false),
            };
            let old_spte = step.map_or(0, |step| step.spte);
            let direct_bits = Gfn::new(self.vm.mmu.layout.direct_bits()).base().get();
            Event::FastPageFault {
                vcpu: self.vcpu.id,
                gva: wanted.gfn.base().get() | direct_bits | u64::from(wanted.offset),
                error_code: wanted.error_code(),
                sptep: step.map_or(0, |step| step.slot.hpa()),
                old_spte,
                new_spte: old_spte | if fixed { spte::WRITE } else { 0 },
                spurious,
                fixed,
            }
        });
    }

    /// The host copies the page before the guest may write it, which takes it away from the guest
    /// first. The guest faults again, with another qualification.
    #[cold]
    fn copy_on_write(&mut self, slot: &Slot, gfn: Gfn) -> Pass {
        self.let_the_writer_in();
        let copied = self.vm.copy_on_write(&mut self.seam, slot, gfn);
        Pass::Ended(copied.map(|()| RetPf::Retry), None)
    }

    #[inline(never)]
    fn map_shared(&mut self, wanted: &Wanted, resolved: &Resolved) -> Pass {
        let Wanted { gfn, .. } = *wanted;
        let vm = self.vm;
        let behind = resolved.page.zip(resolved.slot.as_deref());
        let (target, req_level) = match behind {
            Some((page, slot)) => (
                Target::Page {
                    pfn: page.pfn,
                    map_writable: page.map_writable,
                },
                vm.req_level(slot, gfn),
            ),
            None => {
                let spte = vm.mmio_spte(gfn, resolved.generation);
                self.vcpu.mmio.set(gfn, resolved.generation);
                (Target::Mmio { spte }, Level::L4K)
            }
        };
        let fault = DirectFault {
            gfn,
            access: wanted.access,
            prefetch: wanted.prefetch,
            req_level,
            target,
            traits: DirectTraits {
                ignore_pat: !vm.is_td(),
                nx_huge_pages: vm.nx_huge_pages(),
                write_tracked: behind.is_some() && vm.tracked.contains(gfn),
            },
        };
        let mapped = vm.mmu.map_direct(self.roots.direct, &fault);
        self.seam.counts.flushes += u64::from(mapped.flush);
        if let Some((_, slot)) = behind
            && mapped.spte.is_some_and(|spte| spte & spte::WRITE != 0)
        {
            // A leaf that is writable from the start never faults for the log.
            slot.log.mark(slot.offset(gfn));
        }
        let at = behind.map(|(page, _)| Mapping::new(page.pfn, mapped.level));
        let ret_pf = match mapped.installed {
            Installed::NoMemory => return Pass::Ended(Err(out_of_memory(&vm.host)), None),
            Installed::Retry => return Pass::Wait,
            Installed::Spurious => RetPf::Spurious,
            Installed::WriteProtected => RetPf::WriteProtected,
            Installed::Fixed => {
                self.seam.counts.pages_mapped += 1;
                RetPf::Fixed
            }
            Installed::Mmio => {
                self.seam.counts.pf_mmio_spte_created += 1;
                RetPf::Emulate
            }
        };
        Pass::Ended(Ok(ret_pf), at)
    }

    fn map_private(&mut self, wanted: Wanted, page: Page, tries: u32, mirror: TableId) -> Pass {
        let traits = LeafTraits {
            map_writable: page.map_writable,
            prefetch: wanted.prefetch,
        };
        let leaf = spte::leaf_4k(page.pfn, traits);
        self.vm.mmu.trace_private_request(wanted.gfn, page.pfn);
        if !self.vm.mmu.top_up_external(|| self.vm.host.memory.page()) {
            return Pass::Ended(Err(out_of_memory(&self.vm.host)), None);
        }
        match self.vm.config.mode {
            Mode::Kernel => self.map_now(&wanted, leaf, tries, mirror),
            Mode::Batched => self.map_later(wanted, leaf, tries, mirror),
        }
    }

    fn begin(&self, mirror: TableId, gfn: Gfn, leaf: u64, depth: Depth) -> Begin<'a> {
        if self.seam.is_traced() && spans::watched() {
            spans::begin(&self.vm.mmu, mirror, gfn, leaf, depth)
        } else {
            self.vm.mmu.begin(mirror, gfn, leaf, depth)
        }
    }

    fn hit(&mut self, spte: u64) -> Pass {
        self.seam.counts.mirror_hits += 1;
        Pass::Ended(Ok(RetPf::Spurious), Some(Mapping::small(spte)))
    }

    /// kvm_tdp_mmu_map as the kernel runs it: one entry, one call, one after the other.
    fn map_now(&mut self, wanted: &Wanted, leaf: u64, tries: u32, mirror: TableId) -> Pass {
        let hooks = self.vm.hooks();
        let mut called = false;
        loop {
            let unit = match self.begin(mirror, wanted.gfn, leaf, Depth::One) {
                Begin::Held(unit) => unit,
                Begin::Mapped { spte } if !called => return self.hit(spte),
                Begin::Mapped { spte } => {
                    return Pass::Ended(Ok(RetPf::Spurious), Some(Mapping::small(spte)));
                }
                Begin::Frozen | Begin::Lost => return Pass::Wait,
                Begin::NoMemory => return self.no_memory(tries),
            };
            called = true;
            let is_leaf = unit.links() == 0;
            let sent = hooks.send(&mut self.seam, vec![unit], None);
            match hooks.settle(&mut self.seam, sent) {
                Err(error) => return Pass::Ended(Err(error.into()), None),
                Ok(settled) if !settled.complete => {
                    self.busy = settled.failed.map(|(leaf, result)| (leaf, result.status()));
                    return Pass::Wait;
                }
                Ok(_) if is_leaf => {
                    self.seam.counts.pages_mapped += 1;
                    return Pass::Ended(Ok(RetPf::Fixed), Some(Mapping::small(leaf)));
                }
                Ok(_) => {}
            }
        }
    }

    /// Holds the entries and leaves the call for a message that others share.
    fn map_later(&mut self, wanted: Wanted, leaf: u64, tries: u32, mirror: TableId) -> Pass {
        if let Some(at) = self.unit_over(wanted.gfn) {
            match self.units[at].extend(wanted.gfn, leaf) {
                Extended::Added => return self.hold(wanted, tries, at),
                Extended::Mapped { spte } => return self.hit(spte),
                Extended::Frozen => return Pass::Wait,
                Extended::Outside => {}
            }
        }
        let full = self.units.len() >= MAX_UNITS && wanted.prefetch;
        if full || self.ops >= MAX_OPS - 8 {
            self.send();
        }
        match self.begin(mirror, wanted.gfn, leaf, Depth::Chain) {
            Begin::Held(unit) => {
                self.ops += unit.links();
                self.add(unit);
                self.hold(wanted, tries, self.units.len() - 1)
            }
            Begin::Mapped { spte } => self.hit(spte),
            Begin::Frozen => Pass::Wait,
            Begin::Lost => Pass::Again,
            Begin::NoMemory => self.no_memory(tries),
        }
    }

    /// The unit that holds entries of the leaf table of `gfn`.
    fn unit_over(&self, gfn: Gfn) -> Option<usize> {
        let last = self.units.len().checked_sub(1)?;
        if self.units[last].covers(gfn) {
            return Some(last);
        }
        if self.by_region.is_empty() {
            return (0..last).rev().find(|&at| self.units[at].covers(gfn));
        }
        self.by_region.get(&region(gfn)).copied()
    }

    /// Takes a unit into the message. Beyond a few their regions are looked up.
    fn add(&mut self, unit: Unit<'a>) {
        self.units.push(unit);
        if self.units.len() <= MAX_UNITS {
            return;
        }
        let known = self.by_region.len();
        for (at, unit) in self.units.iter().enumerate().skip(known) {
            self.by_region.insert(region(unit.gfn()), at);
        }
    }

    /// The cache of table pages belongs to all vCPUs: others may have emptied it since it was
    /// topped up, so a fault looks again before it gives up.
    fn no_memory(&self, tries: u32) -> Pass {
        match tries < TOP_UPS {
            true => Pass::Again,
            false => Pass::Ended(Err(out_of_memory(&self.vm.host)), None),
        }
    }

    fn hold(&mut self, wanted: Wanted, tries: u32, unit: usize) -> Pass {
        let leaf = self.units[unit].leaves() - 1;
        self.ops += 1;
        self.waiting.push(Waiting {
            wanted,
            tries,
            unit,
            leaf,
        });
        Pass::Held
    }

    /// Sends what is held as one message.
    fn send(&mut self) {
        if self.units.is_empty() {
            return;
        }
        if self.flights.len() >= MAX_FLIGHTS {
            self.settle_one();
        }
        self.ops = 0;
        self.by_region.clear();
        let units = std::mem::take(&mut self.units);
        let waiting = std::mem::take(&mut self.waiting);
        let sent = self.vm.hooks().send(&mut self.seam, units, None);
        self.flights.push_back(Flight { sent, waiting });
    }

    fn settle_all(&mut self) {
        self.send();
        while !self.flights.is_empty() {
            self.settle_one();
        }
    }

    fn settle_one(&mut self) {
        let Some(Flight { sent, waiting }) = self.flights.pop_front() else {
            return;
        };
        match self.vm.hooks().settle(&mut self.seam, sent) {
            Ok(settled) => {
                self.busy = settled.failed.map(|(leaf, result)| (leaf, result.status()));
                for Waiting {
                    wanted,
                    tries,
                    unit,
                    leaf,
                } in waiting
                {
                    let confirmed = settled
                        .units
                        .get(unit)
                        .is_some_and(|unit| leaf < unit.leaves);
                    if confirmed {
                        self.seam.counts.pages_mapped += 1;
                        self.end(wanted, Ok(RetPf::Fixed), None);
                    } else {
                        self.again(wanted, tries);
                    }
                }
            }
            Err(error) => {
                for waiting in waiting {
                    self.end(waiting.wanted, Err(error.clone().into()), None);
                }
            }
        }
    }

    /// RET_PF_RETRY of a private fault: retried here, not in the guest.
    fn again(&mut self, wanted: Wanted, tries: u32) {
        if self.must_leave(&wanted) {
            self.end(wanted, Ok(RetPf::Retry), None);
        } else if tries + 1 < MAX_TRIES {
            spans::retry(wanted.gfn, tries + 1, self.busy);
            self.todo.push_back((wanted, tries + 1));
        } else {
            self.give_up(wanted, tries + 1);
        }
    }

    /// Model: the kernel retries until the vCPU has an event to serve; here a budget ends it.
    fn give_up(&mut self, wanted: Wanted, tries: u32) {
        let result = match self.busy {
            Some((leaf, status)) => Err(VmError::Busy {
                leaf,
                status,
                tries,
            }),
            None => Ok(RetPf::Retry),
        };
        self.end(wanted, result, None);
    }
}

/// Number of the 2 MiB region of a frame.
fn region(gfn: Gfn) -> u64 {
    gfn.get() / Level::L2M.pages()
}

#[inline]
fn ended(wanted: &Wanted, result: Result<RetPf, VmError>, at: Option<Mapping>) -> Ended {
    Ended {
        index: wanted.index,
        gfn: wanted.gfn,
        result,
        at,
    }
}

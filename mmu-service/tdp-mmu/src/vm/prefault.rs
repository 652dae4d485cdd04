//! KVM_PRE_FAULT_MEMORY: mappings ahead of any access.
//!
//! Source: virt/kvm/kvm_main.c, `kvm_vcpu_pre_fault_memory()`; arch/x86/kvm/mmu/mmu.c,
//! `kvm_arch_vcpu_pre_fault_memory()`. Prefault counts no fault; leaves are made with
//! "accessed" clear.

use std::ops::Range;
use std::sync::Arc;

use tdx_defs::{Gfn, PAGE_SHIFT, PAGE_SIZE, Visibility};

use super::fault::Roots;
use super::faulting::Faulting;
use super::wanted::{GuestWalk, Wanted};
use super::{RetPf, Vm};
use crate::counts::Counts;
use crate::error::VmError;
use crate::mmu::spte::Access;
use crate::sync::lock;

/// Pages between two reports of progress.
const STRIDE: u64 = 4096;

impl Vm {
    /// Maps `[gpa, gpa + size)`. `progress` gets the bytes done so far. Succeeds when at least
    /// one page was done; the last report says how many.
    pub fn pre_fault_memory(
        &self,
        vcpu_id: u32,
        gpa: u64,
        size: u64,
        progress: &mut dyn FnMut(u64),
    ) -> Result<Counts, VmError> {
        self.alive()?;
        let range = self.page_range(("gpa", "size"), gpa, size)?;
        let vcpu = self.vcpu(vcpu_id)?;
        let mut run = lock(&vcpu.run);
        if !self.td.is_runnable() {
            return Err(VmError::NotYet {
                operation: "KVM_PRE_FAULT_MEMORY",
            });
        }
        let roots = self.enter(&vcpu, &mut run)?;
        let mut faulting = Faulting::new(self, &vcpu, roots, self.seam(vcpu.lp));
        let mut done = Done::default();
        let mut gfn = range.start;
        while gfn < range.end {
            let index = usize::try_from(gfn - range.start).unwrap_or(usize::MAX);
            let wanted = faulting.prefetch(index, Gfn::new(gfn));
            faulting.push(wanted);
            // A fault on shared memory has ended by now: a huge page is done up to its end.
            let next = match faulting.ended.last() {
                Some(ended) if ended.index == index => {
                    Gfn::new(gfn).align_down(ended.level().pages()).get() + ended.level().pages()
                }
                _ => gfn + 1,
            };
            let next = next.min(range.end);
            done.collect(self, roots, &mut faulting, range.start..range.end);
            if done.failed.is_some() {
                break;
            }
            if next / STRIDE != gfn / STRIDE {
                progress(done.pages * PAGE_SIZE);
            }
            gfn = next;
        }
        faulting.finish();
        done.collect(self, roots, &mut faulting, range);
        let seam = faulting.into_seam();
        run.counts += &seam.counts;
        progress(done.in_front() * PAGE_SIZE);
        match done.failed {
            Some((0, error)) => Err(error),
            _ => Ok(seam.counts),
        }
    }

    /// Frames of a page-aligned range of guest physical addresses without SHARED bit.
    pub(super) fn page_range(
        &self,
        (field, size_field): (&'static str, &'static str),
        gpa: u64,
        size: u64,
    ) -> Result<Range<u64>, VmError> {
        if !gpa.is_multiple_of(PAGE_SIZE) {
            return Err(VmError::invalid(
                field,
                format!("{gpa:#x} is not page aligned"),
            ));
        }
        if size == 0 || !size.is_multiple_of(PAGE_SIZE) {
            let reason = format!("{size:#x} is not a positive number of pages");
            return Err(VmError::invalid(size_field, reason));
        }
        let limit = self.mmu.layout.gfn_limit() << PAGE_SHIFT;
        if gpa >= limit {
            let reason = format!("{gpa:#x} carries the SHARED bit or is above it ({limit:#x})");
            return Err(VmError::invalid(field, reason));
        }
        match gpa.checked_add(size) {
            Some(end) if end <= limit => Ok(gpa >> PAGE_SHIFT..end >> PAGE_SHIFT),
            _ => Err(VmError::invalid(
                size_field,
                format!("the range {gpa:#x} + {size:#x} ends above the SHARED bit ({limit:#x})"),
            )),
        }
    }
}

impl Faulting<'_> {
    /// The kind of access follows the attribute of the frame.
    fn prefetch(&mut self, index: usize, gfn: Gfn) -> Wanted {
        let slot = self.slots.find(gfn);
        let visibility = match self.vm.is_private(slot.map(Arc::as_ref), gfn) {
            true => Visibility::Private,
            false => Visibility::Shared,
        };
        let access = Access {
            write: false,
            exec: false,
        };
        Wanted {
            index,
            gfn,
            visibility,
            access,
            present: false,
            prefetch: true,
            guest_walk: GuestWalk::Unknown,
            offset: 0,
        }
    }
}

/// How far a prefault got.
#[derive(Default)]
pub(super) struct Done {
    pages: u64,
    /// The first page that could not be done, by its place in the range.
    pub(super) failed: Option<(usize, VmError)>,
}

impl Done {
    pub(super) fn collect(
        &mut self,
        vm: &Vm,
        roots: Roots,
        faulting: &mut Faulting<'_>,
        range: Range<u64>,
    ) {
        for ended in faulting.ended.drain(..) {
            let pages = ended.level().pages();
            let error = match ended.result {
                Ok(RetPf::Fixed | RetPf::Spurious | RetPf::WriteProtected) => {
                    let end = ended.gfn.align_down(pages).get() + pages;
                    self.pages += end.min(range.end) - ended.gfn.get();
                    continue;
                }
                Ok(RetPf::Emulate) => VmError::NoMemory(ended.gfn.base()),
                // Model: the kernel repeats while RETRY, until a signal; here the caller does.
                Ok(_) if vm.mmu.is_obsolete(roots.direct) => {
                    VmError::RootObsolete(ended.gfn.base())
                }
                Ok(_) => VmError::Unstable(ended.gfn.base()),
                Err(error) => error,
            };
            if self
                .failed
                .as_ref()
                .is_none_or(|(first, _)| ended.index < *first)
            {
                self.failed = Some((ended.index, error));
            }
        }
    }

    /// Pages in front of the first failure: only these are reported.
    fn in_front(&self) -> u64 {
        self.failed
            .as_ref()
            .map_or(self.pages, |&(first, _)| first as u64)
    }
}

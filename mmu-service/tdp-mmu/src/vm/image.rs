//! KVM_TDX_INIT_MEM_REGION: the initial image.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_vcpu_init_mem_region()`, `tdx_gmem_post_populate()`;
//! arch/x86/kvm/mmu/mmu.c, `kvm_tdp_mmu_map_private_pfn()`; virt/kvm/guest_memfd.c,
//! `kvm_gmem_populate()`. Only FIXED is success: a frame can be added once.

use std::ops::Range;
use std::sync::Arc;

use tdx_defs::{CompletionStatus, Gfn, Leaf, Pfn};

use super::vcpu::Vcpu;
use super::{InitRegion, Measure, Mode, Vm};
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::ledger::Note;
use crate::memory::backing::NoPage;
use crate::mmu::arena::TableId;
use crate::mmu::mirror::{Begin, Depth, Extended, Unit};
use crate::mmu::spte::{self, LeafTraits};
use crate::sync::{lock, thread};
use crate::tdx::calls::{self, EXTEND_CHUNK, EXTENDS_A_PAGE, Step};
use crate::tdx::install::Source;
use crate::tdx::lifecycle::{SourcePage, out_of_memory};
use crate::tdx::seam::{Seam, Verdict};
use crate::tdx::td::TdState;

/// Pages of one message: 256 KiB of contents.
const MAX_PAGES: usize = 64;
/// Tries of a page that stays busy.
const MAX_TRIES: u32 = 20_000;

impl Vm {
    /// Adds pages to the TD, and their contents to MRTD when asked.
    pub fn init_mem_region(&self, vcpu_id: u32, region: InitRegion<'_>) -> Result<Counts, VmError> {
        let range = self.page_range(("gpa", "size"), region.gpa, region.size)?;
        if region.data.len() as u64 > region.size {
            let reason = format!(
                "{} bytes for {} bytes of memory",
                region.data.len(),
                region.size
            );
            return Err(VmError::invalid("data", reason));
        }
        let vcpu = self.vcpu(vcpu_id)?;
        let _slots = lock(&self.slots_lock);
        let vcpus = self.vcpus.load_full();
        let mut stopped: Vec<_> = vcpus.iter().map(|vcpu| lock(&vcpu.run)).collect();
        let run = stopped
            .get_mut(vcpu_id as usize)
            .ok_or(VmError::NoVcpu(vcpu_id))?;
        self.alive()?;
        self.needs("KVM_TDX_INIT_MEM_REGION", TdState::Initialized)?;
        self.initialized(&vcpu, run, "KVM_TDX_INIT_MEM_REGION")?;
        let pages = self.image_pages(&range)?;
        let roots = self.roots_of(&vcpu, run)?;
        let mirror = roots.mirror.ok_or_else(|| out_of_memory(&self.host))?;
        let mut seam = self.seam(vcpu.lp);
        let _population = lock(&self.gmem_lock);
        let is_measured = region.measure != Measure::No;
        if is_measured {
            self.note(Note::Measuring(true))?;
        }
        let outcome = match region.measure {
            Measure::ExtendOnly => self.extend_range(&mut seam, mirror, &range),
            measure => SourcePage::new(&self.host).and_then(|page| {
                let first = Gfn::new(range.start);
                let measure = measure == Measure::Extend;
                let source = Source {
                    page: page.page,
                    first,
                    data: region.data,
                    measure,
                };
                let mut image = Image {
                    vm: self,
                    vcpu: &vcpu,
                    mirror,
                    source,
                };
                match self.config.mode {
                    Mode::Kernel => image.page_by_page(&mut seam, &pages),
                    Mode::Batched => image.chunk_by_chunk(&mut seam, &pages),
                }
            }),
        };
        run.counts += &seam.counts;
        if is_measured && !self.mmu.bugs.is_dead() {
            self.note(Note::Measuring(false))?;
        }
        outcome.map(|()| seam.counts)
    }

    /// The guest_memfd pages of a range; every frame must be private and have one.
    fn image_pages(&self, range: &Range<u64>) -> Result<Vec<(Gfn, Pfn)>, VmError> {
        let mut pages = Vec::new();
        for gfn in range.clone().map(Gfn::new) {
            let slot = self.slots.find(gfn).filter(|slot| !slot.is_going());
            let Some(gmem) = slot
                .as_ref()
                .and_then(|slot| slot.gmem.as_ref().zip(Some(slot)))
            else {
                let reason = format!("no memory slot with guest_memfd covers {gfn}");
                return Err(VmError::invalid("gpa", reason));
            };
            let (gmem, slot) = gmem;
            if !slot.is_private(gfn) {
                return Err(VmError::invalid("gpa", format!("frame {gfn} is shared")));
            }
            match gmem.get(slot.offset(gfn)) {
                Ok(pfn) => pages.push((gfn, pfn)),
                Err(NoPage::NoMemory) => return Err(out_of_memory(&self.host)),
                Err(NoPage::Closed) => return Err(VmError::HostFault(gfn.base())),
                Err(NoPage::Poisoned) => {
                    return Err(VmError::invalid("gpa", format!("frame {gfn} is poisoned")));
                }
            }
        }
        Ok(pages)
    }

    /// TDH.MR.EXTEND over a range of pages that were added before.
    fn extend_range(
        &self,
        seam: &mut Seam<'_>,
        mirror: TableId,
        range: &Range<u64>,
    ) -> Result<(), VmError> {
        for gfn in range.clone().map(Gfn::new) {
            let mapped = self
                .mmu
                .last(mirror, gfn)
                .is_some_and(|at| spte::is_leaf(at.spte, at.level));
            if !mapped {
                return Err(VmError::invalid(
                    "gpa",
                    format!("frame {gfn} was not added"),
                ));
            }
        }
        range
            .clone()
            .try_for_each(|gfn| self.extend_page(seam, Gfn::new(gfn)))
    }

    /// Sixteen TDH.MR.EXTENDs. Any error bugs the VM: MRTD is lost.
    fn extend_page(&self, seam: &mut Seam<'_>, gfn: Gfn) -> Result<(), VmError> {
        let base = gfn.base().get();
        let steps: Vec<Step> = (0..u64::from(EXTENDS_A_PAGE))
            .map(|chunk| calls::mr_extend(self.td.tdr(), base + chunk * EXTEND_CHUNK))
            .collect();
        let mut failed = None;
        seam.script(&steps, &mut |_, _, result| {
            failed = Some(result.status());
            Verdict::Stop
        })
        .inspect_err(|error| {
            self.mmu.bugs.kill(Check::Unsettled, || {
                format!("the measurement is unknown: {error}")
            });
        })?;
        match failed {
            None => Ok(()),
            Some(status) => {
                self.mmu.bugs.bug(Check::Seamcall, || {
                    format!("SEAMCALL {} failed at {gfn}: {status}", Leaf::MR_EXTEND)
                });
                Err(VmError::Refused {
                    leaf: Leaf::MR_EXTEND,
                    status,
                })
            }
        }
    }
}

/// The pages of one call on their way into the TD.
struct Image<'a> {
    vm: &'a Vm,
    vcpu: &'a Arc<Vcpu>,
    mirror: TableId,
    source: Source<'a>,
}

impl<'a> Image<'a> {
    fn begin(&self, gfn: Gfn, pfn: Pfn, depth: Depth) -> Result<Option<Unit<'a>>, VmError> {
        let vm = self.vm;
        if !vm.mmu.top_up_external(|| vm.host.memory.page()) {
            return Err(out_of_memory(&vm.host));
        }
        vm.mmu.trace_private_request(gfn, pfn);
        match vm.mmu.begin(self.mirror, gfn, image_leaf(pfn), depth) {
            Begin::Held(unit) => Ok(Some(unit)),
            Begin::Mapped { .. } => Err(VmError::AlreadyMapped(gfn.base())),
            Begin::Frozen | Begin::Lost => Ok(None),
            Begin::NoMemory => Err(out_of_memory(&vm.host)),
        }
    }

    /// As the kernel does it: one call after the other, each page to its end.
    fn page_by_page(&mut self, seam: &mut Seam<'_>, pages: &[(Gfn, Pfn)]) -> Result<(), VmError> {
        let vm = self.vm;
        for &(gfn, pfn) in pages {
            let mut tries = Tries::default();
            loop {
                vm.alive()?;
                let _held = vm.mmu.lock.read(self.vcpu.id);
                let Some(unit) = self.begin(gfn, pfn, Depth::One)? else {
                    tries.next(None)?;
                    continue;
                };
                let is_leaf = unit.links() == 0;
                let sent = vm.hooks().send(seam, vec![unit], Some(self.source));
                let settled = vm.hooks().settle(seam, sent)?;
                if !settled.complete {
                    tries.next(settled.failed.map(|(leaf, result)| (leaf, result.status())))?;
                } else if is_leaf {
                    break;
                }
            }
            if self.source.measure {
                vm.extend_page(seam, gfn)?;
            }
        }
        Ok(())
    }

    /// Up to [`MAX_PAGES`] a message, each ADD with its extends behind it.
    fn chunk_by_chunk(&mut self, seam: &mut Seam<'_>, pages: &[(Gfn, Pfn)]) -> Result<(), VmError> {
        let mut tries = Tries::default();
        let mut at = 0;
        while at < pages.len() {
            self.vm.alive()?;
            let _held = self.vm.mmu.lock.read(self.vcpu.id);
            let units = self.gather(&pages[at..])?;
            if units.is_empty() {
                tries.next(None)?;
                continue;
            }
            let sent = self.vm.hooks().send(seam, units, Some(self.source));
            let settled = self.vm.hooks().settle(seam, sent)?;
            at += settled.units.iter().map(|unit| unit.leaves).sum::<usize>();
            if let Some((leaf, result)) = settled.failed {
                if leaf == Leaf::MR_EXTEND {
                    return Err(VmError::Refused {
                        leaf,
                        status: result.status(),
                    });
                }
                tries.next(Some((leaf, result.status())))?;
            } else if !settled.complete {
                tries.next(None)?;
            }
        }
        Ok(())
    }

    /// Holds entries for as many of the next pages as one message takes.
    fn gather(&self, pages: &[(Gfn, Pfn)]) -> Result<Vec<Unit<'a>>, VmError> {
        let mut units: Vec<Unit<'a>> = Vec::new();
        for &(gfn, pfn) in pages.iter().take(MAX_PAGES) {
            match units
                .last_mut()
                .map(|unit| unit.extend(gfn, image_leaf(pfn)))
            {
                Some(Extended::Added) => continue,
                Some(Extended::Frozen) => break,
                Some(Extended::Mapped { .. }) => return Err(VmError::AlreadyMapped(gfn.base())),
                Some(Extended::Outside) | None => {}
            }
            match self.begin(gfn, pfn, Depth::Chain)? {
                Some(unit) => units.push(unit),
                None => break,
            }
        }
        Ok(units)
    }
}

fn image_leaf(pfn: Pfn) -> u64 {
    spte::leaf_4k(
        pfn,
        LeafTraits {
            map_writable: true,
            prefetch: true,
        },
    )
}

/// The kernel repeats a busy page without limit; here the budget ends.
#[derive(Default)]
struct Tries(u32);

impl Tries {
    fn next(&mut self, failed: Option<(Leaf, CompletionStatus)>) -> Result<(), VmError> {
        self.0 += 1;
        if self.0 >= MAX_TRIES {
            let (leaf, status) =
                failed.unwrap_or((Leaf::MEM_PAGE_ADD, CompletionStatus::OPERAND_BUSY));
            return Err(VmError::Busy {
                leaf,
                status,
                tries: self.0,
            });
        }
        thread::yield_now();
        Ok(())
    }
}

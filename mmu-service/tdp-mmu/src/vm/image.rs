//! KVM_TDX_INIT_MEM_REGION: the initial image.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `tdx_vcpu_init_mem_region()`, `tdx_gmem_post_populate()`;
//! arch/x86/kvm/mmu/mmu.c, `kvm_tdp_mmu_map_private_pfn()`; virt/kvm/guest_memfd.c,
//! `kvm_gmem_populate()`. Only FIXED is success: a frame can be added once.

mod adding;
mod parts;

use std::ops::Range;

use tdx_defs::{Gfn, Leaf, Pfn};

use self::adding::Image;
use self::parts::Parts;
use super::{InitRegion, Measure, Mode, Vm};
use crate::bugs::Check;
use crate::counts::Counts;
use crate::error::VmError;
use crate::ledger::Note;
use crate::memory::backing::NoPage;
use crate::mmu::arena::TableId;
use crate::mmu::spte;
use crate::sync::lock;
use crate::tdx::calls::{self, EXTEND_CHUNK, EXTENDS_A_PAGE, Step};
use crate::tdx::lifecycle::{SourcePage, out_of_memory};
use crate::tdx::seam::{Seam, Verdict};
use crate::tdx::td::TdState;

impl Vm {
    /// Adds pages to the TD, and their contents to MRTD when asked.
    pub fn init_mem_region(&self, vcpu_id: u32, region: InitRegion) -> Result<Counts, VmError> {
        self.init_mem_regions(vcpu_id, region, &mut |_| None)
    }

    /// Adds `first`, and what `more` has at hand when it is asked: the next region, if it is measured
    /// as it is told. `more` is asked with locks held, so it must not wait; after 16 MiB it is not
    /// asked any more. All regions up to the first error are added.
    ///
    /// Model: the kernel takes one region a call. Here messages of one region travel while the module
    /// hashes those of the region before.
    pub fn init_mem_regions(
        &self,
        vcpu_id: u32,
        first: InitRegion,
        more: &mut dyn FnMut(Measure) -> Option<InitRegion>,
    ) -> Result<Counts, VmError> {
        let range = self.image_range(&first)?;
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
        let measure = first.measure;
        let mut parts = Parts::begin(self, first, &range, more)?;
        let roots = self.roots_of(&vcpu, run)?;
        let mirror = roots.mirror.ok_or_else(|| out_of_memory(&self.host))?;
        let mut seam = self.seam(vcpu.lp);
        let _population = lock(&self.gmem_lock);
        let is_measured = measure != Measure::No;
        if is_measured {
            self.note(Note::Measuring(true))?;
        }
        let outcome = if measure == Measure::ExtendOnly {
            parts.each(|pages| self.extend_pages(&mut seam, mirror, pages))
        } else {
            SourcePage::new(&self.host).and_then(|source| {
                let image = Image {
                    vm: self,
                    vcpu: &vcpu,
                    mirror,
                    source: source.page,
                    measure: measure == Measure::Extend,
                };
                match self.config.mode {
                    Mode::Kernel => image.page_by_page(&mut seam, &mut parts),
                    Mode::Batched => image.chunk_by_chunk(&mut seam, &mut parts),
                }
            })
        };
        run.counts += &seam.counts;
        if is_measured && !self.mmu.bugs.is_dead() {
            self.note(Note::Measuring(false))?;
        }
        outcome.map(|()| seam.counts)
    }

    /// The frames of a region, if its contents fit into them.
    fn image_range(&self, region: &InitRegion) -> Result<Range<u64>, VmError> {
        let range = self.page_range(("gpa", "size"), region.gpa, region.size)?;
        if region.data.len() as u64 > region.size {
            let reason = format!(
                "{} bytes for {} bytes of memory",
                region.data.len(),
                region.size
            );
            return Err(VmError::invalid("data", reason));
        }
        Ok(range)
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

    /// TDH.MR.EXTEND of pages that were added before.
    fn extend_pages(
        &self,
        seam: &mut Seam<'_>,
        mirror: TableId,
        pages: &[(Gfn, Pfn)],
    ) -> Result<(), VmError> {
        for &(gfn, _) in pages {
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
        pages
            .iter()
            .try_for_each(|&(gfn, _)| self.extend_page(seam, gfn))
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

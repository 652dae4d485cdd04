//! Adding the pages of the image: one call after the other as the kernel does it, or in chains of
//! messages.

use std::collections::VecDeque;
use std::sync::Arc;

use tdx_defs::{CompletionStatus, Gfn, Leaf, Pfn};

use super::parts::{Part, Parts};
use crate::error::VmError;
use crate::mmu::arena::TableId;
use crate::mmu::mirror::{Begin, Depth, Extended, Unit};
use crate::mmu::spte::{self, LeafTraits};
use crate::seam::Chain;
use crate::sync::thread;
use crate::tdx::install::Source;
use crate::tdx::lifecycle::out_of_memory;
use crate::tdx::seam::Seam;
use crate::vm::Vm;
use crate::vm::vcpu::Vcpu;

/// Pages of one message: 256 KiB of contents.
const MAX_PAGES: usize = 64;
/// Messages of a chain on their way: one that the module hashes, one that it has read meanwhile, and
/// one that travels.
const MESSAGES_AHEAD: usize = 3;
/// Tries of a page that stays busy.
const MAX_TRIES: u32 = 20_000;

/// The call that a chain of messages ended with.
type Stop = Option<(Leaf, CompletionStatus)>;

/// How pages get into the TD.
pub(super) struct Image<'a> {
    pub(super) vm: &'a Vm,
    pub(super) vcpu: &'a Arc<Vcpu>,
    pub(super) mirror: TableId,
    /// Host page that the contents are read from.
    pub(super) source: Pfn,
    /// Whether MRTD takes the contents.
    pub(super) measure: bool,
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
    pub(super) fn page_by_page(
        &self,
        seam: &mut Seam<'_>,
        parts: &mut Parts<'_>,
    ) -> Result<(), VmError> {
        while let Some(part) = parts.behind(0)? {
            for &(gfn, pfn) in part.left {
                self.add_page(seam, gfn, pfn, &self.source_of(&part))?;
            }
            let added = part.left.len();
            parts.advance(added);
        }
        Ok(())
    }

    fn add_page(
        &self,
        seam: &mut Seam<'_>,
        gfn: Gfn,
        pfn: Pfn,
        source: &Source,
    ) -> Result<(), VmError> {
        let vm = self.vm;
        let mut tries = Tries::default();
        loop {
            vm.alive()?;
            let _held = vm.mmu.lock.read(self.vcpu.id);
            let Some(unit) = self.begin(gfn, pfn, Depth::One)? else {
                tries.next(None)?;
                continue;
            };
            let is_leaf = unit.links() == 0;
            let sent = vm.hooks().send(seam, vec![unit], Some(source));
            let settled = vm.hooks().settle(seam, sent)?;
            if !settled.complete {
                tries.next(settled.failed.map(|(leaf, result)| (leaf, result.status())))?;
            } else if is_leaf {
                break;
            }
        }
        if self.measure {
            vm.extend_page(seam, gfn)?;
        }
        Ok(())
    }

    fn source_of(&self, part: &Part) -> Source {
        Source {
            page: self.source,
            first: part.first,
            data: part.data.clone(),
            measure: self.measure,
        }
    }

    /// Up to [`MAX_PAGES`] a message, each ADD with its extends behind it.
    ///
    /// Where the module takes chains, a message is on its way while the one before it is hashed. One
    /// that stops short breaks the chain: what is behind it does not run, and MRTD keeps its order.
    pub(super) fn chunk_by_chunk(
        &self,
        seam: &mut Seam<'_>,
        parts: &mut Parts<'_>,
    ) -> Result<(), VmError> {
        let mut tries = Tries::default();
        while parts.behind(0)?.is_some() {
            self.vm.alive()?;
            // Model: held until the chain ends, so that nobody zaps a table below a message that is
            // on its way; the kernel takes it for each page.
            let _held = self.vm.mmu.lock.read(self.vcpu.id);
            let (added, end) = self.chain(seam, parts);
            parts.advance(added);
            match end? {
                None => {}
                Some((leaf @ Leaf::MR_EXTEND, status)) => {
                    return Err(VmError::Refused { leaf, status });
                }
                Some(failed) => tries.next(Some(failed))?,
            }
            if added == 0 {
                tries.next(None)?;
            }
        }
        Ok(())
    }

    /// Adds pages from the front until something stands in the way: how many, and what it was.
    fn chain(&self, seam: &mut Seam<'_>, parts: &mut Parts<'_>) -> (usize, Result<Stop, VmError>) {
        let hooks = self.vm.hooks();
        let id = seam.chain();
        let ahead = id.map_or(1, |_| MESSAGES_AHEAD);
        let mut under_way = VecDeque::with_capacity(ahead);
        let (mut link, mut handed, mut added) = (0, 0, 0);
        let mut end = Ok(None);
        let mut goes_on = true;
        loop {
            while goes_on && under_way.len() < ahead {
                let (units, source) = match self.gather(parts, handed) {
                    Ok(Some(gathered)) => gathered,
                    // More may be at hand once a message is answered.
                    Ok(None) => break,
                    Err(error) => {
                        (end, goes_on) = (Err(error), false);
                        break;
                    }
                };
                if units.is_empty() {
                    // What is under way may hold the table; once it is answered the table is there.
                    goes_on = !under_way.is_empty();
                    break;
                }
                handed += units.iter().map(Unit::leaves).sum::<usize>();
                let place = id.map(|id| Chain { id, link });
                link += 1;
                under_way.push_back(hooks.send_link(seam, place, units, Some(&source)));
            }
            // Whatever was sent is settled, however the chain ends.
            let Some(sent) = under_way.pop_front() else {
                return (added, end);
            };
            match hooks.settle(seam, sent) {
                Ok(settled) => {
                    added += settled.units.iter().map(|unit| unit.leaves).sum::<usize>();
                    // Without chains each message is settled and judged by itself.
                    goes_on &= settled.complete && id.is_some();
                    if let (Ok(None), Some((leaf, result))) = (&end, settled.failed) {
                        end = Ok(Some((leaf, result.status())));
                    }
                }
                Err(error) => {
                    goes_on = false;
                    if end.is_ok() {
                        end = Err(error.into());
                    }
                }
            }
        }
    }

    /// Holds entries for as many of the pages behind `handed` as one message takes: those of one
    /// region.
    fn gather(
        &self,
        parts: &mut Parts<'_>,
        handed: usize,
    ) -> Result<Option<(Vec<Unit<'a>>, Source)>, VmError> {
        let Some(part) = parts.behind(handed)? else {
            return Ok(None);
        };
        let mut units: Vec<Unit<'a>> = Vec::new();
        for &(gfn, pfn) in part.left.iter().take(MAX_PAGES) {
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
        Ok(Some((units, self.source_of(&part))))
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
    fn next(&mut self, failed: Stop) -> Result<(), VmError> {
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

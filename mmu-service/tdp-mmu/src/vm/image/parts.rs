//! The regions of an image that are on their way into a TD, and those that come behind them.

use std::collections::VecDeque;
use std::ops::Range;

use bytes::Bytes;
use tdx_defs::{Gfn, Pfn};

use crate::error::VmError;
use crate::vm::{InitRegion, Measure, Vm};

/// Pages after which no further region is taken: 16 MiB. Others wait for the locks meanwhile.
const MAX_PAGES: usize = 4096;

/// Gives the next region if it is at hand and measured in this way.
type More<'a> = &'a mut dyn FnMut(Measure) -> Option<InitRegion>;

/// Regions in their order, from the first page that is not added.
pub(super) struct Parts<'a> {
    vm: &'a Vm,
    measure: Measure,
    more: More<'a>,
    /// Pages of all regions that were taken.
    taken: usize,
    list: VecDeque<Region>,
}

struct Region {
    first: Gfn,
    data: Bytes,
    pages: Vec<(Gfn, Pfn)>,
    /// Of these pages.
    added: usize,
}

/// What is left of a region.
pub(super) struct Part<'p> {
    /// First frame of `data`.
    pub(super) first: Gfn,
    /// Contents of the region.
    pub(super) data: &'p Bytes,
    /// Pages that are left.
    pub(super) left: &'p [(Gfn, Pfn)],
}

impl<'a> Parts<'a> {
    /// Begins with `first`, whose frames are `range`.
    pub(super) fn begin(
        vm: &'a Vm,
        first: InitRegion,
        range: &Range<u64>,
        more: More<'a>,
    ) -> Result<Self, VmError> {
        let mut parts = Self {
            vm,
            measure: first.measure,
            more,
            taken: 0,
            list: VecDeque::new(),
        };
        parts.push(first, range)?;
        Ok(parts)
    }

    fn take(&mut self, region: InitRegion) -> Result<(), VmError> {
        let range = self.vm.image_range(&region)?;
        if region.measure != self.measure {
            let reason = "regions of one call are measured in one way";
            return Err(VmError::invalid("measure", reason));
        }
        self.push(region, &range)
    }

    fn push(&mut self, region: InitRegion, range: &Range<u64>) -> Result<(), VmError> {
        let pages = self.vm.image_pages(range)?;
        self.taken += pages.len();
        self.list.push_back(Region {
            first: Gfn::new(range.start),
            data: region.data,
            pages,
            added: 0,
        });
        Ok(())
    }

    /// What is left of the region that page number `handed` of those left is in. Takes the next region
    /// when all are handed out; `None` if there is none at hand.
    pub(super) fn behind(&mut self, handed: usize) -> Result<Option<Part<'_>>, VmError> {
        let mut skip = handed;
        let mut at = 0;
        loop {
            match self.list.get(at) {
                Some(region) if skip < region.pages.len() - region.added => break,
                Some(region) => skip -= region.pages.len() - region.added,
                None if self.taken >= MAX_PAGES => return Ok(None),
                None => {
                    let Some(next) = (self.more)(self.measure) else {
                        return Ok(None);
                    };
                    self.take(next)?;
                    // It may be empty.
                    continue;
                }
            }
            at += 1;
        }
        Ok(self.list.get(at).map(|region| Part {
            first: region.first,
            data: &region.data,
            left: &region.pages[region.added + skip..],
        }))
    }

    /// The first `added` pages of those left are in the TD.
    pub(super) fn advance(&mut self, mut added: usize) {
        while let Some(front) = self.list.front_mut() {
            let step = added.min(front.pages.len() - front.added);
            front.added += step;
            added -= step;
            if front.added < front.pages.len() {
                return;
            }
            self.list.pop_front();
        }
    }

    /// Does something for the pages of each region.
    pub(super) fn each(
        &mut self,
        mut work: impl FnMut(&[(Gfn, Pfn)]) -> Result<(), VmError>,
    ) -> Result<(), VmError> {
        while let Some(part) = self.behind(0)? {
            let pages = part.left;
            work(pages)?;
            let done = pages.len();
            self.advance(done);
        }
        Ok(())
    }
}

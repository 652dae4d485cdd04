//! Whose pages are whose, from PAMT.
//!
//! TDH.MEM.SEPT.RD does not show where a table page lies. Its owner does: all pages for tables and
//! control structures come out of blocks that the host split, and it writes each of them down, so
//! TDH.PHYMEM.PAGE.RDMD of those blocks finds every one of them, at a cost that follows the number
//! of tables and not the size of the machine.

use std::collections::{BTreeMap, VecDeque};

use tdx_defs::{CompletionStatus, PAGE_SHIFT, PageType, Pfn, SeamcallResult};

use crate::error::VmError;
use crate::host::{BLOCK_PAGES, Host};
use crate::seam::SeamPort;
use crate::sync::thread;
use crate::tdx::calls;
use crate::tdx::seam::{InFlight, Seam};
use crate::vm::Mode;

/// Blocks whose answers are under way.
const AHEAD: usize = 4;
/// Tries of a page that somebody holds.
const TRIES: u32 = 10_000;

/// The pages in use among those that the host handed out singly.
pub(super) struct Pages(BTreeMap<Pfn, (PageType, Pfn)>);

impl Pages {
    /// Reads the blocks, and has the host's allocator know what is free in them.
    pub(super) fn read(host: &Host, port: &dyn SeamPort, split: &[Pfn]) -> Result<Self, VmError> {
        let mut seam = Seam::new(port, Mode::Batched, 0);
        let mut pages = BTreeMap::new();
        let mut flights: VecDeque<(Vec<Pfn>, InFlight)> = VecDeque::new();
        let mut tries = 0;
        let mut blocks = split.iter();
        loop {
            while flights.len() <= AHEAD
                && let Some(&block) = blocks.next()
            {
                let asked: Vec<Pfn> = (0..BLOCK_PAGES).map(|at| block.offset(at)).collect();
                let flight = ask(&mut seam, &asked);
                flights.push_back((asked, flight));
            }
            let Some((asked, flight)) = flights.pop_front() else {
                break;
            };
            let results = seam.wait(flight)?;
            let mut answered = 0;
            for (&page, result) in asked.iter().zip(&results) {
                if result.status().is_busy() && tries < TRIES {
                    tries += 1;
                    thread::yield_now();
                    break;
                }
                answered += 1;
                if let Some(used) = used(result) {
                    pages.insert(page, used);
                }
            }
            // An error ends a message: the rest of it is asked again.
            let rest = asked[answered..].to_vec();
            if !rest.is_empty() {
                let flight = ask(&mut seam, &rest);
                flights.push_front((rest, flight));
            }
        }
        for &block in split {
            host.memory
                .reserve_split(block, |page| pages.contains_key(&page));
        }
        Ok(Self(pages))
    }

    /// Whether a page has this type.
    pub(super) fn is(&self, page: Pfn, page_type: PageType) -> bool {
        self.0
            .get(&page)
            .is_some_and(|&(found, _)| found == page_type)
    }

    /// Whether it has this type and belongs to the TD.
    pub(super) fn is_owned(&self, page: Pfn, page_type: PageType, tdr: Pfn) -> bool {
        self.0.get(&page) == Some(&(page_type, tdr))
    }

    /// The pages of a TD, of one type, ascending.
    pub(super) fn of(&self, page_type: PageType, tdr: Pfn) -> impl Iterator<Item = Pfn> + '_ {
        let meant = move |&(_, found): &(&Pfn, &(PageType, Pfn))| *found == (page_type, tdr);
        self.0.iter().filter(meant).map(|(&page, _)| page)
    }
}

fn ask(seam: &mut Seam<'_>, pages: &[Pfn]) -> InFlight {
    let reads = pages
        .iter()
        .map(|&page| calls::phymem_page_rdmd(page).into_seamcall());
    seam.submit(None, reads.collect())
}

/// Type and owner of a page that is in use.
fn used(result: &SeamcallResult) -> Option<(PageType, Pfn)> {
    if result.rax != CompletionStatus::SUCCESS.0 {
        return None;
    }
    let page_type = PageType(u8::try_from(result.rcx).ok()?);
    let is_used = ![PageType::NDA, PageType::RSVD].contains(&page_type);
    is_used.then(|| (page_type, Pfn::new(result.rdx >> PAGE_SHIFT)))
}

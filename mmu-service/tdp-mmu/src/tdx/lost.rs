//! Calls whose answers were lost, and how to learn what became of them.
//!
//! An outcome is never guessed. What changes the tree is looked up with TDH.MEM.SEPT.RD, whose page
//! is whose with TDH.PHYMEM.PAGE.RDMD; what the module refuses to do twice is asked for again, and
//! the refusal is the answer.

use tdx_defs::{CompletionStatus, PageType, Pfn, PublicState, SeptView};

use super::calls::{self, Step};
use super::remove::{Hooks, Leaving};
use super::seam::Seam;
use crate::seam::SeamError;
use crate::sync::thread;

/// Lost answers in a row after which an operation gives up.
pub(crate) const LOST_TRIES: u32 = 4;
/// Tries of a look at a page that another call holds.
const LOOK_TRIES: u32 = 1000;

/// How to tell that a call was made for a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Trace {
    /// Its entry is blocked.
    Blocked,
    /// Its entry has another page, or none.
    Removed,
    /// Not at all, and it does not matter: it can be made again.
    None,
}

/// Makes a call until its outcome is known. `again` is what the module answers to a call that was
/// made before; it counts as success of one that may have been.
pub(crate) fn surely(
    seam: &mut Seam<'_>,
    step: &Step,
    again: Option<CompletionStatus>,
) -> Result<CompletionStatus, SeamError> {
    let mut lost = 0;
    loop {
        match seam.call(step) {
            Err(SeamError::Unknown { .. }) if lost < LOST_TRIES => lost += 1,
            Err(error) => return Err(error),
            Ok(result) => {
                let status = result.status();
                let was_made = lost != 0 && again.is_some_and(|again| status.is(again));
                return Ok(match was_made {
                    true => CompletionStatus::SUCCESS,
                    false => status,
                });
            }
        }
    }
}

/// The type of a page, from PAMT.
pub(crate) fn page_type(seam: &mut Seam<'_>, page: Pfn) -> Result<PageType, SeamError> {
    let read = calls::phymem_page_rdmd(page);
    for _ in 0..LOOK_TRIES {
        let result = seam.call(&read)?;
        if result.status().is_success() {
            return Ok(PageType(u8::try_from(result.rcx).unwrap_or(u8::MAX)));
        }
        if !result.status().is_busy() {
            let reason = format!("{} of {page} answers {}", read.leaf, result.status());
            return Err(SeamError::Unknown { reason });
        }
        thread::yield_now();
    }
    Err(SeamError::Unknown {
        reason: format!("{} of {page} stays busy", read.leaf),
    })
}

impl Hooks<'_> {
    /// Whether a call that leaves `trace` was made for a leaf.
    pub(super) fn was_made(
        &self,
        seam: &mut Seam<'_>,
        leaf: &Leaving,
        trace: Trace,
    ) -> Result<bool, SeamError> {
        if trace == Trace::None {
            return Ok(false);
        }
        let result = self.read_entry(seam, leaf.gfn, tdx_defs::Level::L4K)?;
        let view = SeptView::from_regs(result.rcx, result.rdx)
            .filter(|view| result.status().is_success() && view.page == Some(leaf.pfn));
        Ok(match view {
            None => true,
            Some(view) => {
                let blocked = [PublicState::BLOCKED, PublicState::PENDING_BLOCKED];
                trace == Trace::Blocked && blocked.contains(&view.at.state)
            }
        })
    }
}

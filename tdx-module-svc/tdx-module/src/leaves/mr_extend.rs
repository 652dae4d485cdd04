//! TDH.MR.EXTEND: measures 256 bytes of a page of the initial image.
//!
//! Source: TDX module source, tdh_mr_extend.c. RCX GPA, RDX TDR; RCX and RDX describe the entry on
//! a Secure EPT error.

use tdx_defs::{CompletionStatus as Status, Gpa, Hpa, Leaf, OperandId, PAGE_SIZE};

use crate::checks::{OpStateLock, Running, check_integrity, invalid, with_details};
use crate::dispatch::{Cx, Fail, Outcome, Run};
use crate::locks::LockMode;
use crate::measure::CHUNK_SIZE;
use crate::memory::{Contents, PAGE, Page, offset_in_page};

pub(crate) fn mr_extend(cx: &Cx<'_>, run: &mut Run<'_>) -> Outcome {
    let td = cx.lock_tdr(run.take_tdr(), OperandId::RDX, LockMode::Exclusive)?;
    let running = td.check_state(cx, Leaf::MR_EXTEND, OpStateLock::None)?;
    let mut measurement = td.measurement();
    let mut source = Source {
        gpa: None,
        content: None,
    };
    run.each(|regs| {
        let gpa = Gpa::new(std::mem::take(&mut regs.rcx));
        if !gpa.is_aligned(CHUNK_SIZE as u64) {
            return Err(invalid(OperandId::RCX));
        }
        running.check_gpa(gpa)?;
        source.look_at(cx, &running, gpa)?;
        let at = offset_in_page(gpa.get());
        measurement.chunk_extended(gpa, &source.bytes()[at..at + CHUNK_SIZE]);
        Ok(())
    })
}

/// The 4 KiB that chunks come from. The TDR is held exclusively: neither the entry nor what the
/// page holds changes between the chunks of one page.
struct Source {
    /// Where `content` was found.
    gpa: Option<Gpa>,
    /// `None` where all of it is zero.
    content: Option<Contents>,
}

static ZEROS: Page = [0; PAGE];

impl Source {
    /// A page of bytes.
    fn bytes(&self) -> &[u8] {
        self.content.as_ref().map_or(&ZEROS[..], Contents::bytes)
    }

    fn look_at(&mut self, cx: &Cx<'_>, running: &Running<'_>, gpa: Gpa) -> Result<(), Fail> {
        let page = Gpa::new(gpa.get() & !(PAGE_SIZE - 1));
        if self.gpa == Some(page) {
            return Ok(());
        }
        self.gpa = None;
        let found = running.walk_towards(gpa, 0)?;
        if !found.value.has_rights() || !found.value.is_leaf() {
            let status = Status::EPT_ENTRY_NOT_PRESENT.with(OperandId::RCX);
            return Err(with_details(status, found.value, found.slot.level));
        }
        if !found.value.state().allows(Leaf::MR_EXTEND) {
            return Err(Status::EPT_ENTRY_NOT_PRESENT.into());
        }
        let source = address_in(found.value.page(), page, found.slot.level);
        let (integrity, content) = cx.module.private.page(source.frame());
        check_integrity(running.td, integrity)?;
        self.content = content;
        self.gpa = Some(page);
        Ok(())
    }
}

/// The byte of a page at `level` that `gpa` names.
pub(super) fn address_in(page: Hpa, gpa: Gpa, level: u8) -> Hpa {
    let size = tdx_defs::PAGE_SIZE << (9 * u32::from(level));
    Hpa::new(page.get() | gpa.get() & (size - 1))
}

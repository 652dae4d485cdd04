//! TDH.SYS.RD: reads a metadata field of the module.
//!
//! Source: TDX module source, tdh_sys_rd.c. RDX field id; outputs R8 value, RDX next field id,
//! all-ones after the last. RDX all-ones asks for the first field id.

use tdx_defs::CompletionStatus as Status;

use crate::dispatch::{Cx, Outcome, Regs};
use crate::system;
use crate::td::field_identity;

/// No field id.
pub(super) const NO_FIELD: u64 = u64::MAX;
/// `TDX_METADATA_FIRST_FIELD_ID_IN_CONTEXT`
pub(super) const FIRST_FIELD: Status = Status(0x0000_0C0B << 32);

pub(crate) fn sys_rd(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let wanted = std::mem::replace(&mut regs.rdx, NO_FIELD);
    regs.r8 = 0;
    let fields = system::fields(&cx.module.config);
    if wanted == NO_FIELD {
        regs.rdx = fields.first().map_or(NO_FIELD, |field| field.0);
        return Err(FIRST_FIELD.into());
    }
    let at = fields
        .iter()
        .position(|field| field_identity(field.0) == field_identity(wanted))
        .ok_or(Status::METADATA_FIELD_ID_INCORRECT)?;
    regs.r8 = fields[at].1;
    regs.rdx = fields.get(at + 1).map_or(NO_FIELD, |field| field.0);
    Ok(())
}

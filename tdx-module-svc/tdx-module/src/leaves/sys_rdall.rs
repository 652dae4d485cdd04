//! TDH.SYS.RDALL: writes the module's metadata fields into a page of host memory, as a list.
//!
//! Source: TDX module source, tdh_sys_rdall.c and the metadata list format. RDX page, R8 first
//! field id or all-ones; output R8 next field id, all-ones when the list is complete. The list
//! begins with its size (bits 15:0) and the number of its sequences (bits 31:16); here a sequence
//! is a field id and its 8-byte value.

use tdx_defs::{CompletionStatus as Status, OperandId, PAGE_SIZE};

use super::sys_rd::NO_FIELD;
use crate::dispatch::{Cx, Outcome, Regs};
use crate::memory::PAGE;
use crate::system;
use crate::td::field_identity;

/// A header of 8 bytes, then sequences of 16.
const CAPACITY: usize = (PAGE - 8) / 16;

pub(crate) fn sys_rdall(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let first = std::mem::replace(&mut regs.r8, NO_FIELD);
    let list = cx
        .module
        .check_host_memory(regs.rdx, PAGE_SIZE, OperandId::RDX)?;
    let fields = system::fields(&cx.module.config);
    let start = if first == NO_FIELD {
        0
    } else {
        fields
            .iter()
            .position(|field| field_identity(field.0) == field_identity(first))
            .ok_or(Status::METADATA_FIELD_ID_INCORRECT)?
    };
    let chosen = &fields[start..];
    let (chosen, rest) = chosen.split_at(chosen.len().min(CAPACITY));
    let mut bytes = Vec::with_capacity(PAGE);
    let size = 8 + 16 * chosen.len() as u64;
    bytes.extend((size | (chosen.len() as u64) << 16).to_le_bytes());
    for (id, value) in chosen {
        bytes.extend(id.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.resize(PAGE, 0);
    cx.module.write_host_memory(list, &bytes);
    regs.r8 = rest.first().map_or(NO_FIELD, |field| field.0);
    Ok(())
}

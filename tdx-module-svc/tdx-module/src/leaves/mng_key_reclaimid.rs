//! TDH.MNG.KEY.RECLAIMID: kept for old hosts; does nothing and succeeds.

use crate::dispatch::{Cx, Outcome, Regs};

pub(crate) fn mng_key_reclaimid(_cx: &Cx<'_>, _regs: &mut Regs) -> Outcome {
    Ok(())
}

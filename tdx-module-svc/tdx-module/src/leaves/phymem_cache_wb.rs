//! TDH.PHYMEM.CACHE.WB: writes back the caches of the package that executes.
//!
//! Source: TDX module source, tdh_phymem_cache_wb.c. RCX 0 start, 1 resume. The work is cut into
//! blocks with a look for pending interrupts between them. It covers the key ids that were flushed
//! when it started.

use std::sync::{PoisonError, TryLockError};

use tdx_defs::{CompletionStatus as Status, OperandId};

use crate::checks::{busy, invalid};
use crate::dispatch::{Cx, Outcome, Regs};
use crate::locks::LockMode;

/// Blocks into which the work is cut.
const BLOCKS: u32 = 4;

/// Work in progress on a package.
#[derive(Debug, Default)]
pub(crate) struct CacheWriteBack {
    interrupted: Option<Interrupted>,
}

#[derive(Debug)]
struct Interrupted {
    hkids: Vec<u16>,
    next_block: u32,
}

pub(crate) fn phymem_cache_wb(cx: &Cx<'_>, regs: &mut Regs) -> Outcome {
    let resume = match regs.rcx {
        0 => false,
        1 => true,
        _ => return Err(invalid(OperandId::RCX)),
    };
    let module = cx.module;
    let package = cx.package();
    let progress = usize::try_from(package)
        .ok()
        .and_then(|at| module.write_back.get(at));
    let mut progress = match progress.ok_or(busy(OperandId::WBCACHE))?.try_lock() {
        Ok(progress) => progress,
        Err(TryLockError::WouldBlock) => return Err(busy(OperandId::WBCACHE)),
        Err(TryLockError::Poisoned(poisoned)) => PoisonError::into_inner(poisoned),
    };
    let _kot = module
        .kot
        .lock
        .try_lock(LockMode::Shared)
        .map_err(|_| busy(OperandId::KOT))?;
    let mut work = if resume {
        progress
            .interrupted
            .take()
            .ok_or(Status::WBCACHE_RESUME_ERROR)?
    } else {
        Interrupted {
            hkids: module.kot.flushed(),
            next_block: 0,
        }
    };
    if work.hkids.is_empty() {
        return Err(Status::NO_HKID_READY_TO_WBCACHE.into());
    }

    for check in 0.. {
        work.next_block += 1;
        if work.next_block >= BLOCKS {
            break;
        }
        if module.conditions.interrupt_pending(check) {
            progress.interrupted = Some(work);
            return Err(Status::INTERRUPTED_RESUMABLE.into());
        }
    }
    progress.interrupted = None;
    for hkid in work.hkids {
        module.kot.written_back(hkid, package);
    }
    Ok(())
}

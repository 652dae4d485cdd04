//! Statuses by which a leaf says that it cannot do its work now, though it could later.
//!
//! Source: TDX module ABI, the locks that each leaf takes and the operand by which it names them;
//! host interrupts, entropy and key programming for the leaves that meet them.

use super::CompletionStatus;
use crate::{Leaf, OperandId as Id};

const fn busy(operand: Id) -> CompletionStatus {
    CompletionStatus::OPERAND_BUSY.with(operand)
}

/// Locks of a leaf that changes or reads one Secure EPT entry: TDR, OP_STATE, tree, entry.
const ENTRY: &[CompletionStatus] = &[
    busy(Id::RCX),
    busy(Id::SEPT_TREE),
    busy(Id::OP_STATE),
    busy(Id::RDX),
];
/// The same, with a page of its own.
const ENTRY_AND_PAGE: &[CompletionStatus] = &[
    busy(Id::RCX),
    busy(Id::SEPT_TREE),
    busy(Id::OP_STATE),
    busy(Id::RDX),
    busy(Id::R8),
];

impl CompletionStatus {
    /// What `leaf` may answer in any state when others work at the same time; the usual one first.
    /// Empty for leaves that never meet anybody.
    pub const fn transient(leaf: Leaf) -> &'static [Self] {
        match leaf {
            Leaf::MEM_SEPT_ADD
            | Leaf::MEM_PAGE_AUG
            | Leaf::MEM_PAGE_RELOCATE
            | Leaf::MEM_PAGE_DEMOTE => ENTRY_AND_PAGE,
            Leaf::MEM_RANGE_BLOCK
            | Leaf::MEM_RANGE_UNBLOCK
            | Leaf::MEM_PAGE_REMOVE
            | Leaf::MEM_PAGE_PROMOTE
            | Leaf::MEM_SEPT_REMOVE
            | Leaf::MEM_SEPT_RD
            | Leaf::MEM_RD
            | Leaf::MEM_WR => ENTRY,
            Leaf::MEM_PAGE_ADD => const { &[busy(Id::RDX), busy(Id::R8)] },
            Leaf::MEM_TRACK => {
                const {
                    &[
                        busy(Id::TD_EPOCH),
                        busy(Id::OP_STATE),
                        busy(Id::RCX),
                        Self::PREVIOUS_TLB_EPOCH_BUSY,
                    ]
                }
            }
            Leaf::MR_EXTEND => const { &[busy(Id::RDX)] },
            Leaf::MNG_CREATE => const { &[busy(Id::KOT), busy(Id::RCX), Self::RND_NO_ENTROPY] },
            Leaf::MNG_KEY_CONFIG => {
                const { &[busy(Id::RCX), busy(Id::KET), Self::KEY_GENERATION_FAILED] }
            }
            Leaf::MNG_ADDCX | Leaf::VP_CREATE => const { &[busy(Id::RDX), busy(Id::RCX)] },
            Leaf::VP_ADDCX => const { &[busy(Id::RDX), busy(Id::TDR), busy(Id::RCX)] },
            Leaf::MNG_INIT | Leaf::MR_FINALIZE => const { &[busy(Id::RCX)] },
            Leaf::MNG_RD | Leaf::MNG_WR => const { &[busy(Id::RCX), busy(Id::OP_STATE)] },
            Leaf::MNG_VPFLUSHDONE | Leaf::MNG_KEY_FREEID => {
                const { &[busy(Id::KOT), busy(Id::RCX)] }
            }
            Leaf::VP_INIT | Leaf::VP_RD | Leaf::VP_WR => {
                const { &[busy(Id::RCX), busy(Id::TDR), busy(Id::OP_STATE)] }
            }
            Leaf::VP_FLUSH => const { &[busy(Id::RCX), busy(Id::TDR)] },
            Leaf::PHYMEM_PAGE_RDMD | Leaf::PHYMEM_PAGE_WBINVD => const { &[busy(Id::RCX)] },
            Leaf::PHYMEM_PAGE_RECLAIM => const { &[busy(Id::RCX), busy(Id::TDR)] },
            // Not TDX_INTERRUPTED_RESUMABLE: it says how far the work came.
            Leaf::PHYMEM_CACHE_WB => const { &[busy(Id::WBCACHE), busy(Id::KOT)] },
            _ => &[],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Recoverability;

    #[test]
    fn a_transient_status_is_an_error_that_a_repeat_can_cure() {
        for &(leaf, _) in Leaf::NAMED {
            for status in CompletionStatus::transient(leaf) {
                assert!(status.is_error(), "{leaf}: {status}");
                assert_eq!(status.recoverability(), Recoverability::Yes, "{leaf}");
            }
        }
    }

    #[test]
    fn every_leaf_that_kvm_retries_when_busy_can_be_busy() {
        use crate::HostReaction as R;
        for &(leaf, _) in Leaf::NAMED {
            let usual = CompletionStatus::OPERAND_BUSY.host_reaction(Some(leaf));
            if matches!(usual, R::RetryFault | R::KickAndRetry | R::ReturnBusy) {
                assert!(CompletionStatus::transient(leaf)[0].is_busy(), "{leaf}");
            }
        }
        assert!(CompletionStatus::transient(Leaf::SYS_INFO).is_empty());
    }
}

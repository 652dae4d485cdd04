//! What a host does about a completion status.
//!
//! Source: Linux, arch/x86/kvm/vmx/tdx.c and arch/x86/virt/vmx/tdx/tdx.c: the hooks of the TDP
//! MMU, `tdh_do_no_vcpus()`, `sc_retry()`, `tdx_mmu_release_hkid()`, `tdx_reclaim_page()`,
//! `__tdx_td_init()`, `tdx_td_finalize()`.
//!
//! KVM calls busy exactly TDX_OPERAND_BUSY. What it does not expect, it takes for a bug of its own:
//! the VM is then marked bugged and makes no further progress. For a leaf that KVM does not call,
//! the error bits decide.

use super::{CompletionStatus, Recoverability};
use crate::Leaf;

/// What a host does next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum HostReaction {
    /// The call did what it should.
    Proceed,
    /// The vCPU left the guest: look at the exit reason.
    HandleExit,
    /// Give the fault up with RET_PF_RETRY; the guest's next try comes back.
    RetryFault,
    /// Force every vCPU out of the guest and call once more.
    KickAndRetry,
    /// Enter the guest again.
    Reenter,
    /// Call again, ten times in all.
    RetryEntropy,
    /// Call again with RCX = 1, to go on where it stopped.
    Resume,
    /// Call again with the same operands.
    Retry,
    /// Tell the VMM that it is busy (EBUSY).
    ReturnBusy,
    /// Tell the VMM that its parameters are wrong (EINVAL, with the status).
    ReturnInvalid,
    /// Give up quietly; the key id stays assigned and the pages are leaked.
    KeepKeyId,
    /// Mark the VM bugged and leak the key id.
    LeakKeyId,
    /// Warn, and never use the page again.
    LeakPage,
    /// Mark the VM bugged, but finish the removal.
    BugVmAndFinish,
    /// Mark the VM bugged: KVM did something that it must not do.
    BugVm,
    /// Stop using the TD: tear it down.
    TearDown,
    /// Change operands or state first.
    Correct,
}

impl HostReaction {
    /// Every reaction.
    pub const ALL: [Self; 17] = [
        Self::Proceed,
        Self::HandleExit,
        Self::RetryFault,
        Self::KickAndRetry,
        Self::Reenter,
        Self::RetryEntropy,
        Self::Resume,
        Self::Retry,
        Self::ReturnBusy,
        Self::ReturnInvalid,
        Self::KeepKeyId,
        Self::LeakKeyId,
        Self::LeakPage,
        Self::BugVmAndFinish,
        Self::BugVm,
        Self::TearDown,
        Self::Correct,
    ];

    /// A word for scripts.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Proceed => "proceed",
            Self::HandleExit => "handle-exit",
            Self::RetryFault => "retry-fault",
            Self::KickAndRetry => "kick-and-retry",
            Self::Reenter => "reenter",
            Self::RetryEntropy => "retry-entropy",
            Self::Resume => "resume",
            Self::Retry => "retry",
            Self::ReturnBusy => "return-busy",
            Self::ReturnInvalid => "return-invalid",
            Self::KeepKeyId => "keep-key-id",
            Self::LeakKeyId => "leak-key-id",
            Self::LeakPage => "leak-page",
            Self::BugVmAndFinish => "bug-vm-and-finish",
            Self::BugVm => "bug-vm",
            Self::TearDown => "tear-down",
            Self::Correct => "correct",
        }
    }

    /// A sentence for people.
    pub const fn describe(self) -> &'static str {
        match self {
            Self::Proceed => "go on, the work is done",
            Self::HandleExit => "handle the TD exit by its reason",
            Self::RetryFault => {
                "KVM ends the attempt with -EBUSY: RET_PF_RETRY for a fault, another round for the \
                 initial image"
            }
            Self::KickAndRetry => {
                "KVM holds vCPUs off, kicks all out of the guest and calls once more; busy again \
                 bugs the VM"
            }
            Self::Reenter => "KVM leaves the fast path and enters the guest again",
            Self::RetryEntropy => "KVM calls again, ten times in all, then gives -EAGAIN or -EIO",
            Self::Resume => "KVM calls again with RCX = 1, at most 10,000 times",
            Self::Retry => "call again with the same or the updated operands",
            Self::ReturnBusy => "KVM gives -EBUSY to the VMM, which calls again",
            Self::ReturnInvalid => "KVM gives -EINVAL to the VMM, with this status in hw_error",
            Self::KeepKeyId => {
                "KVM stops tearing down without a word: the key id stays assigned, pages are leaked"
            }
            Self::LeakKeyId => "KVM bugs the VM and never uses the key id again",
            Self::LeakPage => "KVM warns and leaks the page; nothing is retried",
            Self::BugVmAndFinish => "KVM bugs the VM, kicks vCPUs and still removes the page",
            Self::BugVm => "KVM bugs the VM (KVM_BUG_ON) and gives -EIO",
            Self::TearDown => "the TD cannot go on: tear it down",
            Self::Correct => "a repeat cannot succeed: correct the operands or the state first",
        }
    }
}

impl CompletionStatus {
    /// What a host does when `leaf` answers this; without a leaf, what it does as a rule.
    pub fn host_reaction(self, leaf: Option<Leaf>) -> HostReaction {
        use HostReaction as R;
        match leaf {
            Some(Leaf::VP_ENTER) => self.after_entry(),
            _ if self.is_success() => R::Proceed,
            // The wrappers compare the whole value.
            _ if self == Self::RND_NO_ENTROPY => R::RetryEntropy,
            Some(leaf) => self.after(leaf).unwrap_or_else(|| {
                if KVM_CALLS.contains(&leaf) {
                    R::BugVm
                } else {
                    self.by_bits()
                }
            }),
            None if self.is(Self::PREVIOUS_TLB_EPOCH_BUSY) => R::BugVmAndFinish,
            None if self.is(Self::INTERRUPTED_RESUMABLE) => R::Resume,
            None if self.is(Self::FLUSHVP_NOT_DONE) => R::KeepKeyId,
            None => self.by_bits(),
        }
    }

    /// What KVM does on purpose after one of its calls, other than to bug the VM.
    fn after(self, leaf: Leaf) -> Option<HostReaction> {
        use HostReaction as R;
        let busy = self.is_busy();
        Some(match leaf {
            Leaf::MEM_SEPT_ADD | Leaf::MEM_PAGE_ADD | Leaf::MEM_PAGE_AUG if busy => R::RetryFault,
            Leaf::MEM_RANGE_BLOCK | Leaf::MEM_TRACK | Leaf::MEM_PAGE_REMOVE if busy => {
                R::KickAndRetry
            }
            Leaf::MEM_TRACK => R::BugVmAndFinish,
            Leaf::MR_FINALIZE if busy => R::ReturnBusy,
            Leaf::MNG_INIT if self.is(Self::OPERAND_INVALID) => R::ReturnInvalid,
            Leaf::PHYMEM_CACHE_WB if self.is(Self::INTERRUPTED_RESUMABLE) => R::Resume,
            Leaf::PHYMEM_CACHE_WB if self.is(Self::NO_HKID_READY_TO_WBCACHE) => R::Proceed,
            Leaf::VP_FLUSH if self.is(Self::VCPU_NOT_ASSOCIATED) => R::Proceed,
            Leaf::MNG_VPFLUSHDONE if self.is(Self::FLUSHVP_NOT_DONE) => R::KeepKeyId,
            Leaf::MNG_VPFLUSHDONE | Leaf::MNG_KEY_FREEID => R::LeakKeyId,
            Leaf::PHYMEM_PAGE_RECLAIM => R::LeakPage,
            _ => return None,
        })
    }

    fn after_entry(self) -> HostReaction {
        use HostReaction as R;
        if self.is_success() {
            R::HandleExit
        } else if self.is_busy() {
            // The tree's lock or the TD's epoch: somebody else's change is about to be over.
            R::Reenter
        } else {
            self.by_bits()
        }
    }

    fn by_bits(self) -> HostReaction {
        match self.recoverability() {
            Recoverability::NotError => HostReaction::Proceed,
            Recoverability::Yes => HostReaction::Retry,
            Recoverability::No => HostReaction::Correct,
            Recoverability::Fatal => HostReaction::TearDown,
        }
    }
}

/// The leaves behind KVM's hooks and ioctls, apart from the entry into the guest.
const KVM_CALLS: [Leaf; 20] = [
    Leaf::MNG_ADDCX,
    Leaf::MEM_PAGE_ADD,
    Leaf::MEM_SEPT_ADD,
    Leaf::VP_ADDCX,
    Leaf::MEM_PAGE_AUG,
    Leaf::MEM_RANGE_BLOCK,
    Leaf::MNG_KEY_CONFIG,
    Leaf::MNG_CREATE,
    Leaf::VP_CREATE,
    Leaf::MR_EXTEND,
    Leaf::MR_FINALIZE,
    Leaf::VP_FLUSH,
    Leaf::MNG_INIT,
    Leaf::VP_INIT,
    Leaf::MEM_PAGE_REMOVE,
    Leaf::MEM_TRACK,
    Leaf::PHYMEM_CACHE_WB,
    Leaf::PHYMEM_PAGE_WBINVD,
    Leaf::VP_RD,
    Leaf::VP_WR,
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::OperandId;

    #[test]
    fn kvm_reacts_by_leaf() {
        use CompletionStatus as S;
        use HostReaction as R;
        let busy = S::OPERAND_BUSY.with(OperandId::SEPT_TREE);
        for (leaf, status, want) in [
            (Leaf::MEM_PAGE_AUG, S::SUCCESS, R::Proceed),
            (Leaf::MEM_PAGE_AUG, busy, R::RetryFault),
            (Leaf::MEM_SEPT_ADD, busy, R::RetryFault),
            (Leaf::MEM_PAGE_AUG, S::EPT_ENTRY_STATE_INCORRECT, R::BugVm),
            (Leaf::MEM_PAGE_AUG, S::SYS_BUSY, R::BugVm),
            (Leaf::MEM_RANGE_BLOCK, busy, R::KickAndRetry),
            // Information for the module, a bug for KVM: it blocks what it knows to be mapped.
            (
                Leaf::MEM_RANGE_BLOCK,
                S::GPA_RANGE_ALREADY_BLOCKED,
                R::BugVm,
            ),
            (Leaf::MEM_PAGE_REMOVE, busy, R::KickAndRetry),
            (Leaf::MEM_PAGE_REMOVE, S::TLB_TRACKING_NOT_DONE, R::BugVm),
            (Leaf::MEM_TRACK, busy, R::KickAndRetry),
            (
                Leaf::MEM_TRACK,
                S::PREVIOUS_TLB_EPOCH_BUSY,
                R::BugVmAndFinish,
            ),
            (Leaf::MR_EXTEND, busy, R::BugVm),
            (Leaf::MR_FINALIZE, busy, R::ReturnBusy),
            (Leaf::MR_FINALIZE, S::NO_VCPUS, R::BugVm),
            (Leaf::MNG_CREATE, S::RND_NO_ENTROPY, R::RetryEntropy),
            (
                Leaf::MNG_INIT,
                S::OPERAND_INVALID.with(OperandId::XFAM),
                R::ReturnInvalid,
            ),
            (Leaf::MNG_INIT, S::INCONSISTENT_MSR, R::BugVm),
            (Leaf::PHYMEM_CACHE_WB, S::INTERRUPTED_RESUMABLE, R::Resume),
            (
                Leaf::PHYMEM_CACHE_WB,
                S::NO_HKID_READY_TO_WBCACHE,
                R::Proceed,
            ),
            (Leaf::VP_FLUSH, S::VCPU_NOT_ASSOCIATED, R::Proceed),
            (Leaf::MNG_VPFLUSHDONE, S::FLUSHVP_NOT_DONE, R::KeepKeyId),
            (Leaf::MNG_VPFLUSHDONE, busy, R::LeakKeyId),
            (Leaf::MNG_KEY_FREEID, S::WBCACHE_NOT_COMPLETE, R::LeakKeyId),
            (Leaf::PHYMEM_PAGE_RECLAIM, busy, R::LeakPage),
            (Leaf::VP_ENTER, S::SUCCESS.with_details(48), R::HandleExit),
            (Leaf::VP_ENTER, busy, R::Reenter),
            (Leaf::VP_ENTER, S::TD_FATAL, R::TearDown),
            // Not called by KVM: the bits decide.
            (Leaf::MEM_SEPT_RD, busy, R::Retry),
            (Leaf::MEM_SEPT_RD, S::OPERAND_INVALID, R::Correct),
            (Leaf(4095), S::OPERAND_INVALID, R::Correct),
        ] {
            assert_eq!(status.host_reaction(Some(leaf)), want, "{leaf}: {status}");
        }
    }

    #[test]
    fn a_status_alone_has_a_reaction_too() {
        use CompletionStatus as S;
        use HostReaction as R;
        for (status, want) in [
            (S::SUCCESS, R::Proceed),
            (S::OPERAND_BUSY, R::Retry),
            (S::RND_NO_ENTROPY, R::RetryEntropy),
            (S::PREVIOUS_TLB_EPOCH_BUSY, R::BugVmAndFinish),
            (S::KEY_CONFIGURED, R::Proceed),
            (S::PAGE_METADATA_INCORRECT, R::Correct),
            (S::TD_FATAL, R::TearDown),
            (S(0xE000_7777_0000_0000), R::TearDown),
            (S(0x8000_7777_0000_0000), R::Retry),
        ] {
            assert_eq!(status.host_reaction(None), want, "{status}");
        }
    }

    #[test]
    fn every_reaction_has_a_word_of_its_own() {
        let words: std::collections::BTreeSet<_> = HostReaction::ALL
            .iter()
            .map(|reaction| reaction.word())
            .collect();
        assert_eq!(words.len(), HostReaction::ALL.len());
    }
}

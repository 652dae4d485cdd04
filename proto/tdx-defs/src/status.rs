//! Completion statuses: the 64-bit answer that a leaf leaves in RAX.
//!
//! Source: TDX module ABI, completion status layout; Linux, arch/x86/kvm/vmx/tdx_errno.h.
//!
//! Bits 63 ERROR, 62 NON_RECOVERABLE, 61 FATAL, 60 HOST_RECOVERABILITY_HINT, 47:40 class,
//! 39:32 code in the class, 31:0 details (operand id, level, state or exit reason).

mod explain;
mod reaction;
mod table;
mod transient;

use std::fmt;

pub use explain::{Details, StatusClass};
pub use reaction::HostReaction;

use crate::OperandId;

/// A completion status. Numbers without a name are values too.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct CompletionStatus(pub u64);

/// What repeating the same call in the same state can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recoverability {
    /// The call did what it should, or there was nothing to do.
    NotError,
    /// A repeat can succeed.
    Yes,
    /// A repeat cannot succeed.
    No,
    /// The TD is, or becomes, unusable.
    Fatal,
}

macro_rules! statuses {
    ($($konst:ident = $num:literal;)*) => {
        impl CompletionStatus {
            $(#[doc = concat!("`TDX_", stringify!($konst), "`")]
            pub const $konst: Self = Self($num << 32);)*
        }
    };
}

statuses! {
    SUCCESS = 0x0000_0000;
    NON_RECOVERABLE_VCPU = 0x4000_0001;
    NON_RECOVERABLE_TD = 0x6000_0002;
    INTERRUPTED_RESUMABLE = 0x8000_0003;
    INTERRUPTED_RESTARTABLE = 0x8000_0004;
    NON_RECOVERABLE_TD_NON_ACCESSIBLE = 0x6000_0005;
    OPERAND_INVALID = 0xC000_0100;
    OPERAND_ADDR_RANGE_ERROR = 0xC000_0101;
    OPERAND_BUSY = 0x8000_0200;
    PREVIOUS_TLB_EPOCH_BUSY = 0x8000_0201;
    SYS_BUSY = 0x8000_0202;
    RND_NO_ENTROPY = 0x8000_0203;
    HOST_PRIORITY_BUSY_TIMEOUT = 0x9000_0205;
    PAGE_METADATA_INCORRECT = 0xC000_0300;
    TD_ASSOCIATED_PAGES_EXIST = 0xC000_0400;
    SYS_INIT_NOT_PENDING = 0xC000_0500;
    SYS_LP_INIT_NOT_DONE = 0xC000_0502;
    SYS_LP_INIT_DONE = 0xC000_0503;
    SYS_NOT_READY = 0xC000_0505;
    SYS_SHUTDOWN = 0xC000_0506;
    SYS_KEY_CONFIG_NOT_PENDING = 0xC000_0507;
    SYS_LP_INIT_NOT_PENDING = 0xC000_050B;
    SYS_CONFIG_NOT_PENDING = 0xC000_050C;
    TD_FATAL = 0xE000_0604;
    TD_NON_DEBUG = 0xC000_0605;
    TDCS_NOT_ALLOCATED = 0xC000_0606;
    LIFECYCLE_STATE_INCORRECT = 0xC000_0607;
    OP_STATE_INCORRECT = 0xC000_0608;
    NO_VCPUS = 0xC000_0609;
    DEBUG_MEM_NOT_WRITABLE = 0xC000_060A;
    TDCX_NUM_INCORRECT = 0xC000_0610;
    X2APIC_ID_NOT_UNIQUE = 0xC000_0621;
    VCPU_STATE_INCORRECT = 0xC000_0700;
    VCPU_ASSOCIATED = 0x8000_0701;
    VCPU_NOT_ASSOCIATED = 0x8000_0702;
    NO_VALID_VE_INFO = 0xC000_0704;
    MAX_VCPUS_EXCEEDED = 0xC000_0705;
    KEY_GENERATION_FAILED = 0x8000_0800;
    TD_KEYS_NOT_CONFIGURED = 0x8000_0810;
    KEY_CONFIGURED = 0x0000_0815;
    WBCACHE_NOT_COMPLETE = 0x8000_0817;
    HKID_NOT_FREE = 0xC000_0820;
    NO_HKID_READY_TO_WBCACHE = 0x0000_0821;
    WBCACHE_RESUME_ERROR = 0xC000_0823;
    FLUSHVP_NOT_DONE = 0x8000_0824;
    INCONSISTENT_MSR = 0xC000_0920;
    TDMR_ALREADY_INITIALIZED = 0x0000_0A03;
    EPT_WALK_FAILED = 0xC000_0B00;
    EPT_ENTRY_NOT_PRESENT = 0xC000_0B03;
    GPA_RANGE_NOT_BLOCKED = 0xC000_0B06;
    GPA_RANGE_ALREADY_BLOCKED = 0x0000_0B07;
    TLB_TRACKING_NOT_DONE = 0xC000_0B08;
    EPT_INVALID_PROMOTE_CONDITIONS = 0xC000_0B09;
    PAGE_ALREADY_ACCEPTED = 0x0000_0B0A;
    PAGE_SIZE_MISMATCH = 0xC000_0B0B;
    EPT_ENTRY_STATE_INCORRECT = 0xC000_0B0D;
    EPT_PAGE_NOT_FREE = 0xC000_0B0E;
    L2_SEPT_WALK_FAILED = 0xC000_0B0F;
    L2_SEPT_ENTRY_NOT_FREE = 0xC000_0B10;
    METADATA_FIELD_ID_INCORRECT = 0xC000_0C00;
    METADATA_FIELD_NOT_WRITABLE = 0xC000_0C01;
    METADATA_FIELD_NOT_READABLE = 0xC000_0C02;
    METADATA_FIELD_VALUE_NOT_VALID = 0xC000_0C03;
}

impl CompletionStatus {
    /// Adds an operand id into bits 31:0.
    #[must_use]
    pub const fn with(self, operand: OperandId) -> Self {
        self.with_details(operand.0)
    }

    /// Puts `details` (a level, an OP_STATE value, an APIC id …) into bits 31:0.
    #[must_use]
    pub const fn with_details(self, details: u32) -> Self {
        Self((self.0 & !0xFFFF_FFFF) | details as u64)
    }

    /// Bits 63:32, the part by which statuses are compared.
    pub const fn code(self) -> Self {
        Self(self.0 & !0xFFFF_FFFF)
    }

    /// Bits 31:0.
    pub const fn details(self) -> u32 {
        (self.0 & 0xFFFF_FFFF) as u32
    }

    /// The operand id in bits 31:0.
    pub const fn operand(self) -> OperandId {
        OperandId(self.details())
    }

    /// Whether bits 63:32 say `code`, whatever the details.
    pub const fn is(self, code: Self) -> bool {
        self.code().0 == code.code().0
    }

    /// TDX_SUCCESS, whatever the details.
    pub const fn is_success(self) -> bool {
        self.is(Self::SUCCESS)
    }

    /// TDX_OPERAND_BUSY, the only status that KVM calls busy.
    pub const fn is_busy(self) -> bool {
        self.is(Self::OPERAND_BUSY)
    }

    /// Bit 63: the call did not do its work.
    pub const fn is_error(self) -> bool {
        self.0 >> 63 != 0
    }

    /// The ABI name, if the code has one. All but one begin with `TDX_`.
    pub fn name(self) -> Option<String> {
        self.entry().map(|(_, name, _)| (*name).to_owned())
    }

    /// Every code with a name, ascending.
    pub fn known() -> impl Iterator<Item = (Self, &'static str)> {
        table::STATUS_CODES
            .iter()
            .map(|&(high, name, _)| (Self(u64::from(high) << 32), name))
    }

    /// What a repeat of the same call can do; from the error bits when the code has no name.
    pub fn recoverability(self) -> Recoverability {
        match self.entry() {
            Some((_, _, recoverability)) => *recoverability,
            None if self.0 >> 61 & 1 != 0 => Recoverability::Fatal,
            None if !self.is_error() => Recoverability::NotError,
            None if self.0 >> 62 & 1 != 0 => Recoverability::No,
            None => Recoverability::Yes,
        }
    }

    fn entry(self) -> Option<&'static (u32, &'static str, Recoverability)> {
        let high = u32::try_from(self.0 >> 32).ok()?;
        let at = table::STATUS_CODES
            .binary_search_by_key(&high, |entry| entry.0)
            .ok()?;
        Some(&table::STATUS_CODES[at])
    }
}

impl fmt::Display for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.entry() {
            Some((_, name, _)) => f.write_str(name)?,
            None => return write!(f, "{:#018x}", self.0),
        }
        let class = self.0 >> 40 & 0xFF;
        match self.details() {
            0 => write!(f, " ({:#018x})", self.0),
            // The classes whose details are an operand id: operand, busy, page metadata, Secure EPT.
            _ if matches!(class, 1..=3 | 0x0B) && self.operand().name().is_some() => {
                write!(f, " + {} ({:#018x})", self.operand(), self.0)
            }
            details => write!(f, " + {details} ({:#018x})", self.0),
        }
    }
}

impl fmt::Debug for CompletionStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_sorted_and_complete() {
        assert!(table::STATUS_CODES.is_sorted_by_key(|entry| entry.0));
        assert_eq!(table::STATUS_CODES.len(), 202);
    }

    #[test]
    fn statuses_print_their_name_and_operand() {
        let busy = CompletionStatus::OPERAND_BUSY.with(OperandId::SEPT_TREE);
        assert_eq!(
            busy.to_string(),
            "TDX_OPERAND_BUSY + SEPT_TREE (0x8000020000000092)"
        );
        assert_eq!(busy.recoverability(), Recoverability::Yes);
        assert!(busy.is_busy() && busy.is_error());
        assert_eq!(CompletionStatus(0x7777_0000_0000_0000).name(), None);
    }

    #[test]
    fn details_replace_and_codes_compare_without_them() {
        let status = CompletionStatus::OP_STATE_INCORRECT.with_details(2);
        assert_eq!(status.details(), 2);
        assert!(status.is(CompletionStatus::OP_STATE_INCORRECT));
        assert!(!CompletionStatus::PREVIOUS_TLB_EPOCH_BUSY.is_busy());
    }
}

//! Operand ids: what bits 31:0 of an operand error or busy status name.
//!
//! Source: TDX module ABI, operand id table.

use std::fmt;

/// Names a register, a TD_PARAMS field or an object of the module.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct OperandId(pub u32);

macro_rules! operands {
    ($($name:ident = $num:literal,)*) => {
        impl OperandId {
            $(#[doc = concat!("`", stringify!($name), "`")] pub const $name: Self = Self($num);)*

            /// Every id that has a name, ascending by number.
            pub const NAMED: &'static [(Self, &'static str)] =
                &[$((Self($num), stringify!($name))),*];
        }
    };
}

operands! {
    RAX = 0,
    RCX = 1,
    RDX = 2,
    RBX = 3,
    RBP = 5,
    RSI = 6,
    RDI = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
    ATTRIBUTES = 64,
    XFAM = 65,
    EXEC_CONTROLS = 66,
    EPTP_CONTROLS = 67,
    MAX_VCPUS = 68,
    CPUID_CONFIG = 69,
    TSC_FREQUENCY = 70,
    NUM_L2_VMS = 71,
    IA32_ARCH_CAPABILITIES_CONFIG = 72,
    PAGE = 95,
    TDMR_INFO_PA = 96,
    GPA_LIST_ENTRY = 97,
    MIG_BUFF_LIST_ENTRY = 98,
    NEW_PAGE_LIST_ENTRY = 99,
    KEYNAME = 100,
    MEM_SCAN_CONTEXT = 105,
    GPA_RANGE_LIST_ENTRY = 106,
    GPA_LIST_INFO_ENTRY = 107,
    KEYSIZE_BITMAP = 108,
    TDR = 128,
    TDCX = 129,
    TDVPR = 130,
    REG_PAGE = 132,
    TDCS = 144,
    TDVPS = 145,
    SEPT_TREE = 146,
    SEPT_ENTRY = 147,
    RTMR = 168,
    TD_EPOCH = 169,
    L2_VAPIC_GPA = 170,
    MIGSC = 171,
    OP_STATE = 172,
    MIG = 173,
    SERVTD_BINDINGS = 174,
    METADATA_FIELD = 176,
    NUM_VCPUS = 177,
    CPUID_FIXED0_BITMAP = 178,
    SYS = 184,
    TDMR = 185,
    KOT = 186,
    KET = 187,
    WBCACHE = 188,
    MEM_SCAN_STATE = 190,
}

impl OperandId {
    /// The ABI name, if the number has one.
    pub fn name(self) -> Option<&'static str> {
        Self::NAMED
            .binary_search_by_key(&self, |&(id, _)| id)
            .ok()
            .map(|at| Self::NAMED[at].1)
    }
}

impl fmt::Display for OperandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "operand {}", self.0),
        }
    }
}

impl fmt::Debug for OperandId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

//! The guest's side of the ABI: TDCALL leaf numbers and the general-purpose registers that
//! TDCALL and TDH.VP.ENTER carry.
//!
//! Source: TDX module ABI, TDG leaf numbers and the register operands of TDG.VP.VMCALL.

use std::fmt;
use std::ops::{Index, IndexMut};

/// A guest-side leaf function number: RAX bits 15:0 of a TDCALL. Unknown numbers stay values.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GuestLeaf(pub u16);

macro_rules! guest_leaves {
    ($($konst:ident = $num:literal, $name:literal;)*) => {
        impl GuestLeaf {
            $(#[doc = concat!("`", $name, "`")] pub const $konst: Self = Self($num);)*

            /// Every leaf that has a name, ascending by number.
            pub const NAMED: &'static [(Self, &'static str)] = &[$((Self($num), $name)),*];
        }
    };
}

guest_leaves! {
    VP_VMCALL = 0, "TDG.VP.VMCALL";
    VP_INFO = 1, "TDG.VP.INFO";
    MR_RTMR_EXTEND = 2, "TDG.MR.RTMR.EXTEND";
    VP_VEINFO_GET = 3, "TDG.VP.VEINFO.GET";
    MR_REPORT = 4, "TDG.MR.REPORT";
    VP_CPUIDVE_SET = 5, "TDG.VP.CPUIDVE.SET";
    MEM_PAGE_ACCEPT = 6, "TDG.MEM.PAGE.ACCEPT";
    VM_RD = 7, "TDG.VM.RD";
    VM_WR = 8, "TDG.VM.WR";
    VP_RD = 9, "TDG.VP.RD";
    VP_WR = 10, "TDG.VP.WR";
    SYS_RD = 11, "TDG.SYS.RD";
    SYS_RDALL = 12, "TDG.SYS.RDALL";
    MEM_PAGE_ATTR_RD = 23, "TDG.MEM.PAGE.ATTR.RD";
    MEM_PAGE_ATTR_WR = 24, "TDG.MEM.PAGE.ATTR.WR";
}

impl GuestLeaf {
    /// The ABI name, if the number has one.
    pub fn name(self) -> Option<&'static str> {
        Self::NAMED
            .binary_search_by_key(&self, |&(leaf, _)| leaf)
            .ok()
            .map(|at| Self::NAMED[at].1)
    }

    /// The leaf of an ABI name such as `TDG.VP.VMCALL`.
    pub fn by_name(name: &str) -> Option<Self> {
        let row = Self::NAMED.iter().find(|(_, known)| *known == name)?;
        Some(row.0)
    }
}

impl fmt::Display for GuestLeaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "guest leaf {}", self.0),
        }
    }
}

impl fmt::Debug for GuestLeaf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A general-purpose register, by the number that register masks and operand ids use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[expect(missing_docs, reason = "the names of the registers say it all")]
pub enum Gpr {
    Rax = 0,
    Rcx = 1,
    Rdx = 2,
    Rbx = 3,
    Rsp = 4,
    Rbp = 5,
    Rsi = 6,
    Rdi = 7,
    R8 = 8,
    R9 = 9,
    R10 = 10,
    R11 = 11,
    R12 = 12,
    R13 = 13,
    R14 = 14,
    R15 = 15,
}

impl Gpr {
    /// All registers, ascending by number.
    pub const ALL: [Self; 16] = [
        Self::Rax,
        Self::Rcx,
        Self::Rdx,
        Self::Rbx,
        Self::Rsp,
        Self::Rbp,
        Self::Rsi,
        Self::Rdi,
        Self::R8,
        Self::R9,
        Self::R10,
        Self::R11,
        Self::R12,
        Self::R13,
        Self::R14,
        Self::R15,
    ];

    /// The name in lower case, as register lists write it.
    pub fn name(self) -> &'static str {
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11",
            "r12", "r13", "r14", "r15",
        ];
        NAMES[self as usize]
    }

    /// Whether a register mask selects it.
    pub fn is_in(self, mask: u64) -> bool {
        mask >> (self as u8) & 1 != 0
    }
}

/// The sixteen general-purpose registers.
#[derive(Clone, Copy, PartialEq, Eq, Default)]
pub struct Gprs([u64; 16]);

impl Gprs {
    /// The registers with one of them changed.
    #[must_use]
    pub fn with(mut self, register: Gpr, value: u64) -> Self {
        self[register] = value;
        self
    }
}

impl Index<Gpr> for Gprs {
    type Output = u64;

    fn index(&self, register: Gpr) -> &u64 {
        &self.0[register as usize]
    }
}

impl IndexMut<Gpr> for Gprs {
    fn index_mut(&mut self, register: Gpr) -> &mut u64 {
        &mut self.0[register as usize]
    }
}

impl fmt::Debug for Gprs {
    /// The registers that are not zero.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut map = f.debug_map();
        for register in Gpr::ALL.into_iter().filter(|register| self[*register] != 0) {
            map.entry(
                &format_args!("{}", register.name()),
                &format_args!("{:#x}", self[register]),
            );
        }
        map.finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guest_leaves_have_their_numbers_and_names() {
        assert!(GuestLeaf::NAMED.is_sorted());
        for &(leaf, name) in GuestLeaf::NAMED {
            assert_eq!(
                (leaf.name(), GuestLeaf::by_name(name)),
                (Some(name), Some(leaf))
            );
        }
        assert_eq!(GuestLeaf(99).to_string(), "guest leaf 99");
    }

    #[test]
    fn registers_stand_at_their_numbers() {
        for (number, register) in Gpr::ALL.into_iter().enumerate() {
            assert_eq!(register as usize, number);
            assert!(register.is_in(1 << number) && !register.is_in(!(1 << number)));
        }
        let registers = Gprs::default().with(Gpr::R11, 5);
        assert_eq!(registers[Gpr::R11], 5);
        assert_eq!(format!("{registers:?}"), "{r11: 0x5}");
    }
}

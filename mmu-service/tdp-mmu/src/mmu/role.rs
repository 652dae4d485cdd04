//! What a page-table page is for, as KVM's 32-bit role word.
//!
//! Source: arch/x86/include/asm/kvm_host.h, `union kvm_mmu_page_role`; mmu.c,
//! `kvm_calc_tdp_mmu_root_page_role()`. Two roots are the same root exactly when their whole
//! words are equal; bit 19, `is_mirror`, keeps a mirror root apart from the direct one.

use tdx_defs::Level;

const DIRECT: u32 = 1 << 7;
const ACCESS_ALL: u32 = 7 << 8;
const INVALID: u32 = 1 << 11;
const EFER_NX: u32 = 1 << 12;
const CR0_WP: u32 = 1 << 13;
const IS_MIRROR: u32 = 1 << 19;
const LEVEL_MASK: u32 = 0xF;

/// Which tree a page-table page belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RootKind {
    /// Shared memory; hardware walks it.
    Direct,
    /// Private memory; software walks it, the module holds the real tables.
    Mirror,
}

/// The role word.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Role(u32);

impl Role {
    /// The role of a root of a TDP MMU with A/D bits, for address space 0.
    pub(crate) fn root(level: Level, kind: RootKind) -> Self {
        let mirror = if kind == RootKind::Mirror {
            IS_MIRROR
        } else {
            0
        };
        Self(u32::from(level.get()) | DIRECT | ACCESS_ALL | EFER_NX | CR0_WP | mirror)
    }

    pub(crate) const fn from_word(word: u32) -> Self {
        Self(word)
    }

    pub(crate) const fn word(self) -> u32 {
        self.0
    }

    pub(crate) const fn is_mirror(self) -> bool {
        self.0 & IS_MIRROR != 0
    }

    pub(crate) const fn kind(self) -> RootKind {
        if self.is_mirror() {
            RootKind::Mirror
        } else {
            RootKind::Direct
        }
    }

    pub(crate) const fn is_invalid(self) -> bool {
        self.0 & INVALID != 0
    }

    pub(crate) const fn invalidated(self) -> Self {
        Self(self.0 | INVALID)
    }

    /// Level of the entries in the page.
    pub(crate) fn level(self) -> Level {
        Level::new((self.0 & LEVEL_MASK) as u8).unwrap_or(Level::L4K)
    }

    /// tdp_iter_child_role: the parent's role, one level down.
    pub(crate) const fn child(self) -> Self {
        Self((self.0 & !LEVEL_MASK) | ((self.0 & LEVEL_MASK) - 1))
    }
}

impl std::fmt::Debug for Role {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Role({:#x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn role_words_are_kvms() {
        for (level, kind, word) in [
            (Level::L512G, RootKind::Direct, 0x3784),
            (Level::L256T, RootKind::Direct, 0x3785),
            (Level::L512G, RootKind::Mirror, 0x8_3784),
            (Level::L256T, RootKind::Mirror, 0x8_3785),
        ] {
            let role = Role::root(level, kind);
            assert_eq!(role.word(), word);
            assert_eq!(role.invalidated().word(), word | 0x800);
            assert_eq!(role.child().level().get(), level.get() - 1);
            assert_eq!(role.child().is_mirror(), kind == RootKind::Mirror);
        }
    }
}

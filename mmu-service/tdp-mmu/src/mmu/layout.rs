//! The guest physical address space of a VM, and what it means for entries.
//!
//! Source: arch/x86/kvm/mmu.h, `kvm_gfn_direct_bits()`, `kvm_is_addr_direct()`; vmx.c,
//! `vmx_hardware_setup()` (MMIO value of an ordinary VM); tdx.c, `tdx_vm_init()` (a TD's).
//! An ordinary VM has no SHARED bit: every address is direct.

use tdx_defs::{Gfn, Gpa, GpaLayout, Gpaw, Level, Visibility};

/// What kind of guest a VM is (`kvm->arch.vm_type`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum VmKind {
    /// KVM_X86_TDX_VM: private memory behind a mirror root, the module holds its tables.
    #[default]
    Td,
    /// KVM_X86_DEFAULT_VM: one direct root, no module.
    Ordinary,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    td: GpaLayout,
    kind: VmKind,
}

impl Layout {
    pub(crate) fn new(gpaw: Gpaw, kind: VmKind) -> Self {
        Self {
            td: GpaLayout::new(gpaw),
            kind,
        }
    }

    pub(crate) fn is_td(self) -> bool {
        self.kind == VmKind::Td
    }

    pub(crate) fn gpaw(self) -> Gpaw {
        self.td.gpaw()
    }

    /// Width of a guest physical address in bits.
    pub(crate) fn width(self) -> u32 {
        self.td.width()
    }

    /// The SHARED bit of an address, for people.
    pub(crate) fn shared_bit(self) -> u32 {
        self.td.shared_bit()
    }

    /// kvm_gfn_direct_bits.
    pub(crate) fn direct_bits(self) -> u64 {
        if self.is_td() {
            self.td.direct_bits()
        } else {
            0
        }
    }

    /// First frame above guest memory.
    pub(crate) fn gfn_limit(self) -> u64 {
        if self.is_td() {
            self.td.gfn_limit()
        } else {
            1 << (self.td.width() - tdx_defs::PAGE_SHIFT)
        }
    }

    pub(crate) fn root_level(self) -> Level {
        self.td.root_level()
    }

    pub(crate) fn split(self, gpa: Gpa) -> (Gfn, Visibility) {
        if self.is_td() {
            self.td.split(gpa)
        } else {
            (gpa.frame(), Visibility::Shared)
        }
    }

    /// kvm_is_gfn_alias.
    pub(crate) fn is_alias(self, gfn: Gfn) -> bool {
        self.is_td() && self.td.is_alias(gfn)
    }
}

impl From<GpaLayout> for Layout {
    fn from(td: GpaLayout) -> Self {
        Self {
            td,
            kind: VmKind::Td,
        }
    }
}

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

/// The address space; what faults ask for is computed once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Layout {
    td: GpaLayout,
    /// The SHARED bit as a frame; 0 in an ordinary VM.
    direct_bits: u64,
    gfn_limit: u64,
    width: u32,
}

impl Layout {
    pub(crate) fn new(gpaw: Gpaw, kind: VmKind) -> Self {
        let td = GpaLayout::new(gpaw);
        let width = td.width();
        let (direct_bits, gfn_limit) = match kind {
            VmKind::Td => (td.direct_bits(), td.gfn_limit()),
            VmKind::Ordinary => (0, 1 << (width - tdx_defs::PAGE_SHIFT)),
        };
        Self {
            td,
            direct_bits,
            gfn_limit,
            width,
        }
    }

    pub(crate) fn is_td(self) -> bool {
        self.direct_bits != 0
    }

    /// The layout of a TD of this width.
    pub(crate) fn td(self) -> GpaLayout {
        self.td
    }

    pub(crate) fn gpaw(self) -> Gpaw {
        self.td.gpaw()
    }

    /// Width of a guest physical address in bits.
    pub(crate) fn width(self) -> u32 {
        self.width
    }

    /// The SHARED bit of an address, for people.
    pub(crate) fn shared_bit(self) -> u32 {
        self.td.shared_bit()
    }

    /// kvm_gfn_direct_bits.
    pub(crate) fn direct_bits(self) -> u64 {
        self.direct_bits
    }

    /// First frame above guest memory.
    pub(crate) fn gfn_limit(self) -> u64 {
        self.gfn_limit
    }

    pub(crate) fn root_level(self) -> Level {
        self.td.root_level()
    }

    /// The frame without SHARED bit, and whose memory it is.
    pub(crate) fn split(self, gpa: Gpa) -> (Gfn, Visibility) {
        let gfn = gpa.frame().get();
        let visibility = match !self.is_td() || gfn & self.direct_bits != 0 {
            true => Visibility::Shared,
            false => Visibility::Private,
        };
        (Gfn::new(gfn & !self.direct_bits), visibility)
    }

    /// kvm_is_gfn_alias.
    pub(crate) fn is_alias(self, gfn: Gfn) -> bool {
        gfn.get() & self.direct_bits != 0
    }
}

impl From<GpaLayout> for Layout {
    fn from(td: GpaLayout) -> Self {
        Self::new(td.gpaw(), VmKind::Td)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_td_is_split_by_its_shared_bit_and_an_ordinary_vm_is_not() {
        for gpaw in [Gpaw::W48, Gpaw::W52] {
            let td = GpaLayout::new(gpaw);
            let (layout, ordinary) = (Layout::from(td), Layout::new(gpaw, VmKind::Ordinary));
            let shared = 1 << td.shared_bit();
            for gpa in [0, 0x1000, shared - 0x1000].map(Gpa::new) {
                let alias = Gpa::new(gpa.get() | shared);
                for gpa in [gpa, alias] {
                    assert_eq!(layout.split(gpa), td.split(gpa));
                    assert_eq!(layout.is_alias(gpa.frame()), td.is_alias(gpa.frame()));
                    assert_eq!(ordinary.split(gpa), (gpa.frame(), Visibility::Shared));
                    assert!(!ordinary.is_alias(gpa.frame()));
                }
            }
            assert_eq!(layout.gfn_limit(), td.gfn_limit());
            assert_eq!(ordinary.gfn_limit() << 12, 1 << td.width());
            assert_eq!(
                (layout.direct_bits(), ordinary.direct_bits()),
                (td.direct_bits(), 0)
            );
        }
    }
}

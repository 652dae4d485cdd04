//! The events with their fields, printed as the kernel prints them.
//!
//! Source: the TP_printk lines of mmutrace.h, trace.h and kvm.h. `%#016llx` is sixteen characters
//! wide with its 0x.
//!
//! Model: an address of an entry is the simulated physical one; a real kernel prints `%p`, which
//! it hashes.

use std::fmt::{Display, Formatter, Result};

use tdx_defs::{Gfn, Level};

use crate::mmu::role::Role;

/// An event of the systems `kvm` and `kvmmmu`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "fields have the names of the kernel's")]
pub enum Event {
    /// An access left the guest. `error_code` is the exit qualification.
    PageFault {
        vcpu: u32,
        rip: u64,
        address: u64,
        error_code: u64,
    },
    /// The host takes user memory back.
    UnmapHvaRange { start: u64, end: u64 },
    /// The host asks what was used, and forgets it.
    AgeHva { start: u64, end: u64 },
    /// The host asks whether a page was used.
    TestAgeHva { hva: u64 },
    /// Frames, end exclusive.
    VmSetMemAttributes {
        start: u64,
        end: u64,
        attributes: u64,
    },
    /// An entry has a new value.
    SpteChanged {
        gfn: Gfn,
        level: Level,
        old_spte: u64,
        new_spte: u64,
    },
    /// A fault knows what it wants; `pfn` is the page of the faulting frame.
    SpteRequested { gfn: Gfn, pfn: u64, level: Level },
    /// A fault has installed a leaf in the entry at `sptep`.
    SetSpte {
        gfn: Gfn,
        spte: u64,
        level: Level,
        sptep: u64,
    },
    /// A table was made.
    GetPage { page: PageText, created: bool },
    /// A table goes.
    PrepareZapPage { page: PageText },
    /// A fault was handled without mmu_lock; `error_code` has the bits of [`error_code`].
    FastPageFault {
        vcpu: u32,
        gva: u64,
        error_code: u64,
        sptep: u64,
        old_spte: u64,
        new_spte: u64,
        spurious: bool,
        fixed: bool,
    },
    /// An MMIO entry was made.
    MarkMmioSpte {
        sptep: u64,
        gfn: Gfn,
        access: u64,
        generation: u32,
    },
    /// An access met a valid MMIO entry.
    HandleMmioPageFault { addr: u64, gfn: Gfn, access: u64 },
    /// An access met an MMIO entry.
    CheckMmioSpte {
        spte: u64,
        kvm_gen: u32,
        spte_gen: u32,
        valid: bool,
    },
    /// Everything that hardware walks goes.
    ZapAllFast { mmu_valid_gen: u32, used_pages: u64 },
    /// A huge leaf became a table, or (`errno` negative) did not.
    SplitHugePage {
        gfn: Gfn,
        spte: u64,
        level: Level,
        errno: i32,
    },
}

impl Event {
    /// The name, as under `events/kvm` and `events/kvmmmu` of tracefs.
    pub fn name(&self) -> &'static str {
        match self {
            Self::PageFault { .. } => "kvm_page_fault",
            Self::UnmapHvaRange { .. } => "kvm_unmap_hva_range",
            Self::AgeHva { .. } => "kvm_age_hva",
            Self::TestAgeHva { .. } => "kvm_test_age_hva",
            Self::VmSetMemAttributes { .. } => "kvm_vm_set_mem_attributes",
            Self::SpteChanged { .. } => "kvm_tdp_mmu_spte_changed",
            Self::SpteRequested { .. } => "kvm_mmu_spte_requested",
            Self::SetSpte { .. } => "kvm_mmu_set_spte",
            Self::GetPage { .. } => "kvm_mmu_get_page",
            Self::PrepareZapPage { .. } => "kvm_mmu_prepare_zap_page",
            Self::FastPageFault { .. } => "fast_page_fault",
            Self::MarkMmioSpte { .. } => "mark_mmio_spte",
            Self::HandleMmioPageFault { .. } => "handle_mmio_page_fault",
            Self::CheckMmioSpte { .. } => "check_mmio_spte",
            Self::ZapAllFast { .. } => "kvm_mmu_zap_all_fast",
            Self::SplitHugePage { .. } => "kvm_mmu_split_huge_page",
        }
    }
}

/// A table, as `KVM_MMU_PAGE_PRINTK` shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageText {
    /// First frame that it covers, without the SHARED bit.
    pub gfn: Gfn,
    /// KVM's role word; bit 19 says mirror, which the text does not.
    pub role: u32,
    /// References, of a root.
    pub root_count: u32,
}

impl Display for PageText {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        let role = Role::from_word(self.role);
        let invalid = if role.is_invalid() { " invalid" } else { "" };
        // Every page of a TDP MMU with A/D bits: direct, all access, NX on, in step.
        write!(
            f,
            "sp gen 0 gfn {:x} l{} 8-byte q0 direct wux{invalid} nxe ad root {} sync",
            self.gfn.get(),
            role.level().get(),
            self.root_count
        )
    }
}

impl Display for Event {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        match *self {
            Self::PageFault {
                vcpu,
                rip,
                address,
                error_code,
            } => write!(
                f,
                "vcpu {vcpu} rip {rip:#x} address {address:#018x} error_code {error_code:#x}"
            ),
            Self::UnmapHvaRange { start, end } => {
                write!(f, "mmu notifier unmap range: {start:#016x} -- {end:#016x}")
            }
            Self::AgeHva { start, end } => {
                write!(f, "mmu notifier age hva: {start:#016x} -- {end:#016x}")
            }
            Self::TestAgeHva { hva } => write!(f, "mmu notifier test age hva: {hva:#016x}"),
            Self::VmSetMemAttributes {
                start,
                end,
                attributes,
            } => write!(f, "{start:#016x} -- {end:#016x} [{attributes:#x}]"),
            Self::SpteChanged {
                gfn,
                level,
                old_spte,
                new_spte,
            } => write!(
                f,
                "as id 0 gfn {:x} level {} old_spte {old_spte:x} new_spte {new_spte:x}",
                gfn.get(),
                level.get()
            ),
            Self::SpteRequested { gfn, pfn, level } => {
                write!(f, "gfn {:x} pfn {pfn:x} level {}", gfn.get(), level.get())
            }
            Self::SetSpte {
                gfn,
                spte,
                level,
                sptep,
            } => write!(
                f,
                "gfn {:x} spte {spte:x} ({}) level {} at {sptep:x}",
                gfn.get(),
                Rights(spte),
                level.get()
            ),
            Self::GetPage { page, created } => {
                write!(f, "{page} {}", if created { "new" } else { "existing" })
            }
            Self::PrepareZapPage { page } => page.fmt(f),
            Self::FastPageFault {
                vcpu,
                gva,
                error_code,
                sptep,
                old_spte,
                new_spte,
                spurious,
                fixed,
            } => write!(
                f,
                "vcpu {vcpu} gva {gva:x} error_code {} sptep {sptep:016x} old {old_spte:#x} \
                 new {new_spte:x} spurious {} fixed {}",
                Names(error_code),
                u8::from(spurious),
                u8::from(fixed)
            ),
            Self::MarkMmioSpte {
                sptep,
                gfn,
                access,
                generation,
            } => write!(
                f,
                "sptep:{sptep:016x} gfn {:x} access {access:x} gen {generation:x}",
                gfn.get()
            ),
            Self::HandleMmioPageFault { addr, gfn, access } => {
                write!(f, "addr:{addr:x} gfn {:x} access {access:x}", gfn.get())
            }
            Self::CheckMmioSpte {
                spte,
                kvm_gen,
                spte_gen,
                valid,
            } => write!(
                f,
                "spte {spte:x} kvm_gen {kvm_gen:x} spte-gen {spte_gen:x} valid {}",
                u8::from(valid)
            ),
            Self::ZapAllFast {
                mmu_valid_gen,
                used_pages,
            } => write!(
                f,
                "kvm-mmu-valid-gen {mmu_valid_gen} used_pages {used_pages:x}"
            ),
            Self::SplitHugePage {
                gfn,
                spte,
                level,
                errno,
            } => write!(
                f,
                "gfn {:x} spte {spte:x} level {} errno {errno}",
                gfn.get(),
                level.get()
            ),
        }
    }
}

/// The letters of kvm_mmu_set_spte.
struct Rights(u64);

impl Display for Rights {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        use crate::mmu::spte::{EXEC, READ, WRITE};
        // "r" always; "u" is the readable bit.
        f.write_str("r")?;
        for (bit, letter) in [(WRITE, "w"), (EXEC, "x"), (READ, "u")] {
            f.write_str(if self.0 & bit != 0 { letter } else { "-" })?;
        }
        Ok(())
    }
}

/// Bits of KVM's page fault error code (PFERR_*).
pub mod error_code {
    /// The entry was present.
    pub const PRESENT: u64 = 1 << 0;
    /// A write.
    pub const WRITE: u64 = 1 << 1;
    /// A read.
    pub const USER: u64 = 1 << 2;
    /// A reserved bit was set.
    pub const RSVD: u64 = 1 << 3;
    /// An instruction fetch.
    pub const FETCH: u64 = 1 << 4;
    /// The access itself, behind the guest's own page walk.
    pub const GUEST_FINAL: u64 = 1 << 32;
    /// An access of the guest's page walk.
    pub const GUEST_PAGE: u64 = 1 << 33;
}

/// The names of fast_page_fault's error code.
struct Names(u64);

impl Display for Names {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        const NAMES: [(u64, &str); 8] = [
            (1 << 0, "P"),
            (1 << 1, "W"),
            (1 << 2, "U"),
            (1 << 5, "PK"),
            (1 << 6, "SS"),
            (1 << 15, "SGX"),
            (1 << 3, "RSVD"),
            (1 << 4, "F"),
        ];
        let mut rest = self.0;
        let mut separator = "";
        for (bit, name) in NAMES {
            if self.0 & bit != 0 {
                rest &= !bit;
                write!(f, "{separator}{name}")?;
                separator = "|";
            }
        }
        if rest != 0 {
            write!(f, "{separator}{rest:#x}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::mmu::role::RootKind;

    #[test]
    fn events_print_what_the_kernel_prints() {
        let root = Role::root(Level::L512G, RootKind::Direct);
        let table = PageText {
            gfn: Gfn::new(0x10000),
            role: root.child().child().child().word(),
            root_count: 0,
        };
        let gfn = Gfn::new(0x10000);
        let cases = [
            (
                Event::PageFault {
                    vcpu: 0,
                    rip: 0x1040,
                    address: 0x1000_0000,
                    error_code: 0x1_0000_0006,
                },
                "vcpu 0 rip 0x1040 address 0x0000000010000000 error_code 0x100000006",
            ),
            (
                Event::UnmapHvaRange {
                    start: 0x7FFB_C60A_3000,
                    end: 0x7FFB_C60A_6000,
                },
                "mmu notifier unmap range: 0x007ffbc60a3000 -- 0x007ffbc60a6000",
            ),
            (
                Event::SpteChanged {
                    gfn,
                    level: Level::L2M,
                    old_spte: 0x8000_0000_0000_0000,
                    new_spte: 0x1_46cc_f827,
                },
                "as id 0 gfn 10000 level 2 old_spte 8000000000000000 new_spte 146ccf827",
            ),
            (
                Event::SpteRequested {
                    gfn,
                    pfn: 1 << 63,
                    level: Level::L4K,
                },
                "gfn 10000 pfn 8000000000000000 level 1",
            ),
            (
                Event::SetSpte {
                    gfn,
                    spte: 0x8600_0000_4000_1b35,
                    level: Level::L4K,
                    sptep: 0x5000_5008,
                },
                "gfn 10000 spte 8600000040001b35 (r-xu) level 1 at 50005008",
            ),
            (
                Event::GetPage {
                    page: table,
                    created: true,
                },
                "sp gen 0 gfn 10000 l1 8-byte q0 direct wux nxe ad root 0 sync new",
            ),
            (
                Event::PrepareZapPage {
                    page: PageText {
                        role: root.invalidated().word(),
                        root_count: 1,
                        ..table
                    },
                },
                "sp gen 0 gfn 10000 l4 8-byte q0 direct wux invalid nxe ad root 1 sync",
            ),
            (
                Event::FastPageFault {
                    vcpu: 0,
                    gva: 0x1000_3000,
                    error_code: 0x1_0000_0007,
                    sptep: 0xa88e_1168,
                    old_spte: 0x3cc_e825,
                    new_spte: 0x3cc_e825,
                    spurious: false,
                    fixed: false,
                },
                "vcpu 0 gva 10003000 error_code P|W|U|0x100000000 sptep 00000000a88e1168 \
                 old 0x3cce825 new 3cce825 spurious 0 fixed 0",
            ),
            (
                Event::MarkMmioSpte {
                    sptep: 0x50b0_67a2,
                    gfn,
                    access: 7,
                    generation: 10,
                },
                "sptep:0000000050b067a2 gfn 10000 access 7 gen a",
            ),
            (
                Event::CheckMmioSpte {
                    spte: 0x8_0000_2000_0077,
                    kvm_gen: 0x10,
                    spte_gen: 0xe,
                    valid: false,
                },
                "spte 8000020000077 kvm_gen 10 spte-gen e valid 0",
            ),
            (
                Event::HandleMmioPageFault {
                    addr: 0,
                    gfn,
                    access: 0,
                },
                "addr:0 gfn 10000 access 0",
            ),
            (
                Event::SplitHugePage {
                    gfn,
                    spte: 0x1_4800_0ee7,
                    level: Level::L2M,
                    errno: -12,
                },
                "gfn 10000 spte 148000ee7 level 2 errno -12",
            ),
            (
                Event::ZapAllFast {
                    mmu_valid_gen: 1,
                    used_pages: 0,
                },
                "kvm-mmu-valid-gen 1 used_pages 0",
            ),
            (
                Event::VmSetMemAttributes {
                    start: 1,
                    end: 0x200,
                    attributes: 8,
                },
                "0x00000000000001 -- 0x00000000000200 [0x8]",
            ),
            (
                Event::AgeHva {
                    start: 0x1000,
                    end: 0x2000,
                },
                "mmu notifier age hva: 0x00000000001000 -- 0x00000000002000",
            ),
            (
                Event::TestAgeHva { hva: 0x1000 },
                "mmu notifier test age hva: 0x00000000001000",
            ),
        ];
        for (event, text) in cases {
            assert_eq!(event.to_string(), text, "{}", event.name());
        }
    }
}

//! TDG.VP.VMCALL: what a guest asks its host for, and MapGPA above all.
//!
//! Source: arch/x86/kvm/vmx/tdx.c, `handle_tdvmcall()`, `tdx_map_gpa()`, `__tdx_map_gpa()`,
//! `tdx_complete_vmcall_map_gpa()`, `tdx_emulate_mmio()`, `tdx_complete_mmio_read()`.
//!
//! KVM changes nothing itself when the guest asks for a conversion: it leaves to user space in
//! chunks of at most 2 MiB, and user space calls KVM_SET_MEMORY_ATTRIBUTES.

use tdx_defs::{GpaLayout, Gpr, Gprs, PAGE_SIZE};

use super::run::RunExit;

/// Sub-function numbers in R11.
const HLT: u64 = 12;
const EPT_VIOLATION: u64 = 48;
const MAP_GPA: u64 = 0x1_0001;

/// Status of a TDG.VP.VMCALL, in R10.
const SUCCESS: u64 = 0;
const RETRY: u64 = 1;
const INVALID_OPERAND: u64 = 0x8000_0000_0000_0000;
const ALIGN_ERROR: u64 = 0x8000_0000_0000_0002;
const SUBFUNC_UNSUPPORTED: u64 = 0x8000_0000_0000_0003;

/// Most pages of one exit to user space (TDX_MAP_GPA_MAX_LEN).
const CHUNK_PAGES: u64 = 512;

/// A TDG.VP.VMCALL between the guest's exit and its next entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Vmcall {
    /// Answered: R10 and R11 for the guest.
    Answered {
        /// Status.
        r10: u64,
        /// Value, or the address that a failure concerns.
        r11: u64,
    },
    /// User space has to convert a chunk first.
    MapGpa(MapGpa),
    /// The guest may have made a call of which nobody knows any more: it is told that it failed.
    Lost,
    /// User space has to emulate an access first.
    Mmio {
        /// Whether the guest reads.
        read: bool,
    },
}

/// A conversion under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct MapGpa {
    /// Start of the chunk that user space has in hand, bytes, as the guest wrote it.
    chunk: u64,
    /// End of the range, bytes.
    end: u64,
}

impl MapGpa {
    fn chunk_end(&self) -> u64 {
        self.end.min(self.chunk + CHUNK_PAGES * PAGE_SIZE)
    }

    /// KVM_HC_MAP_GPA_RANGE of the chunk.
    fn exit(&self, layout: &GpaLayout) -> RunExit {
        let shared = layout.shared_mask();
        RunExit::MapGpa {
            gpa: self.chunk & !shared,
            pages: (self.chunk_end() - self.chunk) / PAGE_SIZE,
            private: self.chunk & shared == 0,
        }
    }
}

/// What a TDG.VP.VMCALL leads to.
pub(crate) enum Next {
    /// The guest goes on.
    Enter(Vmcall),
    /// User space is next.
    Exit(Vmcall, RunExit),
}

/// What a guest gets whose call was lost with the process that had it in hand. Nothing of the call
/// is certain, so it must not look done; a guest may make it again.
pub(crate) const LOST: u64 = INVALID_OPERAND;

fn answered(r10: u64, r11: u64) -> Next {
    Next::Enter(Vmcall::Answered { r10, r11 })
}

/// handle_tdvmcall. `exits` is KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE.
pub(crate) fn handle(regs: &Gprs, layout: &GpaLayout, exits: bool) -> Next {
    if regs[Gpr::R10] != 0 {
        // A hypercall of the guest's own kind; KVM's are not modelled.
        return answered(SUBFUNC_UNSUPPORTED, 0);
    }
    match regs[Gpr::R11] {
        MAP_GPA => map_gpa(regs[Gpr::R12], regs[Gpr::R13], layout, exits),
        HLT => Next::Exit(
            Vmcall::Answered {
                r10: SUCCESS,
                r11: 0,
            },
            RunExit::Hlt,
        ),
        EPT_VIOLATION => mmio(regs, layout),
        _ => answered(SUBFUNC_UNSUPPORTED, 0),
    }
}

fn map_gpa(gpa: u64, size: u64, layout: &GpaLayout, exits: bool) -> Next {
    if !exits {
        return answered(SUBFUNC_UNSUPPORTED, gpa);
    }
    let end = gpa.checked_add(size);
    let is_legal = |address: u64| address >> layout.width() == 0;
    let is_shared = |address: u64| address & layout.shared_mask() != 0;
    let Some(end) = end.filter(|&end| {
        size != 0 && is_legal(gpa) && is_legal(end - 1) && is_shared(gpa) == is_shared(end - 1)
    }) else {
        return answered(INVALID_OPERAND, gpa);
    };
    if !gpa.is_multiple_of(PAGE_SIZE) || !size.is_multiple_of(PAGE_SIZE) {
        return answered(ALIGN_ERROR, gpa);
    }
    let map = MapGpa { chunk: gpa, end };
    Next::Exit(Vmcall::MapGpa(map), map.exit(layout))
}

/// The guest has had #VE and asks for the access by hand: size R12, direction R13, address R14,
/// value R15.
fn mmio(regs: &Gprs, layout: &GpaLayout) -> Next {
    let (size, write, gpa, value) = (
        regs[Gpr::R12],
        regs[Gpr::R13],
        regs[Gpr::R14],
        regs[Gpr::R15],
    );
    let fits = matches!(size, 1 | 2 | 4 | 8)
        && write <= 1
        && gpa & layout.shared_mask() != 0
        && gpa >> layout.width() == 0
        && gpa % PAGE_SIZE <= PAGE_SIZE - size;
    if !fits {
        return answered(INVALID_OPERAND, 0);
    }
    let exit = RunExit::Mmio {
        gpa: gpa & !layout.shared_mask(),
        // One of four small numbers.
        len: u8::try_from(size).unwrap_or(8),
        write: (write == 1).then_some(value),
    };
    Next::Exit(Vmcall::Mmio { read: write == 0 }, exit)
}

/// tdx_complete_vmcall_map_gpa and tdx_complete_mmio_read: user space is back with `ret`, which
/// is 0 for success, or with the value of a read.
pub(crate) fn complete(pending: Vmcall, ret: u64, has_event: bool, layout: &GpaLayout) -> Next {
    match pending {
        Vmcall::Answered { .. } | Vmcall::Lost => Next::Enter(pending),
        Vmcall::Mmio { read } => answered(SUCCESS, if read { ret } else { 0 }),
        Vmcall::MapGpa(map) if ret != 0 => answered(INVALID_OPERAND, map.chunk),
        Vmcall::MapGpa(map) if map.chunk_end() == map.end => answered(SUCCESS, 0),
        Vmcall::MapGpa(map) if has_event => answered(RETRY, map.chunk_end()),
        Vmcall::MapGpa(map) => {
            let next = MapGpa {
                chunk: map.chunk_end(),
                ..map
            };
            Next::Exit(Vmcall::MapGpa(next), next.exit(layout))
        }
    }
}

#[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
pub(crate) mod tests {
    use super::*;
    use tdx_defs::Gpaw;

    const MIB: u64 = 1 << 20;
    const SHARED: u64 = 1 << 47;

    fn call(gpa: u64, size: u64, exits: bool) -> Next {
        let regs = Gprs::default()
            .with(Gpr::R11, MAP_GPA)
            .with(Gpr::R12, gpa)
            .with(Gpr::R13, size);
        handle(&regs, &layout(), exits)
    }

    fn layout() -> GpaLayout {
        GpaLayout::new(Gpaw::W48)
    }

    /// User space answers every exit as `ret` says; the exits, and what the guest gets.
    fn play(
        mut next: Next,
        mut ret: impl FnMut(usize) -> (u64, bool),
    ) -> (Vec<RunExit>, (u64, u64)) {
        let mut exits = Vec::new();
        loop {
            match next {
                Next::Enter(Vmcall::Answered { r10, r11 }) => return (exits, (r10, r11)),
                Next::Enter(other) => panic!("{other:?}"),
                Next::Exit(pending, exit) => {
                    exits.push(exit);
                    let (ret, event) = ret(exits.len());
                    next = complete(pending, ret, event, &layout());
                }
            }
        }
    }

    fn chunks(exits: &[RunExit]) -> Vec<(u64, u64, bool)> {
        exits
            .iter()
            .map(|exit| match *exit {
                RunExit::MapGpa {
                    gpa,
                    pages,
                    private,
                } => (gpa, pages, private),
                ref other => panic!("{other:?}"),
            })
            .collect()
    }

    #[cfg_attr(test, test)]
    pub(crate) fn m01_two_mib_are_one_exit() {
        let (exits, answer) = play(call(SHARED, 2 * MIB, true), |_| (0, false));
        assert_eq!(chunks(&exits), [(0, 512, false)]);
        assert_eq!(answer, (SUCCESS, 0));
    }

    #[cfg_attr(test, test)]
    pub(crate) fn m02_five_mib_are_three_exits() {
        let (exits, answer) = play(call(MIB, 5 * MIB, true), |_| (0, false));
        let expected = [(MIB, 512, true), (3 * MIB, 512, true), (5 * MIB, 256, true)];
        assert_eq!(chunks(&exits), expected);
        assert_eq!(answer, (SUCCESS, 0));
    }

    #[cfg_attr(test, test)]
    pub(crate) fn m03_an_event_cuts_the_conversion_short() {
        let (exits, answer) = play(call(MIB, 5 * MIB, true), |_| (0, true));
        assert_eq!(exits.len(), 1);
        assert_eq!(answer, (RETRY, 3 * MIB));
    }

    #[cfg_attr(test, test)]
    pub(crate) fn m04_a_failure_names_the_chunk() {
        let gpa = SHARED | MIB;
        let (exits, answer) = play(call(gpa, 5 * MIB, true), |exit| ((exit == 2).into(), false));
        assert_eq!(exits.len(), 2);
        assert_eq!(answer, (INVALID_OPERAND, gpa + 2 * MIB));
    }

    #[cfg_attr(test, test)]
    pub(crate) fn m05_without_the_exit_the_call_is_unsupported() {
        let (exits, answer) = play(call(MIB, MIB, false), |_| (0, false));
        assert_eq!((exits.len(), answer), (0, (SUBFUNC_UNSUPPORTED, MIB)));
    }

    #[cfg_attr(test, test)]
    pub(crate) fn m06_a_range_that_cannot_be_is_an_invalid_operand() {
        for (gpa, size) in [
            (MIB, 0),
            (u64::MAX - 4095, 8192),
            (SHARED - 4096, 8192),
            (1 << 48, 4096),
        ] {
            let (exits, answer) = play(call(gpa, size, true), |_| (0, false));
            assert_eq!(
                (exits.len(), answer),
                (0, (INVALID_OPERAND, gpa)),
                "{gpa:#x}"
            );
        }
    }

    #[cfg_attr(test, test)]
    pub(crate) fn m07_an_unaligned_range_is_an_alignment_error() {
        for (gpa, size) in [(MIB + 1, MIB), (MIB, 4097)] {
            let (_, answer) = play(call(gpa, size, true), |_| (0, false));
            assert_eq!(answer, (ALIGN_ERROR, gpa));
        }
    }

    #[test]
    fn an_access_by_hand_goes_to_user_space_and_comes_back_with_a_value() {
        let regs = |size, write, gpa| {
            Gprs::default()
                .with(Gpr::R11, EPT_VIOLATION)
                .with(Gpr::R12, size)
                .with(Gpr::R13, write)
                .with(Gpr::R14, gpa)
                .with(Gpr::R15, 0x55)
        };
        let next = handle(&regs(4, 0, SHARED | 0x1000), &layout(), true);
        let (exits, answer) = play(next, |_| (0xABCD, false));
        let read = RunExit::Mmio {
            gpa: 0x1000,
            len: 4,
            write: None,
        };
        assert_eq!((exits, answer), (vec![read], (SUCCESS, 0xABCD)));
        let next = handle(&regs(1, 1, SHARED | 0x1FFF), &layout(), true);
        let (exits, answer) = play(next, |_| (0, false));
        let write = RunExit::Mmio {
            gpa: 0x1FFF,
            len: 1,
            write: Some(0x55),
        };
        assert_eq!((exits, answer), (vec![write], (SUCCESS, 0)));
        for (size, write, gpa) in [
            (3, 0, SHARED),
            (4, 2, SHARED),
            (4, 0, 0x1000),
            (8, 0, SHARED | 0xFFC),
        ] {
            let (exits, answer) = play(handle(&regs(size, write, gpa), &layout(), true), |_| {
                (0, false)
            });
            assert_eq!((exits.len(), answer.0), (0, INVALID_OPERAND));
        }
    }

    #[test]
    fn other_calls_are_unsupported() {
        for (r10, r11) in [(0, 0x1_0002), (7, 1)] {
            let regs = Gprs::default().with(Gpr::R10, r10).with(Gpr::R11, r11);
            let (_, answer) = play(handle(&regs, &layout(), true), |_| (0, false));
            assert_eq!(answer.0, SUBFUNC_UNSUPPORTED);
        }
    }
}

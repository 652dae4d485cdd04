//! Events of a guest, as values.

use tdx_defs::{Gpa, Gpr, Gprs, GuestLeaf, TdxLevel};

/// What an access does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// Data read.
    Read,
    /// Data write.
    Write,
    /// Instruction fetch.
    Execute,
}

/// A TDCALL: leaf and version of RAX, and the other registers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tdcall {
    /// RAX bits 15:0.
    pub leaf: GuestLeaf,
    /// RAX bits 23:16.
    pub version: u8,
    /// The guest's registers; RAX is not looked at.
    pub regs: Gprs,
}

/// One event of a guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestOp {
    /// Reads `len` bytes, at most [`super::MAX_ACCESS`] and not across a 4 KiB boundary.
    Read {
        /// First byte, with the SHARED bit.
        gpa: Gpa,
        /// Number of bytes.
        len: usize,
    },
    /// Writes bytes, at most [`super::MAX_ACCESS`] and not across a 4 KiB boundary.
    Write {
        /// First byte, with the SHARED bit.
        gpa: Gpa,
        /// What is written.
        data: Vec<u8>,
    },
    /// Fetches an instruction.
    Execute {
        /// Its address, with the SHARED bit.
        gpa: Gpa,
    },
    /// A TDCALL.
    Tdcall(Tdcall),
    /// An EPT violation as the processor would report it, whatever the tables say.
    EptViolation {
        /// The address, with the SHARED bit.
        gpa: Gpa,
        /// Raw exit qualification.
        qualification: u64,
        /// The instruction pointer is the same as at the event before.
        same_rip: bool,
    },
    /// HLT. The module turns it into a #VE; the guest's handler then asks its host.
    Hlt,
    /// An interrupt of the host arrives.
    ExternalInterrupt {
        /// Its vector.
        vector: u8,
    },
}

impl GuestOp {
    /// A TDCALL of version 0 with registers.
    pub fn tdcall(leaf: GuestLeaf, regs: Gprs) -> Self {
        Self::Tdcall(Tdcall {
            leaf,
            version: 0,
            regs,
        })
    }

    /// TDG.MEM.PAGE.ACCEPT of a 4 KiB or 2 MiB page.
    pub fn accept(gpa: Gpa, level: TdxLevel) -> Self {
        let rcx = gpa.get() | u64::from(level.get());
        Self::tdcall(
            GuestLeaf::MEM_PAGE_ACCEPT,
            Gprs::default().with(Gpr::Rcx, rcx),
        )
    }

    /// TDG.MR.RTMR.EXTEND with 48 bytes of guest memory at `gpa`.
    pub fn rtmr_extend(gpa: Gpa, index: u64) -> Self {
        let regs = Gprs::default()
            .with(Gpr::Rcx, gpa.get())
            .with(Gpr::Rdx, index);
        Self::tdcall(GuestLeaf::MR_RTMR_EXTEND, regs)
    }

    /// TDG.VP.VMCALL MapGPA: asks the host to make a range shared or private, as the SHARED bit
    /// of `gpa` says. `size` is in bytes.
    pub fn map_gpa(gpa: Gpa, size: u64) -> Self {
        /// Sub-function number in R11; R10 zero says that it is one of the standard ones.
        const MAP_GPA: u64 = 0x1_0001;
        /// R10 to R13 are passed to the host.
        const PASSED: u64 = 0x3C00;
        let regs = Gprs::default()
            .with(Gpr::Rcx, PASSED)
            .with(Gpr::R11, MAP_GPA)
            .with(Gpr::R12, gpa.get())
            .with(Gpr::R13, size);
        Self::tdcall(GuestLeaf::VP_VMCALL, regs)
    }
}

//! How the core reaches the inside of a TD: a vCPU's way to TDH.VP.ENTER and back.
//!
//! The module owns the private page tables, so it also walks them. [`GuestPort`] enters a vCPU and
//! hands over what the guest does to private memory; what it does to shared memory the core walks
//! itself, in the direct root. The service answers from a gRPC stream, a test from the module core
//! in the same process.

use tdx_defs::{Gpa, Gprs, Seamcall, SeamcallResult, TdxLevel};

use crate::seam::SeamError;

/// Longest access, in bytes; it lies in one 4 KiB page.
pub const MAX_GUEST_ACCESS: usize = 4096;

/// One thing that the guest does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestOp {
    /// Reads `len` bytes, inside one 4 KiB page.
    Read {
        /// With the SHARED bit.
        gpa: Gpa,
        /// Bytes, 1 to [`MAX_GUEST_ACCESS`].
        len: usize,
    },
    /// Writes bytes, inside one 4 KiB page.
    Write {
        /// With the SHARED bit.
        gpa: Gpa,
        /// 1 to [`MAX_GUEST_ACCESS`] bytes.
        data: Vec<u8>,
    },
    /// Fetches an instruction.
    Execute {
        /// With the SHARED bit.
        gpa: Gpa,
    },
    /// TDG.MEM.PAGE.ACCEPT.
    Accept {
        /// Without the SHARED bit.
        gpa: Gpa,
        /// 4 KiB or 2 MiB.
        level: TdxLevel,
    },
    /// Any TDCALL, by leaf number and registers.
    Tdcall {
        /// RAX bits 15:0.
        leaf: u16,
        /// RAX bits 23:16.
        version: u8,
        /// The other registers.
        regs: Gprs,
    },
    /// An interrupt of the host arrives: the vCPU leaves.
    Interrupt,
}

/// What came of one thing that the guest did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum GuestStep {
    /// The guest goes on.
    Resumed(Resumed),
    /// TDH.VP.ENTER returned with these registers; the vCPU is outside.
    Exited(Gprs),
    /// The access would have broken the isolation that TLB tracking and memory integrity promise.
    /// It was not carried out; the vCPU is inside.
    Violated(String),
}

/// The guest goes on.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Resumed {
    /// Its registers after a TDCALL, RAX with the completion status.
    pub regs: Option<Gprs>,
    /// Vector of an exception that it got instead: 20 is #VE.
    pub injected: Option<u8>,
    /// What a read returned.
    pub data: Vec<u8>,
}

/// What came of TDH.VP.ENTER.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Entry {
    /// The vCPU is inside.
    Entered {
        /// The guest's registers, when it left with a TDG.VP.VMCALL.
        vmcall: Option<Gprs>,
    },
    /// It is not; the registers as the leaf returned them.
    Refused(SeamcallResult),
}

/// The way of one vCPU into the module, and the host's way to memory.
pub trait GuestPort {
    /// TDH.VP.ENTER on a logical processor.
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError>;

    /// What the guest does, in order, up to the first TD exit: one step for each that happened.
    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError>;

    /// The host's own read of memory that it shares with the guest.
    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError>;

    /// The host's own write.
    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError>;
}

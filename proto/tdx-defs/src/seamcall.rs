//! One SEAMCALL as registers: what goes in, what comes out, and how a run of them is named.
//!
//! Source: TDX module ABI; Linux, arch/x86/include/asm/tdx.h, `struct tdx_module_args`.

use bytes::Bytes;

use crate::{CompletionStatus, Leaf};

/// Input of one TDH leaf function, or of a run of them.
///
/// Registers are as the ABI defines them for the leaf: addresses in bytes, a Secure EPT operand
/// is GPA bits 51:12 with the TDX level in bits 2:0.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Seamcall {
    /// RAX bits 15:0.
    pub leaf: Leaf,
    /// RAX bits 23:16.
    pub version: u8,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// R8.
    pub r8: u64,
    /// R9.
    pub r9: u64,
    /// R10.
    pub r10: u64,
    /// R11.
    pub r11: u64,
    /// R12.
    pub r12: u64,
    /// R13.
    pub r13: u64,
    /// Host memory behind the leaf's memory operand, as if written just before the call. The module
    /// may keep a page of it as long as the TD keeps the page.
    pub data: Bytes,
    /// Runs the leaf more than once.
    pub repeat: Option<Repeat>,
}

/// A run of one leaf over a contiguous range: `count` calls, the strides added after each.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Repeat {
    /// How many calls.
    pub count: u32,
    /// Added to RCX after each call, in bytes.
    pub rcx_stride: i64,
    /// Added to R8 after each call, in bytes.
    pub r8_stride: i64,
    /// Added to R9 after each call, in bytes.
    pub r9_stride: i64,
}

impl Default for Leaf {
    /// TDH.VP.ENTER, as a zero RAX says.
    fn default() -> Self {
        Self::VP_ENTER
    }
}

impl Seamcall {
    /// A call of `leaf` with every register zero.
    pub fn new(leaf: Leaf) -> Self {
        Self {
            leaf,
            ..Self::default()
        }
    }

    /// Sets RCX.
    #[must_use]
    pub fn rcx(self, rcx: u64) -> Self {
        Self { rcx, ..self }
    }

    /// Sets RDX.
    #[must_use]
    pub fn rdx(self, rdx: u64) -> Self {
        Self { rdx, ..self }
    }

    /// Sets R8.
    #[must_use]
    pub fn r8(self, r8: u64) -> Self {
        Self { r8, ..self }
    }

    /// Sets R9.
    #[must_use]
    pub fn r9(self, r9: u64) -> Self {
        Self { r9, ..self }
    }

    /// Sets the version.
    #[must_use]
    pub fn version(self, version: u8) -> Self {
        Self { version, ..self }
    }

    /// Sets the host memory behind the memory operand.
    #[must_use]
    pub fn data(self, data: impl Into<Bytes>) -> Self {
        Self {
            data: data.into(),
            ..self
        }
    }

    /// Makes it a run.
    #[must_use]
    pub fn repeated(self, repeat: Repeat) -> Self {
        Self {
            repeat: Some(repeat),
            ..self
        }
    }

    /// How many calls this stands for.
    pub fn count(&self) -> u32 {
        self.repeat.map_or(1, |repeat| repeat.count)
    }

    /// The registers of the next call of the run.
    pub fn step(&mut self) {
        if let Some(repeat) = self.repeat {
            self.rcx = self.rcx.wrapping_add_signed(repeat.rcx_stride);
            self.r8 = self.r8.wrapping_add_signed(repeat.r8_stride);
            self.r9 = self.r9.wrapping_add_signed(repeat.r9_stride);
        }
    }
}

/// Output of a leaf: of the last call that ran, when repeated.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct SeamcallResult {
    /// RAX: the completion status.
    pub rax: u64,
    /// RCX.
    pub rcx: u64,
    /// RDX.
    pub rdx: u64,
    /// R8.
    pub r8: u64,
    /// R9.
    pub r9: u64,
    /// R10.
    pub r10: u64,
    /// R11.
    pub r11: u64,
    /// How many calls of a run returned success; 0 or 1 without a repeat.
    pub completed: u32,
}

impl SeamcallResult {
    /// The completion status in RAX.
    pub fn status(&self) -> CompletionStatus {
        CompletionStatus(self.rax)
    }
}

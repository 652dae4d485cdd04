//! Wire ⇄ domain. Every refusal names the field and its limit.

use prost::bytes::Bytes;
use tdx_defs::{Gpr, Gprs, Leaf, Repeat, Seamcall, SeamcallResult};

use crate::module;

/// A field whose value cannot be what it stands for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {reason}")]
pub struct InvalidField {
    /// Path of the field in its message, for instance `calls[3].leaf`.
    pub field: String,
    /// What is wrong, with the limit.
    pub reason: String,
}

impl InvalidField {
    /// A refusal of `field` for `reason`.
    pub fn new(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            reason: reason.into(),
        }
    }

    /// The same refusal, seen from the message that holds the field.
    #[must_use]
    pub fn within(self, parent: &str) -> Self {
        Self {
            field: format!("{parent}.{}", self.field),
            ..self
        }
    }
}

impl TryFrom<module::Seamcall> for Seamcall {
    type Error = InvalidField;

    fn try_from(wire: module::Seamcall) -> Result<Self, InvalidField> {
        let leaf = u16::try_from(wire.leaf)
            .map_err(|_| InvalidField::new("leaf", format!("{} is above 65535", wire.leaf)))?;
        let version = u8::try_from(wire.version)
            .map_err(|_| InvalidField::new("version", format!("{} is above 255", wire.version)))?;
        Ok(Self {
            leaf: Leaf(leaf),
            version,
            rcx: wire.rcx,
            rdx: wire.rdx,
            r8: wire.r8,
            r9: wire.r9,
            r10: wire.r10,
            r11: wire.r11,
            r12: wire.r12,
            r13: wire.r13,
            // Out of the message's buffer: a page that is kept must not keep what came beside it.
            data: Bytes::copy_from_slice(&wire.data),
            repeat: wire.repeat.map(|repeat| Repeat {
                count: repeat.count,
                rcx_stride: repeat.rcx_stride,
                r8_stride: repeat.r8_stride,
                r9_stride: repeat.r9_stride,
            }),
        })
    }
}

/// The wire form of a call.
pub fn seamcall_to_wire(call: Seamcall) -> module::Seamcall {
    module::Seamcall {
        leaf: call.leaf.0.into(),
        version: call.version.into(),
        rcx: call.rcx,
        rdx: call.rdx,
        r8: call.r8,
        r9: call.r9,
        r10: call.r10,
        r11: call.r11,
        r12: call.r12,
        r13: call.r13,
        data: call.data,
        repeat: call.repeat.map(|repeat| module::Repeat {
            count: repeat.count,
            rcx_stride: repeat.rcx_stride,
            r8_stride: repeat.r8_stride,
            r9_stride: repeat.r9_stride,
        }),
    }
}

impl From<SeamcallResult> for module::SeamcallResult {
    fn from(result: SeamcallResult) -> Self {
        Self {
            rax: result.rax,
            rcx: result.rcx,
            rdx: result.rdx,
            r8: result.r8,
            r9: result.r9,
            r10: result.r10,
            r11: result.r11,
            completed: result.completed,
        }
    }
}

impl From<module::SeamcallResult> for SeamcallResult {
    fn from(wire: module::SeamcallResult) -> Self {
        Self {
            rax: wire.rax,
            rcx: wire.rcx,
            rdx: wire.rdx,
            r8: wire.r8,
            r9: wire.r9,
            r10: wire.r10,
            r11: wire.r11,
            completed: wire.completed,
        }
    }
}

impl From<Gprs> for module::Gprs {
    fn from(regs: Gprs) -> Self {
        Self {
            rax: regs[Gpr::Rax],
            rcx: regs[Gpr::Rcx],
            rdx: regs[Gpr::Rdx],
            rbx: regs[Gpr::Rbx],
            rsp: regs[Gpr::Rsp],
            rbp: regs[Gpr::Rbp],
            rsi: regs[Gpr::Rsi],
            rdi: regs[Gpr::Rdi],
            r8: regs[Gpr::R8],
            r9: regs[Gpr::R9],
            r10: regs[Gpr::R10],
            r11: regs[Gpr::R11],
            r12: regs[Gpr::R12],
            r13: regs[Gpr::R13],
            r14: regs[Gpr::R14],
            r15: regs[Gpr::R15],
        }
    }
}

impl From<module::Gprs> for Gprs {
    fn from(wire: module::Gprs) -> Self {
        Self::default()
            .with(Gpr::Rax, wire.rax)
            .with(Gpr::Rcx, wire.rcx)
            .with(Gpr::Rdx, wire.rdx)
            .with(Gpr::Rbx, wire.rbx)
            .with(Gpr::Rsp, wire.rsp)
            .with(Gpr::Rbp, wire.rbp)
            .with(Gpr::Rsi, wire.rsi)
            .with(Gpr::Rdi, wire.rdi)
            .with(Gpr::R8, wire.r8)
            .with(Gpr::R9, wire.r9)
            .with(Gpr::R10, wire.r10)
            .with(Gpr::R11, wire.r11)
            .with(Gpr::R12, wire.r12)
            .with(Gpr::R13, wire.r13)
            .with(Gpr::R14, wire.r14)
            .with(Gpr::R15, wire.r15)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_survives_the_wire() {
        let call = Seamcall::new(Leaf::MEM_PAGE_AUG)
            .rcx(0x1000)
            .rdx(0x4000_0000)
            .r8(0x4002_0000)
            .data(vec![1, 2, 3])
            .repeated(Repeat {
                count: 512,
                rcx_stride: 4096,
                r8_stride: 4096,
                r9_stride: -1,
            });
        assert_eq!(
            Seamcall::try_from(seamcall_to_wire(call.clone())).unwrap(),
            call
        );
    }

    #[test]
    fn registers_survive_the_wire() {
        let mut regs = Gprs::default();
        for (value, register) in (1..).zip(Gpr::ALL) {
            regs[register] = value;
        }
        assert_eq!(Gprs::from(module::Gprs::from(regs)), regs);
    }

    #[test]
    fn fields_out_of_range_are_named() {
        for (wire, field) in [
            (
                module::Seamcall {
                    leaf: 0x10000,
                    ..Default::default()
                },
                "leaf",
            ),
            (
                module::Seamcall {
                    version: 256,
                    ..Default::default()
                },
                "version",
            ),
        ] {
            assert_eq!(Seamcall::try_from(wire).unwrap_err().field, field);
        }
    }
}

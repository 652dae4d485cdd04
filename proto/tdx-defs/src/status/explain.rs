//! What the fields of a completion status say.
//!
//! Source: TDX module ABI, completion status layout and classes.

use super::CompletionStatus;
use crate::OperandId;

/// Bits 47:40: what a status is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct StatusClass(pub u8);

impl StatusClass {
    /// Every class with a name, ascending.
    pub const NAMED: &'static [(Self, &'static str)] = &[
        (Self(0x00), "general and TD exit"),
        (Self(0x01), "operand"),
        (Self(0x02), "busy or entropy"),
        (Self(0x03), "page metadata"),
        (Self(0x04), "dependent pages"),
        (Self(0x05), "module system state"),
        (Self(0x06), "TD state"),
        (Self(0x07), "VCPU state"),
        (Self(0x08), "key management"),
        (Self(0x09), "platform"),
        (Self(0x0A), "physical memory configuration"),
        (Self(0x0B), "secure EPT and guest memory"),
        (Self(0x0C), "metadata field"),
        (Self(0x0D), "service TD"),
        (Self(0x0E), "migration"),
        (Self(0x10), "report and attestation"),
        (Self(0x11), "L2 and partitioning"),
    ];

    /// What the class is about, if the number has a meaning.
    pub fn name(self) -> Option<&'static str> {
        let known = Self::NAMED.iter().find(|(class, _)| *class == self);
        known.map(|(_, name)| *name)
    }
}

/// What bits 31:0 of a status are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Details {
    /// The code has none; the bits are 0 unless the caller made them up.
    None,
    /// An operand id: which operand, lock or object it is about.
    Operand(OperandId),
    /// An exit reason of the VMX architecture.
    ExitReason(u32),
    /// TDCS.OP_STATE. Release 1.5.05 leaves it 0.
    OpState(u32),
    /// A level, as TDX counts: 0 is 4 KiB.
    Level(u32),
    /// An x2APIC id.
    ApicId(u32),
    /// Number of a model-specific register.
    Msr(u32),
    /// Index in a list, or of a page.
    Index(u32),
    /// An L2 VM and a level.
    VmAndLevel {
        /// Number of the VM.
        vm: u16,
        /// The level.
        level: u16,
    },
    /// Something that this table does not tell apart.
    Other(u32),
}

impl CompletionStatus {
    /// Bits 47:40.
    pub const fn class(self) -> StatusClass {
        StatusClass((self.0 >> 40 & 0xFF) as u8)
    }

    /// Bit 62: a repeat of the call in the same state cannot succeed.
    pub const fn is_non_recoverable(self) -> bool {
        self.0 >> 62 & 1 != 0
    }

    /// Bit 61: the TD is, or becomes, unusable.
    pub const fn is_fatal(self) -> bool {
        self.0 >> 61 & 1 != 0
    }

    /// Bit 60: the host may be able to make the call succeed.
    pub const fn has_host_recoverability_hint(self) -> bool {
        self.0 >> 60 & 1 != 0
    }

    /// Bits 59:48, which are reserved and 0.
    pub const fn reserved(self) -> u16 {
        (self.0 >> 48 & 0xFFF) as u16
    }

    /// What bits 31:0 are.
    pub fn details_kind(self) -> Details {
        let details = self.details();
        match (self.0 >> 32 & 0xFFFF, details) {
            (0x0000, _) if self.is_success() => Details::ExitReason(details),
            (0x0102..=0x0103 | 0x0306, _) => Details::Index(details),
            // RAX is operand 0, so that no details name it in this class.
            (0x0100..=0x01FF, _) => Details::Operand(OperandId(details)),
            (0x0608, 1..) => Details::OpState(details),
            (0x0621, _) => Details::ApicId(details),
            (0x0920 | 0x0921, _) => Details::Msr(details),
            (0x0B0A | 0x0B0B, _) => Details::Level(details),
            (0x0B0F | 0x0B10, _) => Details::VmAndLevel {
                vm: (details >> 16) as u16,
                level: (details & 0xFFFF) as u16,
            },
            (_, 0) => Details::None,
            // Classes whose details are an operand id: busy, page metadata, Secure EPT.
            (0x0200..=0x03FF | 0x0B00..=0x0BFF, _) => Details::Operand(OperandId(details)),
            _ => Details::Other(details),
        }
    }

    /// The operand that the status names.
    pub fn named_operand(self) -> Option<OperandId> {
        match self.details_kind() {
            Details::Operand(operand) => Some(operand),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn details_are_read_as_the_code_means_them() {
        use CompletionStatus as Status;
        for (status, details) in [
            (Status::SUCCESS.with_details(48), Details::ExitReason(48)),
            (Status::OPERAND_INVALID, Details::Operand(OperandId::RAX)),
            (
                Status::OPERAND_BUSY.with(OperandId::SEPT_TREE),
                Details::Operand(OperandId::SEPT_TREE),
            ),
            (Status::OPERAND_BUSY, Details::None),
            (
                Status::EPT_WALK_FAILED.with(OperandId::RCX),
                Details::Operand(OperandId::RCX),
            ),
            (
                Status::OP_STATE_INCORRECT.with_details(2),
                Details::OpState(2),
            ),
            (Status::OP_STATE_INCORRECT, Details::None),
            (Status::PAGE_SIZE_MISMATCH, Details::Level(0)),
            (
                Status::X2APIC_ID_NOT_UNIQUE.with_details(7),
                Details::ApicId(7),
            ),
            (
                Status(0xC000_0B0F_0002_0001),
                Details::VmAndLevel { vm: 2, level: 1 },
            ),
            (Status::NO_VCPUS.with_details(9), Details::Other(9)),
            (Status::TLB_TRACKING_NOT_DONE, Details::None),
        ] {
            assert_eq!(status.details_kind(), details, "{status}");
        }
    }

    #[test]
    fn each_flag_is_its_bit() {
        let flags = |status: CompletionStatus| {
            (
                status.is_error(),
                status.is_non_recoverable(),
                status.is_fatal(),
                status.has_host_recoverability_hint(),
            )
        };
        for (status, want) in [
            (CompletionStatus::SUCCESS, (false, false, false, false)),
            (CompletionStatus::OPERAND_BUSY, (true, false, false, false)),
            (CompletionStatus::TD_FATAL, (true, true, true, false)),
            (
                CompletionStatus::HOST_PRIORITY_BUSY_TIMEOUT,
                (true, false, false, true),
            ),
            (
                CompletionStatus(0x6000_0002 << 32),
                (false, true, true, false),
            ),
        ] {
            assert_eq!(flags(status), want, "{status}");
            assert_eq!(status.reserved(), 0);
        }
        assert_eq!(CompletionStatus(0x0FFF << 48).reserved(), 0xFFF);
    }
}

//! Why an operation did not happen: KVM's errno, and what a caller needs to act on it.
//!
//! Answers of the fault path (`RET_PF_*`) are not errors; they travel in the reports.

use tdx_defs::{CompletionStatus, Gpa, Leaf};

use crate::ledger::LedgerError;
use crate::seam::SeamError;

/// The exit record of KVM_EXIT_MEMORY_FAULT.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryFault {
    /// Bytes, without the SHARED bit.
    pub gpa: u64,
    /// Bytes.
    pub size: u64,
    /// KVM_MEMORY_EXIT_FLAG_PRIVATE (8) or 0.
    pub flags: u64,
}

/// What kind of refusal an error is, for the one table that turns it into a gRPC status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// A field has a value that cannot be.
    InvalidArgument,
    /// No such vCPU or slot.
    NotFound,
    /// It is there already.
    AlreadyExists,
    /// Not in this state of the VM.
    FailedPrecondition,
    /// Simulated memory or key ids are spent.
    ResourceExhausted,
    /// Busy beyond the bound of retries.
    Aborted,
    /// The module does not answer.
    Unavailable,
    /// The state could not be written.
    NotKept,
    /// An invariant is broken.
    Internal,
    /// The access left KVM_RUN with an exit record.
    MemoryFault,
}

/// Why an operation did not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VmError {
    /// A field has a value that cannot be.
    #[error("{field}: {reason}")]
    Invalid {
        /// Name of the field.
        field: &'static str,
        /// What is wrong, with the limit.
        reason: String,
    },
    /// No vCPU has this id.
    #[error("vcpu_id: the VM has no vCPU {0}")]
    NoVcpu(u32),
    /// No slot has this id.
    #[error("slot_id: the VM has no memory slot {0}")]
    NoSlot(u32),
    /// The slot overlaps another.
    #[error("slot: the range overlaps slot {0}")]
    SlotOverlaps(u32),
    /// Not in this state of the TD.
    #[error("the VM is {state}, {operation} needs it {needed}")]
    State {
        /// What was asked.
        operation: &'static str,
        /// The state.
        state: &'static str,
        /// The state that it takes.
        needed: &'static str,
    },
    /// The vCPU has not been through KVM_TDX_INIT_VCPU.
    #[error("vcpu_id: vCPU {vcpu_id} is not initialised, {operation} needs it")]
    VcpuNotInitialized {
        /// The vCPU.
        vcpu_id: u32,
        /// What was asked.
        operation: &'static str,
    },
    /// The vCPU has been through KVM_TDX_INIT_VCPU.
    #[error("vcpu_id: vCPU {0} is initialised already")]
    VcpuInitialized(u32),
    /// KVM_CREATE_VCPU takes an initialised TD.
    #[error("the VM is {state}, KVM_CREATE_VCPU needs it initialized")]
    NoTd {
        /// The state.
        state: &'static str,
    },
    /// Not offered in this state of the TD.
    #[error("{operation} is not allowed before the VM is finalised")]
    NotYet {
        /// What was asked.
        operation: &'static str,
    },
    /// The VM is bugged or dead.
    #[error("the VM is dead: {reason}")]
    Dead {
        /// Why.
        reason: String,
    },
    /// The access leaves KVM_RUN with KVM_EXIT_MEMORY_FAULT.
    #[error("memory fault exit at {gpa}: {reason}", gpa = Gpa::new(.record.gpa))]
    MemoryFault {
        /// The exit record.
        record: MemoryFault,
        /// errno beside it: EFAULT, or the lookup's.
        errno: i32,
        /// What did not match.
        reason: &'static str,
    },
    /// Simulated host memory or key ids are spent.
    #[error("out of {what}: {limit} in all")]
    Exhausted {
        /// Pages or key ids.
        what: &'static str,
        /// How many there are.
        limit: u64,
    },
    /// The module refused a call that KVM reports to its caller.
    #[error("the module refused {leaf}: {status}")]
    Refused {
        /// The leaf.
        leaf: Leaf,
        /// Its answer.
        status: CompletionStatus,
    },
    /// The module stayed busy for the whole retry budget.
    #[error("{leaf} stayed busy for {tries} tries: {status}")]
    Busy {
        /// The leaf.
        leaf: Leaf,
        /// Its last answer.
        status: CompletionStatus,
        /// How often it was tried.
        tries: u32,
    },
    /// A page of the range is mapped already.
    #[error("gpa: {gpa} is mapped already", gpa = .0)]
    AlreadyMapped(Gpa),
    /// The prefault of a page ended in emulation: no slot covers it.
    #[error("gpa: no memory slot covers {0}")]
    NoMemory(Gpa),
    /// The host does not map the user memory behind the address, or not for this access.
    #[error("gpa: the host's mapping behind {0} does not allow the access")]
    HostFault(Gpa),
    /// The slot has no dirty log.
    #[error("slot_id: memory slot {0} has no dirty log")]
    NoDirtyLog(u32),
    /// The slot under the address is being deleted.
    #[error("the memory slot under {0} is being deleted")]
    SlotGoing(Gpa),
    /// What the operation is about to do could not be written down; nothing was done.
    #[error("the state cannot be written: {0}")]
    NotKept(#[from] LedgerError),
    /// The direct root was made obsolete in the middle of the operation.
    #[error(
        "the vcpu's root was made obsolete before {0} was mapped; the next call loads a new one"
    )]
    RootObsolete(Gpa),
    /// Others kept changing the mapping until the budget of retries was spent.
    #[error("the mapping of {0} kept changing for the whole retry budget")]
    Unstable(Gpa),
    /// The module cannot be reached.
    #[error(transparent)]
    Seam(#[from] SeamError),
}

impl VmError {
    pub(crate) fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field,
            reason: reason.into(),
        }
    }

    /// KVM's errno, positive.
    pub fn errno(&self) -> i32 {
        match self {
            Self::Invalid { .. }
            | Self::State { .. }
            | Self::VcpuNotInitialized { .. }
            | Self::VcpuInitialized(_) => errno::EINVAL,
            Self::NotYet { .. } => errno::EOPNOTSUPP,
            Self::NoVcpu(_) | Self::NoSlot(_) | Self::NoMemory(_) | Self::NoDirtyLog(_) => {
                errno::ENOENT
            }
            Self::HostFault(_) => errno::EFAULT,
            Self::SlotOverlaps(_) => errno::EEXIST,
            Self::Dead { .. }
            | Self::NoTd { .. }
            | Self::AlreadyMapped(_)
            | Self::NotKept(_)
            | Self::Seam(_) => errno::EIO,
            Self::Refused {
                leaf: Leaf::MNG_INIT,
                status,
            } if status.is(CompletionStatus::OPERAND_INVALID) => errno::EINVAL,
            Self::Refused { .. } => errno::EIO,
            Self::MemoryFault { errno, .. } => *errno,
            Self::Exhausted { .. } => errno::ENOMEM,
            Self::Busy { status, .. } if status.is(CompletionStatus::RND_NO_ENTROPY) => {
                errno::EAGAIN
            }
            Self::Busy { .. } => errno::EBUSY,
            Self::SlotGoing(_) | Self::RootObsolete(_) | Self::Unstable(_) => errno::EAGAIN,
        }
    }

    /// The request field that the refusal concerns.
    pub fn field(&self) -> Option<&'static str> {
        match self {
            Self::Invalid { field, .. } => Some(field),
            Self::NoVcpu(_) | Self::VcpuNotInitialized { .. } | Self::VcpuInitialized(_) => {
                Some("vcpu_id")
            }
            Self::NoSlot(_) | Self::NoDirtyLog(_) => Some("slot_id"),
            Self::SlotOverlaps(_) => Some("slot"),
            Self::AlreadyMapped(_) | Self::NoMemory(_) | Self::HostFault(_) => Some("gpa"),
            _ => None,
        }
    }

    /// The exit record, for a memory fault.
    pub fn memory_fault(&self) -> Option<MemoryFault> {
        match self {
            Self::MemoryFault { record, .. } => Some(*record),
            _ => None,
        }
    }

    /// What KVM_MEMORY_ENCRYPT_OP hands back in hw_error: the module's answer.
    pub fn hw_error(&self) -> Option<CompletionStatus> {
        match self {
            Self::Refused { status, .. } | Self::Busy { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// What kind of refusal this is.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Invalid { .. } => ErrorKind::InvalidArgument,
            Self::NoVcpu(_) | Self::NoSlot(_) | Self::NoMemory(_) => ErrorKind::NotFound,
            Self::SlotOverlaps(_) | Self::AlreadyMapped(_) => ErrorKind::AlreadyExists,
            Self::State { .. }
            | Self::VcpuNotInitialized { .. }
            | Self::VcpuInitialized(_)
            | Self::NoTd { .. }
            | Self::NotYet { .. }
            | Self::Dead { .. }
            | Self::HostFault(_)
            | Self::NoDirtyLog(_) => ErrorKind::FailedPrecondition,
            Self::MemoryFault { .. } => ErrorKind::MemoryFault,
            Self::Exhausted { .. } => ErrorKind::ResourceExhausted,
            Self::Refused {
                leaf: Leaf::MNG_INIT,
                status,
            } if status.is(CompletionStatus::OPERAND_INVALID) => ErrorKind::InvalidArgument,
            Self::Refused { .. } => ErrorKind::Internal,
            Self::Busy { .. } | Self::SlotGoing(_) | Self::RootObsolete(_) | Self::Unstable(_) => {
                ErrorKind::Aborted
            }
            Self::NotKept(_) => ErrorKind::NotKept,
            Self::Seam(SeamError::Restarted { .. }) => ErrorKind::FailedPrecondition,
            Self::Seam(_) => ErrorKind::Unavailable,
        }
    }
}

/// The errno values that KVM uses here (asm-generic/errno*.h).
pub mod errno {
    /// No such file or directory.
    pub const ENOENT: i32 = 2;
    /// Input/output error: the VM is dead.
    pub const EIO: i32 = 5;
    /// Try again.
    pub const EAGAIN: i32 = 11;
    /// Out of memory.
    pub const ENOMEM: i32 = 12;
    /// Bad address: with a memory fault record.
    pub const EFAULT: i32 = 14;
    /// Device or resource busy.
    pub const EBUSY: i32 = 16;
    /// File exists.
    pub const EEXIST: i32 = 17;
    /// Invalid argument.
    pub const EINVAL: i32 = 22;
    /// Operation not supported.
    pub const EOPNOTSUPP: i32 = 95;
    /// Memory page has a hardware error.
    pub const EHWPOISON: i32 = 133;
}

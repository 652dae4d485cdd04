//! The one table from refusals to gRPC statuses, with their google.rpc details.
//!
//! Details: BadRequest names the field, ErrorInfo says why in a word and carries KVM's errno and
//! the exit record of a memory fault, RetryInfo says when another attempt may help.
//!
//! The reasons and their codes are those of [`reasons`], which `docs/errors.md` shows.

use std::collections::HashMap;
use std::time::Duration;

use mirror_proto::InvalidField;
use tdp_mmu::{ErrorKind, VmError};
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt as _};
use transport::Reason;

use crate::reasons;

/// Domain of ErrorInfo.
pub(crate) const DOMAIN: &str = "kvm.mmu.v1";
/// When a caller may come back after an overload or a lost retry race.
const RETRY_SOON: Duration = Duration::from_millis(50);
/// When a caller may come back for a module that is away.
const RETRY_MODULE: Duration = Duration::from_secs(1);

const EIO: i32 = 5;
const ENOENT: i32 = 2;
const EAGAIN: i32 = 11;
const ENOMEM: i32 = 12;
const EINVAL: i32 = 22;
const ESHUTDOWN: i32 = 108;

/// Builds a status; each method adds one kind of detail.
struct Refusal {
    reason: Reason,
    message: String,
    metadata: HashMap<String, String>,
    field: Option<String>,
    retry: Option<Duration>,
}

impl Refusal {
    fn new(reason: Reason, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
            metadata: HashMap::new(),
            field: None,
            retry: None,
        }
    }

    fn errno(mut self, errno: i32) -> Self {
        self.metadata.insert("errno".into(), errno.to_string());
        self
    }

    fn field(mut self, field: Option<impl Into<String>>) -> Self {
        self.field = field.map(Into::into);
        self
    }

    fn retry(mut self, after: Option<Duration>) -> Self {
        self.retry = after;
        self
    }

    fn status(self) -> Status {
        let mut details = ErrorDetails::new();
        details.set_error_info(self.reason.word, DOMAIN, self.metadata);
        if let Some(field) = self.field {
            details.add_bad_request_violation(field, self.message.clone());
        }
        if self.retry.is_some() {
            details.set_retry_info(self.retry);
        }
        Status::with_error_details(self.reason.code, self.message, details)
    }
}

/// A refusal of the core.
pub(crate) fn of_vm(error: &VmError) -> Status {
    let (reason, retry) = match error.kind() {
        ErrorKind::InvalidArgument => (reasons::INVALID_FIELD, None),
        ErrorKind::NotFound => (reasons::NOT_FOUND, None),
        ErrorKind::AlreadyExists => (reasons::ALREADY_EXISTS, None),
        ErrorKind::FailedPrecondition if error.errno() == EIO => (reasons::VM_DEAD, None),
        ErrorKind::FailedPrecondition => (reasons::WRONG_STATE, None),
        ErrorKind::MemoryFault => (reasons::MEMORY_FAULT, None),
        ErrorKind::ResourceExhausted => (reasons::EXHAUSTED, None),
        ErrorKind::Aborted => (reasons::BUSY, Some(RETRY_SOON)),
        ErrorKind::Unavailable => (reasons::MODULE_UNREACHABLE, Some(RETRY_MODULE)),
        ErrorKind::NotKept => (reasons::STATE_NOT_WRITTEN, None),
        ErrorKind::Internal => (reasons::INTERNAL, None),
    };
    let mut refusal = Refusal::new(reason, error.to_string())
        .errno(error.errno())
        .field(error.field())
        .retry(retry);
    if let Some(status) = error.hw_error() {
        let hex = format!("{:#x}", status.0);
        refusal.metadata.insert("hw_error".into(), hex);
    }
    if let Some(record) = error.memory_fault() {
        for (name, value) in [
            ("gpa", record.gpa),
            ("size", record.size),
            ("flags", record.flags),
        ] {
            refusal.metadata.insert(name.into(), format!("{value:#x}"));
        }
    }
    refusal.status()
}

/// A field that the shell refuses before the core sees it.
pub(crate) fn of_field(error: InvalidField) -> Status {
    Refusal::new(reasons::INVALID_FIELD, error.to_string())
        .errno(EINVAL)
        .field(Some(error.field))
        .status()
}

/// No VM has this id.
pub(crate) fn unknown_vm(vm_id: u64) -> Status {
    Refusal::new(reasons::NOT_FOUND, format!("vm_id: there is no VM {vm_id}"))
        .errno(ENOENT)
        .field(Some("vm_id"))
        .status()
}

/// The VM cannot do anything any more.
pub(crate) fn vm_dead(reason: &str) -> Status {
    Refusal::new(reasons::VM_DEAD, format!("the VM is dead: {reason}"))
        .errno(EIO)
        .status()
}

/// Every VM place is taken.
pub(crate) fn too_many_vms(limit: u32) -> Status {
    Refusal::new(reasons::EXHAUSTED, format!("out of VMs: {limit} in all"))
        .errno(ENOMEM)
        .status()
}

/// Every place for a reader of a VM's events is taken.
pub(crate) fn too_many_watchers(limit: usize) -> Status {
    let message = format!("{limit} readers watch the events of the VM, the limit");
    Refusal::new(reasons::EXHAUSTED, message)
        .errno(ENOMEM)
        .status()
}

/// Every thread is taken.
pub(crate) fn overloaded(limit: u32) -> Status {
    let message = format!("{limit} operations are in work, the limit");
    Refusal::new(reasons::OVERLOADED, message)
        .errno(EAGAIN)
        .retry(Some(RETRY_SOON))
        .status()
}

/// One VM asks for more than its share.
pub(crate) fn vm_overloaded(vm_id: u64, limit: u32) -> Status {
    let message = format!("VM {vm_id} has {limit} operations in work, the limit of one VM");
    Refusal::new(reasons::OVERLOADED, message)
        .errno(EAGAIN)
        .retry(Some(RETRY_SOON))
        .status()
}

/// The module is away.
pub(crate) fn module_unreachable(reason: &str) -> Status {
    Refusal::new(reasons::MODULE_UNREACHABLE, reason)
        .errno(EIO)
        .retry(Some(RETRY_MODULE))
        .status()
}

/// The VMs of an earlier process are not there yet.
pub(crate) fn recovering() -> Status {
    let message = "the VMs of an earlier run of the service are being recovered";
    Refusal::new(reasons::RECOVERING, message)
        .errno(EAGAIN)
        .retry(Some(RETRY_SOON))
        .status()
}

/// The service takes nothing more on.
pub(crate) fn draining() -> Status {
    Refusal::new(reasons::DRAINING, "the service is stopping")
        .errno(ESHUTDOWN)
        .status()
}

/// The reader of a stream took nothing for too long.
pub(crate) fn stalled(limit: Duration) -> Status {
    let message = format!("the reader of the stream took nothing for {limit:?}");
    Refusal::new(reasons::READER_STALLED, message).status()
}

/// Something that must not happen did.
pub(crate) fn internal(message: impl Into<String>) -> Status {
    Refusal::new(reasons::INTERNAL, message).errno(EIO).status()
}

#[cfg(test)]
mod tests {
    use tdp_mmu::{MemoryFault, SeamError};
    use tdx_defs::{CompletionStatus, Leaf};
    use tonic::Code;

    use super::*;

    #[test]
    fn the_documented_reasons_are_those_of_the_code() {
        let documented = include_str!("../../docs/errors.md");
        let section = transport::reasons_section(documented, DOMAIN).unwrap();
        assert_eq!(section, transport::reasons_table(reasons::ALL));
    }

    fn reason(why: &str) -> String {
        why.to_owned()
    }

    #[test]
    fn every_kind_of_refusal_has_its_status_reason_and_errno() {
        for (error, code, reason, errno, field, retry) in [
            (
                VmError::Invalid {
                    field: "gpa",
                    reason: reason("unaligned"),
                },
                Code::InvalidArgument,
                "INVALID_FIELD",
                "22",
                Some("gpa"),
                false,
            ),
            (
                VmError::NoVcpu(3),
                Code::NotFound,
                "NOT_FOUND",
                "2",
                Some("vcpu_id"),
                false,
            ),
            (
                VmError::SlotOverlaps(1),
                Code::AlreadyExists,
                "ALREADY_EXISTS",
                "17",
                Some("slot"),
                false,
            ),
            (
                VmError::State {
                    operation: "finalize",
                    state: "bugged",
                    needed: "initialized",
                },
                Code::FailedPrecondition,
                "WRONG_STATE",
                "22",
                None,
                false,
            ),
            (
                VmError::Dead {
                    reason: reason("bug"),
                },
                Code::FailedPrecondition,
                "VM_DEAD",
                "5",
                None,
                false,
            ),
            (
                VmError::Exhausted {
                    what: "key ids",
                    limit: 3,
                },
                Code::ResourceExhausted,
                "EXHAUSTED",
                "12",
                None,
                false,
            ),
            (
                VmError::Busy {
                    leaf: Leaf::MEM_PAGE_AUG,
                    status: CompletionStatus::OPERAND_BUSY,
                    tries: 9,
                },
                Code::Aborted,
                "BUSY",
                "16",
                None,
                true,
            ),
            (
                VmError::Seam(SeamError::NotSent {
                    reason: reason("away"),
                }),
                Code::Unavailable,
                "MODULE_UNREACHABLE",
                "5",
                None,
                true,
            ),
            (
                VmError::Seam(SeamError::Restarted {
                    reason: reason("new"),
                }),
                Code::FailedPrecondition,
                "VM_DEAD",
                "5",
                None,
                false,
            ),
            (
                VmError::NotKept(tdp_mmu::LedgerError {
                    reason: reason("disk full"),
                }),
                Code::Unavailable,
                "STATE_NOT_WRITTEN",
                "5",
                None,
                false,
            ),
            (
                VmError::Refused {
                    leaf: Leaf::MEM_PAGE_AUG,
                    status: CompletionStatus::PAGE_METADATA_INCORRECT,
                },
                Code::Internal,
                "INTERNAL",
                "5",
                None,
                false,
            ),
        ] {
            let status = of_vm(&error);
            assert_eq!(status.code(), code, "{error}");
            assert_eq!(status.message(), error.to_string());
            let details = status.get_error_details();
            let info = details.error_info().unwrap();
            assert_eq!((&*info.reason, &*info.domain), (reason, DOMAIN), "{error}");
            assert_eq!(
                info.metadata.get("errno").map(String::as_str),
                Some(errno),
                "{error}"
            );
            let named = details
                .bad_request()
                .map(|bad| bad.field_violations[0].field.clone());
            assert_eq!(named.as_deref(), field, "{error}");
            assert_eq!(details.retry_info().is_some(), retry, "{error}");
        }
    }

    #[test]
    fn a_refusal_of_the_module_carries_its_status() {
        let status = of_vm(&VmError::Refused {
            leaf: Leaf::MNG_INIT,
            status: CompletionStatus(0xC000_0100_0000_0046),
        });
        assert_eq!(status.code(), Code::InvalidArgument);
        let details = status.get_error_details();
        let metadata = &details.error_info().unwrap().metadata;
        let hw_error = metadata.get("hw_error").map(String::as_str);
        assert_eq!(hw_error, Some("0xc000010000000046"));
    }

    #[test]
    fn a_memory_fault_carries_its_exit_record() {
        let status = of_vm(&VmError::MemoryFault {
            record: MemoryFault {
                gpa: 0x4000,
                size: 0x1000,
                flags: 8,
            },
            errno: 14,
            reason: "private attribute is not set",
        });
        let details = status.get_error_details();
        let metadata = &details.error_info().unwrap().metadata;
        for (key, value) in [
            ("errno", "14"),
            ("gpa", "0x4000"),
            ("size", "0x1000"),
            ("flags", "0x8"),
        ] {
            assert_eq!(metadata.get(key).map(String::as_str), Some(value));
        }
    }
}

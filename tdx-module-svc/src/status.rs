//! Refusals, and the gRPC status of each. The one place where the two meet.
//!
//! The reasons and their codes are those of [`reasons`], which `docs/errors.md` shows.
//!
//! Apart from MODULE_FAILED and a lost reply nothing has run. More requests than the limit are refused before they
//! come here, by `transport::Admission`.

use std::collections::HashMap;
use std::time::Duration;

use mirror_proto::InvalidField;
use tonic::Status;
use tonic_types::{ErrorDetails, StatusExt as _};
use transport::Reason;

use crate::reasons;

/// Domain of the reasons, as google.rpc.ErrorInfo asks for one.
pub(crate) const DOMAIN: &str = "tdx.module.v1";
/// When to come back while every session is in use or holds its answers, in milliseconds.
const SESSIONS_RETRY_MS: u64 = 100;

/// Why a request gets no answer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// A field is out of its range.
    #[error(transparent)]
    Field(#[from] InvalidField),
    /// The session has no replay window here, and the batch is not its first.
    #[error(
        "session {session:?} is not known to this instance, it starts at sequence 1 and not at \
         {sequence}"
    )]
    UnknownSession {
        /// Name of the session.
        session: String,
        /// The number given.
        sequence: u64,
        /// The instance that does not know it.
        instance: String,
    },
    /// Somebody ended the session.
    #[error("session {session:?} was ended")]
    SessionEnded {
        /// Name of the session.
        session: String,
    },
    /// The answer may have been there once.
    #[error("sequence {sequence} is below the replay window, the lowest is {lowest}")]
    BelowWindow {
        /// The number given.
        sequence: u64,
        /// The lowest number that can be told apart from a new one.
        lowest: u64,
    },
    /// The number belongs to a batch with other content.
    #[error("sequence {sequence} was used for another batch")]
    SequenceReused {
        /// The number given.
        sequence: u64,
    },
    /// No session can be forgotten for a new one.
    #[error("all {limit} sessions are in use")]
    TooManySessions {
        /// How many there are.
        limit: usize,
    },
    /// There is no room for another answer.
    #[error("{what} take {held} of {limit} bytes, and this one does not fit; it has not run")]
    ReplayFull {
        /// Whose.
        what: &'static str,
        /// What they take.
        held: u64,
        /// What they may take.
        limit: u64,
    },
    /// The service accepts nothing more.
    #[error("the service is stopping")]
    Draining,
    /// The service was started without leave to change conditions.
    #[error("conditions cannot be changed: the service was started without --allow-injection")]
    InjectionOff,
    /// The lock is held by somebody else, or there is no such object, or it was not held.
    #[error("lock: not there, not free, or not held by such a request")]
    LockNotFree,
    /// A fault rule ended the stream before the batch ran.
    #[error("a fault rule cut the connection, the batch has not run")]
    Cut,
    /// A fault rule took the answer of a batch that ran.
    #[error("a fault rule lost the reply")]
    ReplyLost,
    /// A call ended in a panic: the state of the module is not known.
    #[error("the module failed in the middle of a batch")]
    ModuleFailed,
}

impl Refusal {
    /// The word for it, with its code.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Field(_) => reasons::INVALID_FIELD,
            Self::UnknownSession { .. } | Self::SessionEnded { .. } => reasons::UNKNOWN_SESSION,
            Self::BelowWindow { .. } => reasons::BELOW_REPLAY_WINDOW,
            Self::SequenceReused { .. } => reasons::SEQUENCE_REUSED,
            Self::TooManySessions { .. } => reasons::SESSIONS_IN_USE,
            Self::ReplayFull { .. } => reasons::REPLAY_FULL,
            Self::Draining => reasons::DRAINING,
            Self::InjectionOff => reasons::INJECTION_OFF,
            Self::LockNotFree => reasons::LOCK_NOT_FREE,
            Self::Cut | Self::ReplyLost => reasons::INJECTED_FAULT,
            Self::ModuleFailed => reasons::MODULE_FAILED,
        }
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let reason = refusal.reason();
        let mut metadata = HashMap::new();
        let mut details = ErrorDetails::new();
        match refusal {
            Refusal::Field(InvalidField { field, reason }) => {
                details.add_bad_request_violation(field, reason);
            }
            Refusal::UnknownSession {
                session, instance, ..
            } => {
                metadata.insert("session".to_owned(), session);
                metadata.insert("instance".to_owned(), instance);
            }
            Refusal::SessionEnded { session } => {
                metadata.insert("session".to_owned(), session);
            }
            Refusal::BelowWindow { lowest, .. } => {
                metadata.insert("lowest".to_owned(), lowest.to_string());
            }
            Refusal::TooManySessions { .. } | Refusal::ReplayFull { .. } => {
                details.set_retry_info(Some(Duration::from_millis(SESSIONS_RETRY_MS)));
            }
            Refusal::SequenceReused { .. }
            | Refusal::Draining
            | Refusal::InjectionOff
            | Refusal::LockNotFree
            | Refusal::Cut
            | Refusal::ReplyLost
            | Refusal::ModuleFailed => {}
        }
        details.set_error_info(reason.word, DOMAIN, metadata);
        Self::with_error_details(reason.code, message, details)
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn the_documented_reasons_are_those_of_the_code() {
        let documented = include_str!("../../docs/errors.md");
        let section = transport::reasons_section(documented, DOMAIN).unwrap();
        assert_eq!(section, transport::reasons_table(reasons::ALL));
    }

    #[test]
    fn each_refusal_says_what_to_act_on() {
        for (refusal, code, reason) in [
            (
                Refusal::UnknownSession {
                    session: "s".into(),
                    sequence: 7,
                    instance: "i".into(),
                },
                Code::NotFound,
                "UNKNOWN_SESSION",
            ),
            (
                Refusal::BelowWindow {
                    sequence: 1,
                    lowest: 8,
                },
                Code::FailedPrecondition,
                "BELOW_REPLAY_WINDOW",
            ),
            (
                Refusal::SequenceReused { sequence: 1 },
                Code::AlreadyExists,
                "SEQUENCE_REUSED",
            ),
            (Refusal::Draining, Code::Unavailable, "DRAINING"),
            (Refusal::Cut, Code::Unavailable, "INJECTED_FAULT"),
            (Refusal::ReplyLost, Code::Unavailable, "INJECTED_FAULT"),
            (Refusal::ModuleFailed, Code::Internal, "MODULE_FAILED"),
        ] {
            let message = refusal.to_string();
            assert_eq!(refusal.reason().word, reason);
            let status = Status::from(refusal);
            assert_eq!(status.code(), code, "{reason}");
            assert_eq!(status.message(), message);
            assert_eq!(status.get_details_error_info().unwrap().reason, reason);
        }
    }

    #[test]
    fn a_bad_field_is_named_in_the_details() {
        let status = Status::from(Refusal::from(InvalidField::new(
            "calls[2].leaf",
            "too large",
        )));
        assert_eq!(status.code(), Code::InvalidArgument);
        let violations = status.get_details_bad_request().unwrap().field_violations;
        assert_eq!(violations[0].field, "calls[2].leaf");
        assert_eq!(violations[0].description, "too large");
    }

    #[test]
    fn a_full_table_and_full_windows_say_when_to_come_back() {
        let full = Refusal::ReplayFull {
            what: "answers",
            held: 1,
            limit: 1,
        };
        for refusal in [Refusal::TooManySessions { limit: 3 }, full] {
            let status = Status::from(refusal);
            assert_eq!(status.code(), Code::ResourceExhausted);
            let retry = status.get_details_retry_info().unwrap();
            assert!(retry.retry_delay.is_some());
        }
    }
}

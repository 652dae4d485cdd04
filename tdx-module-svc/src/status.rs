//! Refusals, and the gRPC status of each. The one place where the two meet.
//!
//! | refusal | code | details |
//! |---|---|---|
//! | a field out of range | INVALID_ARGUMENT | BadRequest with the field |
//! | a session that is not known | NOT_FOUND | ErrorInfo `UNKNOWN_SESSION` with the instance |
//! | a number below the replay window | FAILED_PRECONDITION | ErrorInfo `BELOW_REPLAY_WINDOW` |
//! | a number used for another batch | ALREADY_EXISTS | ErrorInfo `SEQUENCE_REUSED` |
//! | every session is in use | RESOURCE_EXHAUSTED | RetryInfo |
//! | the service is stopping | UNAVAILABLE | ErrorInfo `DRAINING` |
//! | the module failed | INTERNAL | ErrorInfo `MODULE_FAILED` |
//!
//! Apart from the last one nothing has run. More requests than the limit are refused before they
//! come here, by `transport::Admission`.

use std::collections::HashMap;
use std::time::Duration;

use mirror_proto::InvalidField;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

/// Domain of the reasons, as google.rpc.ErrorInfo asks for one.
const DOMAIN: &str = "tdx.module.v1";
/// When to come back while every session is in use, in milliseconds.
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
    /// The service accepts nothing more.
    #[error("the service is stopping")]
    Draining,
    /// A call ended in a panic: the state of the module is not known.
    #[error("the module failed in the middle of a batch")]
    ModuleFailed,
}

impl Refusal {
    /// Every [`reason`](Self::reason).
    pub(crate) const REASONS: [&'static str; 7] = [
        "INVALID_FIELD",
        "UNKNOWN_SESSION",
        "BELOW_REPLAY_WINDOW",
        "SEQUENCE_REUSED",
        "TOO_MANY_SESSIONS",
        "DRAINING",
        "MODULE_FAILED",
    ];

    /// The refusal in a word.
    pub(crate) fn reason(&self) -> &'static str {
        let at = match self {
            Self::Field(_) => 0,
            Self::UnknownSession { .. } => 1,
            Self::BelowWindow { .. } => 2,
            Self::SequenceReused { .. } => 3,
            Self::TooManySessions { .. } => 4,
            Self::Draining => 5,
            Self::ModuleFailed => 6,
        };
        Self::REASONS[at]
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let message = refusal.to_string();
        let info = |reason, metadata: &[(&str, String)]| {
            let metadata: HashMap<_, _> = metadata
                .iter()
                .map(|(key, value)| ((*key).to_owned(), value.clone()))
                .collect();
            ErrorDetails::with_error_info(reason, DOMAIN, metadata)
        };
        let (code, details) = match refusal {
            Refusal::Field(InvalidField { field, reason }) => (
                Code::InvalidArgument,
                ErrorDetails::with_bad_request_violation(field, reason),
            ),
            Refusal::UnknownSession {
                session, instance, ..
            } => (
                Code::NotFound,
                info(
                    "UNKNOWN_SESSION",
                    &[("session", session), ("instance", instance)],
                ),
            ),
            Refusal::BelowWindow { lowest, .. } => (
                Code::FailedPrecondition,
                info("BELOW_REPLAY_WINDOW", &[("lowest", lowest.to_string())]),
            ),
            Refusal::SequenceReused { .. } => (Code::AlreadyExists, info("SEQUENCE_REUSED", &[])),
            Refusal::TooManySessions { .. } => (
                Code::ResourceExhausted,
                ErrorDetails::with_retry_info(Some(Duration::from_millis(SESSIONS_RETRY_MS))),
            ),
            Refusal::Draining => (Code::Unavailable, info("DRAINING", &[])),
            Refusal::ModuleFailed => (Code::Internal, info("MODULE_FAILED", &[])),
        };
        Self::with_error_details(code, message, details)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            (Refusal::ModuleFailed, Code::Internal, "MODULE_FAILED"),
        ] {
            let message = refusal.to_string();
            assert_eq!(refusal.reason(), reason);
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
    fn a_full_session_table_says_when_to_come_back() {
        let status = Status::from(Refusal::TooManySessions { limit: 3 });
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert!(
            status
                .get_details_retry_info()
                .unwrap()
                .retry_delay
                .is_some()
        );
    }
}

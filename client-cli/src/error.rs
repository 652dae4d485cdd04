//! What can go wrong, and how it is told: one line on stderr with the whole chain of causes.

use std::error::Error as _;
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use tonic::{Code, Status};
use tonic_types::StatusExt as _;

/// Why a command did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A mistake that the argument parser cannot see.
    #[error("{0}")]
    Usage(String),
    /// Ctrl-C or SIGTERM.
    #[error("interrupted")]
    Interrupted,
    /// A service said no.
    #[error("{call} was refused")]
    Refused {
        /// The RPC.
        call: &'static str,
        /// The answer.
        #[source]
        source: Refusal,
    },
    /// A service did not say anything.
    #[error("{call} had no answer within the limit of {}; whether it was carried out is unknown", seconds(*.limit))]
    NoAnswer {
        /// The RPC.
        call: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// A stream ended before its last message.
    #[error("{call} ended without its result")]
    Truncated {
        /// The RPC.
        call: &'static str,
    },
    /// Nobody listens.
    #[error("cannot reach the {service}")]
    Connect {
        /// Which one.
        service: &'static str,
        /// Why.
        #[source]
        source: transport::ConnectError,
    },
    /// The files of `--tls-ca`, `--tls-cert` and `--tls-key`.
    #[error("the certificates cannot be used")]
    Tls(#[source] transport::TlsError),
    /// `certs` cannot do its work.
    #[error("certificates cannot be made")]
    Certs(#[source] crate::certs::CertsError),
    /// The services of `--local` did not come up.
    #[error("cannot start the local services")]
    Local(#[from] crate::local::LocalError),
    /// A file cannot be read.
    #[error("cannot read {path}")]
    File {
        /// Its name.
        path: PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// The recording cannot be opened.
    #[error(transparent)]
    Input(#[from] crate::trace::InputError),
    /// The recording cannot be read to its end.
    #[error(transparent)]
    Trace(#[from] crate::trace::ReadError),
    /// `--strict` and lines that cannot be read.
    #[error("{count} lines of the trace cannot be read and --strict allows none")]
    Unreadable {
        /// How many.
        count: u64,
    },
    /// The recording cannot be laid out as a VM.
    #[error("the trace cannot be played")]
    Plan(#[from] crate::replay::PlanError),
    /// The firmware image is none.
    #[error("the firmware image is malformed")]
    Tdvf(#[from] crate::tdvf::TdvfError),
    /// What a benchmark relies on did not work.
    #[error("the benchmark cannot be run")]
    Bench(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The guest cannot go on.
    #[error("KVM_RUN failed: {reason}")]
    Guest {
        /// As the service said.
        reason: String,
    },
    /// A line of a recording is no sequence.
    #[error("{}: line {line}", path.display())]
    Sequence {
        /// The file.
        path: PathBuf,
        /// Its line, from 1.
        line: usize,
        /// Why.
        #[source]
        source: crate::conformance::SequenceError,
    },
    /// The module answers in another way than recorded.
    #[error("{failed} of {sequences} sequences are not answered as recorded")]
    Conformance {
        /// How many.
        failed: u64,
        /// Of how many.
        sequences: u64,
    },
    /// A file is no marked recording.
    #[error("{}", path.display())]
    Recording {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: crate::compare::RecordingError,
    },
    /// The model does something else than the recorded kernel.
    #[error("{different} of {steps} steps differ from the recording")]
    Compare {
        /// How many.
        different: u64,
        /// Of how many.
        steps: u64,
    },
    /// Scenarios that do not do what they say.
    #[error("{failed} of {scenarios} scenarios do not do what they say")]
    Scenario {
        /// How many.
        failed: u64,
        /// Of how many.
        scenarios: u64,
    },
    /// A chaos run found something.
    #[error("chaos found: {found}; to repeat: {again}")]
    Chaos {
        /// What.
        found: String,
        /// The command that plays the same again.
        again: String,
    },
    /// The raw call ended with an error.
    #[error("{leaf} answered {status}")]
    Seamcall {
        /// The leaf.
        leaf: tdx_defs::Leaf,
        /// Its completion status.
        status: tdx_defs::CompletionStatus,
    },
    /// Trees that should be alike are not.
    #[error("the audit found {mismatches} mismatches and {frozen} frozen entries, 0 are allowed")]
    Audit {
        /// Entries that differ.
        mismatches: u64,
        /// Entries left frozen.
        frozen: u64,
    },
    /// No such VM.
    #[error("vm {vm_id} does not exist")]
    NoVm {
        /// The number.
        vm_id: u64,
    },
    /// No slot.
    #[error("gpa {gpa:#x}: no slot of vm {vm_id} covers it")]
    NoSlot {
        /// The number of the VM.
        vm_id: u64,
        /// The address.
        gpa: u64,
    },
    /// The result cannot be written.
    #[error("cannot write the result")]
    Output(#[source] std::io::Error),
    /// `--report` has nowhere to go.
    #[error("report: cannot write {}", .file.display())]
    Report {
        /// As given.
        file: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// `--plot` has nowhere to go.
    #[error("plot: cannot write {}", .file.display())]
    Plot {
        /// As given.
        file: std::path::PathBuf,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// Logs and traces cannot be set up.
    #[error("telemetry cannot be set up")]
    Telemetry(#[from] telemetry::TelemetryError),
    /// The operating system refused something.
    #[error("the runtime cannot be started")]
    Runtime(#[source] std::io::Error),
}

impl Error {
    /// 1 the system answered no, 2 usage; 130 after a signal, as shells have it.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted => 130,
            _ => 1,
        }
    }

    /// The message and every cause behind it, in one line.
    pub fn chain(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let next = error.to_string();
            // Some libraries repeat their cause in their own message.
            if !text.contains(&next) {
                text.push_str(": ");
                text.push_str(&next);
            }
            cause = error.source();
        }
        text
    }
}

fn seconds(limit: Duration) -> String {
    format!("{} s", limit.as_secs_f64())
}

/// A gRPC error with its google.rpc details.
pub struct Refusal(Box<Status>);

impl Refusal {
    /// Takes the answer of an RPC.
    pub fn new(status: Status) -> Self {
        Self(Box::new(status))
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        self.0.code()
    }

    /// The reason that the service gives; none comes from a connection that broke.
    pub fn reason(&self) -> Option<String> {
        let details = self.0.get_error_details();
        Some(details.error_info()?.reason.clone())
    }

    /// KVM's errno, when there is one.
    pub fn errno(&self) -> Option<i32> {
        let details = self.0.get_error_details();
        details.error_info()?.metadata.get("errno")?.parse().ok()
    }

    /// What the message leaves out: fields, limits, the errno, the exit record.
    fn details(&self) -> Vec<String> {
        let message = self.0.message();
        let details = self.0.get_error_details();
        let mut told = Vec::new();
        for violation in details
            .bad_request()
            .iter()
            .flat_map(|bad| &bad.field_violations)
        {
            told.push((violation.field.clone(), violation.description.clone()));
        }
        for violation in details
            .precondition_failure()
            .iter()
            .flat_map(|pre| &pre.violations)
        {
            told.push((violation.subject.clone(), violation.description.clone()));
        }
        for violation in details
            .quota_failure()
            .iter()
            .flat_map(|quota| &quota.violations)
        {
            told.push((violation.subject.clone(), violation.description.clone()));
        }
        let mut lines: Vec<String> = told
            .into_iter()
            .filter(|(what, why)| !(message.contains(what) && message.contains(why)))
            .map(|(what, why)| format!("{what}: {why}"))
            .collect();
        if let Some(info) = details.error_info() {
            let mut fields: Vec<_> = info.metadata.iter().collect();
            fields.sort_unstable();
            lines.extend(fields.iter().map(|(key, value)| format!("{key} {value}")));
            if fields.is_empty() && !info.reason.is_empty() {
                lines.push(format!("reason {}", info.reason));
            }
        }
        if let Some(delay) = details.retry_info().and_then(|retry| retry.retry_delay) {
            lines.push(format!("try again after {} s", delay.as_secs_f64()));
        }
        lines
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = transport::code_name(self.0.code());
        match self.0.message() {
            "" => f.write_str(name)?,
            message => write!(f, "{name}: {message}")?,
        }
        match &self.details()[..] {
            [] => Ok(()),
            details => write!(f, " ({})", details.join("; ")),
        }
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Refusal {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        self.0.source()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    fn refused(status: Status) -> String {
        Error::Refused {
            call: "CreateVm",
            source: Refusal::new(status),
        }
        .chain()
    }

    #[test]
    fn a_refusal_tells_field_limit_errno_and_cause() {
        let mut details =
            ErrorDetails::with_bad_request_violation("gpaw", "47 is neither 48 nor 52");
        details.set_error_info(
            "EINVAL",
            "kvm",
            HashMap::from([("errno".into(), "EINVAL".into())]),
        );
        let with_details = |message: &str| {
            Status::with_error_details(Code::InvalidArgument, message, details.clone())
        };
        for (status, want) in [
            (
                with_details("malformed request"),
                "CreateVm was refused: INVALID_ARGUMENT: malformed request \
                 (gpaw: 47 is neither 48 nor 52; errno EINVAL)",
            ),
            (
                with_details("gpaw: 47 is neither 48 nor 52"),
                "CreateVm was refused: INVALID_ARGUMENT: gpaw: 47 is neither 48 nor 52 \
                 (errno EINVAL)",
            ),
            (Status::unavailable(""), "CreateVm was refused: UNAVAILABLE"),
            (
                Status::from_error(Box::new(std::io::Error::other("broken pipe"))),
                "CreateVm was refused: UNKNOWN: broken pipe",
            ),
        ] {
            assert_eq!(refused(status), want);
        }
    }

    #[test]
    fn exit_codes_tell_usage_from_refusal() {
        assert_eq!(Error::Usage("x".into()).exit_code(), 2);
        assert_eq!(Error::NoVm { vm_id: 1 }.exit_code(), 1);
        assert_eq!(Error::Interrupted.exit_code(), 130);
    }
}

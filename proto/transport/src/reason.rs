//! Reasons of refusals: each service lists its own once, for the code and for its documentation.
//!
//! Source: google.rpc.ErrorInfo, whose `reason` is a word that programs compare.

use std::fmt::Write as _;

use tonic::Code;

/// Why a request is refused, as a word for programs and as text for people.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reason {
    /// ErrorInfo.reason.
    pub word: &'static str,
    /// The gRPC code, always the same for a reason.
    pub code: Code,
    /// What the details name beside the reason: fields, metadata, a delay. Markdown, may be empty.
    pub details: &'static str,
    /// What it means.
    pub meaning: &'static str,
    /// What a caller does about it.
    pub remedy: &'static str,
}

/// Defines reasons as constants, and `ALL` of them in the order given.
///
/// ```text
/// transport::reasons! {
///     DRAINING: Unavailable, "", "the service is stopping", "wait for the next one";
/// }
/// ```
#[macro_export]
macro_rules! reasons {
    ($($name:ident: $code:ident, $details:literal, $meaning:literal, $remedy:literal;)*) => {
        $(
            #[doc = $meaning]
            pub(crate) const $name: $crate::Reason = $crate::Reason {
                word: stringify!($name),
                code: $crate::Code::$code,
                details: $details,
                meaning: $meaning,
                remedy: $remedy,
            };
        )*

        /// Every reason.
        #[allow(dead_code, reason = "only the test that compares the documentation needs it")]
        pub(crate) const ALL: &[$crate::Reason] = &[$($name),*];
    };
}

/// The reasons as a Markdown table.
pub fn reasons_table(reasons: &[Reason]) -> String {
    let mut table =
        String::from("| code | reason | details | meaning | what to do |\n|---|---|---|---|---|\n");
    for reason in reasons {
        // Writing to a string cannot fail.
        let _ = writeln!(
            table,
            "| {} | `{}` | {} | {} | {} |",
            code_name(reason.code),
            reason.word,
            reason.details,
            reason.meaning,
            reason.remedy
        );
    }
    table
}

/// The part of a document between `<!-- reasons DOMAIN -->` and `<!-- /reasons -->`.
pub fn reasons_section<'a>(document: &'a str, domain: &str) -> Option<&'a str> {
    let (_, rest) = document.split_once(&format!("<!-- reasons {domain} -->\n"))?;
    let (section, _) = rest.split_once("<!-- /reasons -->")?;
    Some(section)
}

/// The name of a code in the gRPC specification.
pub fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    mod example {
        crate::reasons! {
            GONE: NotFound, "`id`", "there is none", "make one";
            DRAINING: Unavailable, "", "the service is stopping", "wait";
        }
    }

    #[test]
    fn a_table_has_a_row_for_each_reason_and_is_found_again() {
        assert_eq!((example::GONE.word, example::ALL.len()), ("GONE", 2));
        let table = reasons_table(example::ALL);
        assert!(table.contains("| NOT_FOUND | `GONE` | `id` | there is none | make one |\n"));
        let document = format!("text\n<!-- reasons a.b -->\n{table}<!-- /reasons -->\nmore");
        assert_eq!(reasons_section(&document, "a.b"), Some(&*table));
        assert_eq!(reasons_section(&document, "a"), None);
    }
}

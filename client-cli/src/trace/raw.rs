//! Lines of a recording with all their events, for readers that want more than faults.
//!
//! What [`read`](super::read) takes is taken here, and lines without a prefix, too: `EVENT: PAYLOAD`
//! as a script leaves it that drops the time stamps.

use std::io::BufRead;

use super::lines::{Line, Lines};
use super::prefix;
use super::reader::{ReadError, is_header, lost_events};

/// One line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RawLine<'a> {
    /// An event, or what a program wrote into the trace.
    Event {
        /// Task name; empty without a prefix.
        task: &'a str,
        /// Thread id; 0 without a prefix.
        thread: u32,
        /// Name without its system; empty for a line that has none.
        name: &'a str,
        /// The rest.
        text: &'a str,
    },
    /// Events are missing here.
    Lost(u64),
    /// Neither.
    Unreadable,
}

/// Hands every line that is no header to `take`, with its number from 1.
pub(crate) fn each(
    input: impl BufRead,
    mut take: impl FnMut(u64, RawLine<'_>),
) -> Result<(), ReadError> {
    let mut lines = Lines::new(input);
    let mut number = 0;
    loop {
        let line = lines.next_line().map_err(|source| ReadError {
            line: number,
            source,
        })?;
        number += 1;
        match line {
            None => return Ok(()),
            Some(Line::TooLong) => take(number, RawLine::Unreadable),
            Some(Line::Text(bytes)) => {
                let text = String::from_utf8_lossy(bytes);
                let text = text.trim_end_matches(['\0', ' ', '\t']);
                if let Some(lost) = lost_events(text) {
                    if lost > 0 {
                        take(number, RawLine::Lost(lost));
                    }
                } else if !is_header(text) {
                    take(number, event(text));
                }
            }
        }
    }
}

fn event(text: &str) -> RawLine<'_> {
    match prefix::parse(text) {
        Ok(prefixed) => RawLine::Event {
            task: prefixed.task,
            thread: prefixed.thread,
            name: prefixed.event,
            text: prefixed.payload,
        },
        Err(_) => bare(text),
    }
}

fn bare(text: &str) -> RawLine<'_> {
    let is_name = |name: &str| {
        name.bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
    };
    let (name, text) = match text.split_once(": ") {
        Some((name, rest)) if !name.is_empty() && is_name(name) => (name, rest),
        _ => ("", text),
    };
    RawLine::Event {
        task: "",
        thread: 0,
        name,
        text: text.trim(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_with_and_without_their_prefix() {
        let text = "# tracer: nop\n  kvmt-182 [000] ...1. 17.4: tracing_mark_write: STEP 1 BEGIN X\n\
                    STEP 1 END rc=0\nkvm_page_fault: vcpu 0\nCPU:1 [LOST 3 EVENTS]\n";
        let mut found = Vec::new();
        each(text.as_bytes(), |number, line| {
            found.push(match line {
                RawLine::Event {
                    thread, name, text, ..
                } => format!("{number} {thread} {name}|{text}"),
                other => format!("{number} {other:?}"),
            });
        })
        .unwrap();
        assert_eq!(
            found,
            [
                "2 182 tracing_mark_write|STEP 1 BEGIN X",
                "3 0 |STEP 1 END rc=0",
                "4 0 kvm_page_fault|vcpu 0",
                "5 Lost(3)",
            ]
        );
    }
}

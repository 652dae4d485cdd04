//! From lines to events.
//!
//! A line that starts like an event and ends too early is kept until the next line shows whether
//! it was folded (mail programs break lines at about 72 columns) or cut off.

use std::io::BufRead;

use super::lines::{Line, Lines, MAX_LINE_BYTES};
use super::vcpus::Vcpus;
use super::{Event, Fault, Summary, Trace, Unmap, fault, prefix, unmap};

/// An event is not folded over more lines than this.
const MAX_FOLDS: u32 = 4;
/// Columns between which mail programs break lines.
const FOLD_COLUMNS: std::ops::RangeInclusive<usize> = 60..=80;

/// Why a line cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LineError {
    /// It does not start like an event.
    #[error("not an event of a trace file, trace-cmd report or perf script")]
    Prefix,
    /// It ends before this field.
    #[error("{field} is missing")]
    Missing {
        /// Name of the field.
        field: &'static str,
    },
    /// A field that is no number, or one of more than 64 bits.
    #[error("{field} {text:?} is not a number of at most 64 bits")]
    Number {
        /// Name of the field.
        field: &'static str,
        /// What stands there.
        text: String,
    },
    /// A word that does not belong into the event.
    #[error("unexpected {word:?}")]
    Word {
        /// The word.
        word: String,
    },
    /// A vCPU number that KVM does not have.
    #[error("vcpu {id} is not below the limit of {limit}")]
    Vcpu {
        /// The number.
        id: u32,
        /// The limit.
        limit: u32,
    },
    /// More threads without a vCPU number than KVM has vCPUs.
    #[error("thread {thread} would be one more than the limit of {limit} vcpus")]
    Threads {
        /// The thread id.
        thread: u32,
        /// The limit.
        limit: u32,
    },
    /// An empty or backward range.
    #[error("start {start:#x} is not below {end:#x}")]
    Range {
        /// Its start.
        start: u64,
        /// Its end.
        end: u64,
    },
    /// A line above the bound.
    #[error("longer than the limit of {limit} bytes")]
    TooLong {
        /// The bound.
        limit: usize,
    },
}

impl LineError {
    pub(super) fn number(field: &'static str, text: &str) -> Self {
        Self::Number {
            field,
            text: excerpt(text),
        }
    }
}

/// A piece of a line that is short enough for a message.
pub(super) fn excerpt(text: &str) -> String {
    const LONGEST: usize = 40;
    text.chars().take(LONGEST).collect()
}

/// A line that could not be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {line}: {reason}")]
pub struct Unreadable {
    /// Number of the line, from 1.
    pub line: u64,
    /// Why.
    pub reason: LineError,
}

/// The input ended with an error.
#[derive(Debug, thiserror::Error)]
#[error("cannot read the trace behind line {line}")]
pub struct ReadError {
    /// The last line that was read.
    pub line: u64,
    /// What happened.
    #[source]
    pub source: std::io::Error,
}

/// Reads a recording to its end. Lines that cannot be read go to `report`, one call each.
pub fn read(input: impl BufRead, report: impl FnMut(Unreadable)) -> Result<Trace, ReadError> {
    let mut lines = Lines::new(input);
    let mut reader = Reader::new(report);
    let mut number = 0;
    loop {
        match lines.next_line() {
            Ok(Some(Line::Text(bytes))) => {
                number += 1;
                match str::from_utf8(bytes) {
                    Ok(text) => reader.line(number, text),
                    Err(_) => reader.line(number, &String::from_utf8_lossy(bytes)),
                }
            }
            Ok(Some(Line::TooLong)) => {
                number += 1;
                reader.flush();
                reader.refuse(
                    number,
                    LineError::TooLong {
                        limit: MAX_LINE_BYTES,
                    },
                );
            }
            Ok(None) => return Ok(reader.finish()),
            Err(source) => {
                return Err(ReadError {
                    line: number,
                    source,
                });
            }
        }
    }
}

/// An event that ended too early.
struct Pending {
    line: u64,
    text: String,
    folds: u32,
    reason: LineError,
}

struct Reader<F> {
    trace: Trace,
    vcpus: Vcpus,
    pending: Option<Pending>,
    /// Columns of the last line, when it was a whole event whose tail may follow.
    tail_of: Option<usize>,
    report: F,
}

/// What a whole line says.
enum Read {
    Event(Event),
    Ignored,
}

impl<F: FnMut(Unreadable)> Reader<F> {
    fn new(report: F) -> Self {
        Self {
            trace: Trace::default(),
            vcpus: Vcpus::default(),
            pending: None,
            tail_of: None,
            report,
        }
    }

    fn line(&mut self, number: u64, text: &str) {
        let text = text.trim_ascii_end();
        if let Some(lost) = lost_events(text) {
            self.flush();
            self.summary().lost = self.trace.summary.lost.saturating_add(lost);
            return;
        }
        if is_header(text) {
            return self.flush();
        }
        match self.parse(number, text) {
            Ok(read) => {
                self.flush();
                self.accept(read, text);
            }
            Err(LineError::Prefix) => self.continuation(number, text),
            Err(reason @ LineError::Missing { .. }) => {
                self.flush();
                self.pending = Some(Pending {
                    line: number,
                    text: text.into(),
                    folds: 0,
                    reason,
                });
            }
            Err(reason) => {
                self.flush();
                self.refuse(number, reason);
            }
        }
    }

    /// A line that does not start like an event: the rest of the one above, or nothing known.
    fn continuation(&mut self, number: u64, text: &str) {
        if let Some(mut pending) = self.pending.take() {
            pending.text.push(' ');
            pending.text.push_str(text.trim_start());
            pending.folds += 1;
            match self.parse(pending.line, &pending.text) {
                Ok(read) => return self.accept(read, text),
                Err(reason @ LineError::Missing { .. })
                    if pending.folds < MAX_FOLDS && pending.text.len() < MAX_LINE_BYTES =>
                {
                    self.pending = Some(Pending { reason, ..pending });
                    return;
                }
                Err(_) => self.refuse(pending.line, pending.reason),
            }
        } else if self
            .tail_of
            .is_some_and(|columns| was_folded(columns, text))
        {
            self.tail_of = Some(text.chars().count());
            return;
        }
        self.refuse(number, LineError::Prefix);
    }

    fn parse(&mut self, number: u64, text: &str) -> Result<Read, LineError> {
        let prefixed = prefix::parse(text)?;
        match prefixed.event {
            "kvm_page_fault" => {
                let payload = fault::parse(prefixed.payload)?;
                let vcpu = self
                    .vcpus
                    .resolve(payload.vcpu, prefixed.task, prefixed.thread)?;
                Ok(Read::Event(Event::Fault(Fault {
                    line: number,
                    time_ns: prefixed.time_ns,
                    vcpu,
                    address: payload.address,
                    error_code: payload.error_code,
                })))
            }
            "kvm_unmap_hva_range" => {
                let (start, end) = unmap::parse(prefixed.payload)?;
                let time_ns = prefixed.time_ns;
                Ok(Read::Event(Event::Unmap(Unmap {
                    line: number,
                    time_ns,
                    start,
                    end,
                })))
            }
            _ => Ok(Read::Ignored),
        }
    }

    fn accept(&mut self, read: Read, text: &str) {
        self.tail_of = Some(text.chars().count());
        match read {
            Read::Ignored => self.summary().ignored += 1,
            Read::Event(event) => {
                match event {
                    Event::Fault(_) => self.summary().faults += 1,
                    Event::Unmap(_) => self.summary().unmaps += 1,
                }
                self.trace.events.push(event);
            }
        }
    }

    /// The event that waits for its rest will not get it.
    fn flush(&mut self) {
        self.tail_of = None;
        if let Some(pending) = self.pending.take() {
            self.refuse(pending.line, pending.reason);
        }
    }

    fn refuse(&mut self, line: u64, reason: LineError) {
        self.tail_of = None;
        self.summary().unreadable += 1;
        (self.report)(Unreadable { line, reason });
    }

    fn summary(&mut self) -> &mut Summary {
        &mut self.trace.summary
    }

    fn finish(mut self) -> Trace {
        self.flush();
        self.trace
    }
}

/// Whether a mail program would have broken a line of so many columns before this text.
fn was_folded(columns: usize, text: &str) -> bool {
    let first_word = text.split_ascii_whitespace().next().map_or(0, str::len);
    FOLD_COLUMNS.contains(&columns) && columns + 1 + first_word > 70
}

/// Events that a line says are lost: `CPU:3 [LOST 117 EVENTS]` of tracefs, `CPU:3 [117 EVENTS
/// DROPPED]` of trace-cmd, and what was overwritten before the file was read, from its header.
pub(super) fn lost_events(text: &str) -> Option<u64> {
    let text = text.trim_ascii();
    if let Some(counts) = text.strip_prefix("# entries-in-buffer/entries-written:") {
        let (kept, written) = counts.split_ascii_whitespace().next()?.split_once('/')?;
        let (kept, written): (u64, u64) = (kept.parse().ok()?, written.parse().ok()?);
        return Some(written.saturating_sub(kept));
    }
    let note = text
        .strip_prefix("CPU:")?
        .split_once('[')?
        .1
        .strip_suffix(']')?;
    let words: Vec<&str> = note.split_ascii_whitespace().collect();
    match words[..] {
        ["LOST", count, "EVENTS"] | [count, "EVENTS", "DROPPED"] => count.parse().ok(),
        // How many is not known, at least one.
        ["LOST", "EVENTS"] | ["EVENTS", "DROPPED"] => Some(1),
        _ => None,
    }
}

/// Comments, empty lines, and what trace-cmd prints above the events.
pub(super) fn is_header(text: &str) -> bool {
    let text = text.trim_ascii();
    let cpu_is_empty = || {
        let cpu = text
            .strip_prefix("CPU ")
            .and_then(|rest| rest.strip_suffix(" is empty"));
        cpu.is_some_and(|cpu| cpu.bytes().all(|byte| byte.is_ascii_digit()))
    };
    text.is_empty()
        || text.starts_with('#')
        || text.starts_with("cpus=")
        || text.starts_with("version = ")
        || cpu_is_empty()
}

#[cfg(test)]
#[path = "reader_tests.rs"]
mod tests;

//! The text of a recording, cut into steps.
//!
//! The program that drove the VM wrote `STEP n BEGIN …`, `STEP n END rc=… errno=…`, `STEP n STAT …`
//! and notes such as `DIRTY …` into the trace; events stand between them.

use std::collections::BTreeMap;
use std::io::BufRead;

use crate::trace::raw::{RawLine, each};
use crate::trace::{ReadError, hex};

/// Lines of one recording: some hundred megabytes of text.
const MAX_LINES: usize = 1 << 22;

/// Why a file is no recording.
#[derive(Debug, thiserror::Error)]
pub enum RecordingError {
    /// It cannot be read to its end.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// Nothing in it says what was done.
    #[error("no line says STEP n BEGIN: not a marked recording")]
    NoSteps,
    /// More than anybody waits for.
    #[error("more than the limit of {limit} lines")]
    TooLong {
        /// The limit.
        limit: usize,
    },
}

/// What was done to a VM, and what KVM did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Recording {
    /// In the order of the file.
    pub steps: Vec<Step>,
}

/// One ioctl, system call or stretch of guest code.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// Its number in the file.
    pub number: u64,
    /// What was done, with its arguments.
    pub title: String,
    /// Events and notes, in order.
    pub lines: Vec<Line>,
    /// What the call returned; `None` when the recording does not say.
    pub outcome: Option<Outcome>,
    /// The VM's statistics after the step, by name.
    pub stat: BTreeMap<String, u64>,
    /// Events that the recorder lost here.
    pub lost: u64,
}

/// What a call returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Outcome {
    /// Its value.
    pub rc: i64,
    /// Its errno, 0 when there was none.
    pub errno: i32,
}

/// An event or a note.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// Task that it happened in.
    pub task: String,
    /// Its thread id.
    pub thread: u32,
    /// Name of the event; empty for a note.
    pub name: String,
    /// The rest.
    pub text: String,
}

impl Recording {
    /// Reads a recording to its end. Lines that are neither events nor marks are left out.
    pub fn read(input: impl BufRead) -> Result<Self, RecordingError> {
        let mut recording = Self::default();
        let mut lines = 0;
        each(input, |_, line| {
            lines += 1;
            if lines <= MAX_LINES {
                recording.take(line);
            }
        })?;
        match recording.steps.is_empty() {
            _ if lines > MAX_LINES => Err(RecordingError::TooLong { limit: MAX_LINES }),
            true => Err(RecordingError::NoSteps),
            false => Ok(recording),
        }
    }

    fn take(&mut self, line: RawLine<'_>) {
        match line {
            RawLine::Unreadable => {}
            RawLine::Lost(lost) => {
                if let Some(step) = self.steps.last_mut() {
                    step.lost = step.lost.saturating_add(lost);
                }
            }
            RawLine::Event {
                task,
                thread,
                name,
                text,
            } => match mark(name, text) {
                Some(text) if self.step_mark(text) => {}
                note => {
                    // What stands before the first step belongs to none.
                    let Some(step) = self.steps.last_mut() else {
                        return;
                    };
                    step.lines.push(Line {
                        task: task.to_owned(),
                        thread,
                        name: note.map_or(name, |_| "").to_owned(),
                        text: note.unwrap_or(text).to_owned(),
                    });
                }
            },
        }
    }

    /// Takes a `STEP` line. `false` when it is none.
    fn step_mark(&mut self, text: &str) -> bool {
        let Some((number, rest)) = text
            .strip_prefix("STEP ")
            .and_then(|rest| rest.split_once(' '))
        else {
            return false;
        };
        let Ok(number) = number.parse() else {
            return false;
        };
        let (word, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        match (word, self.steps.last_mut()) {
            ("BEGIN", _) => self.steps.push(Step {
                number,
                title: rest.trim().to_owned(),
                ..Step::default()
            }),
            ("END", Some(step)) => step.outcome = outcome(rest),
            ("STAT", Some(step)) => {
                let counts = fields(rest)
                    .filter_map(|(name, value)| Some((name.to_owned(), value.parse().ok()?)));
                step.stat = counts.collect();
            }
            _ => return false,
        }
        true
    }
}

fn outcome(text: &str) -> Option<Outcome> {
    let value = |key| {
        fields(text)
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    };
    Some(Outcome {
        rc: value("rc")?.parse().ok()?,
        errno: value("errno").map_or(Some(0), |errno| errno.parse().ok())?,
    })
}

/// What a program wrote into the trace, if the line is that.
fn mark<'a>(name: &str, text: &'a str) -> Option<&'a str> {
    match name {
        // Without a prefix there is no name: nothing else looks like this.
        "tracing_mark_write" | "" => Some(text),
        // trace-cmd and perf put the event of ftrace itself in front.
        "print" => text.split_once(": ").map(|(_, text)| text),
        _ => None,
    }
}

/// `key=value` words.
pub(super) fn fields(text: &str) -> impl Iterator<Item = (&str, &str)> {
    text.split_whitespace()
        .filter_map(|word| word.split_once('='))
}

/// A number as the driving program prints it: `0x` hexadecimal, else decimal.
pub(super) fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(_) => hex("number", text).ok(),
        None => text.parse().ok(),
    }
}

impl Step {
    /// What was done.
    pub fn verb(&self) -> &str {
        self.title.split_whitespace().next().unwrap_or("")
    }

    /// The words behind the verb that are no `key=value`, as one.
    pub(super) fn words(&self) -> String {
        let words = self.title.split_whitespace().skip(1);
        words
            .filter(|word| !word.contains('='))
            .collect::<Vec<_>>()
            .join(" ")
    }

    /// The text of an argument.
    pub(super) fn field(&self, key: &str) -> Option<&str> {
        fields(&self.title)
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value)
    }

    /// The first of several names that an argument may have, as a number.
    pub(super) fn number(&self, keys: &[&str]) -> Result<u64, String> {
        let Some(text) = keys.iter().find_map(|key| self.field(key)) else {
            return Err(format!(
                "{} is missing",
                keys.first().unwrap_or(&"an argument")
            ));
        };
        number(text).ok_or_else(|| format!("{}: {text:?} is no number", keys[0]))
    }

    /// The note that begins with a word: the rest of it.
    pub(super) fn note(&self, word: &str) -> Option<&str> {
        let notes = self.lines.iter().filter(|line| line.name.is_empty());
        let mut found = notes.filter_map(|line| line.text.strip_prefix(word)?.strip_prefix(' '));
        found.next()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# tracer: nop
  kvmt-1 [000] ...1. 1.0: tracing_mark_write: SCENARIO x
  kvmt-1 [000] ...1. 1.1: tracing_mark_write: STEP 1 BEGIN MADVISE DONTNEED(a-b) hva=0x1000 len=16
  kvmt-1 [000] ..... 1.2: kvm_unmap_hva_range: mmu notifier unmap range: 0x1 -- 0x2
CPU:0 [LOST 5 EVENTS]
  kvmt-1 [000] ...1. 1.3: tracing_mark_write: DIRTY slot=1 pages=a
  kvmt-1 [000] ...1. 1.4: tracing_mark_write: STEP 1 END rc=-1 errno=22
  kvmt-1 [000] ...1. 1.5: tracing_mark_write: STEP 1 STAT pages_4k=7 odd=x
STEP 2 BEGIN
";

    #[test]
    fn a_step_has_its_arguments_lines_result_and_statistics() {
        let recording = Recording::read(TEXT.as_bytes()).unwrap();
        let [step, last] = &recording.steps[..] else {
            panic!("{recording:?}");
        };
        assert_eq!((step.number, step.verb()), (1, "MADVISE"));
        assert_eq!(step.words(), "DONTNEED(a-b)");
        assert_eq!(step.number(&["gpa", "hva"]), Ok(0x1000));
        assert_eq!(step.number(&["len"]), Ok(16));
        assert_eq!(step.number(&["slot"]), Err("slot is missing".into()));
        assert_eq!(step.lines.len(), 2);
        assert_eq!(step.note("DIRTY"), Some("slot=1 pages=a"));
        assert_eq!(step.outcome, Some(Outcome { rc: -1, errno: 22 }));
        assert_eq!(step.stat, BTreeMap::from([("pages_4k".into(), 7)]));
        assert_eq!(step.lost, 5);
        assert_eq!((last.number, last.verb()), (2, ""));
    }

    #[test]
    fn a_file_without_steps_is_refused() {
        for text in [
            "",
            "# tracer: nop\n",
            "STEP x BEGIN\n",
            "kvm_page_fault: vcpu 0\n",
            "\0\0",
        ] {
            let error = Recording::read(text.as_bytes()).unwrap_err();
            assert!(matches!(error, RecordingError::NoSteps), "{text:?}");
        }
    }
}

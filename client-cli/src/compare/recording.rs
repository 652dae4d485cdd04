//! The text of a recording, cut into steps.
//!
//! The program that drove the VM wrote `STEP n BEGIN …`, `STEP n END rc=… errno=…`, `STEP n STAT …`
//! and notes such as `DIRTY …` into the trace; events stand between them.

use std::collections::BTreeMap;
use std::io::BufRead;

use super::arguments::{alone, argument, counts, value};
use crate::trace::ReadError;
use crate::trace::raw::{RawLine, each};

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
    /// How many of the lines stand before its end, once that has come.
    pub(super) ended: Option<usize>,
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
        let text = text.trim();
        let (first, rest) = split_word(text);
        let is_step = first.eq_ignore_ascii_case("STEP");
        let (name, rest) = split_word(rest);
        let (word, rest) = split_word(rest);
        let number = name.trim_matches(['#', ':']).parse::<u64>().ok();
        let word = word.trim_end_matches(':').to_ascii_uppercase();
        match (word.as_str(), number) {
            _ if !is_step => false,
            // A step whose number nobody can read is one all the same, if it says what it does.
            ("BEGIN", None) if rest.is_empty() => false,
            ("BEGIN", number) => {
                let last = self.steps.last().map_or(0, |step| step.number);
                self.begin(number.unwrap_or(last + 1), rest);
                true
            }
            ("END", Some(number)) => self.end(number, rest),
            ("END", None) => match self.steps.last().filter(|step| step.ended.is_none()) {
                Some(&Step { number, .. }) => self.end(number, rest),
                None => false,
            },
            ("STAT", Some(number)) => match self.steps.last_mut() {
                Some(step) if step.number == number => {
                    step.stat = counts(rest)
                        .map(|(name, value)| (name.to_owned(), value))
                        .collect();
                    true
                }
                _ => false,
            },
            _ => false,
        }
    }

    fn begin(&mut self, number: u64, title: &str) {
        self.steps.push(Step {
            number,
            title: title.to_owned(),
            ..Step::default()
        });
    }

    /// The end of a step whose beginning was lost takes what came since the one before ended.
    fn end(&mut self, number: u64, text: &str) -> bool {
        let Some(last) = self.steps.last_mut() else {
            return false;
        };
        if last.number != number {
            let Some(ended) = last.ended else {
                return false;
            };
            let lines = last.lines.split_off(ended);
            self.begin(number, "");
            if let Some(step) = self.steps.last_mut() {
                step.lines = lines;
            }
        }
        if let Some(step) = self.steps.last_mut() {
            step.outcome = outcome(text);
            step.ended = Some(step.lines.len());
        }
        true
    }
}

/// The first word, and what stands behind it.
fn split_word(text: &str) -> (&str, &str) {
    let text = text.trim_start();
    let end = text.find(char::is_whitespace).unwrap_or(text.len());
    let (word, rest) = text.split_at(end);
    (word, rest.trim())
}

fn outcome(text: &str) -> Option<Outcome> {
    let signed = |text: &str| text.parse::<i64>().ok();
    Some(Outcome {
        rc: signed(argument(text, "rc")?)?,
        errno: argument(text, "errno").map_or(Some(0), |errno| errno.parse().ok())?,
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

impl Step {
    /// What was done, in capitals and without `KVM_`: `MADVISE` of `madvise(MADV_DONTNEED)`.
    pub fn verb(&self) -> String {
        let (verb, _) = self.title.split_at(self.verb_end());
        let verb = verb.to_ascii_uppercase().replace('-', "_");
        verb.strip_prefix("KVM_").unwrap_or(&verb).to_owned()
    }

    fn verb_end(&self) -> usize {
        let ends = |letter: char| letter.is_whitespace() || matches!(letter, '(' | ':' | ',');
        self.title.find(ends).unwrap_or(self.title.len())
    }

    /// What stands behind the verb.
    fn arguments(&self) -> &str {
        &self.title[self.verb_end()..]
    }

    /// The words behind the verb that are no arguments, as one, in capitals.
    pub(super) fn words(&self) -> String {
        alone(self.arguments()).to_ascii_uppercase()
    }

    /// The text of an argument.
    pub(super) fn field(&self, key: &str) -> Option<&str> {
        argument(self.arguments(), key)
    }

    /// The first of several names that an argument may have, as a number. `None` when it has none
    /// of them.
    pub(super) fn optional(&self, keys: &[&str]) -> Result<Option<u64>, String> {
        let found = keys.iter().find_map(|key| Some((*key, self.field(key)?)));
        found.map(|(key, text)| value(key, text)).transpose()
    }

    /// The same, of an argument that must be there.
    pub(super) fn number(&self, keys: &[&str]) -> Result<u64, String> {
        let missing = || format!("{} is missing", keys.first().unwrap_or(&"an argument"));
        self.optional(keys)?.ok_or_else(missing)
    }

    /// The note that begins with a word: the rest of it.
    pub(super) fn note(&self, word: &str) -> Option<&str> {
        let notes = self.lines.iter().filter(|line| line.name.is_empty());
        let mut found = notes.filter_map(|line| {
            let (first, rest) = split_word(&line.text);
            first.eq_ignore_ascii_case(word).then_some(rest)
        });
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
        assert_eq!((step.number, step.verb()), (1, "MADVISE".into()));
        assert_eq!(step.words(), "DONTNEED(A-B)");
        assert_eq!(step.number(&["gpa", "hva"]), Ok(0x1000));
        assert_eq!(step.number(&["len"]), Ok(16));
        assert_eq!(step.number(&["slot"]), Err("slot is missing".into()));
        assert_eq!(step.lines.len(), 2);
        assert_eq!(step.note("DIRTY"), Some("slot=1 pages=a"));
        assert_eq!(step.outcome, Some(Outcome { rc: -1, errno: 22 }));
        assert_eq!(step.stat, BTreeMap::from([("pages_4k".into(), 7)]));
        assert_eq!(step.lost, 5);
        assert_eq!((last.number, last.verb()), (2, String::new()));
    }

    #[test]
    fn marks_may_be_written_in_several_ways() {
        let text = "step 1 begin madvise(MADV_DONTNEED) addr=7fa1ce002000 len=16K\n\
            step 1 end rc=0, errno=0\nstep 1 stat: pages_4k 7 pf_taken 3\n\
            STEP #2 BEGIN: kvm_create_vm vcpus 1\nSTEP x BEGIN WAIT\n";
        let recording = Recording::read(text.as_bytes()).unwrap();
        let [first, second, third] = &recording.steps[..] else {
            panic!("{recording:?}");
        };
        assert_eq!(
            (first.verb(), first.words()),
            ("MADVISE".into(), "(MADV_DONTNEED)".into())
        );
        assert_eq!(first.number(&["hva", "addr"]), Ok(0x7FA1_CE00_2000));
        assert_eq!(first.number(&["len"]), Ok(16 << 10));
        assert_eq!(first.outcome, Some(Outcome { rc: 0, errno: 0 }));
        assert_eq!(
            first.stat,
            BTreeMap::from([("pages_4k".into(), 7), ("pf_taken".into(), 3)])
        );
        assert_eq!((second.number, second.verb()), (2, "CREATE_VM".into()));
        assert_eq!(second.number(&["vcpus"]), Ok(1));
        assert_eq!(
            (third.number, third.verb()),
            (3, "WAIT".into()),
            "the next number"
        );
    }

    #[test]
    fn a_step_whose_beginning_was_lost_takes_its_events_with_it() {
        let text = "STEP 1 BEGIN WAIT\nkvm_age_hva: a\nSTEP 1 END rc=0 errno=0\nSTEP 1 STAT pages_4k=1\n\
            kvm_age_hva: b\nSTEP 2 END rc=-1 errno=14\nSTEP 3 END rc=0\nSTEP 9 STAT pages_4k=3\n";
        let recording = Recording::read(text.as_bytes()).unwrap();
        let found: Vec<_> = recording
            .steps
            .iter()
            .map(|step| {
                (
                    step.number,
                    step.lines.len(),
                    step.outcome.map(|outcome| outcome.errno),
                )
            })
            .collect();
        // The statistics of nobody stay a note.
        assert_eq!(found, [(1, 1, Some(0)), (2, 1, Some(14)), (3, 1, Some(0))]);
        assert_eq!(recording.steps[1].title, "");
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

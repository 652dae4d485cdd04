//! A real KVM against the model's direct root: the same steps, the events of both side by side.
//!
//! ```text
//! trace text ─▶ Recording (steps, lines) ─▶ Player ─▶ services ─▶ the model's events
//!                          └──────────────▶ Seen ─▶ Matcher ◀─ Seen ◀──────┘ ─▶ Report
//! ```
//!
//! What the guest and the host's memory management did is taken from the recording: the accesses
//! that faulted, and the ranges that the notifiers named. What KVM made of it is the model's part.
//! `docs/compare.md` describes the form of a recording and what counts as the same.

mod arguments;
mod matching;
mod pages;
mod player;
mod recording;
mod report;
mod seen;
mod service;
mod settings;
mod spte;
mod stimuli;
mod verbs;

use tdx_defs::PAGE_SIZE;

pub use player::Player;
pub use recording::{Line, Outcome, Recording, RecordingError, Step};
pub use report::{Difference, Report, Verdict};

/// Reads everything that a recording says: settings, arguments, events. How many events have a form
/// that is known.
pub(crate) fn understand(recording: &Recording) -> usize {
    let settings = settings::Settings::of(&recording.steps);
    let mut known = 0;
    for (at, step) in recording.steps.iter().enumerate() {
        let gpa = step.number(&["gpa", "start", "base"]).unwrap_or_default();
        let size = step.number(&["size", "len"]).unwrap_or_default();
        let (frame, pages) = (gpa / PAGE_SIZE, size / PAGE_SIZE);
        settings.largest(at, frame, pages);
        for line in &step.lines {
            let seen = seen::seen(settings.format, &line.name, &line.text);
            known += usize::from(matches!(seen, Some(Ok(_))));
        }
    }
    known
}

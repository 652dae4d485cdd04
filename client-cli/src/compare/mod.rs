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

pub use player::Player;
pub use recording::{Line, Outcome, Recording, RecordingError, Step};
pub use report::{Difference, Report, Verdict};

//! Secure EPT: the table that maps a TD's private memory.

mod arena;
mod entry;
mod states;
mod walk;

pub(crate) use arena::{ENTRIES, Table};
pub(crate) use entry::{EntryFormat, SeptEntry};
pub use states::SeptState;
pub(crate) use walk::{EntryLock, Sept, Slot, Walk};

//! Reads recorded KVM trace events: the text of tracefs' `trace` file, of `trace-cmd report` and
//! of `perf script`.
//!
//! Source: the format strings of the `kvm` trace system and of ftrace's `print_trace_line()`,
//! `trace-cmd report` and `perf script`. Nothing here opens a file or a socket: text comes in
//! through a [`std::io::BufRead`], events go out.
//!
//! Units: addresses in bytes, time stamps in nanoseconds where the clock has a decimal point.
//!
//! Invariants
//! - T1  Each line is counted once: as an event, as ignored, as unreadable, as lost events or as
//!   a header. A folded line counts with the line it continues.
//! - T2  Events keep the order of the file.
//! - T3  Memory for one line is bounded by [`MAX_LINE_BYTES`].

mod error_code;
mod fault;
pub mod ftrace;
mod input;
mod lines;
mod prefix;
pub(crate) mod raw;
mod reader;
mod unmap;
mod vcpus;

pub use error_code::{as_shared, exit_qualification, qualification};
pub(crate) use fault::{hex, parse as parse_fault};
pub(crate) use input::unpack;
pub use input::{Input, InputError, open};
pub use lines::MAX_LINE_BYTES;
pub use reader::{ReadError, Unreadable, read};
pub use vcpus::MAX_VCPU_ID;

/// What a recording holds.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Trace {
    /// The events that can be played, in the order of the file.
    pub events: Vec<Event>,
    /// What else was in the file.
    pub summary: Summary,
}

/// Counts of the lines of a recording.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// `kvm_page_fault` events read.
    pub faults: u64,
    /// `kvm_unmap_hva_range` events read.
    pub unmaps: u64,
    /// Other events.
    pub ignored: u64,
    /// Lines that could not be read.
    pub unreadable: u64,
    /// Events that the recorder says it lost.
    pub lost: u64,
}

/// An event that can be played.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// `kvm_page_fault`.
    Fault(Fault),
    /// `kvm_unmap_hva_range`.
    Unmap(Unmap),
}

/// A guest access that left the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Number of the line, from 1.
    pub line: u64,
    /// Time stamp.
    pub time_ns: u64,
    /// vCPU number, below [`MAX_VCPU_ID`].
    pub vcpu: u32,
    /// Address of the access, with its offset in the page.
    pub address: u64,
    /// As printed; [`qualification`] reads it.
    pub error_code: u64,
}

/// The host took pages away.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Unmap {
    /// Number of the line, from 1.
    pub line: u64,
    /// Time stamp.
    pub time_ns: u64,
    /// First host virtual address.
    pub start: u64,
    /// The address behind the last one; above `start`.
    pub end: u64,
}

//! KVM's TDP MMU with a direct and a mirror root, and KVM's TDX layer over it.
//!
//! A [`Vm`] is a TDX guest seen from the host, or an ordinary guest, which has the direct root
//! only. A TD's direct root maps shared memory; its mirror
//! root has the shape of the private tables that the TDX module owns, so that most questions
//! about private memory are answered here, and only real changes go through a [`SeamPort`].
//!
//! The crate is synchronous and knows no runtime, socket or clock. An operation blocks its
//! thread while the module works, as a KVM ioctl does.

// The integration tests' host and module serve the tests inside the crate, too.
#[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
extern crate self as tdp_mmu;
#[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
#[path = "../tests/common/mod.rs"]
mod common;

// The package in scenarios/ is these sources and what plays them.
#[cfg(all(feature = "scenarios", not(feature = "shuttle")))]
#[path = "../scenarios/src/mod.rs"]
mod scenarios;
#[cfg(all(feature = "scenarios", not(feature = "shuttle")))]
pub use scenarios::{Policy, RACES, Run, Scenario, fold, list, run};

mod bugs;
mod counts;
mod error;
mod guest;
mod host;
mod ledger;
mod memory;
mod mmu;
mod seam;
mod sync;
mod tdx;
mod trace;
mod vm;

pub use bugs::{Bugs, Check};
pub use counts::{Counts, SeamcallCounts};
pub use error::{ErrorKind, MemoryFault, VmError, errno};
pub use guest::{Entry, GuestOp, GuestPort, GuestStep, MAX_GUEST_ACCESS, Resumed};
pub use host::{Host, HostError, MemoryRange, Platform};
pub use ledger::{Ledger, LedgerError, Note, PoolLedger, TdRecord, VcpuRecord, VmRecord};
pub use memory::slots::{MAX_SLOT_PAGES, MAX_SLOTS, SlotSpec};
pub use memory::user::{HostChange, HostPageSize};
pub use mmu::layout::VmKind;
pub use mmu::role::RootKind;
pub use mmu::spte::SpteKind;
pub use seam::{Batch, MAX_CALLS, MAX_REPEAT, SeamError, SeamPort, Ticket, Via};
pub use tdx::lifecycle::check_hw_error;
pub use trace::{Event, MAX_EVENTS, PageText, error_code};
pub use vm::{
    AuditReport, DirtyLogMode, Fault, FaultOutcome, FaultReport, FaultsReport, Held, InitRegion,
    MAX_MAP_CELLS, Map, MapCell, Measure, Mismatch, Mode, Recovered, Recovery, RetPf, RootInfo,
    RunExit, RunReport, RunRequest, Settled, Stats, TreeEntry, Vm, VmConfig, VmInfo, Walk,
    WalkEntry,
};

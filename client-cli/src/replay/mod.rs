//! Playing a recording: what VM it needs, its accesses in order, and what came of them.
//!
//! ```text
//! trace ─▶ Plan (slots, private memory, host addresses, segments) ─▶ Player ─▶ Report
//! ```
//!
//! The plan is pure; the player talks to the services.

mod accept;
#[cfg(test)]
mod fake;
pub mod html;
mod hva;
mod map;
pub mod meter;
mod pages;
mod placement;
mod plan;
mod play;
mod report;
mod slots;
mod vm;

pub use accept::Accepted;
pub use hva::{HvaBase, HvaSource};
pub use map::AddressMap;
pub use plan::{Hole, Plan, PlanError, PlanOptions, PlannedFault, Segment, UnmapStep};
pub(crate) use play::ret_pf_name;
pub use play::{Played, Player};
pub use report::{AfterDestroy, AuditResult, Report};
pub use slots::SlotPlan;
pub use vm::{TdVm, VmSpec, audit, platform_use, with_vm, with_vm_or_keep};

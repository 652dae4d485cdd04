//! The result of a replay, for scripts and for people.

use std::time::Duration;

use mirror_proto::mmu::Mismatch;
use serde_json::{Value, json};

use super::plan::Plan;
use super::play::Played;
use crate::error::Error;
use crate::output::{hex, merge};
use crate::tally::Tally;
use crate::trace::Summary;

/// What an audit found.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct AuditResult {
    /// Entries compared.
    pub entries: u64,
    /// Entries that differ.
    pub mismatches: u64,
    /// Entries left frozen.
    pub frozen: u64,
    /// Present leaves of the mirror.
    pub leaves: u64,
    /// Linked mirror tables.
    pub tables: u64,
    /// The first differences.
    pub first: Vec<Mismatch>,
}

impl AuditResult {
    /// An error unless all trees agree.
    pub fn verdict(&self) -> Option<Error> {
        let (mismatches, frozen) = (self.mismatches, self.frozen);
        (mismatches > 0 || frozen > 0).then_some(Error::Audit { mismatches, frozen })
    }

    /// The object of the same name.
    pub fn to_json(&self) -> Value {
        let first: Vec<Value> = self
            .first
            .iter()
            .map(|one| json!({ "gpa": hex(one.gpa), "level": one.level, "reason": one.reason }))
            .collect();
        json!({
            "entries": self.entries,
            "mismatches": self.mismatches,
            "frozen": self.frozen,
            "leaves": self.leaves,
            "tables": self.tables,
            "first_mismatches": first,
        })
    }
}

/// What the module holds once the VM is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AfterDestroy {
    /// Private key ids that are not free.
    pub hkids_in_use: u32,
    /// Pages of any type but free and reserved ones, 4 KiB units.
    pub pages_in_use: u64,
}

/// All of it.
#[derive(Debug, Clone)]
pub struct Report {
    /// As on the command line.
    pub mode: &'static str,
    /// As on the command line.
    pub order: &'static str,
    /// What was in the recording.
    pub summary: Summary,
    /// What was made of it.
    pub plan: Plan,
    /// What building the VM cost.
    pub built: Tally,
    /// Measurement of the initial image, 96 hex digits.
    pub mrtd: String,
    /// What came of it.
    pub played: Played,
    /// Whether the trees agree.
    pub audit: AuditResult,
    /// What is left in the module; `None` without a connection to it.
    pub after_destroy: Option<AfterDestroy>,
}

impl Report {
    /// Faults in a second.
    pub fn faults_per_s(&self) -> f64 {
        self.faults_per_s_with(Duration::ZERO)
    }

    /// Faults in a second when the time `before` they were played counts too.
    pub fn faults_per_s_with(&self, before: Duration) -> f64 {
        let elapsed_s = (before + self.played.elapsed).as_secs_f64();
        if elapsed_s > 0.0 {
            self.played.faults as f64 / elapsed_s
        } else {
            0.0
        }
    }

    /// The object for scripts.
    pub fn to_json(&self) -> Value {
        let (played, plan, summary) = (&self.played, &self.plan, &self.summary);
        let mut object = json!({
            "mode": self.mode,
            "order": self.order,
            "vcpus": plan.vcpus.len(),
            "slots": plan.slots.len(),
            "events": summary.faults,
            "ignored": summary.ignored,
            "unreadable": summary.unreadable,
            "lost": summary.lost,
            "out_of_range": plan.out_of_range,
            "unmaps": summary.unmaps,
            "unmap_outside": plan.unmap_outside,
            "hva_base": hex(plan.hva.base),
            "hva_base_source": plan.hva.source.name(),
            "faults": played.faults,
            "ret_pf": played.ret_pf,
            "errors": played.errors,
            "unlisted": played.unlisted,
            "retries": played.retries,
            "accepted": played.accepted.map(|accepted| json!({
                "pages": accepted.pages,
                "again": accepted.again,
                "busy": accepted.busy,
            })),
            "elapsed_s": played.elapsed.as_secs_f64(),
            "faults_per_s": self.faults_per_s(),
            "mrtd": self.mrtd,
            "audit": self.audit.to_json(),
            "after_destroy": self.after_destroy.map(|left| json!({
                "hkids_in_use": left.hkids_in_use,
                "pages_in_use": left.pages_in_use,
            })),
        });
        merge(&mut object, played.tally.to_json());
        object
    }

    /// The same for people.
    pub fn rows(&self) -> Vec<(String, String)> {
        let (played, plan, summary) = (&self.played, &self.plan, &self.summary);
        let mut rows: Vec<(String, String)> = Vec::new();
        let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
        row("mode, order", format!("{}, {}", self.mode, self.order));
        row(
            "vcpus, slots",
            format!("{}, {}", plan.vcpus.len(), plan.slots.len()),
        );
        row("kvm_page_fault events", summary.faults.to_string());
        for (name, count) in [
            ("kvm_unmap_hva_range events", summary.unmaps),
            ("  outside of every slot", plan.unmap_outside),
            ("other events, ignored", summary.ignored),
            ("unreadable lines", summary.unreadable),
            ("lost events", summary.lost),
            ("addresses out of range", plan.out_of_range),
            ("sent again after RETRY", played.retries),
        ] {
            if count > 0 {
                row(name, count.to_string());
            }
        }
        if summary.unmaps > 0 {
            row(
                "host address of gpa 0",
                format!("{:#x} ({})", plan.hva.base, plan.hva.source.name()),
            );
        }
        row("faults played", played.faults.to_string());
        for (name, count) in &played.ret_pf {
            row(&format!("  RET_PF_{name}"), count.to_string());
        }
        for (errno, count) in &played.errors {
            row(&format!("  left KVM_RUN with {errno}"), count.to_string());
        }
        if let Some(accepted) = played.accepted {
            for (name, count) in [
                ("pages accepted by the guest", accepted.pages),
                ("  accepted before", accepted.again),
                ("  tried again: module busy", accepted.busy),
            ] {
                rows.push((name.to_owned(), count.to_string()));
            }
        }
        rows.extend(played.tally.rows());
        let mut row = |name: &str, value: String| rows.push((name.to_owned(), value));
        row("time", format!("{:.3} s", played.elapsed.as_secs_f64()));
        row("faults per second", format!("{:.0}", self.faults_per_s()));
        row(
            "audit",
            format!(
                "{} entries, {} mismatches",
                self.audit.entries, self.audit.mismatches
            ),
        );
        if let Some(left) = self.after_destroy {
            let text = format!("{} key ids, {} pages", left.hkids_in_use, left.pages_in_use);
            row("in use after destroy", text);
        }
        rows
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_audit_is_fine_only_without_mismatch_and_without_frozen_entry() {
        for (mismatches, frozen, fine) in [(0, 0, true), (1, 0, false), (0, 1, false)] {
            let audit = AuditResult {
                mismatches,
                frozen,
                ..Default::default()
            };
            assert_eq!(audit.verdict().is_none(), fine, "{mismatches} {frozen}");
        }
    }
}

//! What a recording asks of a VM, decided before anything is created.

use std::collections::{BTreeMap, BTreeSet};

use tdx_defs::{Gpaw, PAGE_SIZE, Visibility};

use super::hva::{self, HvaBase, HvaSource, Step};
use super::pages;
use super::placement::Placement;
use super::slots::{SlotPlan, layout};
use crate::args::{AddressRange, PrivateMemory};
use crate::trace::{Event, Trace, as_shared, qualification};

/// KVM's limit for vCPUs of a TD (`KVM_MAX_VCPUS` there).
const MAX_VCPUS: usize = 576;

/// A recording that no VM can play.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// No access in it.
    #[error(
        "it holds no kvm_page_fault event with an address below the guest's width of {width} bits \
         ({unreadable} lines cannot be read, {out_of_range} addresses are wider)"
    )]
    NoFaults {
        /// Bits.
        width: u32,
        /// Lines that cannot be read.
        unreadable: u64,
        /// Faults that cannot be played.
        out_of_range: u64,
    },
    /// More vCPUs than a TD can have.
    #[error("its events name {count} vcpus, above the limit of {MAX_VCPUS}")]
    TooManyVcpus {
        /// How many.
        count: usize,
    },
}

/// How to read a recording.
#[derive(Debug, Clone)]
pub struct PlanOptions {
    /// What is private.
    pub private: PrivateMemory,
    /// Guest physical address width.
    pub gpaw: Gpaw,
    /// `--hva-base`.
    pub hva_base: Option<u64>,
    /// More guest memory that slots must cover: the initial image.
    pub image: Vec<AddressRange>,
}

/// What to create and what to play.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// vCPU numbers of the recording, ascending; segments count by their place here.
    pub vcpus: Vec<u32>,
    /// Memory slots, ascending.
    pub slots: Vec<SlotPlan>,
    /// Memory that is private from the start.
    pub private: Vec<AddressRange>,
    /// Where guest memory lies in the host.
    pub hva: HvaBase,
    /// What to play, in order.
    pub segments: Vec<Segment>,
    /// Faults that cannot be played: their address is wider than the guest's.
    pub out_of_range: u64,
    /// Unmaps that touch no slot.
    pub unmap_outside: u64,
}

/// Accesses without an unmap between them, and the unmap that ends them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Segment {
    /// In recorded order.
    pub faults: Vec<PlannedFault>,
    /// Applied when all of `faults` are answered.
    pub unmap: Option<UnmapStep>,
}

/// One access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PlannedFault {
    /// Place in [`Plan::vcpus`].
    pub vcpu: usize,
    /// As the guest uses it.
    pub gpa: u64,
    /// Exit qualification bits 5:0.
    pub qualification: u64,
    /// Which tree has to answer.
    pub visibility: Visibility,
}

/// The host takes pages away.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnmapStep {
    /// Host virtual addresses for the notifier.
    pub range: AddressRange,
    /// Private memory in it, given back to guest_memfd.
    pub holes: Vec<Hole>,
}

/// Pages of a slot's guest_memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hole {
    /// The slot.
    pub slot: u32,
    /// Bytes from its start.
    pub offset: u64,
    /// Bytes.
    pub size: u64,
}

impl Plan {
    /// Lays out a VM for `trace`.
    pub fn new(trace: &Trace, options: &PlanOptions) -> Result<Self, PlanError> {
        let placement = Placement::new(options.gpaw, options.private.clone());
        let survey = Survey::of(trace, &placement);
        if survey.first_touch.is_empty() {
            return Err(PlanError::NoFaults {
                width: if options.gpaw == Gpaw::W48 { 48 } else { 52 },
                unreadable: trace.summary.unreadable,
                out_of_range: survey.out_of_range,
            });
        }
        let vcpus: Vec<u32> = survey.vcpus.iter().copied().collect();
        if vcpus.len() > MAX_VCPUS {
            return Err(PlanError::TooManyVcpus { count: vcpus.len() });
        }
        let image = options.image.iter().flat_map(|range| {
            (range.start..range.end).step_by(usize::try_from(PAGE_SIZE).unwrap_or(usize::MAX))
        });
        let slots = layout(survey.first_touch.keys().copied().chain(image));
        let private = private_ranges(&slots, &placement, &survey.first_touch);
        let guest_end = slots.last().map_or(0, |slot| slot.range.end);
        let hva = match options.hva_base {
            Some(base) => HvaBase {
                base,
                source: HvaSource::Given,
            },
            None => hva::infer(&survey.steps, guest_end),
        };
        let mut plan = Self {
            vcpus,
            slots,
            private,
            hva,
            segments: Vec::new(),
            out_of_range: survey.out_of_range,
            unmap_outside: 0,
        };
        plan.fill(trace, &placement);
        Ok(plan)
    }

    /// Faults that will be played.
    pub fn fault_count(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.faults.len() as u64)
            .sum()
    }

    /// Unmaps that will be played.
    pub fn unmap_count(&self) -> u64 {
        self.segments
            .iter()
            .filter(|segment| segment.unmap.is_some())
            .count() as u64
    }

    fn fill(&mut self, trace: &Trace, placement: &Placement) {
        let mut segment = Segment::default();
        for event in &trace.events {
            match event {
                Event::Fault(fault) => {
                    let (Some(placed), Ok(vcpu)) = (
                        placement.place(fault.address),
                        self.vcpus.binary_search(&fault.vcpu),
                    ) else {
                        continue;
                    };
                    let recorded = qualification(fault.error_code);
                    segment.faults.push(PlannedFault {
                        vcpu,
                        gpa: placed.gpa,
                        qualification: match placed.visibility {
                            Visibility::Private => recorded,
                            Visibility::Shared => as_shared(recorded),
                        },
                        visibility: placed.visibility,
                    });
                }
                Event::Unmap(unmap) => match self.unmap(unmap.start, unmap.end) {
                    Some(unmap) => {
                        segment.unmap = Some(unmap);
                        self.segments.push(std::mem::take(&mut segment));
                    }
                    None => self.unmap_outside += 1,
                },
            }
        }
        if !segment.faults.is_empty() {
            self.segments.push(segment);
        }
    }

    /// `None` when no slot is touched.
    fn unmap(&self, start: u64, end: u64) -> Option<UnmapStep> {
        let range = AddressRange {
            start: start & !(PAGE_SIZE - 1),
            end: end.checked_next_multiple_of(PAGE_SIZE)?,
        };
        // A start below guest address 0 is cut off there.
        let guest = AddressRange {
            start: range.start.saturating_sub(self.hva.base),
            end: range.end.checked_sub(self.hva.base)?,
        };
        let mut touched = false;
        let mut holes = Vec::new();
        for slot in &self.slots {
            let Some(part) = slot.range.intersect(guest) else {
                continue;
            };
            touched = true;
            let first = self
                .private
                .partition_point(|private| private.end <= part.start);
            let private = self.private[first..]
                .iter()
                .take_while(|private| private.start < part.end);
            holes.extend(
                private
                    .filter_map(|private| private.intersect(part))
                    .map(|hole| Hole {
                        slot: slot.id,
                        offset: hole.start - slot.range.start,
                        size: hole.size(),
                    }),
            );
        }
        touched.then_some(UnmapStep { range, holes })
    }
}

/// One pass over the events.
#[derive(Default)]
struct Survey {
    vcpus: BTreeSet<u32>,
    /// By page: how it was touched first.
    first_touch: BTreeMap<u64, Visibility>,
    steps: Vec<Step>,
    out_of_range: u64,
}

impl Survey {
    fn of(trace: &Trace, placement: &Placement) -> Self {
        let mut survey = Self::default();
        for event in &trace.events {
            match event {
                Event::Fault(fault) => match placement.place(fault.address) {
                    Some(placed) => {
                        survey.vcpus.insert(fault.vcpu);
                        survey
                            .first_touch
                            .entry(placed.page)
                            .or_insert(placed.visibility);
                        survey.steps.push(Step::Touch(placed.page));
                    }
                    None => survey.out_of_range += 1,
                },
                Event::Unmap(unmap) => survey.steps.push(Step::Unmap(unmap.start)),
            }
        }
        survey
    }
}

/// The private memory of the slots. Under `all` a page whose first recorded access is shared
/// starts as shared memory.
fn private_ranges(
    slots: &[SlotPlan],
    placement: &Placement,
    first_touch: &BTreeMap<u64, Visibility>,
) -> Vec<AddressRange> {
    let shared = first_touch
        .iter()
        .filter(|(_, first)| **first == Visibility::Shared);
    match placement.private() {
        PrivateMemory::None => Vec::new(),
        PrivateMemory::All => {
            let shared = pages::join(shared.map(|(page, _)| *page));
            slots
                .iter()
                .flat_map(|slot| pages::subtract(slot.range, &shared))
                .collect()
        }
        PrivateMemory::Ranges(ranges) => slots
            .iter()
            .flat_map(|slot| {
                ranges
                    .iter()
                    .filter_map(|range| range.intersect(slot.range))
            })
            .collect(),
    }
}

#[cfg(test)]
#[path = "plan_tests.rs"]
mod tests;

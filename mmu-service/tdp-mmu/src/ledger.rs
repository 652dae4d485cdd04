//! What must be known again when this process is gone and another one takes its place.
//!
//! A VM and its host say what they are about to do, before they do it; a [`Ledger`] keeps that
//! where it survives. Private pages and tables are not among it: the module holds them, and
//! [`Recovery`](crate::Recovery) reads them back from there. So a fault writes nothing, and what is
//! kept of a VM stays small.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use tdx_defs::Pfn;

use crate::memory::attributes::PrivateRanges;
use crate::memory::slots::SlotSpec;
use crate::vm::VmConfig;

/// Key id and control pages of a TD.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TdRecord {
    /// TD root page.
    pub tdr: Pfn,
    /// Private key id.
    pub hkid: u32,
    /// TDCX pages, in the order in which they are added.
    pub pages: Vec<Pfn>,
}

/// A vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VcpuRecord {
    /// It was created; false while its creation is under way.
    pub created: bool,
    /// TDVPR, then TDCX pages, from before TDH.VP.CREATE; empty until then.
    pub pages: Vec<Pfn>,
}

/// One thing to be kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Note {
    /// TDH.MNG.CREATE and its followers are about to get these.
    Td(TdRecord),
    /// The VM is no TD: the module has none of its pages.
    NoTd,
    /// TDH.VP.CREATE and its followers are about to get these pages.
    VcpuPages {
        /// Id of the vCPU.
        vcpu_id: u32,
        /// TDVPR first.
        pages: Vec<Pfn>,
    },
    /// The vCPU is there, with the pages said before, or with none.
    Vcpu {
        /// Its id.
        vcpu_id: u32,
    },
    /// The module has none of the vCPU's pages; one that was not created is not there.
    NoVcpuPages {
        /// Its id.
        vcpu_id: u32,
    },
    /// A slot is about to be there, or to change.
    Slot(SlotSpec),
    /// Nothing of a slot is mapped any more; it is about to go.
    NoSlot(u32),
    /// A range of frames is about to have this attribute.
    Attributes {
        /// The frames.
        gfns: Range<u64>,
        /// KVM_MEMORY_ATTRIBUTE_PRIVATE.
        private: bool,
    },
    /// Whether a part of the initial image is on its way into MRTD.
    Measuring(bool),
    /// The settings that can be changed later.
    Settings {
        /// kvm.nx_huge_pages.
        nx_huge_pages: bool,
        /// KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE.
        exit_hypercall: bool,
    },
    /// The module did not let go of a page of guest memory.
    Kept(Pfn),
    /// The VM is about to be taken down.
    Going,
    /// The VM is dead, and why.
    Dead(String),
}

/// The note could not be kept, so what it announces must not happen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct LedgerError {
    /// What went wrong.
    pub reason: String,
}

/// Keeps the notes of one VM.
pub trait Ledger: Send + Sync {
    /// Returns when the note will outlive this process.
    fn note(&self, note: Note) -> Result<(), LedgerError>;
}

/// Keeps which blocks a host split into single pages. All control structures and tables of TDs
/// lie in such blocks.
pub trait PoolLedger: Send + Sync {
    /// The 2 MiB block that begins at `first` is about to be split.
    fn split(&self, first: Pfn) -> Result<(), LedgerError>;
}

/// Keeps nothing: what it is told ends with the process.
pub(crate) struct Forgetful;

impl Ledger for Forgetful {
    fn note(&self, _: Note) -> Result<(), LedgerError> {
        Ok(())
    }
}

/// What is kept of a VM: the sum of its notes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmRecord {
    /// As it was created.
    pub config: VmConfig,
    /// From before TDH.MNG.CREATE until everything is given back.
    pub td: Option<TdRecord>,
    /// By id.
    pub vcpus: BTreeMap<u32, VcpuRecord>,
    /// By id.
    pub slots: BTreeMap<u32, SlotSpec>,
    /// Private frames: disjoint ranges, start → end.
    pub private: BTreeMap<u64, u64>,
    /// A part of the initial image was on its way into MRTD.
    pub measuring: bool,
    /// kvm.nx_huge_pages.
    pub nx_huge_pages: bool,
    /// KVM_CAP_EXIT_HYPERCALL for KVM_HC_MAP_GPA_RANGE.
    pub exit_hypercall: bool,
    /// Pages of guest memory that the module did not let go.
    pub kept: BTreeSet<Pfn>,
    /// It is to be taken down: its creation or its end was under way.
    pub going: bool,
    /// Why it is dead.
    pub dead: Option<String>,
}

impl VmRecord {
    /// Of a new VM, as [`Vm::new`](crate::Vm::new) makes it.
    pub fn new(config: VmConfig) -> Self {
        Self {
            nx_huge_pages: config.nx_huge_pages,
            config,
            td: None,
            vcpus: BTreeMap::new(),
            slots: BTreeMap::new(),
            private: BTreeMap::new(),
            measuring: false,
            exit_hypercall: true,
            kept: BTreeSet::new(),
            going: false,
            dead: None,
        }
    }

    /// Adds a note.
    pub fn apply(&mut self, note: Note) {
        match note {
            Note::Td(td) => self.td = Some(td),
            Note::NoTd => self.td = None,
            Note::VcpuPages { vcpu_id, pages } => {
                self.vcpus.entry(vcpu_id).or_default().pages = pages;
            }
            Note::Vcpu { vcpu_id } => self.vcpus.entry(vcpu_id).or_default().created = true,
            Note::NoVcpuPages { vcpu_id } => {
                if let Some(vcpu) = self.vcpus.get_mut(&vcpu_id)
                    && vcpu.created
                {
                    vcpu.pages.clear();
                } else {
                    self.vcpus.remove(&vcpu_id);
                }
            }
            Note::Slot(spec) => drop(self.slots.insert(spec.slot_id, spec)),
            Note::NoSlot(slot_id) => drop(self.slots.remove(&slot_id)),
            Note::Attributes { gfns, private } => {
                let mut ranges = PrivateRanges::from_parts(std::mem::take(&mut self.private));
                ranges.set(gfns, private);
                self.private = ranges.into_parts();
            }
            Note::Measuring(measuring) => self.measuring = measuring,
            Note::Settings {
                nx_huge_pages,
                exit_hypercall,
            } => {
                self.nx_huge_pages = nx_huge_pages;
                self.exit_hypercall = exit_hypercall;
            }
            Note::Kept(page) => drop(self.kept.insert(page)),
            Note::Going => self.going = true,
            // The first reason is the cause of the others.
            Note::Dead(reason) => drop(self.dead.get_or_insert(reason)),
        }
    }
}

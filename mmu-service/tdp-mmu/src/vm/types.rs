//! What callers pass in and get back.

use bytes::Bytes;
use tdx_defs::{CompletionStatus, Gfn, Gpaw, Hpa, Leaf, Level, Pfn, TdAttributes};

use crate::counts::Counts;
use crate::error::VmError;
use crate::memory::slots::SlotSpec;
use crate::mmu::layout::VmKind;
use crate::mmu::role::RootKind;
use crate::mmu::spte::SpteKind;
use crate::trace::error_code;

/// How changes of the mirror reach the module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum Mode {
    /// Chains and runs: the fewest messages.
    #[default]
    Batched,
    /// One message for each SEAMCALL, in the kernel's order and number.
    Kernel,
}

/// How the dirty log is read (KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum DirtyLogMode {
    /// Reading the log clears it and protects its pages again.
    #[default]
    Protect,
    /// Reading changes nothing, clearing is a call of its own.
    Manual,
    /// The same, and a new log says that every page is dirty.
    ManualInitiallySet,
}

/// What a new VM is like.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmConfig {
    /// TD, or an ordinary VM without private memory and without the module. Of the fields below
    /// an ordinary one has no use for `mode`, `attributes` and `xfam`.
    pub kind: VmKind,
    /// Guest physical address width.
    pub gpaw: Gpaw,
    /// Propagation mode.
    pub mode: Mode,
    /// TD attributes.
    pub attributes: TdAttributes,
    /// Extended features, at least 3.
    pub xfam: u64,
    /// 1 to 576.
    pub max_vcpus: u16,
    /// Huge leaves are split when dirty logging begins, not by the faults that follow
    /// (kvm.eager_page_split).
    pub eager_page_split: bool,
    /// How the dirty log is read.
    pub dirty_log: DirtyLogMode,
    /// The processor logs dirtied pages itself. An ordinary VM's only: TDs have no PML.
    pub pml: bool,
    /// Huge leaves are not executable (kvm.nx_huge_pages). Can be changed later.
    pub nx_huge_pages: bool,
    /// Deleting or moving a slot zaps everything (KVM_X86_QUIRK_SLOT_ZAP_ALL). An ordinary VM's
    /// only.
    pub slot_zap_all: bool,
}

impl Default for VmConfig {
    fn default() -> Self {
        Self {
            kind: VmKind::Td,
            gpaw: Gpaw::W48,
            mode: Mode::Batched,
            attributes: TdAttributes::SEPT_VE_DISABLE,
            xfam: 3,
            max_vcpus: 16,
            eager_page_split: true,
            dirty_log: DirtyLogMode::Protect,
            pml: false,
            nx_huge_pages: false,
            slot_zap_all: true,
        }
    }
}

/// An access of the guest that no translation serves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Fault {
    /// Guest physical address, bytes; the SHARED bit chooses the root.
    pub gpa: u64,
    /// Exit qualification: read 1, write 2, fetch 4; bits 5:3 say what the entry allowed; bit 7
    /// that the address came from a guest walk, bit 8 that it is the access itself.
    pub qualification: u64,
    /// Extended exit qualification of a TD exit: type in bits 3:0, 6 for a page that the guest has
    /// not accepted. 0 when there is none.
    pub extended: u64,
}

impl Fault {
    /// The access that a real KVM reported with a page fault error code: AMD's, or what
    /// kvm_page_fault prints there. A reserved bit needs no saying, the tables know it.
    pub fn from_error_code(gpa: u64, code: u64) -> Self {
        let access = if code & error_code::FETCH != 0 {
            4
        } else if code & error_code::WRITE != 0 {
            2
        } else {
            1
        };
        let present = if code & error_code::PRESENT != 0 {
            1 << 3
        } else {
            0
        };
        let walk = if code & error_code::GUEST_FINAL != 0 {
            1 << 7 | 1 << 8
        } else if code & error_code::GUEST_PAGE != 0 {
            1 << 7
        } else {
            0
        };
        Self {
            gpa,
            qualification: access | present | walk,
            extended: 0,
        }
    }
}

/// `enum RET_PF_*`, arch/x86/kvm/mmu/mmu_internal.h.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RetPf {
    /// Internal to the fault path.
    Continue,
    /// Let the guest try again.
    Retry,
    /// Emulate; for a TD, let the instruction raise #VE.
    Emulate,
    /// Internal to the fault path.
    WriteProtected,
    /// Internal to the fault path.
    Invalid,
    /// A mapping was installed.
    Fixed,
    /// The mapping was there.
    Spurious,
}

/// What became of one fault.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultReport {
    /// KVM's answer.
    pub ret_pf: RetPf,
    /// The root that the address belongs to.
    pub root: RootKind,
    /// Level of the mapping, when there is one.
    pub level: Option<Level>,
    /// The mapped page.
    pub pfn: Option<Pfn>,
    /// The calls, in order.
    pub seamcalls: Vec<(Leaf, CompletionStatus)>,
    /// What it cost.
    pub counts: Counts,
}

/// What became of a batch of faults.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FaultsReport {
    /// Faults that installed a mapping.
    pub fixed: u32,
    /// Faults that found it there.
    pub spurious: u32,
    /// The other ones, at most [`FaultsReport::MAX_OTHERS`].
    pub others: Vec<FaultOutcome>,
    /// How many there were.
    pub others_count: u32,
    /// What the batch cost.
    pub counts: Counts,
}

impl FaultsReport {
    /// Most outcomes that a report lists.
    pub const MAX_OTHERS: usize = 64;
}

/// A fault that ended in anything but FIXED or SPURIOUS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultOutcome {
    /// Its place in the batch.
    pub index: u32,
    /// What it came to.
    pub result: Result<RetPf, VmError>,
}

/// Pages of the initial image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InitRegion {
    /// First address, bytes, page aligned, private.
    pub gpa: u64,
    /// Bytes, page aligned.
    pub size: u64,
    /// Contents; what is missing is zero.
    pub data: Bytes,
    /// Whether MRTD takes the contents.
    pub measure: Measure,
}

/// Whether and when MRTD is extended by the contents of pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Measure {
    /// Only the addition of the page is measured.
    No,
    /// Sixteen extends behind each page (KVM_TDX_MEASURE_MEMORY_REGION).
    Extend,
    /// Only the extends, of pages added before. Model: KVM has no such call; loaders that
    /// measure region by region need it.
    ExtendOnly,
}

/// The entries on the path to an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Walk {
    /// The root that the address belongs to.
    pub root: RootKind,
    /// From the root down.
    pub entries: Vec<WalkEntry>,
    /// Whether the path ends in a present leaf.
    pub mapped: bool,
    /// KVM_MEMORY_ATTRIBUTE_PRIVATE of the frame.
    pub private_attribute: bool,
}

/// One entry on a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WalkEntry {
    /// Paging level.
    pub level: Level,
    /// Index in its table.
    pub index: u16,
    /// The entry.
    pub spte: u64,
    /// What it is.
    pub kind: SpteKind,
    /// Where table or page lies, bytes; 0 for none.
    pub hpa: u64,
    /// The module's page behind a mirror table, bytes; 0 for none.
    pub external_hpa: u64,
    /// RCX and RDX of TDH.MEM.SEPT.RD.
    pub sept: Option<(u64, u64)>,
    /// State of the module's entry.
    pub sept_state: Option<&'static str>,
}

/// A run of neighbouring entries that are alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TreeEntry {
    /// The tree.
    pub root: RootKind,
    /// Paging level.
    pub level: Level,
    /// First frame.
    pub gfn: Gfn,
    /// How many entries, with consecutive pages.
    pub count: u64,
    /// The first entry.
    pub spte: u64,
    /// What it is.
    pub kind: SpteKind,
    /// Where table or page lies, bytes.
    pub hpa: u64,
    /// The module's page behind a mirror table, bytes; 0 for none.
    pub external_hpa: u64,
}

/// A root table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RootInfo {
    /// The tree.
    pub root: RootKind,
    /// KVM's role word.
    pub role: u32,
    /// References: one of the TDP MMU, one for each vCPU that has it loaded.
    pub count: u32,
    /// Where it lies.
    pub hpa: Hpa,
}

/// How mirror, private tree and PAMT compare.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct AuditReport {
    /// Entries compared.
    pub entries: u64,
    /// Entries that do not agree.
    pub mismatches: u64,
    /// The first of them, at most [`AuditReport::MAX_LISTED`].
    pub first_mismatches: Vec<Mismatch>,
    /// FROZEN entries in reachable tables.
    pub frozen: u64,
    /// Present mirror leaves.
    pub leaves: u64,
    /// Linked mirror tables.
    pub tables: u64,
}

impl AuditReport {
    /// Most mismatches that a report lists.
    pub const MAX_LISTED: usize = 64;
}

/// A place where the trees do not agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mismatch {
    /// First address of the entry, bytes.
    pub gpa: u64,
    /// Its level.
    pub level: Level,
    /// What differs.
    pub reason: String,
}

/// What a VM is and has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmInfo {
    /// TD or ordinary VM.
    pub kind: VmKind,
    /// "uninitialized", "initialized", "runnable", "bugged" or "dead".
    pub state: &'static str,
    /// Why, for a bugged or dead VM.
    pub reason: Option<String>,
    /// Guest physical address width.
    pub gpaw: Gpaw,
    /// Propagation mode.
    pub mode: Mode,
    /// vCPUs created.
    pub vcpus: u32,
    /// Key id, while one is assigned.
    pub hkid: Option<u32>,
    /// TD root page.
    pub tdr: Hpa,
    /// Build-time measurement, once finalised.
    pub mrtd: Option<[u8; 48]>,
    /// Memory slots, ascending by address.
    pub slots: Vec<SlotSpec>,
    /// Present 4 KiB leaves, both trees.
    pub pages_4k: u64,
    /// Present 2 MiB leaves.
    pub pages_2m: u64,
    /// Present 1 GiB leaves.
    pub pages_1g: u64,
}

/// Counters of a VM since its creation.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Stats {
    /// What all operations did.
    pub counts: Counts,
    /// Present 4 KiB leaves, both trees.
    pub pages_4k: u64,
    /// Present 2 MiB leaves.
    pub pages_2m: u64,
    /// Present 1 GiB leaves.
    pub pages_1g: u64,
    /// Every kvm_flush_remote_tlbs.
    pub remote_tlb_flush_requests: u64,
    /// Tables that stand where the NX mitigation forbids a huge page.
    pub nx_lpage_splits: u64,
    /// Bytes of mirror and direct tables.
    pub page_table_bytes: u64,
}

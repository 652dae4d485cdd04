//! VMs, vCPUs and looking at them.

use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};
use mirror_proto::mmu::{DirtyLogMode, Root, VmKind};

use super::ModeArg;
use super::number::{number, number32};

/// `mmuctl vm`.
#[derive(Debug, Subcommand)]
pub enum VmCommand {
    /// Create a TD and initialise it (KVM_CREATE_VM, KVM_TDX_INIT_VM)
    Create(VmCreateArgs),
    /// Make a VM that was only created a TD (KVM_TDX_INIT_VM)
    Init(VmArg),
    /// List the VMs
    List,
    /// Show one VM
    Show(VmArg),
    /// Destroy a VM
    Destroy(VmArg),
    /// Add pages to the initial image (KVM_TDX_INIT_MEM_REGION)
    InitRegion(InitRegionArgs),
    /// End the build: the TD can run and private memory can fault (KVM_TDX_FINALIZE_VM)
    Finalize(VmArg),
}

/// `mmuctl vm create`.
#[derive(Debug, Args)]
pub struct VmCreateArgs {
    /// Guest physical address width in bits: 48 or 52
    #[arg(long, value_name = "BITS", default_value = "48", value_parser = number32)]
    pub gpaw: u32,
    /// How changes of the mirror reach the module
    #[arg(long, value_enum, default_value_t)]
    pub mode: ModeArg,
    /// TD attributes; default: SEPT_VE_DISABLE
    #[arg(long, value_name = "BITS", value_parser = number)]
    pub attributes: Option<u64>,
    /// XFAM; default: 3
    #[arg(long, value_name = "BITS", default_value = "0", hide_default_value = true, value_parser = number)]
    pub xfam: u64,
    /// Most vCPUs
    #[arg(long, value_name = "N", default_value = "16", value_parser = number32)]
    pub max_vcpus: u32,
    /// A name for people
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    pub label: String,
    /// Create the VM only; `vm init` makes it a TD
    #[arg(long)]
    pub create_only: bool,
    /// A TD, or an ordinary VM without private memory
    #[arg(long, value_enum, default_value_t)]
    pub kind: VmKindArg,
    /// Whether huge leaves are split when a dirty log begins (kvm.eager_page_split)
    #[arg(long, value_name = "BOOL", default_value_t = true, action = clap::ArgAction::Set)]
    pub eager_page_split: bool,
    /// How the dirty log is read
    #[arg(long, value_enum, value_name = "HOW", default_value_t)]
    pub dirty_log: DirtyLogArg,
    /// The processor logs dirtied pages itself; ordinary VMs only
    #[arg(long)]
    pub pml: bool,
    /// Huge leaves are not executable (kvm.nx_huge_pages)
    #[arg(long)]
    pub nx_huge_pages: bool,
    /// Whether deleting or moving a slot zaps everything (KVM_X86_QUIRK_SLOT_ZAP_ALL); ordinary
    /// VMs only, where the default is true
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub slot_zap_all: Option<bool>,
}

/// What kind of guest a VM is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum VmKindArg {
    /// A TDX guest.
    #[default]
    Td,
    /// No private memory, and no call to the module.
    Ordinary,
}

impl VmKindArg {
    /// The wire's word.
    pub fn to_wire(self) -> VmKind {
        match self {
            Self::Td => VmKind::Td,
            Self::Ordinary => VmKind::Ordinary,
        }
    }
}

/// How a dirty log is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DirtyLogArg {
    /// Reading clears, and protects again.
    #[default]
    Protect,
    /// Clearing is a call of its own.
    Manual,
    /// The same, and a new log says that every page is dirty.
    ManualInitiallySet,
}

impl DirtyLogArg {
    /// The wire's word.
    pub fn to_wire(self) -> DirtyLogMode {
        match self {
            Self::Protect => DirtyLogMode::Protect,
            Self::Manual => DirtyLogMode::Manual,
            Self::ManualInitiallySet => DirtyLogMode::ManualInitiallySet,
        }
    }
}

/// A VM, by position or by `--vm`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("which").required(true).args(["id", "vm"]))]
pub struct VmArg {
    /// The VM
    #[arg(value_name = "ID", value_parser = number)]
    id: Option<u64>,
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    vm: Option<u64>,
}

impl VmArg {
    /// The VM's number.
    pub fn vm_id(&self) -> u64 {
        // The argument group sees to it that one of the two is there; no VM has the number 0.
        self.id.or(self.vm).unwrap_or(0)
    }
}

/// `mmuctl vm init-region`.
#[derive(Debug, Args)]
pub struct InitRegionArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The vCPU
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub vcpu: u32,
    /// First guest physical address
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: u64,
    /// Bytes; default: the size of the data, rounded up to pages
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: Option<u64>,
    /// Contents; zero without it, and behind its end
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Extend MRTD by the contents (KVM_TDX_MEASURE_MEMORY_REGION)
    #[arg(long)]
    pub measure: bool,
}

/// `mmuctl vcpu`.
#[derive(Debug, Subcommand)]
pub enum VcpuCommand {
    /// Add vCPUs to a VM (KVM_CREATE_VCPU, KVM_TDX_INIT_VCPU)
    Add {
        /// The VM
        #[arg(long, value_name = "ID", value_parser = number)]
        vm: u64,
        /// How many
        #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=576))]
        count: u32,
        /// Create them only; `vcpu init` makes them known to the module
        #[arg(long)]
        create_only: bool,
    },
    /// Make a vCPU that was only created known to the module (KVM_TDX_INIT_VCPU)
    Init {
        /// The VM
        #[arg(long, value_name = "ID", value_parser = number)]
        vm: u64,
        /// The vCPU
        #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
        vcpu: u32,
    },
}

/// `mmuctl walk`.
#[derive(Debug, Args)]
pub struct WalkArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// Guest physical address; the SHARED bit chooses the root
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: u64,
}

/// A page table tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TreeRoot {
    /// Shared memory.
    Direct,
    /// Private memory.
    Mirror,
    /// Both trees.
    Both,
}

impl TreeRoot {
    /// The wire's word; unspecified means both.
    pub fn to_wire(self) -> Root {
        match self {
            Self::Direct => Root::Direct,
            Self::Mirror => Root::Mirror,
            Self::Both => Root::Unspecified,
        }
    }
}

/// `mmuctl tree`.
#[derive(Debug, Args)]
pub struct TreeArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// Which tree
    #[arg(long, value_enum, default_value_t = TreeRoot::Both)]
    pub root: TreeRoot,
    /// Lowest level to show, from 1 (4 KiB entries) to 5
    #[arg(long, value_name = "LEVEL", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=5))]
    pub min_level: u32,
}

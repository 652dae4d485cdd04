//! Slots, faults and ranges.

use clap::{Args, Subcommand, ValueEnum};

use mirror_proto::mmu::HostPageSize;

use super::number::{number, number32};

/// `mmuctl slot`.
#[derive(Debug, Subcommand)]
pub enum SlotCommand {
    /// Create a slot, or change it (KVM_SET_USER_MEMORY_REGION2)
    Set(SlotSetArgs),
    /// Delete a slot
    Delete(SlotDeleteArgs),
}

/// `mmuctl slot set`.
#[derive(Debug, Args)]
pub struct SlotSetArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The slot
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub slot: u32,
    /// First guest physical address
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: u64,
    /// Bytes
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: u64,
    /// Host virtual address of the first byte; default: 0x7f0000000000 + gpa
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub hva: Option<u64>,
    /// Whether private pages come from a guest_memfd; default: true, but for a dirty log and in an
    /// ordinary VM, which has none
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    pub guest_memfd: Option<bool>,
    /// The guest may not write (KVM_MEM_READONLY)
    #[arg(long)]
    pub read_only: bool,
    /// Log dirty pages (KVM_MEM_LOG_DIRTY_PAGES); can be changed while the slot is there
    #[arg(long)]
    pub log_dirty: bool,
    /// Pages that the host maps user memory with, where alignment allows it; counts when the slot
    /// is created
    #[arg(long, value_enum, value_name = "SIZE", default_value_t)]
    pub host_page_size: HostPageSizeArg,
    /// Reads of user memory that nobody wrote get the zero page; counts when the slot is created
    #[arg(long)]
    pub demand_zero: bool,
}

/// Page sizes of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum HostPageSizeArg {
    /// 4 KiB.
    #[default]
    #[value(name = "4K", alias = "4k")]
    Size4K,
    /// 2 MiB.
    #[value(name = "2M", alias = "2m")]
    Size2M,
    /// 1 GiB.
    #[value(name = "1G", alias = "1g")]
    Size1G,
}

impl HostPageSizeArg {
    /// The wire's word.
    pub fn to_wire(self) -> HostPageSize {
        match self {
            Self::Size4K => HostPageSize::HostPageSize4k,
            Self::Size2M => HostPageSize::HostPageSize2m,
            Self::Size1G => HostPageSize::HostPageSize1g,
        }
    }
}

/// `mmuctl slot delete`.
#[derive(Debug, Args)]
pub struct SlotDeleteArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The slot
    #[arg(long, value_name = "N", value_parser = number32)]
    pub slot: u32,
}

/// `mmuctl fault`.
#[derive(Debug, Args)]
pub struct FaultArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The vCPU
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub vcpu: u32,
    /// Guest physical address; the SHARED bit chooses the root
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: u64,
    /// A write; a read without --write and --exec
    #[arg(long)]
    pub write: bool,
    /// An instruction fetch
    #[arg(long)]
    pub exec: bool,
    /// The exit says that the guest has not accepted the page; such a guest ends
    #[arg(long)]
    pub pending: bool,
    /// Show what happened in each process, with times
    #[arg(long)]
    pub explain: bool,
}

/// `mmuctl prefault`.
#[derive(Debug, Args)]
pub struct PrefaultArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The vCPU
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub vcpu: u32,
    /// First guest physical address, without the SHARED bit
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: u64,
    /// Bytes
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: u64,
}

/// What memory becomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Visibility {
    /// Under the TD's key.
    Private,
    /// Seen by the host.
    Shared,
}

impl Visibility {
    /// `KVM_MEMORY_ATTRIBUTE_PRIVATE` or nothing.
    pub fn attributes(self) -> u64 {
        match self {
            Self::Private => 1 << 3,
            Self::Shared => 0,
        }
    }
}

/// `mmuctl convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// First guest physical address, without the SHARED bit
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: u64,
    /// Bytes
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: u64,
    /// What the range becomes
    #[arg(long, value_enum)]
    pub to: Visibility,
}

/// `mmuctl punch-hole`: by place in a slot's file, or by guest address.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("place").required(true).args(["offset", "gpa"]))]
pub struct PunchHoleArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The slot, with --offset
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32, conflicts_with = "gpa")]
    pub slot: u32,
    /// Bytes from the start of the slot's guest_memfd
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub offset: Option<u64>,
    /// First guest physical address, without the SHARED bit, in place of --slot and --offset
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: Option<u64>,
    /// Bytes
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: u64,
}

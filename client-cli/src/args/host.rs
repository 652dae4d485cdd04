//! The host's side of shared memory: its mappings, protection against writes, the guest's
//! processor, huge pages without X.

use clap::{Args, Subcommand, ValueEnum};

use mirror_proto::mmu::HostChange;

use super::memory::HostPageSizeArg;
use super::number::{number, number32};

/// `mmuctl host`.
#[derive(Debug, Subcommand)]
pub enum HostCommand {
    /// The host maps a range otherwise: the VM is told (kvm_unmap_hva_range), then it changes
    Change(HostChangeArgs),
    /// The VM is told to let go of a range, and nothing changes (kvm_unmap_hva_range)
    Unmap(HostUnmapArgs),
}

/// `mmuctl host change`.
#[derive(Debug, Args)]
pub struct HostChangeArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// First host virtual address
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub hva: u64,
    /// Bytes
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: u64,
    /// What becomes of it
    #[arg(long, value_enum, value_name = "CHANGE")]
    pub to: HostChangeArg,
    /// Pages to map it with
    #[arg(
        long,
        value_enum,
        value_name = "SIZE",
        required_if_eq("to", "page-size")
    )]
    pub page_size: Option<HostPageSizeArg>,
    /// The VM is not told: it was before, or the guest has not touched the range
    #[arg(long)]
    pub silent: bool,
}

/// What the host does with user memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HostChangeArg {
    /// Pages are given up, the next access gets new ones.
    Drop,
    /// Pages are given up, a read gets the zero page (MADV_DONTNEED).
    Zero,
    /// Reads only (mprotect).
    ReadOnly,
    /// Reads and writes again.
    ReadWrite,
    /// Nothing: accesses fail with EFAULT (munmap).
    None,
    /// Pages of another size.
    PageSize,
    /// Somebody else has the pages, too: a write gets a copy (fork).
    Share,
    /// The host writes: pages come, shared ones become the VM's own.
    Write,
}

impl HostChangeArg {
    /// The wire's word.
    pub fn to_wire(self) -> HostChange {
        match self {
            Self::Drop => HostChange::Drop,
            Self::Zero => HostChange::DropToZero,
            Self::ReadOnly => HostChange::ReadOnly,
            Self::ReadWrite => HostChange::ReadWrite,
            Self::None => HostChange::NoAccess,
            Self::PageSize => HostChange::PageSize,
            Self::Share => HostChange::Share,
            Self::Write => HostChange::Write,
        }
    }
}

/// `mmuctl host unmap`.
#[derive(Debug, Args)]
pub struct HostUnmapArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// First host virtual address
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub hva: u64,
    /// Bytes
    #[arg(long, value_name = "SIZE", value_parser = number)]
    pub size: u64,
}

/// `mmuctl write-protect`.
#[derive(Debug, Args)]
pub struct WriteProtectArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// Every shared leaf of a slot; writes come back through the fast path
    #[arg(
        long,
        value_name = "N",
        required_unless_present = "gpa",
        conflicts_with = "gpa",
        value_parser = number32
    )]
    pub slot: Option<u32>,
    /// The leaf of one frame, without the SHARED bit, for good
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: Option<u64>,
    /// Whether somebody wants to see every write of the frame from now on
    #[arg(long, value_name = "BOOL", conflicts_with = "slot", action = clap::ArgAction::Set)]
    pub track: Option<bool>,
}

/// `mmuctl touch`.
#[derive(Debug, Args)]
pub struct TouchArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// First guest physical address; shared memory only
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub gpa: u64,
    /// How many addresses, at most 4096
    #[arg(long, value_name = "N", default_value = "1", value_parser = number32)]
    pub count: u32,
    /// Bytes between two of them
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = number)]
    pub stride: u64,
    /// Write; default: read
    #[arg(long)]
    pub write: bool,
}

/// `mmuctl nx`.
#[derive(Debug, Subcommand)]
pub enum NxCommand {
    /// Switch the mitigation: huge pages without X, split where the guest executes
    Set(NxSetArgs),
    /// Give up the oldest tables that were split for it, as its recovery thread does
    Recover(NxRecoverArgs),
}

/// `mmuctl nx set`.
#[derive(Debug, Args)]
pub struct NxSetArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// Whether huge pages come without X from now on
    #[arg(value_name = "BOOL", action = clap::ArgAction::Set)]
    pub on: bool,
}

/// `mmuctl nx recover`.
#[derive(Debug, Args)]
pub struct NxRecoverArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// At most so many tables
    #[arg(long, value_name = "N", default_value = "1", value_parser = number32)]
    pub most: u32,
}

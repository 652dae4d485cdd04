//! The direct root at work: dirty logs, aging, zaps, tracepoints.

use clap::{Args, Subcommand};

use super::number::{number, number32};

/// `mmuctl dirty-log`.
#[derive(Debug, Subcommand)]
pub enum DirtyLogCommand {
    /// Which pages were written (KVM_GET_DIRTY_LOG)
    Get(DirtyLogGetArgs),
    /// Clear pages and protect them again (KVM_CLEAR_DIRTY_LOG)
    Clear(DirtyLogClearArgs),
    /// Begin or end a log, with all else of the slot as it is
    Set(DirtyLogSetArgs),
}

/// `mmuctl dirty-log get`.
#[derive(Debug, Args)]
pub struct DirtyLogGetArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The slot
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub slot: u32,
}

/// `mmuctl dirty-log clear`.
#[derive(Debug, Args)]
pub struct DirtyLogClearArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The slot
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub slot: u32,
    /// First page of the slot to clear
    #[arg(long, value_name = "PAGE", default_value = "0", value_parser = number)]
    pub first: u64,
    /// How many pages
    #[arg(long, value_name = "N", value_parser = number)]
    pub pages: u64,
}

/// `mmuctl dirty-log set`.
#[derive(Debug, Args)]
pub struct DirtyLogSetArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The slot
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub slot: u32,
    /// Whether pages are logged from now on
    #[arg(value_name = "BOOL", action = clap::ArgAction::Set)]
    pub on: bool,
}

/// `mmuctl age`.
#[derive(Debug, Args)]
pub struct AgeArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// First host virtual address
    #[arg(long, value_name = "ADDR", value_parser = number)]
    pub hva: u64,
    /// Bytes; with --test one page
    #[arg(long, value_name = "SIZE", default_value = "4K", value_parser = number)]
    pub size: u64,
    /// Only look (kvm_test_age_hva)
    #[arg(long)]
    pub test: bool,
}

/// `mmuctl zap`.
#[derive(Debug, Args)]
pub struct ZapArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// First guest physical address, without the SHARED bit; without it everything goes
    #[arg(long, value_name = "ADDR", requires = "size", value_parser = number)]
    pub gpa: Option<u64>,
    /// Bytes
    #[arg(long, value_name = "SIZE", requires = "gpa", value_parser = number)]
    pub size: Option<u64>,
}

/// `mmuctl zap-fast`.
#[derive(Debug, Args)]
pub struct ZapFastArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
}

/// `mmuctl events`.
#[derive(Debug, Args)]
pub struct EventsArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// End after so many events; default: with the VM, or when interrupted
    #[arg(long, value_name = "N", value_parser = number)]
    pub count: Option<u64>,
    /// Events that may wait for a slow reader before the oldest are lost
    #[arg(long, value_name = "N", default_value = "65536", value_parser = number32)]
    pub buffer: u32,
}

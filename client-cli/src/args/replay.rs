//! `demo` and `replay`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::number::{hex_number, number32};
use super::{ModeArg, PrivateMemory};

/// `mmuctl demo`.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Leave the VM of the second run where it is, to look at: not with services of its own
    #[arg(long)]
    pub keep: bool,
}

/// Which events of a recording may overtake each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Order {
    /// None: the order of the file.
    #[default]
    Recorded,
    /// Those of different vCPUs: each vCPU plays its own events, beside the others.
    PerVcpu,
}

impl Order {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Recorded => "recorded",
            Self::PerVcpu => "per-vcpu",
        }
    }
}

/// `mmuctl replay`.
#[derive(Debug, Args)]
pub struct ReplayArgs {
    /// The recording, plain or compressed with zstd; - is standard input
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Private memory: all, none, or ranges START-END in hexadecimal, END exclusive, with commas
    /// between them
    #[arg(long, value_name = "WHAT", default_value = "all")]
    pub private: PrivateMemory,
    /// How changes of the mirror reach the module
    #[arg(long, value_enum, default_value_t)]
    pub mode: ModeArg,
    /// Which events may overtake each other
    #[arg(long, value_enum, default_value_t)]
    pub order: Order,
    /// The guest accepts each private page once it is mapped (TDG.MEM.PAGE.ACCEPT)
    #[arg(long)]
    pub accept: bool,
    /// Host virtual address of guest physical address 0, for kvm_unmap_hva_range; default:
    /// inferred from the recording
    #[arg(long, value_name = "HEX", value_parser = hex_number)]
    pub hva_base: Option<u64>,
    /// Write a page about the replay, for a browser; plays the recording in both modes
    #[arg(long, value_name = "FILE.html")]
    pub report: Option<PathBuf>,
    /// With --report: play the recording in one mode only, that of --mode
    #[arg(long, requires = "report")]
    pub one_mode: bool,
    /// A line that cannot be read is an error
    #[arg(long)]
    pub strict: bool,
    /// Guest physical address width in bits: 48 or 52
    #[arg(long, value_name = "BITS", default_value = "48", value_parser = number32)]
    pub gpaw: u32,
}

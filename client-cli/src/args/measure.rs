//! `measure`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::ModeArg;
use super::number::number32;

/// In which order pages are added and measured. MRTD depends on it, and hosts differ.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum MeasureOrder {
    /// A page and its sixteen chunks, then the next page: KVM_TDX_INIT_MEM_REGION.
    #[default]
    PerPage,
    /// All pages of a section, then all chunks of that section.
    PerRegion,
}

impl MeasureOrder {
    /// As on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::PerPage => "per-page",
            Self::PerRegion => "per-region",
        }
    }
}

/// `mmuctl measure`.
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// A firmware image with TDX metadata, such as OVMF.fd
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// In which order pages are added and measured
    #[arg(long, value_enum, default_value_t)]
    pub order: MeasureOrder,
    /// How changes of the mirror reach the module
    #[arg(long, value_enum, default_value_t)]
    pub mode: ModeArg,
    /// Guest physical address width in bits: 48 or 52
    #[arg(long, value_name = "BITS", default_value = "48", value_parser = number32)]
    pub gpaw: u32,
}

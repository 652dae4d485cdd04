//! `compare`.

use std::path::PathBuf;

use clap::Args;

/// `mmuctl compare`.
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Marked recordings of a real KVM: the text of tracefs' trace file; .zst too, `-` is standard
    /// input
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

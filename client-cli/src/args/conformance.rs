//! `conformance`.

use std::path::PathBuf;

use clap::Args;

/// `mmuctl conformance`.
#[derive(Debug, Args)]
pub struct ConformanceArgs {
    /// Recorded sequences, one JSON object a line; .zst too, `-` is standard input
    #[arg(required = true, value_name = "FILE")]
    pub files: Vec<PathBuf>,
}

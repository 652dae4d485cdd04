//! The program `mmu-service`; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    mmu_service::cli_main(std::env::args_os())
}

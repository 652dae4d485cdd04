//! The program `mmuctl`; see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    client_cli::cli_main(std::env::args_os())
}

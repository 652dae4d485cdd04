//! The service binary; everything is in the library, so that `mmuctl` can host it too.

use std::process::ExitCode;

fn main() -> ExitCode {
    tdx_module_svc::cli_main(std::env::args_os())
}

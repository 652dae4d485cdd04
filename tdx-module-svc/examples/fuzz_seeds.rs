//! Writes the inputs that fuzzing of the module's RPCs begins with, into the folder that is given:
//! `execute` gets requests, `requests` gets scripts of calls.

use std::path::PathBuf;

use prost::Message as _;
use tdx_module_svc::fuzz;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1);
    let folder = folder.map_or_else(|| PathBuf::from("."), PathBuf::from);
    let write = |target: &str, name: &str, bytes: Vec<u8>| {
        let folder = folder.join(target);
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join(format!("seed-{name}")), bytes)
    };
    for (name, request) in fuzz::seeds() {
        write("execute", name, request.encode_to_vec())?;
    }
    for (name, script) in fuzz::request_seeds() {
        write("requests", name, script)?;
    }
    Ok(())
}

//! Writes the inputs that fuzzing of Execute requests begins with, into the folder that is given.

use std::path::PathBuf;

use prost::Message as _;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1);
    let folder = folder.map_or_else(|| PathBuf::from("."), PathBuf::from);
    std::fs::create_dir_all(&folder)?;
    for (name, request) in tdx_module_svc::fuzz::seeds() {
        std::fs::write(folder.join(format!("seed-{name}")), request.encode_to_vec())?;
    }
    Ok(())
}

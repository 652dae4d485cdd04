//! Writes the inputs that fuzzing of the service begins with, into the folder that is given: `mmu`
//! gets scripts of calls, `state` gets damage of the state.

use std::path::PathBuf;

use mmu_service::fuzz;

fn main() -> std::io::Result<()> {
    let folder = std::env::args_os().nth(1);
    let folder = folder.map_or_else(|| PathBuf::from("."), PathBuf::from);
    for (target, seeds) in [
        ("mmu", fuzz::request_seeds()),
        ("state", fuzz::state_seeds()),
    ] {
        let folder = folder.join(target);
        std::fs::create_dir_all(&folder)?;
        for (name, bytes) in seeds {
            std::fs::write(folder.join(format!("seed-{name}")), bytes)?;
        }
    }
    Ok(())
}

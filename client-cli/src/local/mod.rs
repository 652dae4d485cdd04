//! `--local`: both services as child processes of this one, on Unix sockets in a private
//! directory.
//!
//! mmuctl links both services and runs itself again for each, see [`child`].
//!
//! Invariants
//! - C1  The children end when this process ends, however it ends: their stdin is a pipe whose
//!   other end only this process holds, and end of file means stop.
//! - C2  The directory is readable by its owner alone and is gone afterwards.
//! - C3  Signals of the terminal reach this process only: the children have a process group of
//!   their own, so that a VM can still be destroyed behind Ctrl-C.

pub mod child;
mod process;

use std::path::{Path, PathBuf};
use std::time::Duration;

use tempfile::TempDir;

use crate::stop::Stop;
use child::Role;
pub(crate) use process::Process;

/// Memory of both processes, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ProcessMemory {
    /// Resident set of the MMU service.
    pub mmu: u64,
    /// Resident set of the module.
    pub module: u64,
}

/// How long a service may take until it is serving.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// Longest path of a Unix socket (`sun_path`), its terminating zero left out.
const MAX_SOCKET_PATH_BYTES: usize = 107;

/// The services cannot be started or did not stay.
#[derive(Debug, thiserror::Error)]
pub enum LocalError {
    /// No directory for the sockets.
    #[error("cannot make a directory for the sockets")]
    Directory(#[source] std::io::Error),
    /// A socket path that the system cannot take.
    #[error(
        "socket path {path} is above the limit of {MAX_SOCKET_PATH_BYTES} bytes: set TMPDIR to a shorter one"
    )]
    SocketPath {
        /// The path.
        path: PathBuf,
    },
    /// This program's own file is not to be found.
    #[error("cannot find the program itself")]
    Program(#[source] std::io::Error),
    /// A child process cannot be made.
    #[error("cannot start the {role}")]
    Spawn {
        /// Which one.
        role: Role,
        /// Why.
        #[source]
        source: std::io::Error,
    },
    /// A child ended by itself.
    #[error("the {role} ended by itself ({status}){}", said(.stderr))]
    Ended {
        /// Which one.
        role: Role,
        /// How.
        status: String,
        /// The end of what it wrote to stderr.
        stderr: String,
    },
    /// A child does not serve.
    #[error("the {role} was not serving within {} s{}", .limit.as_secs(), said(.stderr))]
    NotReady {
        /// Which one.
        role: Role,
        /// How long it was waited for.
        limit: Duration,
        /// The end of what it wrote to stderr.
        stderr: String,
        /// The last answer to the health check.
        #[source]
        source: Option<transport::HealthError>,
    },
    /// Ctrl-C or SIGTERM came first.
    #[error("interrupted")]
    Interrupted,
}

fn said(stderr: &str) -> String {
    if stderr.is_empty() {
        String::new()
    } else {
        format!("; it said:\n{stderr}")
    }
}

/// What the services get beside what they need.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// Options of the module.
    pub module: &'a [&'a str],
    /// Options of the MMU service.
    pub mmu: &'a [&'a str],
    /// Variables of both, beside and in place of those that this process has.
    pub environment: &'a [(&'a str, &'a str)],
}

/// Both services, running.
#[derive(Debug)]
pub struct Local {
    // Fields are dropped in this order: the processes end before their directory goes.
    mmu: Process,
    module: Process,
    directory: TempDir,
}

impl Local {
    /// Starts both and waits until both are serving.
    pub async fn start(stop: &Stop, more: Options<'_>) -> Result<Self, LocalError> {
        let directory = directory()?;
        let program = std::env::current_exe().map_err(LocalError::Program)?;
        let socket = |role: Role| socket_url(directory.path(), role);
        let module_url = socket(Role::Module)?;
        let mmu_url = socket(Role::Mmu)?;
        let spawn = |role: Role, options: &[&str]| {
            Process::spawn_in(&program, role, options, more.environment)
        };
        let options = [&["--listen", &module_url], more.module].concat();
        let mut module = spawn(Role::Module, &options)?;
        module.ready(&module_url, READY_LIMIT, stop).await?;
        // Short: nobody needs the VMs that an interrupted command leaves behind.
        let options = [
            "--listen",
            &mmu_url,
            "--module",
            &module_url,
            "--drain-s",
            "2",
        ];
        let options = [&options, more.mmu].concat();
        let mut mmu = spawn(Role::Mmu, &options)?;
        mmu.ready(&mmu_url, READY_LIMIT, stop).await?;
        Ok(Self {
            mmu,
            module,
            directory,
        })
    }

    /// Where the MMU service listens.
    pub fn mmu_url(&self) -> &str {
        self.mmu.url()
    }

    /// Where the module listens.
    pub fn module_url(&self) -> &str {
        self.module.url()
    }

    /// Resident memory of both; `None` once one has ended.
    pub fn memory(&self) -> Option<ProcessMemory> {
        Some(ProcessMemory {
            mmu: self.mmu.resident_bytes()?,
            module: self.module.resident_bytes()?,
        })
    }

    /// A child that ended although nobody asked it to: the cause behind a connection that broke.
    pub async fn obituary(&mut self) -> Option<LocalError> {
        match self.module.ended().await {
            Some(ended) => Some(ended),
            None => self.mmu.ended().await,
        }
    }

    /// Stops both, the MMU service first since it still talks to the module, and removes the
    /// directory.
    pub async fn stop(self) {
        self.mmu.stop().await;
        self.module.stop().await;
        // What cannot be removed stays; the temporary directory of the system is the place for it.
        let _ = self.directory.close();
    }
}

pub(crate) fn directory() -> Result<TempDir, LocalError> {
    use std::os::unix::fs::PermissionsExt as _;
    tempfile::Builder::new()
        .prefix("mmuctl-")
        .permissions(std::fs::Permissions::from_mode(0o700))
        .tempdir()
        .map_err(LocalError::Directory)
}

pub(crate) fn socket_url(directory: &Path, role: Role) -> Result<String, LocalError> {
    let path = directory.join(role.socket_name());
    if path.as_os_str().len() > MAX_SOCKET_PATH_BYTES {
        return Err(LocalError::SocketPath { path });
    }
    Ok(format!("unix://{}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_belongs_to_its_owner_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = directory().unwrap();
        let mode = std::fs::metadata(directory.path())
            .unwrap()
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o700);
    }

    #[test]
    fn a_path_that_no_socket_can_have_is_refused() {
        let long = PathBuf::from("/").join("d".repeat(120));
        let error = socket_url(&long, Role::Module).unwrap_err().to_string();
        assert!(error.contains("limit of 107 bytes"), "{error}");
        assert_eq!(
            socket_url(Path::new("/tmp/x"), Role::Mmu).unwrap(),
            "unix:///tmp/x/mmu.sock"
        );
    }
}

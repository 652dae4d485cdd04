//! What a child process of `--local` does: it is one of the services, until its stdin ends.
//!
//! Source: the hidden first arguments `__module` and `__mmu` of mmuctl, never typed by people.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};

/// How long a service may take to end in order once its parent is gone.
const ORDERLY_END: Duration = Duration::from_secs(3);

/// Which service a child is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The TDX module.
    Module,
    /// The MMU service.
    Mmu,
}

impl Role {
    /// The role that a hidden first argument asks for.
    pub fn from_argument(argument: &OsStr) -> Option<Self> {
        [Self::Module, Self::Mmu]
            .into_iter()
            .find(|role| argument == role.argument())
    }

    /// The hidden first argument.
    pub(super) fn argument(self) -> &'static str {
        match self {
            Self::Module => "__module",
            Self::Mmu => "__mmu",
        }
    }

    /// The socket's name in the private directory.
    pub(super) fn socket_name(self) -> &'static str {
        match self {
            Self::Module => "module.sock",
            Self::Mmu => "mmu.sock",
        }
    }

    fn serve(self, arguments: Vec<OsString>) -> ExitCode {
        match self {
            Self::Module => tdx_module_svc::cli_main(arguments),
            Self::Mmu => mmu_service::cli_main(arguments),
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Module => "TDX module",
            Self::Mmu => "MMU service",
        })
    }
}

/// Is the service, with the options behind the hidden argument.
pub fn run(role: Role, program: OsString, options: Vec<OsString>) -> ExitCode {
    let socket = own_socket(&options);
    let watched = socket.clone();
    let watcher = std::thread::Builder::new()
        .name("parent".into())
        .spawn(move || follow_parent(watched.as_deref()));
    if watcher.is_err() {
        // Serving without the watcher could outlive the parent.
        return ExitCode::FAILURE;
    }
    let code = role.serve([program].into_iter().chain(options).collect());
    remove(socket.as_deref());
    code
}

/// Waits until the parent is gone, then ends the service: in order first, so that its last spans
/// get out, by force when that takes too long.
fn follow_parent(socket: Option<&Path>) {
    // An error means that there is no pipe to a parent any more, the same as its end.
    let _ = io::copy(&mut io::stdin().lock(), &mut io::sink());
    // Before the signal: without a handler, early in the start, it ends the process here.
    remove(socket);
    let _ = kill_process(getpid(), Signal::TERM);
    std::thread::sleep(ORDERLY_END);
    remove(socket);
    std::process::exit(1);
}

/// The path behind `--listen unix://`.
fn own_socket(options: &[OsString]) -> Option<PathBuf> {
    let at = options.iter().position(|option| option == "--listen")?;
    let url = options.get(at + 1)?.to_str()?;
    url.strip_prefix("unix://").map(PathBuf::from)
}

/// Removes the socket, and the private directory when it was the last one. The parent removes
/// both as well: whoever comes second finds nothing, which is fine.
fn remove(socket: Option<&Path>) {
    if let Some(socket) = socket {
        let _ = std::fs::remove_file(socket);
        if let Some(directory) = socket.parent() {
            let _ = std::fs::remove_dir(directory);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hidden_arguments_name_the_roles() {
        for (argument, role) in [
            ("__module", Some(Role::Module)),
            ("__mmu", Some(Role::Mmu)),
            ("demo", None),
        ] {
            assert_eq!(Role::from_argument(OsStr::new(argument)), role);
        }
    }

    #[test]
    fn the_last_socket_takes_the_directory_along() {
        let directory = tempfile::tempdir().unwrap();
        let sockets = ["module.sock", "mmu.sock"].map(|name| directory.path().join(name));
        for socket in &sockets {
            std::fs::write(socket, "").unwrap();
        }
        let options = [
            "--listen".into(),
            format!("unix://{}", sockets[0].display()).into(),
        ];
        assert_eq!(own_socket(&options).as_ref(), Some(&sockets[0]));
        remove(Some(&sockets[0]));
        assert!(directory.path().exists());
        remove(Some(&sockets[1]));
        assert!(!directory.path().exists());
    }
}

//! Runs `mmuctl` and, for commands that need VMs to stay, a pair of services.

use std::ffi::OsStr;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;

/// Waiting longer than this is a failure.
const LIMIT_S: i64 = 60;

/// What a run of `mmuctl` left.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Run {
    /// The one JSON object on stdout.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        let value: Value =
            serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"));
        assert!(value.is_object(), "{self:?}");
        value
    }
}

/// `mmuctl` with an environment of its own.
pub(crate) fn mmuctl() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_mmuctl"));
    for variable in [
        "MMUCTL_MMU",
        "MMUCTL_MODULE",
        "RUST_LOG",
        "OTEL_EXPORTER_OTLP_ENDPOINT",
    ] {
        command.env_remove(variable);
    }
    command.stdin(Stdio::null());
    command
}

/// Runs `mmuctl` to its end.
pub(crate) fn run<S: AsRef<OsStr>>(args: impl IntoIterator<Item = S>) -> Run {
    finish(mmuctl().args(args))
}

/// Runs a command to its end.
pub(crate) fn finish(command: &mut Command) -> Run {
    let output = command.output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// A file beside the tests or in the crate.
pub(crate) fn data(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let own = root.join("tests/data").join(name);
    if own.exists() {
        own
    } else {
        root.join("data").join(name)
    }
}

/// Both services, until dropped.
pub(crate) struct Services {
    directory: TempDir,
    children: Vec<Child>,
    environment: Vec<(String, String)>,
}

impl Services {
    pub(crate) fn start() -> Self {
        Self::start_with(&[])
    }

    /// With variables that both services and every `mmuctl` get.
    pub(crate) fn start_with(environment: &[(&str, &str)]) -> Self {
        Self::start_with_module(environment, &[])
    }

    /// The same, with options for the module.
    pub(crate) fn start_with_module(environment: &[(&str, &str)], options: &[&str]) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let environment = environment
            .iter()
            .map(|&(name, value)| (name.into(), value.into()));
        let mut services = Self {
            directory,
            children: Vec::new(),
            environment: environment.collect(),
        };
        let module = services.url("module");
        let mmu = services.url("mmu");
        services.spawn("__module", &[&["--listen", &module], options].concat());
        services.spawn("__mmu", &["--listen", &mmu, "--module", &module]);
        services
    }

    pub(crate) fn url(&self, name: &str) -> String {
        format!(
            "unix://{}",
            self.directory.path().join(format!("{name}.sock")).display()
        )
    }

    /// Starts a service and waits until its socket is there: it logs when it is up.
    fn spawn(&mut self, role: &str, options: &[&str]) {
        let mut child = mmuctl()
            .arg(role)
            .args(options)
            .envs(self.environment.iter().cloned())
            .env("RUST_LOG", "info")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        self.children.push(child);
        let socket = options[1].trim_start_matches("unix://").to_owned();
        let mut line = String::new();
        while std::os::unix::net::UnixStream::connect(&socket).is_err() {
            line.clear();
            assert!(log.read_line(&mut line).unwrap() > 0, "{role} ended");
        }
        // Somebody has to read the rest, or the service would block on a full pipe.
        std::thread::spawn(move || std::io::copy(&mut log, &mut std::io::sink()));
    }

    /// `mmuctl` with these services.
    pub(crate) fn command(&self, line: &str) -> Command {
        let mut command = mmuctl();
        command.envs(self.environment.iter().cloned());
        command.args(line.split_whitespace());
        command.args(["--mmu", &self.url("mmu"), "--module", &self.url("module")]);
        command
    }

    /// Runs `mmuctl` with these services and JSON output.
    pub(crate) fn run(&self, line: &str) -> Run {
        finish(self.command(line).args(["--output", "json"]))
    }

    /// The same with tables.
    pub(crate) fn run_table(&self, line: &str) -> Run {
        finish(self.command(line).args(["--output", "table"]))
    }

    /// The same, for commands that must succeed.
    #[track_caller]
    pub(crate) fn ok(&self, line: &str) -> Value {
        let run = self.run(line);
        assert_eq!(run.code, Some(0), "{line}: {}", run.stderr);
        run.json()
    }
}

impl Drop for Services {
    fn drop(&mut self) {
        for child in self.children.iter_mut().rev() {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

/// Processes whose parent is `parent`.
pub(crate) fn children_of(parent: u32) -> Vec<i32> {
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        // The name in parentheses may hold anything, the fields behind it do not.
        let stat = std::fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
        if fields.split_whitespace().nth(1) == Some(&parent.to_string()) {
            children.push(pid);
        }
    }
    children
}

/// A process that can be waited for without being its parent.
pub(crate) struct Watched(std::os::fd::OwnedFd);

impl Watched {
    pub(crate) fn new(pid: i32) -> Self {
        Self(pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap())
    }

    /// Waits until it has ended.
    pub(crate) fn ended(&self) -> bool {
        let mut fds = [PollFd::new(&self.0, PollFlags::IN)];
        let limit = Timespec {
            tv_sec: LIMIT_S,
            tv_nsec: 0,
        };
        poll(&mut fds, Some(&limit)).unwrap() == 1
    }
}

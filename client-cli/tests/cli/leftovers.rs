//! Nothing of `--local` outlives `mmuctl`: no process, no socket, no directory.

use std::io::Write as _;
use std::os::unix::process::ExitStatusExt as _;
use std::process::{Child, ChildStdin, Stdio};

use crate::common::{Watched, children_of, data, finish, mmuctl};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

const LINE: &str = "CPU 0/KVM-1 [000] ..... 1.000000: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 \
                    error_code 0x182\n";

/// A replay that reads its recording from a pipe and has its services up.
struct Replay {
    directory: TempDir,
    mmuctl: Child,
    stdin: Option<ChildStdin>,
    services: Vec<Watched>,
}

impl Replay {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let mut mmuctl = mmuctl()
            .args(["replay", "-", "--output", "json"])
            .env("TMPDIR", directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = mmuctl.stdin.take().unwrap();
        // More than a pipe holds: once all of it is written, somebody reads, which happens only
        // when the services are up.
        stdin.write_all(LINE.repeat(4096).as_bytes()).unwrap();
        let pids = children_of(mmuctl.id());
        assert_eq!(pids.len(), 2, "{pids:?}");
        let services = pids.into_iter().map(Watched::new).collect();
        Self {
            directory,
            mmuctl,
            stdin: Some(stdin),
            services,
        }
    }

    fn signal(&self, signal: Signal) {
        let pid = Pid::from_raw(i32::try_from(self.mmuctl.id()).unwrap()).unwrap();
        kill_process(pid, signal).unwrap();
    }

    fn assert_nothing_is_left(&self, case: &str) {
        for service in &self.services {
            assert!(service.ended(), "{case}");
        }
        let left: Vec<_> = std::fs::read_dir(self.directory.path())
            .unwrap()
            .flatten()
            .collect();
        assert!(left.is_empty(), "{case}: {left:?}");
    }
}

#[test]
fn nothing_is_left_after_the_end() {
    let mut replay = Replay::start();
    drop(replay.stdin.take());
    let output = replay.mmuctl.wait().unwrap();
    assert_eq!(output.code(), Some(0));
    replay.assert_nothing_is_left("end");
}

#[test]
fn nothing_is_left_after_signals() {
    for (signal, code, killed_by) in [
        (Signal::INT, Some(130), None),
        (Signal::TERM, Some(130), None),
        (Signal::KILL, None, Some(9)),
    ] {
        let mut replay = Replay::start();
        replay.signal(signal);
        let status = replay.mmuctl.wait().unwrap();
        assert_eq!(
            (status.code(), status.signal()),
            (code, killed_by),
            "{signal:?}"
        );
        replay.assert_nothing_is_left(&format!("{signal:?}"));
    }
}

#[test]
fn nothing_is_left_after_an_error() {
    let directory = tempfile::tempdir().unwrap();
    let run = finish(
        mmuctl()
            .args(["replay", "/nonexistent/x"])
            .env("TMPDIR", directory.path()),
    );
    assert_eq!(run.code, Some(1), "{run:?}");
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_directory_too_deep_for_sockets_is_refused_by_name() {
    let directory = tempfile::tempdir().unwrap();
    let deep = directory.path().join("d".repeat(100));
    std::fs::create_dir(&deep).unwrap();
    let file = data("boot-small.trace");
    let run = finish(
        mmuctl()
            .args(["replay", file.to_str().unwrap()])
            .env("TMPDIR", &deep),
    );
    assert_eq!(run.code, Some(1), "{run:?}");
    assert!(
        run.stderr.contains("above the limit of 107 bytes"),
        "{run:?}"
    );
    assert_eq!(std::fs::read_dir(&deep).unwrap().count(), 0);
}

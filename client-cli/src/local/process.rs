//! One child process: started, waited for, and never left behind.

use std::collections::VecDeque;
use std::path::Path;
use std::process::Stdio;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, ChildStderr, ChildStdin, Command};
use tokio::time::Instant;

use super::LocalError;
use super::child::Role;
use crate::stop::Stop;

/// First and longest pause between health checks.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(5), Duration::from_millis(200));
/// How long a child gets to end by itself before it is killed.
const STOP_LIMIT: Duration = Duration::from_secs(6);
/// How long the rest of a dead child's stderr is waited for.
const LAST_WORDS_LIMIT: Duration = Duration::from_millis(500);
/// Lines of stderr that are kept for an error message.
const KEPT_LINES: usize = 20;

type Lines = Arc<Mutex<VecDeque<String>>>;

/// A running service.
#[derive(Debug)]
pub(crate) struct Process {
    role: Role,
    url: String,
    child: Child,
    /// Dropping it tells the child to stop.
    stdin: Option<ChildStdin>,
    said: Lines,
    listening: Option<tokio::task::JoinHandle<()>>,
}

impl Process {
    /// Runs `program` as `role`.
    pub(crate) fn spawn(program: &Path, role: Role, options: &[&str]) -> Result<Self, LocalError> {
        Self::spawn_in(program, role, options, &[])
    }

    /// The same with variables beside those of this process.
    pub(super) fn spawn_in(
        program: &Path,
        role: Role,
        options: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self, LocalError> {
        let mut child = Command::new(program)
            .arg(role.argument())
            .args(options)
            .envs(environment.iter().copied())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|source| LocalError::Spawn { role, source })?;
        let said = Lines::default();
        let stderr = child.stderr.take();
        let listening = stderr.map(|stderr| tokio::spawn(listen(stderr, said.clone())));
        let stdin = child.stdin.take();
        Ok(Self {
            role,
            url: String::new(),
            child,
            stdin,
            said,
            listening,
        })
    }

    /// Where it serves.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    /// Resident memory in bytes (`VmRSS` of /proc); `None` once it has ended.
    pub(crate) fn resident_bytes(&self) -> Option<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id()?)).ok()?;
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("VmRSS:"))?;
        let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
        Some(kib << 10)
    }

    /// Waits until the health check says that it is serving.
    pub(crate) async fn ready(
        &mut self,
        url: &str,
        limit: Duration,
        stop: &Stop,
    ) -> Result<(), LocalError> {
        let deadline = Instant::now() + limit;
        let mut pause = BACK_OFF.0;
        let mut last = None;
        while Instant::now() < deadline {
            let attempt = async {
                match transport::healthcheck(url).await {
                    Ok(()) => None,
                    Err(error) => {
                        tokio::time::sleep(pause).await;
                        Some(error)
                    }
                }
            };
            tokio::select! {
                answer = tokio::time::timeout_at(deadline, attempt) => match answer {
                    Ok(None) => {
                        url.clone_into(&mut self.url);
                        return Ok(());
                    }
                    Ok(error) => last = error,
                    Err(_) => break,
                },
                _ = self.child.wait() => {
                    if let Some(ended) = self.ended().await {
                        return Err(ended);
                    }
                }
                () = stop.asked() => return Err(LocalError::Interrupted),
            }
            pause = (pause * 2).min(BACK_OFF.1);
        }
        let stderr = self.last_words();
        Err(LocalError::NotReady {
            role: self.role,
            limit,
            stderr,
            source: last,
        })
    }

    /// How it ended, if it has.
    pub(crate) async fn ended(&mut self) -> Option<LocalError> {
        let status = match self.child.try_wait() {
            Ok(None) => return None,
            Ok(Some(status)) => status.to_string(),
            Err(error) => error.to_string(),
        };
        if let Some(listening) = self.listening.take() {
            // Its stderr ends with it, unless a process of its own holds on to it.
            let _ = tokio::time::timeout(LAST_WORDS_LIMIT, listening).await;
        }
        Some(LocalError::Ended {
            role: self.role,
            status,
            stderr: self.last_words(),
        })
    }

    /// Ends it at once (SIGKILL) and waits until it is gone.
    pub(crate) async fn kill(&mut self) {
        // Fails when it has ended in between.
        let _ = self.child.kill().await;
    }

    /// Tells it to stop and waits; kills it when it does not.
    pub(crate) async fn stop(mut self) {
        drop(self.stdin.take());
        if tokio::time::timeout(STOP_LIMIT, self.child.wait())
            .await
            .is_err()
        {
            tracing::warn!(role = %self.role, "did not stop, killing it");
            // Fails when it has ended in between.
            let _ = self.child.kill().await;
        }
    }

    fn last_words(&self) -> String {
        let lines = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        lines
            .iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join("\n")
    }
}

/// Keeps the last lines, and passes all of them on to whoever asked for logs.
async fn listen(stderr: ChildStderr, said: Lines) {
    let wanted = std::env::var_os("RUST_LOG").is_some_and(|filter| !filter.is_empty());
    let mut lines = BufReader::new(stderr).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if wanted {
            eprintln!("{line}");
        }
        let mut said = said.lock().unwrap_or_else(PoisonError::into_inner);
        if said.len() == KEPT_LINES {
            said.pop_front();
        }
        said.push_back(line);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const URL: &str = "unix:///nonexistent/mmuctl.sock";

    #[tokio::test]
    async fn a_child_that_ends_early_is_told_with_its_last_words() {
        // A shell takes the role's argument for a script that does not exist.
        let mut process = Process::spawn(Path::new("/bin/sh"), Role::Module, &[]).unwrap();
        let error = process
            .ready(URL, Duration::from_secs(60), &Stop::never())
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(
            text.starts_with("the TDX module ended by itself (exit status: "),
            "{text}"
        );
        assert!(
            text.contains("it said:\n") && text.contains("__module"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_program_that_is_not_there_cannot_be_started() {
        let error = Process::spawn(Path::new("/nonexistent/x"), Role::Mmu, &[]).unwrap_err();
        assert_eq!(error.to_string(), "cannot start the MMU service");
    }
}

//! The two services of a run, as children that can be killed and started again.

use std::path::PathBuf;
use std::time::Duration;

use tempfile::TempDir;

use crate::local::child::Role;
use crate::local::{self, LocalError, Process, ProcessMemory};
use crate::stop::Stop;

/// How long a service may take until it serves, its recovery included.
pub(crate) const READY_LIMIT: Duration = Duration::from_secs(60);
/// How long a process takes to be gone whose connections are.
const DYING_LIMIT: Duration = Duration::from_secs(5);

/// Both services.
pub(crate) struct Stack {
    // Dropped in this order: the processes end before their directory goes.
    mmu: Process,
    module: Process,
    program: PathBuf,
    stop: Stop,
    mmu_options: Vec<String>,
    module_options: Vec<String>,
    directory: TempDir,
}

impl Stack {
    /// Starts both and waits until they serve.
    pub(crate) async fn start(stop: &Stop) -> Result<Self, LocalError> {
        let directory = local::directory()?;
        let program = std::env::current_exe().map_err(LocalError::Program)?;
        let module_url = local::socket_url(directory.path(), Role::Module)?;
        let mmu_url = local::socket_url(directory.path(), Role::Mmu)?;
        let options = |options: &[&str]| -> Vec<String> {
            options.iter().map(|&option| option.to_owned()).collect()
        };
        let module_options = options(&["--listen", &module_url, "--fault-injection"]);
        let state = directory.path().join("state").display().to_string();
        let mmu_options = options(&[
            "--listen",
            &mmu_url,
            "--module",
            &module_url,
            "--drain-s",
            "2",
            "--state",
            &state,
        ]);
        let mut module = Process::spawn(&program, Role::Module, &strs(&module_options))?;
        module.ready(&module_url, READY_LIMIT, stop).await?;
        let mut mmu = Process::spawn(&program, Role::Mmu, &strs(&mmu_options))?;
        mmu.ready(&mmu_url, READY_LIMIT, stop).await?;
        Ok(Self {
            mmu,
            module,
            program,
            stop: stop.clone(),
            mmu_options,
            module_options,
            directory,
        })
    }

    pub(crate) fn mmu_url(&self) -> &str {
        &self.mmu_options[1]
    }

    pub(crate) fn module_url(&self) -> &str {
        &self.module_options[1]
    }

    /// Resident memory of both.
    pub(crate) fn memory(&self) -> Option<ProcessMemory> {
        Some(ProcessMemory {
            mmu: self.mmu.resident_bytes()?,
            module: self.module.resident_bytes()?,
        })
    }

    /// Whether the module has ended by itself.
    pub(crate) async fn module_ended(&mut self) -> bool {
        self.module.ended().await.is_some()
    }

    /// Whether the module ends by itself, when its connection has broken already.
    pub(crate) async fn module_ends_soon(&mut self) -> bool {
        let ended = async {
            while !self.module_ended().await {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        tokio::time::timeout(DYING_LIMIT, ended).await.is_ok()
    }

    /// Ends a service at once (SIGKILL), and starts it again.
    pub(crate) async fn kill(&mut self, role: Role) -> Result<(), LocalError> {
        let (process, options) = match role {
            Role::Module => (&mut self.module, &self.module_options),
            Role::Mmu => (&mut self.mmu, &self.mmu_options),
        };
        process.kill().await;
        *process = Process::spawn(&self.program, role, &strs(options))?;
        let url = options[1].clone();
        process.ready(&url, READY_LIMIT, &self.stop).await
    }

    /// A service that ended although nobody asked it to.
    pub(crate) async fn obituary(&mut self) -> Option<LocalError> {
        match self.module.ended().await {
            Some(ended) => Some(ended),
            None => self.mmu.ended().await,
        }
    }

    /// Stops both and removes the directory.
    pub(crate) async fn stop(self) {
        self.mmu.stop().await;
        self.module.stop().await;
        let _ = self.directory.close();
    }
}

fn strs(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

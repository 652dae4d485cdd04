//! The run of the module that the services serve. A reset ends it and starts a new one, for them
//! as if the process had been restarted: another instance, no session, no TD.

use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use tdx_module::hooks::LockObject;
use tdx_module::{LockMode, Module, PlatformConfig, PlatformError};

use crate::config::Limits;
use crate::replay::{ReplayMemory, Sessions};

/// Locks that callers may hold at a time.
const MAX_HELD_LOCKS: usize = 1024;

/// One run of the module.
pub(crate) struct Run {
    pub(crate) module: Arc<Module>,
    /// Changes with every run.
    pub(crate) instance: String,
    pub(crate) sessions: Sessions,
    /// Locks that were taken from outside: only these may be given back from outside.
    held: Mutex<Vec<(LockObject, LockMode)>>,
}

/// The present run; cheap to ask for.
pub(crate) struct Running {
    platform: PlatformConfig,
    limits: Limits,
    run: ArcSwap<Run>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running")
            .field("instance", &self.run.load().instance)
            .finish_non_exhaustive()
    }
}

impl Running {
    /// Starts the first run.
    pub(crate) fn start(platform: PlatformConfig, limits: &Limits) -> Result<Self, PlatformError> {
        Ok(Self {
            run: ArcSwap::from_pointee(Run::new(&platform, limits)?),
            platform,
            limits: limits.clone(),
        })
    }

    /// The run that requests belong to from now on.
    pub(crate) fn now(&self) -> Arc<Run> {
        self.run.load_full()
    }

    /// Starts a new run in place of the present one; answers its instance.
    pub(crate) fn reset(&self) -> Result<String, PlatformError> {
        let run = Run::new(&self.platform, &self.limits)?;
        let instance = run.instance.clone();
        self.run.store(Arc::new(run));
        Ok(instance)
    }
}

impl Run {
    fn new(platform: &PlatformConfig, limits: &Limits) -> Result<Self, PlatformError> {
        let instance = uuid::Uuid::new_v4().to_string();
        let memory = ReplayMemory::new(limits.max_replay_bytes, limits.max_session_replay_bytes);
        let sessions = Sessions::new(
            limits.max_sessions,
            limits.replay_window,
            memory,
            instance.clone(),
        );
        Ok(Self {
            module: Arc::new(Module::new(platform.clone())?),
            instance,
            sessions,
            held: Mutex::default(),
        })
    }

    /// Takes a lock as if another processor were inside a call. Whether it was there and free.
    pub(crate) fn hold_lock(&self, object: LockObject, mode: LockMode, as_guest: bool) -> bool {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = held.len() < MAX_HELD_LOCKS
            && if as_guest {
                self.module.hold_lock_as_guest(object, mode)
            } else {
                self.module.hold_lock(object, mode)
            };
        if taken {
            held.push((object, mode));
        }
        taken
    }

    /// Gives back what [`Run::hold_lock`] took. Whether it was taken and is still there.
    pub(crate) fn release_lock(&self, object: LockObject, mode: LockMode) -> bool {
        let mut held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = held.iter().position(|lock| *lock == (object, mode)) else {
            return false;
        };
        held.swap_remove(at);
        self.module.release_lock(object, mode)
    }
}

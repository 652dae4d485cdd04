//! Which run of the module the service talks to.
//!
//! A module that starts anew has another `instance` and none of the old TDs. Everything that a VM
//! needs of the module's run, its host memory and keys first of all, hangs on an [`Attachment`];
//! VMs keep the one they were built on.
//!
//! Invariants
//! - A1  At most one attachment is current, and there is one [`Host`] for each instance: two would
//!   hand out the same pages twice.
//! - A2  A retired instance never becomes current again.

use std::collections::HashSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use mirror_proto::module::GetPlatformResponse;
use tdp_mmu::{Host, HostError, MemoryRange, Platform};
use tokio::sync::watch;

use super::LinkError;

/// One run of the module, and the host that serves its TDs.
pub(crate) struct Attachment {
    instance: String,
    host: Arc<Host>,
    replay_window: usize,
    retired: AtomicBool,
}

impl Attachment {
    fn new(platform: &GetPlatformResponse) -> Result<Self, HostError> {
        Ok(Self {
            instance: platform.instance.clone(),
            host: Host::new(platform_of(platform))?,
            replay_window: usize::try_from(platform.replay_window).unwrap_or(usize::MAX),
            retired: AtomicBool::new(false),
        })
    }

    /// An earlier run, on the same platform. Nothing of it is there any more.
    pub(crate) fn earlier(&self, instance: &str) -> Self {
        Self {
            instance: instance.to_owned(),
            host: self.host.emptied(),
            replay_window: 0,
            retired: AtomicBool::new(true),
        }
    }

    /// The module's name for this run.
    pub(crate) fn instance(&self) -> &str {
        &self.instance
    }

    /// Memory and keys that the TDs of this run are built from.
    pub(crate) fn host(&self) -> &Arc<Host> {
        &self.host
    }

    /// Whether the module has started anew since.
    pub(crate) fn is_retired(&self) -> bool {
        self.retired.load(Ordering::Acquire)
    }

    /// How many batches of one session may be unanswered, of the `wanted` ones: the module must
    /// still hold the answer to the oldest when the newest arrives.
    pub(super) fn window(&self, wanted: usize) -> usize {
        wanted.min(self.replay_window.saturating_sub(1)).max(1)
    }
}

impl std::fmt::Debug for Attachment {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Attachment")
            .field("instance", &self.instance)
            .field("retired", &self.is_retired())
            .finish_non_exhaustive()
    }
}

/// Whether there is a module to talk to.
#[derive(Debug, Clone)]
pub(crate) enum LinkState {
    /// Nothing is known yet.
    Connecting,
    /// The module answers.
    Up(Arc<Attachment>),
    /// It does not.
    Down {
        /// The last error.
        reason: Arc<str>,
        /// Since when.
        since: Instant,
    },
}

/// The instances seen so far, and the one that is current.
#[derive(Debug)]
pub(super) struct Instances {
    known: Mutex<Known>,
    state: watch::Sender<LinkState>,
}

#[derive(Debug, Default)]
struct Known {
    current: Option<Arc<Attachment>>,
    retired: HashSet<String>,
}

impl Instances {
    pub(super) fn new() -> Self {
        Self {
            known: Mutex::default(),
            state: watch::Sender::new(LinkState::Connecting),
        }
    }

    /// The attachment to the run that answered `platform`; a run not seen before retires the
    /// current one.
    pub(super) fn learn(
        &self,
        platform: &GetPlatformResponse,
    ) -> Result<Arc<Attachment>, LinkError> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if known.retired.contains(&platform.instance) {
            return Err(LinkError::Stale {
                instance: platform.instance.clone(),
            });
        }
        let same = known
            .current
            .as_ref()
            .filter(|current| current.instance == platform.instance)
            .cloned();
        let attachment = match same {
            Some(same) => same,
            None => {
                let attachment = Arc::new(Attachment::new(platform).map_err(LinkError::Platform)?);
                if let Some(old) = known.current.replace(Arc::clone(&attachment)) {
                    tracing::warn!(old = %old.instance, new = %attachment.instance, "the module restarted");
                    old.retired.store(true, Ordering::Release);
                    known.retired.insert(old.instance.clone());
                }
                attachment
            }
        };
        // Under the lock, so that the state never goes back to an older run.
        self.state.send_if_modified(|state| {
            let changed =
                !matches!(state, LinkState::Up(current) if Arc::ptr_eq(current, &attachment));
            if changed {
                *state = LinkState::Up(Arc::clone(&attachment));
            }
            changed
        });
        Ok(attachment)
    }

    /// The module does not answer.
    pub(super) fn lost(&self, reason: &str) {
        self.state.send_if_modified(|state| {
            let before = match state {
                LinkState::Down { since, .. } => Some(*since),
                LinkState::Connecting | LinkState::Up(_) => None,
            };
            let since = before.unwrap_or_else(Instant::now);
            *state = LinkState::Down {
                reason: reason.into(),
                since,
            };
            before.is_none()
        });
    }

    /// For how long the module has not answered.
    pub(super) fn down_for(&self) -> Option<Duration> {
        match &*self.state.borrow() {
            LinkState::Down { since, .. } => Some(since.elapsed()),
            LinkState::Connecting | LinkState::Up(_) => None,
        }
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<LinkState> {
        self.state.subscribe()
    }
}

/// What the core wants to know of the platform.
fn platform_of(wire: &GetPlatformResponse) -> Platform {
    Platform {
        // Memory that the module has not initialised cannot hold TD pages yet.
        tdmrs: wire
            .tdmrs
            .iter()
            .filter(|tdmr| tdmr.initialized)
            .map(|tdmr| MemoryRange {
                base: tdmr.base,
                size: tdmr.size,
                reserved: tdmr
                    .reserved
                    .iter()
                    .map(|area| (area.base, area.size))
                    .collect(),
            })
            .collect(),
        hkid_start: wire.hkid_start,
        hkid_count: wire.hkid_count,
        global_hkid: wire.global_hkid,
        maxpa: wire.maxpa,
        hkid_bits: wire.hkid_bits,
        logical_processors: wire.logical_processors,
        packages: wire.packages,
        tdcs_pages: wire.tdcs_pages,
        tdvps_pages: wire.tdvps_pages,
        attributes_fixed0: wire.attributes_fixed0,
        attributes_fixed1: wire.attributes_fixed1,
        xfam_fixed0: wire.xfam_fixed0,
        xfam_fixed1: wire.xfam_fixed1,
        five_level: wire.five_level,
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::platform;
    use super::*;

    #[test]
    fn one_instance_has_one_host_and_a_new_one_retires_it() {
        let instances = Instances::new();
        let first = instances.learn(&platform("a")).unwrap();
        assert!(Arc::ptr_eq(
            &first,
            &instances.learn(&platform("a")).unwrap()
        ));
        let second = instances.learn(&platform("b")).unwrap();
        assert!(first.is_retired() && !second.is_retired());
        assert!(!Arc::ptr_eq(first.host(), second.host()));
        assert!(
            matches!(instances.learn(&platform("a")), Err(LinkError::Stale { instance }) if instance == "a"),
            "a late answer of the old run must not bring it back"
        );
        assert!(
            matches!(&*instances.subscribe().borrow(), LinkState::Up(current) if Arc::ptr_eq(current, &second))
        );
    }

    #[test]
    fn the_window_stays_below_what_the_module_remembers() {
        let attachment = Attachment::new(&platform("a")).unwrap();
        for (wanted, window) in [(0, 1), (1, 1), (7, 7), (8, 7), (16, 7)] {
            assert_eq!(attachment.window(wanted), window, "{wanted}");
        }
    }
}

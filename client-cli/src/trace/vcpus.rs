//! Which vCPU an event belongs to, where its payload does not say.
//!
//! QEMU names its vCPU threads `CPU n/KVM`. Anything else leaves the thread id: threads get
//! numbers in the order in which they appear, leaving out numbers that are taken by name.

use std::collections::HashMap;

use super::reader::LineError;

/// vCPU numbers are below this; KVM's own limit on x86 (`KVM_MAX_VCPU_IDS`).
pub const MAX_VCPU_ID: u32 = 4096;

/// The numbers given out so far.
#[derive(Debug, Default)]
pub(super) struct Vcpus {
    by_thread: HashMap<u32, u32>,
    /// By number, up to the highest that is taken.
    taken: Vec<bool>,
}

impl Vcpus {
    /// The vCPU of an event: as its payload says, else by task name, else by thread.
    pub(super) fn resolve(
        &mut self,
        payload: Option<u32>,
        task: &str,
        thread: u32,
    ) -> Result<u32, LineError> {
        if let Some(vcpu) = payload.or_else(|| from_task(task)) {
            self.take(vcpu);
            return Ok(vcpu);
        }
        if let Some(vcpu) = self.by_thread.get(&thread) {
            return Ok(*vcpu);
        }
        let vcpu =
            (0..MAX_VCPU_ID)
                .find(|&vcpu| !self.is_taken(vcpu))
                .ok_or(LineError::Threads {
                    thread,
                    limit: MAX_VCPU_ID,
                })?;
        self.take(vcpu);
        self.by_thread.insert(thread, vcpu);
        Ok(vcpu)
    }

    fn is_taken(&self, vcpu: u32) -> bool {
        self.taken.get(vcpu as usize).is_some_and(|&taken| taken)
    }

    /// `vcpu` is below [`MAX_VCPU_ID`].
    fn take(&mut self, vcpu: u32) {
        let at = vcpu as usize;
        if at >= self.taken.len() {
            self.taken.resize(at + 1, false);
        }
        self.taken[at] = true;
    }
}

/// `CPU 3/KVM` is 3.
fn from_task(task: &str) -> Option<u32> {
    let number = task.strip_prefix("CPU ")?.strip_suffix("/KVM")?;
    number.parse().ok().filter(|vcpu| *vcpu < MAX_VCPU_ID)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_payload_decides_then_the_name_then_the_thread() {
        let mut vcpus = Vcpus::default();
        for (case, payload, task, thread, want) in [
            ("payload", Some(7), "CPU 3/KVM", 10, 7),
            ("name", None, "CPU 1/KVM", 11, 1),
            ("first unnamed thread", None, "<...>", 40, 0),
            ("second leaves out 1", None, "<...>", 30, 2),
            ("the first again", None, "renamed", 40, 0),
            (
                "a name above the limit is none",
                None,
                "CPU 4096/KVM",
                50,
                3,
            ),
        ] {
            assert_eq!(
                vcpus.resolve(payload, task, thread).unwrap(),
                want,
                "{case}"
            );
        }
    }

    #[test]
    fn more_threads_than_vcpus_are_refused() {
        let mut vcpus = Vcpus::default();
        for thread in 0..MAX_VCPU_ID {
            assert_eq!(vcpus.resolve(None, "x", thread).unwrap(), thread);
        }
        let error = vcpus.resolve(None, "x", MAX_VCPU_ID).unwrap_err();
        assert!(matches!(error, LineError::Threads { .. }));
    }
}

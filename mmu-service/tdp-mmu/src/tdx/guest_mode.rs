//! Whether vCPUs are inside the guest, and how to get them out.
//!
//! Source: arch/x86/kvm/x86.c, `vcpu_enter_guest()`; virt/kvm/kvm_main.c,
//! `kvm_make_all_cpus_request()`; arch/x86/kvm/vmx/tdx.c, `tdx_vcpu_run()`.
//!
//! A KICK asks every vCPU to leave and waits until each has been outside once. Whoever kicks may
//! hold mmu_lock: a vCPU takes it only while it is outside.

use std::sync::Arc;

use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Condvar, Mutex, lock, wait_while};

/// `vcpu->mode`, and what makes the vCPU leave.
#[derive(Debug, Default)]
pub(crate) struct GuestMode {
    inside: Mutex<bool>,
    left: Condvar,
    /// KVM_REQ_OUTSIDE_GUEST_MODE.
    kicked: AtomicBool,
    /// An event or a signal waits for the vCPU.
    events: AtomicBool,
}

impl GuestMode {
    /// IN_GUEST_MODE, from here to [`GuestMode::leave`].
    fn enter(&self) {
        *lock(&self.inside) = true;
    }

    /// OUTSIDE_GUEST_MODE.
    pub(crate) fn leave(&self) {
        let mut inside = lock(&self.inside);
        *inside = false;
        self.kicked.store(false, Ordering::SeqCst);
        self.left.notify_all();
    }

    /// Whether somebody waits for the vCPU to leave.
    pub(crate) fn is_kicked(&self) -> bool {
        self.kicked.load(Ordering::SeqCst)
    }

    /// An event waits: loops that retry end, and a call of the guest is cut short.
    pub(crate) fn queue_event(&self) {
        self.events.store(true, Ordering::SeqCst);
    }

    /// Whether one waits.
    pub(crate) fn has_event(&self) -> bool {
        self.events.load(Ordering::SeqCst)
    }

    /// The vCPU has served it.
    pub(crate) fn take_event(&self) -> bool {
        self.events.swap(false, Ordering::SeqCst)
    }

    fn kick(&self) {
        let inside = lock(&self.inside);
        if *inside {
            self.kicked.store(true, Ordering::SeqCst);
            // Once outside is enough: what was to be noticed is noticed at the next entry.
            drop(wait_while(&self.left, inside, |inside| {
                *inside && self.kicked.load(Ordering::SeqCst)
            }));
        }
    }
}

/// The vCPUs of a TD, and whether they may enter.
#[derive(Debug, Default)]
pub(crate) struct GuestModes {
    vcpus: Mutex<Vec<Arc<GuestMode>>>,
    /// `wait_for_sept_zap`: how many removals keep vCPUs outside.
    held: Mutex<u32>,
    released: Condvar,
}

impl GuestModes {
    /// One more vCPU.
    pub(crate) fn add(&self) -> Arc<GuestMode> {
        let mode = Arc::new(GuestMode::default());
        lock(&self.vcpus).push(Arc::clone(&mode));
        mode
    }

    /// KVM_REQ_OUTSIDE_GUEST_MODE to every vCPU; returns when each has left.
    pub(crate) fn kick(&self) {
        let vcpus = lock(&self.vcpus).clone();
        vcpus.iter().for_each(|vcpu| vcpu.kick());
    }

    /// Keeps vCPUs from entering until [`GuestModes::release`]. Those inside are not concerned.
    pub(crate) fn hold(&self) {
        *lock(&self.held) += 1;
    }

    pub(crate) fn release(&self) {
        *lock(&self.held) -= 1;
        self.released.notify_all();
    }

    /// Whether a removal keeps vCPUs outside.
    #[cfg(all(test, not(feature = "shuttle")))]
    pub(crate) fn is_held(&self) -> bool {
        *lock(&self.held) != 0
    }

    /// The vCPU goes inside; waits while a removal keeps it outside.
    pub(crate) fn enter(&self, vcpu: &GuestMode) {
        // Marked as inside under the lock: a removal that begins now kicks it out again.
        let held = wait_while(&self.released, lock(&self.held), |held| *held != 0);
        vcpu.enter();
        drop(held);
    }
}

#[cfg(all(test, not(feature = "shuttle")))]
mod tests {
    use super::*;

    #[test]
    fn a_kick_returns_when_the_vcpu_has_left() {
        let modes = GuestModes::default();
        let vcpu = modes.add();
        modes.kick();
        modes.enter(&vcpu);
        std::thread::scope(|scope| {
            let kick = scope.spawn(|| modes.kick());
            while !vcpu.is_kicked() {
                std::thread::yield_now();
            }
            assert!(!kick.is_finished(), "it is inside");
            vcpu.leave();
        });
        assert!(!vcpu.is_kicked());
    }

    #[test]
    fn a_vcpu_does_not_enter_while_a_removal_retries() {
        let modes = GuestModes::default();
        let vcpu = modes.add();
        modes.hold();
        assert!(modes.is_held());
        std::thread::scope(|scope| {
            let entering = scope.spawn(|| modes.enter(&vcpu));
            // It cannot have entered: a kick finds it outside and returns at once.
            modes.kick();
            assert!(!entering.is_finished());
            modes.release();
        });
        assert!(*lock(&vcpu.inside));
        assert!(!modes.is_held());
    }
}

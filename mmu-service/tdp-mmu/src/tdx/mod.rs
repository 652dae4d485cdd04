//! KVM's TDX layer: what the MMU's changes mean in SEAMCALLs.
//!
//! Source: arch/x86/kvm/vmx/tdx.c and arch/x86/virt/vmx/tdx/tdx.c.
//! `calls` builds them, `seam` carries them and counts, `install` and `remove` are the hooks of
//! `kvm_x86_ops`, `lifecycle` is TD_CREATE to RECLAIM, `guest_mode` gets vCPUs out of the guest.

pub(crate) mod calls;
pub(crate) mod guest_mode;
pub(crate) mod install;
pub(crate) mod lifecycle;
pub(crate) mod lost;
pub(crate) mod remove;
pub(crate) mod seam;
pub(crate) mod td;

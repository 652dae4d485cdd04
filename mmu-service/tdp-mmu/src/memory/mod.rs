//! Guest memory as the host arranges it: slots, what backs them, which pages are private, and
//! the protocol that keeps faults from using what is being taken away.

pub(crate) mod attributes;
pub(crate) mod backing;
pub(crate) mod dirty;
pub(crate) mod invalidate;
pub(crate) mod slots;
pub(crate) mod user;

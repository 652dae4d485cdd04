//! Who may call what.
//!
//! A caller is known by the certificate of its connection, by the user at the other end of a Unix
//! socket, or not at all (plain TCP). [`Peers`] says which roles each of them holds, a [`Policy`]
//! which role each RPC needs, and [`AccessLayer`] brings the two together in front of a server.
//!
//! Invariants
//! - A1  A request that no rule names needs more than one that a rule names: nothing becomes open
//!   because a rule was forgotten.
//! - A2  A request whose connection is not known is refused.

mod layer;
mod peers;
mod policy;
mod roles;
mod settings;

pub use layer::{Access, AccessFuture, AccessLayer, Refusals};
pub use peers::{AllowedUid, AllowedUidError, Peers};
pub use policy::{Policy, Rule};
pub use roles::{RoleError, Roles};

pub(crate) use roles::roles_of_names;

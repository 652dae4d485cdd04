//! How the two services and their clients reach each other: HTTP/2 over a Unix socket, TCP or TLS.
//!
//! [`Address`] is a URL of any kind. A service binds [`Listener`]s by its [`Exposure`], builds on
//! [`server`], puts an [`AccessLayer`] in front and hands all of it to [`serve`]; a client asks for
//! a channel by [`connect`] or [`connect_with`]. Nothing here knows a service by name.
//!
//! Invariants
//! - N1  TCP connections have Nagle's algorithm off at both ends: a batch is one message, and
//!   waiting for an acknowledgement would cost 40 ms.
//! - N2  HTTP/2 windows are at least 1 MiB, so that one full-sized batch never waits for a window.
//! - N3  A socket file that somebody answers on is never removed.

mod access;
mod address;
mod admission;
mod chain;
mod client;
mod handshake;
mod listen;
mod reason;
mod script;
mod server;
mod signal;
mod socket;
mod sparingly;
mod tls;
mod web;

pub use access::{
    Access, AccessFuture, AccessLayer, AllowedUid, AllowedUidError, Peers, Policy, Refusals,
    RoleError, Roles, Rule,
};
pub use address::{Address, AddressError};
pub use admission::{Admission, AdmissionLayer};
pub use chain::error_chain;
pub use client::{
    ConnectError, HealthError, connect, connect_with, endpoint, healthcheck, healthcheck_with,
};
pub use listen::{BindError, Exposure, Incoming, Listener};
pub use reason::{Reason, code_name, reasons_section, reasons_table};
pub use script::ScriptedCall;
pub use server::{ServeError, serve, server};
pub use signal::{shutdown_signal, stdin_closed};
pub use socket::{Connection, PeerInfo, Plain, Tls, TlsPeer, open};
pub use tls::{ClientTls, ClientTlsFiles, ServerTls, ServerTlsFiles, TlsError};
/// The codes of [`Reason`]s.
pub use tonic::Code;
pub use web::with_web;

/// HTTP/2 flow-control window of one stream, in bytes.
pub const STREAM_WINDOW: u32 = 2 << 20;
/// HTTP/2 flow-control window of one connection, in bytes.
pub const CONNECTION_WINDOW: u32 = 8 << 20;
/// Largest HTTP/2 frame that a server takes, in bytes: contents of pages come in few of them.
pub const MAX_FRAME: u32 = 64 << 10;
/// Time between HTTP/2 pings, in seconds: a peer that vanished is noticed without traffic.
pub const KEEPALIVE_S: u64 = 10;
/// How long a ping may stay unanswered, in seconds. Generous: a peer may be hashing.
pub const KEEPALIVE_TIMEOUT_S: u64 = 20;

//! TLS 1.3 with certificates at both ends.
//!
//! A service shows its certificate and asks for one of the authority in `client_ca`; the URIs in
//! it give the caller its roles. A client does the same the other way round: it trusts the
//! authority in `ca` alone, for the host in the URL. There is no TLS without a certificate of the
//! client, so that TLS always says who calls.
//!
//! Invariants
//! - L1  Files are read again when they change. Files that cannot be used change nothing: what
//!   was in use stays in use.
//! - L2  A connection keeps the certificates that it began with, and none is resumed: what holds
//!   for new connections holds for every one that begins.
//! - L3  What a key file holds is in no message, error or log line.

mod client;
mod error;
mod files;
mod server;
mod watched;

use std::sync::Arc;

use rustls::crypto::{CryptoProvider, ring};

pub use client::{ClientTls, ClientTlsFiles};
pub use error::TlsError;
pub use server::{ServerTls, ServerTlsFiles};

pub(crate) use client::Explained;
pub(crate) use error::explain;
pub(crate) use server::roles_of;

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

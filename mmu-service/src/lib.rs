//! KVM's memory management for TDX guests as a service: the shell around the core `tdp-mmu`.
//!
//! The core is synchronous and blocks while the TDX module answers, as a KVM ioctl does. This
//! crate gives it threads (`service`), a way to the module in the other process (`link`), the
//! wire contract `kvm.mmu.v1`, limits, health and an orderly end.
//!
//! ```text
//! gRPC request ─▶ service: convert ─▶ blocking thread: core ─▶ link: batch ─▶ TDX module
//!                 service: convert ◀─                       ◀─ link: answer ◀─
//! ```
//!
//! [`cli_main`] is the whole program; [`run`] is the server on listeners that the caller made.

mod access;
mod cli;
mod config;
mod convert;
mod events;
pub mod fuzz;
mod health;
mod link;
mod linked;
mod metrics;
mod reasons;
mod recover;
mod registry;
mod server;
mod service;
mod shell;
mod status;
mod store;
mod web;

pub use access::{Access, CallerTls, RULES};
pub use cli::{Error, cli_main};
pub use config::{Command, Config, DEFAULT_LISTEN, DEFAULT_MODULE, Limits, Link, Page, Tracing};
pub use linked::{Linked, LinkedError, link_to};
pub use server::run;
pub use store::StateError;

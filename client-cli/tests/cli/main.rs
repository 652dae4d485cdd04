//! `mmuctl` as a process, with real services behind it.

mod commands;
mod common;
mod conformance;
mod leftovers;
mod measure;
mod replay;
mod scenario;
mod trace;

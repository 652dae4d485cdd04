//! `mmuctl` as a process, with real services behind it.

mod bench;
mod commands;
mod common;
mod conformance;
mod guest;
mod leftovers;
mod measure;
mod replay;
mod trace;

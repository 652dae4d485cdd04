//! `mmuctl` as a process, with real services behind it.

mod bench;
mod chaos;
mod commands;
mod common;
mod compare;
mod conformance;
mod guest;
mod leftovers;
mod measure;
mod replay;
mod scenario;
mod tables;
mod tls;
mod trace;

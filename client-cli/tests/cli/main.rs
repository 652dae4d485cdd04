//! `mmuctl` as a process, with real services behind it.

mod access;
mod bench;
mod chaos;
mod commands;
mod common;
mod compare;
mod compare_own;
mod conformance;
mod guest;
mod host;
mod leftovers;
mod measure;
mod recorded;
mod replay;
mod replay_in_process;
mod scenario;
mod tables;
mod tls;
mod trace;

//! `mmuctl` as a process, with real services behind it.

mod commands;
mod common;
mod compare;
mod conformance;
mod leftovers;
mod measure;
mod replay;
mod tables;
mod trace;

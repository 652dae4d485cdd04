//! Requests that cannot be: wrong ids, wrong states, numbers that stand for nothing.

mod creation;
mod direct;
mod faults;
mod ids;
mod states;

const NO_VM: u64 = 999;

//! The service as its callers see it: a real server on a Unix socket and on TCP, real clients.

mod faults;
mod guest;
mod life;
mod metrics;
mod operations;
mod refusals;
mod replay;
mod stream;
mod support;

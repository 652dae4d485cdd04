//! The simulated platform: what it consists of and whether that can be.

mod config;
mod validate;

pub use config::{Features, PlatformConfig, Release, Tdmr};
pub use validate::PlatformError;

//! libFuzzer target: recorded call sequences.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| client_cli::fuzz::fuzz_sequence(bytes));

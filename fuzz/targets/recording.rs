//! libFuzzer target: marked recordings of a KVM.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| client_cli::fuzz::fuzz_recording(bytes));

//! libFuzzer target: recordings of kvm_page_fault.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| client_cli::fuzz::fuzz_trace(bytes));

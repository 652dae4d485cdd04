//! libFuzzer target: platform files.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tdx_module_svc::fuzz::fuzz_platform(bytes));

//! libFuzzer target: Execute requests, as the bytes of their message.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tdx_module_svc::fuzz::fuzz_execute(bytes));

//! libFuzzer target: calls of any RPC of the module, as a script.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| tdx_module_svc::fuzz::fuzz_requests(bytes));

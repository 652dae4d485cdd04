//! libFuzzer target: damaged states of mmu-service.

#![no_main]

use std::panic;

/// A panic of the store's library is one that the store turns into a refusal; libFuzzer would end
/// with any.
fn forgive_the_library() {
    let ends = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        let is_library = info
            .location()
            .is_some_and(|location| location.file().contains("/redb-"));
        if !is_library {
            ends(info);
        }
    }));
}

libfuzzer_sys::fuzz_target!(
    init: forgive_the_library(),
    |bytes: &[u8]| mmu_service::fuzz::fuzz_state(bytes)
);

//! What comes from outside, as a fuzzer sees it: raw bytes in, answers and refusals out.
//!
//! [`Requests`] plays scripts of RPCs on the service's own handlers, with a real module behind them;
//! [`fuzz_state`] opens states that are damaged. Neither needs a fuzzer of a certain make; `fuzz/`
//! drives them with libFuzzer, and the tests beside them with what was valid before it was damaged.

mod requests;
mod state;

pub use requests::{Requests, request_seeds};
pub use state::{fuzz_state, state_seeds};

/// Runs what is kept for a target.
#[cfg(test)]
fn each_kept(target: &str, run: impl Fn(&[u8])) {
    let folder = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
    let mut inputs = 0;
    for entry in std::fs::read_dir(&folder).unwrap() {
        run(&std::fs::read(entry.unwrap().path()).unwrap());
        inputs += 1;
    }
    assert!(inputs > 0, "{folder} is empty");
}

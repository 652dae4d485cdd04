//! Replaying recorded call sequences against a module behind `tdx.module.v1`, whoever's it is.
//!
//! | file | content |
//! |---|---|
//! | `sequence` | a recorded sequence: steps, what they returned, the state at the end |
//! | `player` | steps as requests to the module |
//! | `compare` | outputs and the final state against the recording |
//! | `report` | what passed, and the first differences |

mod compare;
mod player;
mod report;
mod sequence;

pub use player::Player;
pub use report::{Difference, Report};
pub use sequence::{Sequence, SequenceError};

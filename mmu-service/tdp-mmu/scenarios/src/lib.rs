//! Scenarios that can be run: the tables, as text, and races of the past.
//!
//! Everything runs on both cores in this process, each scenario with a host, a module and a VM of
//! its own. Through the services it could not: a row spoils single answers of the module, races
//! stop a call in its middle, and both look at the private tree directly. The cores stay free of
//! that, so it is a crate of its own, beside the core whose tests use the same tables. Host, port
//! and checks (`tests/common`) are files of the core's tests, compiled once more here: the tests
//! inside the core need them against their own instance of it.
//!
//! Each file of `tables/` is a list of rows:
//!
//! ```text
//! == P01 the first private fault builds the path
//! base E4
//! do fault 1 => Fixed
//! calls SA3 SA2 SA1 AUG
//! ```
//!
//! Lines up to the last `do` set up or act; the lines behind a `do` say what it did. Numbers are
//! hexadecimal frames and page counts, decimal elsewhere. A line that starts with `kernel` or
//! `batched` holds in that propagation mode only. Behind every row the invariants are checked, and
//! the VM gives everything back, unless it is bugged.
#![cfg(not(feature = "shuttle"))]

#[path = "../../tests/common/mod.rs"]
mod common;

mod actions;
mod calls;
mod races;
mod rows;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

pub use tdp_mmu::Mode;

use rows::Row;
use world::World;

/// Name and text of each table.
const TABLES: [(&str, &str); 6] = [
    ("roots", include_str!("../tables/roots.txt")),
    ("shared", include_str!("../tables/shared.txt")),
    ("private", include_str!("../tables/private.txt")),
    ("zaps", include_str!("../tables/zaps.txt")),
    ("ioctls", include_str!("../tables/ioctls.txt")),
    ("teardown", include_str!("../tables/teardown.txt")),
];
/// The group of the races.
pub const RACES: &str = "races";

/// What a host is told of a module in the same process.
pub fn platform_of(config: &tdx_module::PlatformConfig) -> tdp_mmu::Platform {
    common::platform_of(config)
}

/// A scenario by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario {
    /// `P01` for a row, a few words for a race.
    pub id: String,
    /// What happens.
    pub title: String,
    /// Table, or [`RACES`].
    pub group: &'static str,
}

/// What one policy of the host comes to in a race.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    /// `fixed`, as KVM does it now, or `unfixed`.
    pub name: &'static str,
    /// What it does, in a sentence.
    pub outcome: String,
    /// The SEAMCALLs, in short.
    pub calls: Vec<String>,
}

/// What came of a run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Why the scenario did not do what it says.
    pub failure: Option<String>,
    /// The SEAMCALLs of its actions, in short and in order: `SA1` is TDH.MEM.SEPT.ADD at level 1.
    /// Of a race, those of the fixed policy.
    pub calls: Vec<String>,
    /// Of a race: both policies.
    pub policies: Vec<Policy>,
}

/// Every scenario, in the order of the tables, races last.
pub fn list() -> Vec<Scenario> {
    let rows = TABLES.iter().flat_map(|&(group, text)| {
        rows::parse(text).into_iter().map(move |row| Scenario {
            id: row.id,
            title: row.title,
            group,
        })
    });
    let races = races::ALL.iter().map(|race| Scenario {
        id: race.id.into(),
        title: race.title.into(),
        group: RACES,
    });
    rows.chain(races).collect()
}

/// Runs a scenario in a propagation mode; `None` when there is none of this name.
pub fn run(id: &str, mode: Mode) -> Option<Run> {
    if let Some(race) = races::ALL.iter().find(|race| race.id == id) {
        let policies = caught(|| (race.run)(mode));
        return Some(match policies {
            Ok(policies) => Run {
                failure: None,
                calls: policies
                    .first()
                    .map_or(Vec::new(), |fixed| fixed.calls.clone()),
                policies,
            },
            Err(failure) => Run {
                failure: Some(failure),
                calls: Vec::new(),
                policies: Vec::new(),
            },
        });
    }
    let mut rows = TABLES.iter().flat_map(|(_, text)| rows::parse(text));
    let row = rows.find(|row| row.id == id)?;
    let mut world = World::new(mode);
    let played = caught(|| play(&mut world, &row, mode)).and_then(|played| played);
    let calls = world.take_calls();
    let ended = match played {
        Ok(()) => caught(|| world.end()).and_then(|ended| ended),
        failed => failed,
    };
    Some(Run {
        failure: ended.err(),
        calls,
        policies: Vec::new(),
    })
}

fn play(world: &mut World, row: &Row, mode: Mode) -> Result<(), String> {
    let is_meant = |only: Option<Mode>| only.is_none_or(|only| only == mode);
    for line in row.lines.iter().filter(|line| is_meant(line.mode)) {
        world
            .line(&line.text)
            .map_err(|why| format!("line {}: {}: {why}", line.number, line.text))?;
    }
    Ok(())
}

/// What a row asserts and does not find is a failure of the scenario, not of the program.
fn caught<T>(act: impl FnOnce() -> T) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(act)).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()));
        text.unwrap_or_else(|| "it panicked".into())
    })
}

/// Neighbouring calls that repeat, folded: `AUG*512`.
pub fn fold(calls: &[String]) -> String {
    calls::fold(calls)
}

//! Scenarios that can be run: the tables, as text, what no line can play, and races of the past.
//!
//! Everything runs on both cores in this process, each scenario with a host, a module and a VM of
//! its own. Through the services it could not: a row spoils single answers of the module, races
//! stop a call in its middle, some need a hand inside the core, and all look at the private tree
//! directly. The core that the service has stays free of that, so this is a package of its own
//! which compiles the sources of the core once more. Host, port and checks (`tests/common`) are
//! files of the core's tests, and so are the functions that [`played`] lists.
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

mod actions;
mod concurrent;
mod played;
mod races;
mod rows;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};

use tdp_mmu::Mode;

use crate::common::{calls, witness};
use rows::Row;
use world::World;

/// Texts of the tables.
const TABLES: [&str; 6] = [
    include_str!("../tables/roots.txt"),
    include_str!("../tables/shared.txt"),
    include_str!("../tables/private.txt"),
    include_str!("../tables/zaps.txt"),
    include_str!("../tables/ioctls.txt"),
    include_str!("../tables/teardown.txt"),
];
/// The group of the races.
pub const RACES: &str = "races";

/// Letters of ids, and the groups that they stand for, in the order of the list.
const GROUPS: [(&str, &str); 11] = [
    ("R", "roots"),
    ("D", "shared"),
    ("L", "shared"),
    ("N", "shared"),
    ("P", "private"),
    ("Z", "zaps"),
    ("C", "concurrency"),
    ("I", "ioctls"),
    ("M", "map-gpa"),
    ("T", "teardown"),
    ("X", "forbidden"),
];

/// A scenario by name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Scenario {
    /// `P01` for a row, a few words for a race.
    pub id: String,
    /// What happens.
    pub title: String,
    /// What it is about: `roots`, `shared`, `private`, `zaps`, `concurrency`, `ioctls`, `map-gpa`,
    /// `teardown`, `forbidden`, or [`RACES`].
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

fn rows() -> impl Iterator<Item = Row> {
    TABLES.into_iter().flat_map(rows::parse)
}

/// Place of an id in the list: its group, then its number.
fn place(id: &str) -> (usize, &str) {
    let letter = id.get(..1).unwrap_or_default();
    let group = GROUPS.iter().position(|(of, _)| *of == letter);
    (group.unwrap_or(GROUPS.len()), id)
}

/// Every scenario: rows by group and number, races last.
pub fn list() -> Vec<Scenario> {
    let rows = rows().map(|row| (row.id, row.title));
    let played = played::ALL.iter().map(|one| (one.id(), one.title()));
    let mut named: Vec<(String, String)> = rows.chain(played).collect();
    named.sort_by(|(one, _), (other, _)| place(one).cmp(&place(other)));
    let races = races::ALL.iter().map(|race| Scenario {
        id: race.id.into(),
        title: race.title.into(),
        group: RACES,
    });
    let rows = named.into_iter().map(|(id, title)| {
        let group = GROUPS.get(place(&id).0).map_or("", |(_, group)| group);
        Scenario { id, title, group }
    });
    rows.chain(races).collect()
}

/// Runs a scenario in a propagation mode; `None` when there is none of this name.
pub fn run(id: &str, mode: Mode) -> Option<Run> {
    if let Some(race) = races::ALL.iter().find(|race| race.id == id) {
        return Some(run_race(race, mode));
    }
    if let Some(played) = played::ALL.iter().find(|played| played.id() == id) {
        let (ended, calls) = witness::watch(mode, || caught(|| played.play(mode)));
        return Some(Run {
            failure: ended.err(),
            calls,
            policies: Vec::new(),
        });
    }
    let row = rows().find(|row| row.id == id)?;
    Some(run_row(&row, mode))
}

fn run_race(race: &races::Race, mode: Mode) -> Run {
    let (failure, policies) = match caught(|| (race.run)(mode)) {
        Ok(policies) => (None, policies),
        Err(failure) => (Some(failure), Vec::new()),
    };
    let fixed = policies.first();
    Run {
        failure,
        calls: fixed.map_or(Vec::new(), |fixed| fixed.calls.clone()),
        policies,
    }
}

fn run_row(row: &Row, mode: Mode) -> Run {
    let mut world = World::new(mode);
    let played = caught(|| play(&mut world, row, mode)).and_then(|played| played);
    let calls = world.take_calls();
    let ended = match played {
        Ok(()) => caught(|| world.end()).and_then(|ended| ended),
        failed => failed,
    };
    Run {
        failure: ended.err(),
        calls,
        policies: Vec::new(),
    }
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

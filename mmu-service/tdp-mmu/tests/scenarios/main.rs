//! Scenario tables as text: what KVM does to its trees, and which SEAMCALLs that takes.
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
//! `batched` holds in that propagation mode only. Every row runs in both modes; afterwards the
//! invariants hold, and the VM gives everything back, unless it is bugged.
#![cfg(not(feature = "shuttle"))]

#[path = "../common/mod.rs"]
mod common;

mod actions;
mod calls;
mod ids;
mod rows;
mod world;

use tdp_mmu::Mode;

use rows::Row;
use world::World;

const TABLES: [(&str, &str); 6] = [
    ("roots", include_str!("tables/roots.txt")),
    ("shared", include_str!("tables/shared.txt")),
    ("private", include_str!("tables/private.txt")),
    ("zaps", include_str!("tables/zaps.txt")),
    ("ioctls", include_str!("tables/ioctls.txt")),
    ("teardown", include_str!("tables/teardown.txt")),
];

fn run(table: &str) {
    let (_, text) = TABLES.into_iter().find(|(name, _)| *name == table).unwrap();
    let mut failed = Vec::new();
    for row in rows::parse(text) {
        for mode in [Mode::Kernel, Mode::Batched] {
            if let Err(why) = play(&row, mode) {
                failed.push(format!("{} ({mode:?}) {}\n    {why}", row.id, row.title));
            }
        }
    }
    assert!(
        failed.is_empty(),
        "{} rows failed\n{}",
        failed.len(),
        failed.join("\n")
    );
}

fn play(row: &Row, mode: Mode) -> Result<(), String> {
    let mut world = World::new(mode);
    for line in row
        .lines
        .iter()
        .filter(|line| line.mode.is_none_or(|only| only == mode))
    {
        world
            .line(&line.text)
            .map_err(|why| format!("line {}: {}: {why}", line.number, line.text))?;
    }
    world.end()
}

#[test]
fn roots_are_loaded_put_and_replaced_as_listed() {
    run("roots");
}

#[test]
fn shared_faults_do_what_is_listed() {
    run("shared");
}

#[test]
fn private_faults_make_the_listed_calls() {
    run("private");
}

#[test]
fn zaps_and_conversions_make_the_listed_calls() {
    run("zaps");
}

#[test]
fn building_a_td_makes_the_listed_calls() {
    run("ioctls");
}

#[test]
fn the_end_of_a_vm_makes_the_listed_calls() {
    run("teardown");
}

//! The host's side of shared memory on the command line.

use serde_json::json;

use crate::common::Services;

/// An ordinary VM with one slot of 4 MiB, which the host maps with pages of 2 MiB.
fn services() -> Services {
    let services = Services::start();
    services.ok("vm create --kind ordinary");
    services.ok("vcpu add --vm 1");
    services.ok("slot set --vm 1 --gpa 0 --size 4M --hva 0x7f0000000000 --host-page-size 2M");
    services
}

fn pages(services: &Services) -> [u64; 2] {
    let stats = services.ok("stats --vm 1");
    ["pages_4k", "pages_2m"].map(|name| stats[name].as_u64().unwrap())
}

#[test]
fn the_host_changes_its_mappings_and_takes_them_back() {
    let services = services();
    services.ok("fault --vm 1 --gpa 0x1000 --write");
    assert_eq!(pages(&services), [0, 1]);
    // A leaf that overlaps goes as a whole, and the host is left with small pages.
    let line = "host change --vm 1 --hva 0x7f0000000000 --size 2M --to page-size --page-size 4K";
    let changed = services.ok(line);
    assert_eq!(
        (&changed["hva"], &changed["size"], &changed["flushes"]),
        (&json!("0x7f0000000000"), &json!(2 << 20), &json!(1)),
        "{changed}"
    );
    assert_eq!(pages(&services), [0, 0]);
    services.ok("fault --vm 1 --gpa 0x1000 --write");
    assert_eq!(pages(&services), [1, 0]);

    services.ok("host change --vm 1 --hva 0x7f0000000000 --size 2M --to read-only");
    assert_eq!(pages(&services), [0, 0]);
    let written = services.run("fault --vm 1 --gpa 0x1000 --write");
    assert_eq!(written.code, Some(1), "EFAULT: {written:?}");
    let read = services.ok("fault --vm 1 --gpa 0x1000");
    assert_eq!(read["ret_pf"], "FIXED", "{read}");
    services.ok("host change --vm 1 --hva 0x7f0000000000 --size 2M --to read-write");
    assert_eq!(
        services.ok("fault --vm 1 --gpa 0x1000 --write")["ret_pf"],
        "FIXED"
    );

    let unmapped = services.ok("host unmap --vm 1 --hva 0x7f0000001000 --size 4K");
    assert_eq!(unmapped["flushes"], 1, "{unmapped}");
    assert_eq!(pages(&services), [0, 0]);
    // Nothing is taken from a VM that is not told.
    services.ok("fault --vm 1 --gpa 0x1000 --write");
    services.ok("host change --vm 1 --hva 0x7f0000000000 --size 2M --to drop --silent");
    assert_eq!(pages(&services), [1, 0]);
    for to in ["zero", "share", "write", "none"] {
        let line = format!("host change --vm 1 --hva 0x7f0000000000 --size 2M --to {to}");
        services.ok(&line);
    }
    let refused = services.run("fault --vm 1 --gpa 0x1000 --write");
    assert_eq!(refused.code, Some(1), "{refused:?}");
}

#[test]
fn leaves_are_protected_and_writes_are_watched() {
    let services = services();
    services.ok("dirty-log set --vm 1 true");
    services.ok("fault --vm 1 --gpa 0x1000 --write");
    let line = "write-protect --vm 1 --gpa 0x1000";
    assert_eq!(services.ok(line)["was_writable"], true);
    assert_eq!(services.ok(line)["was_writable"], false, "for good");
    let protected = services.ok("write-protect --vm 1 --slot 0");
    assert_eq!(protected["slot_id"], 0, "{protected}");
    assert!(protected.get("was_writable").is_none(), "{protected}");

    services.ok("write-protect --vm 1 --gpa 0x5000 --track true");
    let watched = services.ok("fault --vm 1 --gpa 0x5000 --write");
    assert_ne!(watched["ret_pf"], "FIXED", "{watched}");
    services.ok("write-protect --vm 1 --gpa 0x5000 --track false");
    let written = services.ok("fault --vm 1 --gpa 0x5000 --write");
    assert_eq!(written["ret_pf"], "FIXED", "{written}");
}

#[test]
fn a_touch_leaves_bits_and_no_faults() {
    let services = services();
    services.ok("fault --vm 1 --gpa 0 --write");
    let young = || services.ok("age --vm 1 --hva 0x7f0000000000 --size 2M")["young"].clone();
    assert_eq!([young(), young()], [true, false]);
    let touched = services.ok("touch --vm 1 --gpa 0x1000 --count 3");
    assert_eq!(
        (&touched["count"], &touched["faulting"]),
        (&json!(3), &json!(0))
    );
    assert_eq!(young(), true);
    let line = "touch --vm 1 --gpa 2093056 --count 3 --stride 4096 --write";
    assert_eq!(services.ok(line)["faulting"], 2, "behind the leaf");
    assert_eq!(pages(&services), [0, 1]);
}

#[test]
fn the_nx_mitigation_is_switched_and_recovered() {
    let services = services();
    let on = services.ok("nx set --vm 1 true");
    assert_eq!(on["nx_huge_pages"], true, "{on}");
    services.ok("fault --vm 1 --gpa 0x1000 --write");
    services.ok("fault --vm 1 --gpa 0x1000 --exec");
    assert_eq!(services.ok("stats --vm 1")["nx_lpage_splits"], 1);
    let recovered = services.ok("nx recover --vm 1 --most 8");
    assert_eq!(recovered["recovered"], 1, "{recovered}");
    assert_eq!(services.ok("nx recover --vm 1")["recovered"], 0);
    services.ok("nx set --vm 1 false");
}

#[test]
fn mistakes_are_told_apart_from_refusals() {
    let services = services();
    for (line, code) in [
        ("host change --vm 1 --hva 0 --size 4K", 2),
        ("host change --vm 1 --hva 0 --size 4K --to page-size", 2),
        ("host change --vm 1 --hva 0 --size 4K --to away", 2),
        (
            "host change --vm 1 --hva 0xfffffffffffff000 --size 8K --to drop",
            2,
        ),
        ("host change --vm 1 --hva 1 --size 4K --to drop", 1),
        ("host unmap --vm 9 --hva 0 --size 4K", 1),
        ("write-protect --vm 1", 2),
        ("write-protect --vm 1 --slot 0 --gpa 0", 2),
        ("write-protect --vm 1 --slot 0 --track true", 2),
        ("write-protect --vm 1 --slot 7", 1),
        ("write-protect --vm 1 --gpa 1", 1),
        ("touch --vm 1 --gpa 0 --count 5000", 1),
        ("nx recover --vm 1 --most 0", 1),
        ("nx set --vm 9 true", 1),
    ] {
        let ran = services.run(line);
        assert_eq!(ran.code, Some(code), "{line}: {ran:?}");
    }
}

//! Ordinary VMs and the direct root on the command line, and their tracepoints.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use serde_json::json;

use crate::common::Services;

#[test]
fn an_ordinary_vm_is_logged_aged_and_zapped() {
    let services = Services::start();
    let vm = services.ok("vm create --kind ordinary --dirty-log manual --nx-huge-pages");
    assert_eq!((&vm["kind"], &vm["hkid"]), (&json!("ordinary"), &json!(0)));
    services.ok("vcpu add --vm 1");
    services.ok("slot set --vm 1 --gpa 0 --size 4M --hva 0x7f0000000000 --host-page-size 2M");
    services.ok("slot set --vm 1 --slot 1 --gpa 1G --size 1M --log-dirty --demand-zero");
    let shown = services.ok("vm show 1");
    assert_eq!(shown["kind"], "ordinary", "{shown}");
    let slots = [&shown["slots"][0], &shown["slots"][1]];
    assert_eq!(
        (&slots[0]["host_page_size"], &slots[0]["log_dirty"]),
        (&json!("2M"), &json!(false))
    );
    assert_eq!(
        (&slots[1]["demand_zero"], &slots[1]["log_dirty"]),
        (&json!(true), &json!(true))
    );
    assert_eq!(slots[1]["guest_memfd"], false);

    let fault = services.ok("fault --vm 1 --gpa 0x1000 --write");
    assert_eq!(
        (&fault["level"], &fault["rpcs"]),
        (&json!(2), &json!(0)),
        "{fault}"
    );
    services.ok("fault --vm 1 --gpa 0x40003000 --write");
    for _ in 0..2 {
        let log = services.ok("dirty-log get --vm 1 --slot 1");
        assert_eq!(
            (&log["dirty"], &log["pages"]),
            (&json!(1), &json!([3])),
            "{log}"
        );
    }
    services.ok("dirty-log clear --vm 1 --slot 1 --first 3 --pages 1");
    assert_eq!(services.ok("dirty-log get --vm 1 --slot 1")["dirty"], 0);
    services.ok("dirty-log set --vm 1 --slot 1 false");
    let refused = services.run("dirty-log get --vm 1 --slot 1");
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.contains("no dirty log"),
        "{}",
        refused.stderr
    );

    let young = |line| services.ok(line)["young"].clone();
    assert_eq!(young("age --vm 1 --hva 0x7f0000000000 --test"), true);
    assert_eq!(young("age --vm 1 --hva 0x7f0000000000 --size 2M"), true);
    assert_eq!(young("age --vm 1 --hva 0x7f0000000000 --test"), false);

    services.ok("zap --vm 1 --gpa 1G --size 16K");
    assert_eq!(services.ok("stats --vm 1")["pages_4k"], 0);
    services.ok("zap-fast --vm 1");
    assert_eq!(services.ok("stats --vm 1")["pages_2m"], 0);
    services.ok("fault --vm 1 --gpa 0x1000 --write");
    services.ok("zap --vm 1");
    assert_eq!(services.ok("stats --vm 1")["pages_2m"], 0);
    for (line, code) in [
        ("zap --vm 1 --gpa 1G", 2),
        ("zap --vm 1 --gpa 1 --size 4K", 1),
        ("zap-fast --vm 9", 1),
        ("age --vm 1 --hva 1", 1),
        ("dirty-log clear --vm 1 --slot 1 --pages 1000000000000", 1),
        ("vm create --kind ordinary --xfam 3", 1),
        ("vm create --kind odd", 2),
        ("slot set --vm 1 --gpa 0 --size 4K --host-page-size 3M", 2),
        ("events --vm 1", 2),
        ("events --vm 9 --count 1", 1),
    ] {
        assert_eq!(services.run(line).code, Some(code), "{line}");
    }
}

/// What `events` prints is what a script reads from tracefs, and what `replay` plays.
#[test]
fn events_are_a_trace_file_that_can_be_replayed() {
    let services = Services::start();
    services.ok("vm create --kind ordinary --label events");
    services.ok("vcpu add --vm 1 --count 2");
    services.ok("slot set --vm 1 --gpa 0 --size 1G --hva 0x7f0000000000");
    let mut child = services
        .command("events --vm 1")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap())
        .lines()
        .map(Result::unwrap);
    // The header says that nothing is missed from here on.
    let header: Vec<String> = lines.by_ref().take(4).collect();
    assert_eq!(header[0], "# tracer: nop");
    for (vcpu, page) in [(0, 1), (1, 2), (0, 513), (1, 514)] {
        services.ok(&format!(
            "fault --vm 1 --vcpu {vcpu} --gpa {} --write",
            page * 4096
        ));
    }
    services.ok("vm destroy 1");
    let text: Vec<String> = header.into_iter().chain(lines).collect();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success());
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("events, 0 lost"), "{said}");

    let events: Vec<&String> = text.iter().filter(|line| !line.starts_with('#')).collect();
    let first_fault = events
        .iter()
        .find(|line| line.contains("kvm_page_fault"))
        .unwrap();
    let columns: Vec<&str> = first_fault.split_whitespace().collect();
    assert_eq!(
        columns[..4],
        ["CPU", "0/KVM-1", "[000]", "....."],
        "{first_fault}"
    );
    assert_eq!(
        columns[5..],
        [
            "kvm_page_fault:",
            "vcpu",
            "0",
            "rip",
            "0x0",
            "address",
            "0x0000000000001000",
            "error_code",
            "0x2"
        ]
    );
    let zapped = events
        .iter()
        .filter(|line| line.contains("kvm_mmu_prepare_zap_page"));
    assert_eq!(zapped.count(), 4, "{text:#?}");

    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), text.join("\n")).unwrap();
    let path = file.path().display().to_string();
    let replayed = services.ok(&format!("replay --strict {path}"));
    assert_eq!(
        (&replayed["faults"], &replayed["vcpus"]),
        (&json!(4), &json!(2)),
        "{replayed}"
    );
    assert_eq!(
        (&replayed["ret_pf"]["FIXED"], &replayed["lost"]),
        (&json!(4), &json!(0))
    );
    assert_eq!(replayed["audit"]["mismatches"], 0);
}

#[test]
fn a_count_ends_the_events_and_makes_one_object() {
    let services = Services::start();
    services.ok("vm create --kind ordinary");
    services.ok("vcpu add --vm 1");
    services.ok("slot set --vm 1 --gpa 0 --size 1M");
    let mut command = services.command("events --vm 1 --count 3 --output json");
    let child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Whether it watches already does not matter: it ends with three events, whichever they are.
    let mut page = 0;
    let watcher = std::thread::spawn(move || child.wait_with_output().unwrap());
    while !watcher.is_finished() {
        services.ok(&format!("fault --vm 1 --gpa {page}"));
        services.ok(&format!("zap --vm 1 --gpa {page} --size 4K"));
        page = (page + 4096) % (1 << 20);
    }
    let output = watcher.join().unwrap();
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(
        (&json["events"], &json["lost"]),
        (&json!(3), &json!(0)),
        "{json}"
    );
    let sequences: Vec<u64> = json["records"]
        .as_array()
        .unwrap()
        .iter()
        .map(|record| record["sequence"].as_u64().unwrap())
        .collect();
    assert_eq!(sequences, [1, 2, 3]);
}

//! Whole replays through both services, with the counts that the recordings must give.

use crate::common::{Services, data, run};
use crate::recorded::{RANGES, expected, touches};
use serde_json::{Value, json};

/// One replay through both services.
struct Case {
    file: &'static str,
    mode: &'static str,
    order: &'static str,
    private: &'static str,
}

const BOOTS: [&str; 3] = [
    "boot-1g-2vcpu.trace.zst",
    "boot-1g-2vcpu-noinit.trace.zst",
    "boot-1g-2vcpu.touch.zst",
];

/// Every order with all memory private and with a part of it.
fn cases(file: &'static str, mode: &'static str) -> impl Iterator<Item = Case> {
    ["recorded", "per-vcpu"].into_iter().flat_map(move |order| {
        ["all", RANGES].map(|private| Case {
            file,
            mode,
            order,
            private,
        })
    })
}

fn sum(seamcalls: &Value) -> u64 {
    seamcalls
        .as_object()
        .unwrap()
        .values()
        .map(|count| count.as_u64().unwrap())
        .sum()
}

/// Replays, and compares with what the text of the recording says.
fn check(case: &Case) {
    let expected = expected(&touches(case.file), case.private);
    let file = data(case.file);
    let args = [
        "replay",
        file.to_str().unwrap(),
        "--mode",
        case.mode,
        "--order",
        case.order,
        "--private",
        case.private,
        "--output",
        "json",
    ];
    let run = run(args);
    assert_eq!(run.code, Some(0), "{args:?}: {}", run.stderr);
    let report = run.json();
    let name = format!("{args:?}: {report}");
    for (key, value) in [
        ("events", expected.events),
        ("faults", expected.events),
        ("pages_mapped", expected.pages),
        ("vcpus", expected.vcpus),
    ] {
        assert_eq!(report[key], value, "{key} {name}");
    }
    assert_eq!(report["ret_pf"]["FIXED"], expected.pages, "{name}");
    assert_eq!(report["ret_pf"]["SPURIOUS"], expected.again(), "{name}");
    let seamcalls = &report["seamcalls"];
    assert_eq!(seamcalls["TDH.MEM.PAGE.AUG"], expected.private, "{name}");
    assert_eq!(seamcalls["TDH.MEM.SEPT.ADD"], expected.tables, "{name}");
    let (calls, rpcs) = (sum(seamcalls), report["rpcs"].as_u64().unwrap());
    assert_eq!(calls, expected.private + expected.tables, "{name}");
    let hits = report["mirror_hits"].as_u64().unwrap();
    match case.order {
        "recorded" => assert_eq!(hits, expected.private_again, "{name}"),
        // A fault that made a table and then found its leaf in place made no hit.
        _ => assert!(hits <= expected.private_again, "{name}"),
    }
    assert_eq!(report["audit"]["mismatches"], 0, "{name}");
    assert_eq!(report["audit"]["leaves"], expected.private, "{name}");
    assert_eq!(report["audit"]["tables"], expected.tables, "{name}");
    assert_eq!(report["after_destroy"]["hkids_in_use"], 0, "{name}");
    assert_eq!(report["after_destroy"]["pages_in_use"], 0, "{name}");
    assert_eq!(report["hva_base_source"], "none", "{name}");
    assert_eq!(report["errors"], json!({}), "{name}");
    for none in ["unreadable", "lost", "unmaps", "out_of_range", "unlisted"] {
        assert_eq!(report[none], 0, "{none} {name}");
    }
    match case.mode {
        "kernel" => assert_eq!(rpcs, calls, "{name}"),
        _ => assert!(rpcs <= expected.private, "{name}"),
    }
}

#[test]
fn the_small_boot_gives_its_exact_counts_in_both_modes() {
    for mode in ["kernel", "batched"] {
        cases("boot-small.trace", mode).for_each(|case| check(&case));
    }
}

/// Each recording in both orders, private as a whole in one of them and in part in the other. The
/// remaining pairs are below, and without services in `replay_in_process`.
#[test]
fn boots_give_their_exact_counts() {
    for (at, file) in BOOTS.into_iter().enumerate() {
        let [a, b, c, d] = cases(file, "batched")
            .collect::<Vec<_>>()
            .try_into()
            .ok()
            .unwrap();
        let pair = if at % 2 == 0 { [a, d] } else { [b, c] };
        pair.iter().for_each(check);
    }
}

/// The whole table. In mode `kernel` it is a message for each of some 180 thousand calls, twelve
/// times over.
#[test]
#[ignore = "takes minutes: cargo test --release -p client-cli --test cli every_way -- --ignored"]
fn boots_give_their_exact_counts_in_every_way() {
    for file in BOOTS {
        for mode in ["kernel", "batched"] {
            cases(file, mode).for_each(|case| check(&case));
        }
    }
}

#[test]
fn shared_replays_make_no_call_to_the_module() {
    let file = data("boot-small.trace");
    let run = run([
        "replay",
        file.to_str().unwrap(),
        "--private",
        "none",
        "--output",
        "json",
    ]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report = run.json();
    assert_eq!(report["faults"], 5_000, "{report}");
    assert_eq!(sum(&report["seamcalls"]), 0, "{report}");
    assert_eq!(report["audit"]["mismatches"], 0, "{report}");
}

#[test]
fn memory_outside_the_private_ranges_is_shared() {
    let file = data("boot-small.trace");
    // 494 touches are in the firmware ROM.
    let args = [
        "replay",
        file.to_str().unwrap(),
        "--private",
        "ffe00000-100000000",
    ];
    let run = run(args.iter().chain(&["--output", "json"]));
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let report = run.json();
    assert_eq!(report["seamcalls"]["TDH.MEM.PAGE.AUG"], 494, "{report}");
    assert_eq!(report["errors"], json!({}), "{report}");
}

#[test]
fn unmaps_of_a_recording_zap_and_the_pages_fault_again() {
    let file = data("notifier4k.trace");
    for (private, unmapped) in [("all", true), ("none", false)] {
        let args = [
            "replay",
            file.to_str().unwrap(),
            "--private",
            private,
            "--output",
            "json",
        ];
        let run = run(args);
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        let report = run.json();
        assert_eq!(report["events"], 41, "{report}");
        assert_eq!(report["hva_base"], "0x7fa1be000000", "{report}");
        assert_eq!(report["hva_base_source"], "inferred", "{report}");
        assert_eq!(
            (&report["unmaps"], &report["unmap_outside"]),
            (&14.into(), &1.into())
        );
        assert!(report["pages_zapped"].as_u64().unwrap() > 0, "{report}");
        let removed = report["seamcalls"]["TDH.MEM.PAGE.REMOVE"]
            .as_u64()
            .unwrap_or(0);
        assert_eq!(removed > 0, unmapped, "{report}");
        assert_eq!(report["audit"]["mismatches"], 0, "{report}");
    }
}

#[test]
fn the_demo_measures_its_image_and_compares_both_modes() {
    let run = run(["demo", "--output", "json"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let demo = run.json();
    let expected: Value =
        serde_json::from_str(&std::fs::read_to_string(data("tiny.json")).unwrap()).unwrap();
    assert_eq!(
        demo["mrtd"], expected["images"]["tiny.fd"]["mrtd_per_page"],
        "{demo}"
    );
    for mode in ["kernel", "batched"] {
        let part = &demo[mode];
        assert_eq!(part["mode"], mode);
        assert_eq!(part["mrtd"], demo["mrtd"], "{mode}");
        assert_eq!(part["faults"], 5_000, "{mode}");
        assert_eq!(part["audit"]["mismatches"], 0, "{mode}");
        assert_eq!(part["convert"]["to_shared"]["pages_zapped"], 512, "{mode}");
        assert_eq!(
            part["convert"]["touched_again"]["ret_pf"]["FIXED"], 512,
            "{mode}"
        );
        assert_eq!(part["after_destroy"]["pages_in_use"], 0, "{mode}");
    }
    for count in ["ret_pf", "pages_mapped", "seamcalls"] {
        assert_eq!(demo["kernel"][count], demo["batched"][count], "{count}");
    }
    assert!(demo["batched"]["rpcs"].as_u64() < demo["kernel"]["rpcs"].as_u64());
    assert!(
        demo["trace_id"].as_str().is_some_and(|id| id.len() == 32),
        "{demo}"
    );
}

#[test]
fn a_demo_that_keeps_its_vm_leaves_something_to_look_at() {
    let services = Services::start();
    let demo = services.ok("demo --keep");
    let vm = demo["vm_id"].as_u64().expect("the VM of mode batched");
    let listed = services.ok("vm list");
    let listed = listed["vms"].as_array().unwrap();
    assert_eq!(listed.len(), 1, "{listed:?}");
    assert_eq!(listed[0]["vm_id"], vm);
    let audit = services.ok(&format!("audit --vm {vm}"));
    assert_eq!(audit["mismatches"], 0, "{audit}");
    assert_eq!(audit["leaves"], demo["audit"]["leaves"], "{audit}");
    services.ok(&format!("vm destroy --vm {vm}"));

    // With services of its own nothing could stay.
    let alone = run(["demo", "--keep"]);
    assert_eq!(alone.code, Some(2), "{}", alone.stderr);
    assert!(alone.stderr.contains("--keep"), "{}", alone.stderr);
}

/// Every element of a page is closed in order, and every attribute quoted: what an XML reader asks.
fn check_well_formed(page: &str) {
    let body = page.strip_prefix("<!DOCTYPE html>\n").unwrap();
    let mut open: Vec<&str> = Vec::new();
    let mut rest = body;
    while let Some(at) = rest.find('<') {
        assert!(
            !rest[..at].contains('>'),
            "a bare > near {:.60}",
            &rest[..at]
        );
        let end = at + rest[at..].find('>').expect("a tag without an end");
        let tag = &rest[at + 1..end];
        rest = &rest[end + 1..];
        let name = tag
            .trim_start_matches('/')
            .split([' ', '\n', '/'])
            .next()
            .unwrap();
        assert!(!name.is_empty(), "<{tag}>");
        if tag.starts_with('/') {
            assert_eq!(open.pop(), Some(name), "</{name}>");
            continue;
        }
        assert_eq!(tag.matches('"').count() % 2, 0, "<{tag}>");
        if name == "style" {
            // Style sheets have > of their own.
            rest = &rest[rest.find("</style>").unwrap() + "</style>".len()..];
        } else if !tag.ends_with('/') {
            open.push(name);
        }
    }
    assert_eq!(open, Vec::<&str>::new());
    for reference in rest.split('&').skip(1) {
        assert!(reference.contains(';'), "{reference:.20}");
    }
}

/// The text of the element with this id, without the spaces between thousands.
fn figure(page: &str, id: &str) -> String {
    let (_, rest) = page
        .split_once(&format!("id=\"{id}\""))
        .unwrap_or_else(|| panic!("{id} is not on the page"));
    let (_, text) = rest.split_once('>').unwrap();
    let (text, _) = text.split_once('<').unwrap();
    text.replace('\u{202f}', "")
}

#[test]
fn a_report_tells_of_both_modes_with_the_figures_of_its_own_run() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("a report.html");
    let trace = data("boot-small.trace");
    let run = run([
        "replay",
        trace.to_str().unwrap(),
        "--output",
        "json",
        "--report",
        file.to_str().unwrap(),
    ]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let json = run.json();
    let page = std::fs::read_to_string(&file).unwrap();
    check_well_formed(&page);
    for outside in ["http-equiv", "<script", "<link", "src=", "@import", "url("] {
        assert!(!page.contains(outside), "{outside}");
    }
    assert!(page.contains("prefers-color-scheme: dark"));

    for (id, member) in [
        ("faults", "faults"),
        ("rpcs", "rpcs"),
        ("batched-rpcs", "rpcs"),
        ("batched-kicks", "kicks"),
        ("batched-pages_mapped", "pages_mapped"),
    ] {
        assert_eq!(figure(&page, id), json[member].to_string(), "{id}");
    }
    let calls = sum(&json["seamcalls"]);
    assert_eq!(figure(&page, "batched-seamcalls"), calls.to_string());
    let seconds = json["elapsed_s"].as_f64().unwrap();
    assert_eq!(figure(&page, "batched-elapsed_s"), format!("{seconds:.3}"));
    assert_eq!(
        figure(&page, "calls-TDH.MEM.PAGE.AUG"),
        json["seamcalls"]["TDH.MEM.PAGE.AUG"].to_string()
    );
    // The other mode: the same calls and pages, each call a message.
    assert_eq!(figure(&page, "kernel-seamcalls"), calls.to_string());
    assert_eq!(figure(&page, "kernel-rpcs"), calls.to_string());
    assert_eq!(figure(&page, "kernel-pages_mapped"), "5000");
    assert_eq!(figure(&page, "audit"), "clean");
    assert_eq!(figure(&page, "mapped"), "19.5 MiB");
    for process in ["mmu-rss", "module-rss"] {
        assert!(figure(&page, process).ends_with("iB"), "{process}");
    }
    let command = figure(&page, "command");
    assert!(
        command.starts_with("mmuctl replay ") && command.contains("'"),
        "{command}"
    );
}

#[test]
fn a_report_of_one_mode_leaves_the_other_out_and_a_bad_place_is_refused_first() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("report.html");
    let trace = data("sample.trace");
    let (trace, file) = (trace.to_str().unwrap(), file.to_str().unwrap());
    let ran = run([
        "replay",
        trace,
        "--mode",
        "kernel",
        "--one-mode",
        "--report",
        file,
    ]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let page = std::fs::read_to_string(file).unwrap();
    check_well_formed(&page);
    assert!(page.contains("id=\"kernel-rpcs\"") && !page.contains("id=\"batched-rpcs\""));

    let refused = run(["replay", trace, "--report", "/nonexistent/report.html"]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused
            .stderr
            .contains("report: cannot write /nonexistent/report.html")
    );
}

#[test]
fn a_guest_that_accepts_has_every_private_page() {
    let file = data("boot-small.trace");
    let expected = expected(&touches("boot-small.trace"), RANGES);
    for (mode, order) in [
        ("batched", "recorded"),
        ("batched", "per-vcpu"),
        ("kernel", "recorded"),
    ] {
        let run = run([
            "replay",
            file.to_str().unwrap(),
            "--accept",
            "--private",
            RANGES,
            "--mode",
            mode,
            "--order",
            order,
            "--output",
            "json",
        ]);
        assert_eq!(run.code, Some(0), "{mode} {order}: {}", run.stderr);
        let report = run.json();
        let name = format!("{mode} {order}: {report}");
        // Each private page went from PENDING to MAPPED once, whoever touched it first.
        assert_eq!(report["accepted"]["pages"], expected.private, "{name}");
        assert_eq!(
            report["accepted"]["again"], expected.private_again,
            "{name}"
        );
        // All else is as without: KVM has nothing to do with it.
        assert_eq!(report["ret_pf"]["FIXED"], expected.pages, "{name}");
        assert_eq!(report["seamcalls"]["TDH.MEM.PAGE.AUG"], expected.private);
        assert_eq!(report["audit"]["mismatches"], 0, "{name}");
        assert_eq!(report["audit"]["leaves"], expected.private, "{name}");
        assert_eq!(report["after_destroy"]["pages_in_use"], 0, "{name}");
    }
}

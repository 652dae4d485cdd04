//! The command line against running services: a life of a VM, and how mistakes are told.

use crate::common::{Services, finish, mmuctl, run};
use serde_json::json;

#[test]
fn a_vm_lives_from_create_to_destroy() {
    let services = Services::start();
    let vm = services.ok("vm create --max-vcpus 2 --label life");
    let id = vm["vm_id"].as_u64().unwrap();
    assert!(vm["tdr"].as_str().unwrap().starts_with("0x"), "{vm}");
    assert_eq!(
        services.ok(&format!("vcpu add --vm {id} --count 2"))["vcpu_ids"],
        json!([0, 1])
    );
    services.ok(&format!("slot set --vm {id} --slot 0 --gpa 0 --size 1G"));
    services.ok(&format!(
        "convert --vm {id} --gpa 0 --size 512M --to private"
    ));
    let mrtd = services.ok(&format!("vm finalize {id}"))["mrtd"].clone();
    assert_eq!(mrtd.as_str().unwrap().len(), 96);

    let fault = services.ok(&format!("fault --vm {id} --gpa 0x201000 --write"));
    assert_eq!(fault["ret_pf"], "FIXED", "{fault}");
    assert_eq!(
        (&fault["root"], &fault["level"]),
        (&json!("mirror"), &json!(1))
    );
    let leaves: Vec<_> = fault["seamcalls"].as_array().unwrap().iter().collect();
    assert_eq!(leaves.len(), 4, "{fault}");
    assert_eq!(leaves[0]["leaf"], "TDH.MEM.SEPT.ADD");
    assert_eq!(leaves[3]["leaf"], "TDH.MEM.PAGE.AUG");
    assert!(
        leaves.iter().all(|call| call["status"] == "TDX_SUCCESS"),
        "{fault}"
    );
    assert_eq!(fault["rpcs"], 1, "{fault}");
    assert_eq!(fault["trace_id"].as_str().unwrap().len(), 32);
    let again = services.ok(&format!("fault --vm {id} --vcpu 1 --gpa 0x201000"));
    assert_eq!(
        (&again["ret_pf"], &again["rpcs"]),
        (&json!("SPURIOUS"), &json!(0))
    );
    let shared = services.ok(&format!("fault --vm {id} --gpa 0x800030000000 --write"));
    assert_eq!(
        (&shared["ret_pf"], &shared["root"]),
        (&json!("FIXED"), &json!("direct"))
    );

    let walk = services.ok(&format!("walk --vm {id} --gpa 0x201000"));
    assert_eq!(walk["mapped"], true, "{walk}");
    let entries = walk["entries"].as_array().unwrap();
    assert_eq!(entries.len(), 4, "{walk}");
    assert_eq!(entries[3]["kind"], "leaf", "{walk}");
    assert_eq!(entries[0]["sept_state"], "NL_MAPPED", "{walk}");
    assert!(
        entries[3]["sept_state"]
            .as_str()
            .unwrap()
            .contains("PENDING"),
        "{walk}"
    );
    let tree = services.ok(&format!("tree --vm {id} --root mirror"));
    assert!(!tree["entries"].as_array().unwrap().is_empty(), "{tree}");

    let mapped = services.ok(&format!("prefault --vm {id} --gpa 4M --size 4M"));
    assert_eq!(mapped["pages_mapped"], 1024, "{mapped}");
    let zapped = services.ok(&format!("convert --vm {id} --gpa 4M --size 2M --to shared"));
    assert_eq!(zapped["pages_zapped"], 512, "{zapped}");
    let hole = services.ok(&format!("punch-hole --vm {id} --gpa 6M --size 1M"));
    assert_eq!(hole["pages_zapped"], 256, "{hole}");
    let audit = services.ok(&format!("audit --vm {id}"));
    assert_eq!(audit["mismatches"], 0, "{audit}");
    assert!(audit["entries"].as_u64().unwrap() > 256, "{audit}");

    let shown = services.ok(&format!("vm show --vm {id}"));
    assert_eq!((&shown["label"], &shown["mrtd"]), (&json!("life"), &mrtd));
    assert_eq!(services.ok("vm list")["vms"][0]["vm_id"], id);
    assert_eq!(
        services.ok(&format!("stats --vm {id}"))["pages_4k"],
        shown["pages_4k"]
    );
    services.ok(&format!("slot delete --vm {id} --slot 0"));
    assert_eq!(services.ok(&format!("vm destroy {id}"))["pages_leaked"], 0);
    let stats = services.ok("stats");
    assert_eq!(stats["module"]["hkids_in_use"], 0, "{stats}");
    assert_eq!(services.ok("vm list")["vms"], json!([]));
}

#[test]
fn refusals_name_what_was_wrong_and_exit_with_1() {
    let services = Services::start();
    let id = services.ok("vm create")["vm_id"].as_u64().unwrap();
    for (line, want) in [
        ("vm create --gpaw 47", "gpaw"),
        ("vm create --max-vcpus 577", "max_vcpus"),
        ("vm show 999", "999"),
        ("vm destroy 999", "999"),
        ("vcpu add --vm 999", "999"),
        ("fault --vm 999 --gpa 0", "999"),
        ("fault --vm ID --vcpu 7 --gpa 0", "7"),
        ("slot set --vm ID --gpa 1 --size 4K", "gpa"),
        ("slot set --vm ID --gpa 0 --size 1", "size"),
        ("convert --vm ID --gpa 1 --size 4K --to private", "gpa"),
        ("punch-hole --vm ID --gpa 0 --size 4K", "no slot"),
        ("stats --vm 0", "vm 0 does not exist"),
        (
            "vm init-region --vm ID --gpa 0 --data /nonexistent/file",
            "cannot read /nonexistent/file",
        ),
        (
            "replay /nonexistent/trace",
            "cannot open the trace /nonexistent/trace",
        ),
    ] {
        let run = services.run(&line.replace("ID", &id.to_string()));
        assert_eq!(run.code, Some(1), "{line}: {run:?}");
        assert_eq!(run.stdout, "", "{line}");
        assert!(
            run.stderr.starts_with("mmuctl: ") && run.stderr.contains(want),
            "{line}: {run:?}"
        );
    }
}

#[test]
fn a_raw_call_shows_its_registers_and_its_error() {
    let services = Services::start();
    let run = services.run("seamcall TDH.MEM.SEPT.RD rcx=0x3 rdx=0x1");
    assert_eq!(run.code, Some(1), "{run:?}");
    let answer = run.json();
    assert!(
        answer["status"].as_str().unwrap().starts_with("TDX_"),
        "{answer}"
    );
    assert!(
        answer["rax"].as_str().unwrap().starts_with("0xc"),
        "{answer}"
    );
    assert!(
        run.stderr.contains("TDH.MEM.SEPT.RD answered TDX_"),
        "{run:?}"
    );
    assert_eq!(answer["status"], "TDX_OPERAND_ADDR_RANGE_ERROR", "{answer}");
    assert_eq!(answer["class"], "operand", "{answer}");
    assert_eq!(answer["operand"], "RDX", "{answer}");
    assert_eq!(answer["recoverable"], "no", "{answer}");
    assert_eq!(answer["host_reaction"], "correct", "{answer}");
    let fine = services.ok("seamcall PHYMEM.PAGE.RDMD rcx=0x100000000");
    assert_eq!(fine["status"], "TDX_SUCCESS", "{fine}");
    assert_eq!(fine["recoverable"], "not_error", "{fine}");
    assert_eq!(fine["host_reaction"], "proceed", "{fine}");
}

#[test]
fn a_status_is_explained_without_a_service() {
    let nowhere = ["--mmu", "unix:///nonexistent/x.sock"];
    let json = run(["explain", "0x8000020000000092", "--output", "json"]
        .iter()
        .chain(&nowhere));
    assert_eq!(json.code, Some(0), "{json:?}");
    let answer = json.json();
    for (key, want) in [
        ("rax", json!("0x8000020000000092")),
        ("status", json!("TDX_OPERAND_BUSY")),
        ("leaf", json!(null)),
        ("class", json!("busy or entropy")),
        ("operand", json!("SEPT_TREE")),
        ("recoverable", json!("yes")),
        ("host_reaction", json!("retry")),
    ] {
        assert_eq!(answer[key], want, "{key}: {answer}");
    }
    let line = ["explain", "0x8000020000000092", "--leaf", "mem_range_block"];
    let table = run(line.iter().chain(&nowhere));
    assert_eq!(table.code, Some(0), "{table:?}");
    for part in [
        "TDX_OPERAND_BUSY",
        "SEPT_TREE (0x92)",
        "ERROR",
        "kicks all out",
    ] {
        assert!(table.stdout.contains(part), "{part}: {}", table.stdout);
    }
    let wrong = run(["explain", "TDX_NO_SUCH_STATUS"]);
    assert_eq!((wrong.code, &*wrong.stdout), (Some(2), ""), "{wrong:?}");
    assert!(
        wrong.stderr.contains("neither a number nor the name"),
        "{wrong:?}"
    );
}

#[test]
fn mistakes_in_usage_exit_with_2() {
    for (line, want) in [
        ("", "Usage"),
        ("nonsense", "nonsense"),
        ("replay", "FILE"),
        (
            "vm list --mmu ftp://x",
            "none of unix:///path, http://host:port and https://host:port",
        ),
        ("fault --vm 1", "--gpa"),
        ("fault --vm 1 --gpa five", "not a number"),
        ("replay x --private 1-2", "not a multiple of the page size"),
        ("replay x --hva-base 123 --local", "hva-base 0x123"),
        ("replay x --gpaw 50 --local", "gpaw 50 is neither 48 nor 52"),
    ] {
        let run = run(line.split_whitespace());
        assert_eq!(run.code, Some(2), "{line}: {run:?}");
        assert_eq!(run.stdout, "", "{line}");
        assert!(run.stderr.contains(want), "{line}: {run:?}");
    }
}

#[test]
fn a_service_that_is_not_there_is_told_with_its_cause() {
    let run = run(["vm", "list", "--mmu", "unix:///nonexistent/mmu.sock"]);
    assert_eq!(run.code, Some(1), "{run:?}");
    for part in [
        "cannot reach the MMU service",
        "/nonexistent/mmu.sock",
        "No such file",
    ] {
        assert!(run.stderr.contains(part), "{part}: {run:?}");
    }
}

#[test]
fn lines_that_cannot_be_read_are_named_and_fatal_only_when_strict() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("some.trace");
    let good = "CPU 0/KVM-1 [000] ..... 1.000000: kvm_page_fault: vcpu 0 rip 0x1 address 0x1000 \
                error_code 0x182\n";
    std::fs::write(&file, format!("{good}{}", "rubbish\n".repeat(12))).unwrap();
    let file = file.to_str().unwrap();
    let lenient = run(["replay", file, "--output", "json"]);
    assert_eq!(lenient.code, Some(0), "{lenient:?}");
    assert_eq!(lenient.json()["unreadable"], 12);
    assert!(
        lenient.stderr.contains("line 11: not an event"),
        "{lenient:?}"
    );
    assert!(!lenient.stderr.contains("line 12:"), "{lenient:?}");
    assert!(lenient.stderr.contains("2 more lines"), "{lenient:?}");
    let strict = run(["replay", file, "--strict", "--output", "json"]);
    assert_eq!(
        (strict.code, strict.stdout.as_str()),
        (Some(1), ""),
        "{strict:?}"
    );
    assert!(
        strict
            .stderr
            .contains("12 lines of the trace cannot be read"),
        "{strict:?}"
    );
}

#[test]
fn what_needs_no_service_works_without_one() {
    for (args, want) in [
        (&["--version"][..], "mmuctl "),
        (&["--help"], "punch-hole"),
        (&["completions", "bash"], "complete"),
        (&["man"], ".TH"),
    ] {
        let run = finish(
            mmuctl()
                .args(args)
                .env("MMUCTL_MMU", "unix:///nonexistent/x.sock"),
        );
        assert_eq!(run.code, Some(0), "{args:?}: {run:?}");
        assert!(run.stdout.contains(want), "{args:?}: {}", run.stdout);
    }
}

#[test]
fn every_changing_command_tells_its_trace() {
    let services = Services::start();
    for line in [
        "vm create",
        "vcpu add --vm 1",
        "slot set --vm 1 --slot 0 --gpa 0 --size 64M",
        "slot set --vm 1 --slot 1 --gpa 64M --size 8M --guest-memfd=false",
        "convert --vm 1 --gpa 0 --size 64M --to private",
        "vm init-region --vm 1 --gpa 0 --size 4K --measure",
        "vm finalize 1",
        "fault --vm 1 --gpa 0x2000 --write",
        "prefault --vm 1 --gpa 4M --size 4M",
        "guest --vm 1 accept:0x2000",
        "convert --vm 1 --gpa 4M --size 2M --to shared",
        "punch-hole --vm 1 --gpa 6M --size 1M",
        "dirty-log set --vm 1 --slot 1 true",
        "dirty-log clear --vm 1 --slot 1 --pages 64",
        "age --vm 1 --hva 0x7f0004000000",
        "zap --vm 1",
        "zap-fast --vm 1",
        "slot delete --vm 1 --slot 1",
        "seamcall PHYMEM.PAGE.RDMD rcx=0x100000000",
        "vm destroy 1",
    ] {
        let answer = services.ok(line);
        let id = answer["trace_id"].as_str().unwrap_or_default();
        let is_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        assert!(
            is_id && id.bytes().any(|byte| byte != b'0'),
            "{line}: {answer}"
        );
    }
}

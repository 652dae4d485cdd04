use super::*;

const FAULT: &str = "       CPU 2/KVM-4151    [006] .....    86.601928: kvm_page_fault: vcpu 2 rip \
     0x7f08a4602116 address 0x0000000113600002 error_code 0x181";

fn read_text(text: &str) -> (Trace, Vec<String>) {
    let mut reports = Vec::new();
    let trace = read(text.as_bytes(), |report| reports.push(report.to_string())).unwrap();
    (trace, reports)
}

fn faults(trace: &Trace) -> Vec<(u64, u32, u64, u64)> {
    trace
        .events
        .iter()
        .filter_map(|event| match event {
            Event::Fault(fault) => Some((fault.line, fault.vcpu, fault.address, fault.error_code)),
            Event::Unmap(_) => None,
        })
        .collect()
}

#[test]
fn events_of_every_form_are_read_in_order() {
    let (trace, reports) = read_text(
        "# tracer: nop\n\
         #\n\
         # entries-in-buffer/entries-written: 7/7   #P:8\n\
         cpus=8\n\
         CPU 3 is empty\n\
         \x20      CPU 2/KVM-4151    [006] .....    86.601928: kvm_page_fault: vcpu 2 rip 0x7f08a4602116 address 0x0000000113600002 error_code 0x181\n\
         \x20qemu-system-x86-8397    [002] d..1  1404.389384: kvm_page_fault: vcpu 0 rip 0x1000 address 0x0000000000001000 error_code 0x184\n\
         \x20      CPU 5/KVM-2201  [010] 275859.349038: kvm_page_fault:       address fffffff0 error_code 784\n\
         \x20          <...>-1946   [226] ...1. 32479.313982123: kvm_page_fault: vcpu 9 rip 0x0 address 0x00000018cbc00000 error_code 0x500000004\n\
         CPU 1/KVM  2203 [003]   501.224817: kvm:kvm_page_fault: vcpu 1 rip 0xffffffff81002000 address 0x0000000001002000 error_code 0x184\n\
         \x20      VCPU-0-61883   [003]   501.224818: kvm_page_fault: address 5000 error_code 182\n\
         \x20qemu-system-x86-6149    [001] ..... 72280.002117: kvm_unmap_hva_range: mmu notifier unmap range: 0x007f3a4e19e000 -- 0x007f3a4e19f000\n\
         \x20      CPU 0/KVM-6151    [003] ..... 72276.115701: kvm_mmu_spte_requested: gfn 84d pfn 1004a4d level 1\n\
         CPU:3 [LOST 117 EVENTS]\n\
         CPU:1 [5 EVENTS DROPPED]\n",
    );
    assert_eq!(reports, Vec::<String>::new());
    assert_eq!(
        faults(&trace),
        [
            (6, 2, 0x1_1360_0002, 0x181),
            (7, 0, 0x1000, 0x184),
            (8, 5, 0xffff_fff0, 0x784),
            (9, 9, 0x18_cbc0_0000, 0x5_0000_0004),
            (10, 1, 0x100_2000, 0x184),
            (11, 3, 0x5000, 0x182),
        ]
    );
    assert_eq!(
        trace.events[6],
        Event::Unmap(Unmap {
            line: 12,
            time_ns: 72_280_002_117_000,
            start: 0x7f3a_4e19_e000,
            end: 0x7f3a_4e19_f000
        })
    );
    let summary = Summary {
        faults: 6,
        unmaps: 1,
        ignored: 1,
        unreadable: 0,
        lost: 122,
    };
    assert_eq!(trace.summary, summary);
}

#[test]
fn folded_lines_are_joined_and_keep_the_first_number() {
    for (case, text, line, error_code) in [
        (
            "once",
            "CPU 2/KVM-4151 [006] ..... 86.601928: kvm_page_fault: vcpu 2 rip\n\
             0x7f08a4602116 address 0x0000000113600002 error_code 0x181\n",
            1,
            0x181,
        ),
        (
            "before the event name, then twice more",
            "x\nCPU 2/KVM-4151 [006] ..... 86.601928:\n  kvm_page_fault: vcpu 2\n  rip 0x1 \
             address\n 0x0000000113600002 error_code 0x183\n",
            2,
            0x183,
        ),
        (
            "before the last number",
            "CPU 2/KVM-4151 [006] ..... 86.601928: kvm_page_fault: vcpu 2 address 0x113600002 \
             error_code\n0x182\n",
            1,
            0x182,
        ),
    ] {
        let (trace, _) = read_text(text);
        assert_eq!(
            faults(&trace),
            [(line, 2, 0x1_1360_0002, error_code)],
            "{case}"
        );
    }
}

#[test]
fn the_folded_tail_of_a_whole_event_is_not_an_unreadable_line() {
    // 72 columns, then the rest of an event that is ignored anyway.
    let exit = "CPU 0/KVM-6151 [003] ..... 72276.115701: kvm_exit: vcpu 0 reason EPT_VIO";
    assert_eq!(exit.len(), 72);
    let (trace, reports) = read_text(&format!("{exit}\nrip 0x1000 info1 0x0000000000000182\n"));
    assert_eq!(
        (trace.summary.ignored, trace.summary.unreadable),
        (1, 0),
        "{reports:?}"
    );
}

#[test]
fn lines_that_cannot_be_read_are_counted_and_named() {
    let long = "x".repeat(MAX_LINE_BYTES + 1);
    for (case, text, want) in [
        ("other text", "hello\n".to_owned(), "line 1: not an event"),
        (
            "cut off at the end",
            FAULT[..FAULT.len() - 6].to_owned(),
            "line 1: error_code is missing",
        ),
        (
            "cut off before the next event",
            format!("{}\n{FAULT}\n", &FAULT[..FAULT.len() - 17]),
            "line 1: error_code is missing",
        ),
        (
            "a bad number",
            FAULT.replace("0x181", "0x18z"),
            "line 1: error_code \"0x18z\" is not",
        ),
        (
            "behind an event",
            format!("{FAULT}\nhello\n"),
            "line 2: not an event",
        ),
        (
            "a vcpu above the limit",
            FAULT.replace("vcpu 2", "vcpu 4096"),
            "line 1: vcpu 4096 is not below the limit of 4096",
        ),
        (
            "a long line",
            format!("{long}\n{FAULT}\n"),
            "line 1: longer than the limit of 65536",
        ),
        (
            "bytes that are no text",
            "\u{fffd}\u{0}\n".to_owned(),
            "line 1: not an event",
        ),
    ] {
        let (trace, reports) = read_text(&text);
        assert_eq!(trace.summary.unreadable, 1, "{case}: {reports:?}");
        assert!(reports[0].starts_with(want), "{case}: {reports:?}");
    }
}

#[test]
fn a_cut_event_and_foreign_text_behind_it_are_two_lines() {
    let (trace, reports) = read_text(&format!("{}\nhello\n{FAULT}\n", &FAULT[..FAULT.len() - 17]));
    assert_eq!(trace.summary.unreadable, 2, "{reports:?}");
    assert_eq!(trace.summary.faults, 1);
    assert!(
        reports[0].starts_with("line 1:") && reports[1].starts_with("line 2:"),
        "{reports:?}"
    );
}

#[test]
fn overwritten_entries_of_the_header_count_as_lost() {
    let (trace, _) = read_text("# entries-in-buffer/entries-written: 100/140   #P:2\n");
    assert_eq!(trace.summary.lost, 40);
}

#[test]
fn the_sample_recordings_read_whole() {
    for (name, raw, faults, unmaps, ignored) in [
        (
            "boot",
            &include_bytes!("../../data/boot-small.trace")[..],
            5000,
            0,
            0,
        ),
        (
            "notifier",
            include_bytes!("../../tests/data/notifier4k.trace"),
            41,
            14,
            250,
        ),
        (
            "mixed",
            include_bytes!("../../tests/data/sample.trace"),
            23,
            1,
            1236,
        ),
    ] {
        let mut reports = Vec::new();
        let trace = read(raw, |report| reports.push(report)).unwrap();
        let summary = Summary {
            faults,
            unmaps,
            ignored,
            unreadable: 0,
            lost: 0,
        };
        assert_eq!(trace.summary, summary, "{name}: {reports:?}");
        assert_eq!(trace.events.len() as u64, faults + unmaps, "{name}");
    }
}

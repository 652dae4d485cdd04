//! A recording that the model made of itself compares as the same, however it is written.

use std::fmt::Write as _;

use client_cli::bench::platform_of;
use tdp_mmu::{Fault, Host, HostChange, HostPageSize, SlotSpec, Vm, VmConfig, VmError};
use tdx_module::PlatformConfig;

use crate::compare::{compare_text, counts};

/// Exit qualifications of EPT: the address is linear, and what the entries allow.
const READ: u64 = 0x181;
const WRITE: u64 = 0x182;
const WRITE_PRESENT: u64 = 0x1AA;
const FETCH: u64 = 0x184;
const HVA: u64 = 0x7F00_0000_0000;

/// A VM that writes down what is done to it.
struct Recorder {
    vm: Vm,
    step: u32,
    text: String,
}

impl Recorder {
    fn new(config: VmConfig) -> Self {
        let host = Host::new(platform_of(&PlatformConfig::roomy())).unwrap();
        let vm = Vm::create_ordinary(host, config).unwrap();
        vm.trace(1 << 16);
        let (step, text) = (0, String::new());
        let mut recorder = Self { vm, step, text };
        recorder.step("CREATE_VM vcpus=1", |_| Ok(()));
        recorder
    }

    fn line(&mut self, name: &str, text: &str) {
        writeln!(self.text, " own-7 [000] ..... 1.0: {name}: {text}").unwrap();
    }

    fn mark(&mut self, text: &str) {
        self.line("tracing_mark_write", text);
    }

    /// Does something, and writes down what, its events, its result and the statistics.
    fn step<T>(&mut self, title: &str, act: impl FnOnce(&Vm) -> Result<T, VmError>) -> Option<T> {
        self.step += 1;
        let step = self.step;
        self.mark(&format!("STEP {step} BEGIN {title}"));
        let done = act(&self.vm);
        let (events, lost) = self.vm.take_events();
        assert_eq!(lost, 0);
        for event in events {
            self.line(event.name(), &event.to_string());
        }
        let errno = done.as_ref().err().map_or(0, VmError::errno);
        let rc = if errno == 0 { 0 } else { -1 };
        self.mark(&format!("STEP {step} END rc={rc} errno={errno}"));
        let stats = self.vm.stats();
        let counts = &stats.counts;
        let stat = format!(
            "STEP {step} STAT pages_4k={} pages_2m={} pages_1g={} pf_taken={} pf_fixed={} \
             pf_fast={} pf_spurious={} pf_emulate={} pf_mmio_spte_created={} \
             remote_tlb_flush_requests={} nx_lpage_splits={}",
            stats.pages_4k,
            stats.pages_2m,
            stats.pages_1g,
            counts.pf_taken,
            counts.pf_fixed,
            counts.pf_fast,
            counts.pf_spurious,
            counts.pf_emulate,
            counts.pf_mmio_spte_created,
            stats.remote_tlb_flush_requests,
            stats.nx_lpage_splits,
        );
        self.mark(&stat);
        done.ok()
    }

    fn slot(&mut self, spec: SlotSpec, note: &str) {
        let title = format!(
            "SET_USER_MEMORY_REGION slot={} gpa={:#x} size={:#x} hva={:#x} flags={} note={note}",
            spec.slot_id,
            spec.gpa,
            spec.size,
            spec.userspace_addr,
            u32::from(spec.log_dirty) | u32::from(spec.read_only) << 1,
        );
        self.step(&title, |vm| vm.set_user_memory_region(spec));
    }

    fn access(&mut self, op: &str, qualification: u64, gpas: &[u64]) {
        let title = format!(
            "ACCESS vcpu=0 op={op} gpa={:#x} count={}",
            gpas[0],
            gpas.len()
        );
        self.step(&title, |vm| {
            gpas.iter().try_for_each(|&gpa| {
                let fault = Fault {
                    gpa,
                    qualification,
                    ..Fault::default()
                };
                vm.handle_fault(0, fault).map(drop)
            })
        });
    }

    fn dirty_log(&mut self, slot: u32) {
        self.step(&format!("GET_DIRTY_LOG slot={slot}"), |vm| {
            vm.get_dirty_log(slot)
        });
    }

    fn host(&mut self, title: &str, start: u64, pages: u64, change: HostChange) {
        let size = pages << 12;
        self.step(&format!("{title} hva={start:#x} len={size:#x}"), |vm| {
            vm.change_host_mapping(start, start + size, change)
        });
    }
}

fn spec(slot_id: u32, gpa: u64, size: u64, host_page_size: HostPageSize) -> SlotSpec {
    SlotSpec {
        slot_id,
        gpa,
        size,
        userspace_addr: HVA + gpa,
        host_page_size,
        ..SlotSpec::default()
    }
}

/// Small and huge pages, a dirty log, prefaults, changes of the host, zaps, the end.
fn record(config: VmConfig) -> (String, u64) {
    let mut own = Recorder::new(config);
    let small = spec(0, 0, 0x10_0000, HostPageSize::Size4K);
    let huge = spec(1, 0x4000_0000, 0x80_0000, HostPageSize::Size2M);
    own.slot(small, "4K-backed,populated");
    own.slot(huge, "2M-backed(THP),populated");
    own.step("CREATE_VCPU n=1", |vm| vm.add_vcpu());
    own.access("write", WRITE, &[0x1000, 0x2000, 0x2000, 0x9000]);
    own.access("read", READ, &[0x4000_0000, 0x4020_3000]);
    own.access("exec", FETCH, &[0x4040_0000]);
    own.access("read", READ, &[0x9000_0000]);
    own.slot(
        SlotSpec {
            log_dirty: true,
            ..small
        },
        "",
    );
    own.access("write", WRITE_PRESENT, &[0x1000, 0x9000]);
    own.dirty_log(0);
    own.access("write", WRITE_PRESENT, &[0x9000]);
    own.slot(small, "");
    own.slot(
        SlotSpec {
            log_dirty: true,
            ..huge
        },
        "",
    );
    own.access("write", WRITE_PRESENT, &[0x4020_3000]);
    own.dirty_log(1);
    own.slot(huge, "");
    own.step("PRE_FAULT_MEMORY vcpu=0 gpa=0x20000 size=0x3000", |vm| {
        vm.pre_fault_memory(0, 0x2_0000, 0x3000, &mut |_| {})
    });
    own.host(
        "MADVISE DONTNEED",
        HVA + 0x2_0000,
        2,
        HostChange::DropToZero,
    );
    own.host("MPROTECT READ", HVA + 0x1000, 2, HostChange::ReadOnly);
    own.access("read", READ, &[0x1000]);
    own.host(
        "MPROTECT READ|WRITE",
        HVA + 0x1000,
        2,
        HostChange::ReadWrite,
    );
    own.access("write", WRITE, &[0x1000]);
    own.host("MUNMAP", HVA + 0x9000, 1, HostChange::NoAccess);
    own.access("write", WRITE, &[0x9000]);
    own.step("ZAP_ALL_FAST", Vm::zap_all_fast);
    own.access("write", WRITE, &[0x1000]);
    own.slot(SlotSpec { size: 0, ..small }, "");
    own.step("VM_DESTROY", Vm::destroy);
    (own.text, own.step.into())
}

#[test]
fn what_the_model_records_of_itself_is_the_same() {
    for (name, config) in [
        ("plain", VmConfig::default()),
        (
            "lazy, without the quirk, five levels",
            VmConfig {
                eager_page_split: false,
                slot_zap_all: false,
                gpaw: tdx_defs::Gpaw::W52,
                ..VmConfig::default()
            },
        ),
    ] {
        let (mut text, steps) = record(config);
        let mut steps = steps;
        if name != "plain" {
            // What no event shows has to be said.
            let first = "STEP 2 BEGIN";
            let said = "STEP 99 BEGIN ENABLE_CAP cap=KVM_CAP_DISABLE_QUIRKS2 arg0=0x80\n";
            text = text.replacen(first, &format!("{said}{first}"), 1);
            steps += 1;
        }
        let report = compare_text(&text);
        let json = report.json();
        assert_eq!(
            counts(&json),
            [steps, steps, 0, 0, 0],
            "{name}: {json:#}\n{text}"
        );
        assert_eq!(report.code, Some(0), "{name}");
    }
}

/// The same recording in the hand of another program.
#[test]
fn other_ways_to_write_the_steps_are_the_same_steps() {
    let (text, steps) = record(VmConfig::default());
    let other: Vec<String> = text
        .lines()
        .map(|line| {
            let Some((prefix, mark)) = line.split_once("tracing_mark_write: ") else {
                return line.to_owned();
            };
            let mark = mark.replace("STEP", "step").replace("BEGIN", "Begin");
            let mark = mark.replace("MADVISE DONTNEED", "madvise(MADV_DONTNEED)");
            let mark = mark.replace("MPROTECT READ|WRITE", "mprotect prot=PROT_READ|PROT_WRITE");
            let mark = mark.replace("MPROTECT READ", "mprotect PROT_READ");
            let mark = mark.replace("flags=1", "flags=KVM_MEM_LOG_DIRTY_PAGES");
            // A note has blanks in it, and hva is an address whether it says so or not.
            let mark = mark.replace("hva=0x", "hva ").replace("gpa=0x", "GPA 0X");
            let mark = mark
                .replace("slot=", "slot ")
                .replace("pages_4k=", "pages_4k ");
            format!("{prefix}tracing_mark_write: {mark}")
        })
        .collect();
    let report = compare_text(&other.join("\n"));
    let json = report.json();
    assert_eq!(counts(&json), [steps, steps, 0, 0, 0], "{json:#}");
}

/// What a reader cannot be sure of is left out, with what stands there.
#[test]
fn what_has_two_meanings_is_skipped() {
    let text = "STEP 1 BEGIN CREATE_VM\n\
        STEP 2 BEGIN SET_USER_MEMORY_REGION slot=0 gpa=4096000 size=4K hva=0x1000\n\
        STEP 3 BEGIN SET_USER_MEMORY_REGION slot=0 gpa=0 size=4K hva=0x1000 flags=SOMETHING\n\
        STEP 4 BEGIN FALLOCATE mode=ZERO_RANGE hva=0x1000 len=0x1000\n\
        STEP 5 BEGIN madvise(0x1000, 0x1000, MADV_DONTNEED)\n\
        STEP 6 BEGIN CLEAR_DIRTY_LOG slot=0 first_page=x num_pages=64\n\
        STEP 7 BEGIN PRE_FAULT_MEMORY gpa=0x1000 size=many\n\
        STEP 7 END rc=0 errno=0\n\
        STEP 8 END rc=0 errno=0\n\
        STEP 9 BEGIN MPROTECT SOMETIMES hva=0x1000 len=4096\n";
    let report = compare_text(text);
    assert_eq!(report.code, Some(0), "{}", report.stderr);
    let json = report.json();
    assert_eq!(counts(&json), [9, 1, 0, 0, 8], "{json:#}");
    let skipped = json["first_skipped"].as_array().unwrap().clone();
    for (skipped, (title, says)) in skipped.iter().zip([
        ("gpa=4096000", "decimal or hexadecimal"),
        ("SOMETHING", "flags"),
        ("ZERO_RANGE", "FALLOCATE"),
        ("madvise(0x1000", "no advice"),
        ("first_page=x", "no number"),
        ("size=many", "no number"),
        ("", "no step that is known"),
        ("SOMETIMES", "MPROTECT"),
    ]) {
        let of = |key: &str| skipped[key].as_str().unwrap().to_owned();
        assert!(of("title").contains(title), "{skipped}: {title}");
        assert!(of("reason").contains(says), "{skipped}: {says}");
    }
}

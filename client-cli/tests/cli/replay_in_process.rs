//! The same replays without services: host and module core in this process, every recording, mode
//! and order, with all memory private and with a part of it shared.

use std::sync::Arc;
use std::thread;

use client_cli::args::PrivateMemory;
use client_cli::bench::platform_of;
use client_cli::replay::{Plan, PlanOptions, PlannedFault};
use client_cli::trace;
use tdp_mmu::{
    Batch, Counts, Fault, FaultsReport, Host, Mode, RetPf, SeamPort, SlotSpec, Ticket, Vm, VmConfig,
};
use tdx_defs::{Gpaw, Leaf};
use tdx_module::{LpId, Module, PlatformConfig, Violations};

use crate::common::data;
use crate::recorded::{Expected, RANGES, expected, touches};

/// Faults of one vCPU that go to the VM together: all of them can be listed when they are retried.
const BATCH: usize = FaultsReport::MAX_OTHERS;
/// How often a fault that ends with RET_PF_RETRY is made again.
const MAX_RETRIES: u32 = 64;

/// Calls the module at once.
struct Direct(Arc<Module>);

impl SeamPort for Direct {
    fn submit(&self, batch: Batch) -> Ticket {
        let mut results = Vec::with_capacity(batch.calls.len());
        for call in &batch.calls {
            let result = self.0.seamcall(LpId(batch.lp), call);
            results.push(result);
            if batch.stop_on_error && result.status().is_error() {
                break;
            }
        }
        Ticket::ready(Ok(results))
    }
}

/// What the faults of one thread came to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Came {
    fixed: u64,
    spurious: u64,
    counts: Counts,
}

impl Came {
    /// Plays faults of one vCPU, in order.
    fn play(&mut self, vm: &Vm, vcpu: u32, faults: &[PlannedFault]) {
        let fault = |fault: &PlannedFault| Fault {
            gpa: fault.gpa,
            qualification: fault.qualification,
            ..Fault::default()
        };
        for batch in faults.chunks(BATCH) {
            let mut batch: Vec<Fault> = batch.iter().map(fault).collect();
            for round in 0.. {
                let report = vm.handle_faults(vcpu, &batch).unwrap();
                self.fixed += u64::from(report.fixed);
                self.spurious += u64::from(report.spurious);
                self.counts += &report.counts;
                assert_eq!(report.others.len(), report.others_count as usize);
                if report.others.is_empty() {
                    break;
                }
                assert!(round < MAX_RETRIES, "{:?}", report.others);
                let again = report.others.iter().map(|outcome| {
                    assert_eq!(outcome.result, Ok(RetPf::Retry), "{outcome:?}");
                    batch[outcome.index as usize]
                });
                batch = again.collect();
            }
        }
    }

    fn add(&mut self, other: &Self) {
        self.fixed += other.fixed;
        self.spurious += other.spurious;
        self.counts += &other.counts;
    }
}

fn build(host: &Arc<Host>, module: &Arc<Module>, plan: &Plan, mode: Mode) -> Vm {
    let config = VmConfig {
        mode,
        max_vcpus: u16::try_from(plan.vcpus.len()).unwrap(),
        ..VmConfig::default()
    };
    let port = Arc::new(Direct(Arc::clone(module)));
    let (vm, _) = Vm::create(Arc::clone(host), port, config).unwrap();
    for _ in &plan.vcpus {
        vm.add_vcpu().unwrap();
    }
    for slot in &plan.slots {
        vm.set_user_memory_region(SlotSpec {
            slot_id: slot.id,
            gpa: slot.range.start,
            size: slot.range.size(),
            userspace_addr: plan.hva.base + slot.range.start,
            guest_memfd: true,
            ..SlotSpec::default()
        })
        .unwrap();
    }
    for range in &plan.private {
        vm.set_memory_attributes(range.start, range.size(), 8)
            .unwrap();
    }
    vm.finalize().unwrap();
    vm
}

fn play(vm: &Vm, plan: &Plan, is_concurrent: bool) -> Came {
    let mut came = Came::default();
    for segment in &plan.segments {
        assert_eq!(segment.unmap, None);
        if !is_concurrent {
            for run in segment.faults.chunk_by(|a, b| a.vcpu == b.vcpu) {
                came.play(vm, u32::try_from(run[0].vcpu).unwrap(), run);
            }
            continue;
        }
        thread::scope(|scope| {
            let vcpus = (0..plan.vcpus.len()).map(|vcpu| {
                let own = segment.faults.iter().filter(|fault| fault.vcpu == vcpu);
                let own: Vec<PlannedFault> = own.copied().collect();
                scope.spawn(move || {
                    let mut came = Came::default();
                    came.play(vm, u32::try_from(vcpu).unwrap(), &own);
                    came
                })
            });
            for vcpu in vcpus.collect::<Vec<_>>() {
                came.add(&vcpu.join().unwrap());
            }
        });
    }
    came
}

fn check(name: &str, came: &Came, expected: &Expected, is_concurrent: bool, mode: Mode) {
    let made = |leaf| came.counts.seamcalls.get(leaf);
    assert_eq!(came.fixed, expected.pages, "{name}");
    assert_eq!(came.spurious, expected.again(), "{name}");
    assert_eq!(came.counts.pages_mapped, expected.pages, "{name}");
    assert_eq!(made(Leaf::MEM_PAGE_AUG), expected.private, "{name}");
    assert_eq!(made(Leaf::MEM_SEPT_ADD), expected.tables, "{name}");
    let calls = expected.private + expected.tables;
    assert_eq!(
        came.counts.seamcalls.total(),
        calls,
        "{name}: no other call"
    );
    if mode == Mode::Kernel {
        assert_eq!(came.counts.rpcs, calls, "{name}");
    } else {
        assert!(came.counts.rpcs < calls, "{name}");
    }
    // A fault that made a table and then found its leaf in place made no hit.
    if is_concurrent {
        assert!(came.counts.mirror_hits <= expected.private_again, "{name}");
    } else {
        assert_eq!(came.counts.mirror_hits, expected.private_again, "{name}");
    }
}

/// One recording: modes, orders and both kinds of placement, each on a VM of its own.
fn replay(file: &str) {
    let recording =
        trace::read(trace::open(&data(file)).unwrap(), |line| panic!("{line}")).unwrap();
    let touches = touches(file);
    let config = PlatformConfig::roomy();
    let host = Host::new(platform_of(&config)).unwrap();
    let module = Arc::new(Module::new(config).unwrap());
    let free = host.pages_in_use();
    for private in ["all", RANGES] {
        let expected = expected(&touches, private);
        let plan = Plan::new(
            &recording,
            &PlanOptions {
                private: private.parse::<PrivateMemory>().unwrap(),
                gpaw: Gpaw::W48,
                hva_base: None,
                image: Vec::new(),
            },
        )
        .unwrap();
        assert_eq!(plan.vcpus.len() as u64, expected.vcpus);
        for mode in [Mode::Batched, Mode::Kernel] {
            for is_concurrent in [false, true] {
                let name = format!("{file} {private} {mode:?} concurrent {is_concurrent}");
                let vm = build(&host, &module, &plan, mode);
                let came = play(&vm, &plan, is_concurrent);
                check(&name, &came, &expected, is_concurrent, mode);
                let audit = vm.audit(&mut |_, _| {}).unwrap();
                assert_eq!(
                    (audit.mismatches, audit.frozen),
                    (0, 0),
                    "{name}: {audit:?}"
                );
                assert_eq!(
                    (audit.leaves, audit.tables),
                    (expected.private, expected.tables),
                    "{name}"
                );
                assert_eq!(vm.info().pages_4k, expected.pages, "{name}");
                assert_eq!(vm.bugs().reports(), [], "{name}");
                vm.destroy().unwrap();
                assert_eq!(host.pages_in_use(), free, "{name}");
                assert_eq!(module.violations(), Violations::default(), "{name}");
            }
        }
    }
}

#[test]
fn the_small_boot_replays_exactly_in_every_way() {
    replay("boot-small.trace");
}

#[test]
fn the_boot_replays_exactly_in_every_way() {
    replay("boot-1g-2vcpu.trace.zst");
}

#[test]
fn the_boot_without_page_clearing_replays_exactly_in_every_way() {
    replay("boot-1g-2vcpu-noinit.trace.zst");
}

#[test]
fn touches_by_each_vcpu_replay_exactly_in_every_way() {
    replay("boot-1g-2vcpu.touch.zst");
}

//! What the MMU takes for a page of the mirror, the module's own work left out: its time is
//! measured at the port and subtracted.
#![allow(
    missing_docs,
    reason = "the macros of criterion make undocumented functions"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tdp_mmu::{Batch, Fault, Host, SeamPort, SlotSpec, Ticket, Vm, VmConfig};
use tdx_module::{LpId, Module, PlatformConfig};

const PAGE: u64 = 4096;
/// One leaf table.
const SIZE: u64 = 512 * PAGE;
/// KVM_MEMORY_ATTRIBUTE_PRIVATE.
const PRIVATE: u64 = 8;

/// The module in this process, with the time that it takes.
struct Timed {
    module: Module,
    nanos: AtomicU64,
}

impl SeamPort for Timed {
    fn submit(&self, batch: Batch) -> Ticket {
        let start = Instant::now();
        let results = self
            .module
            .seamcalls(LpId(batch.lp), &batch.calls, batch.stop_on_error);
        let nanos = u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        Ticket::ready(Ok(results))
    }
}

impl Timed {
    /// How long `work` takes outside of the module.
    fn outside(&self, work: impl FnOnce()) -> Duration {
        let before = self.nanos.load(Ordering::Relaxed);
        let start = Instant::now();
        work();
        let inside = self.nanos.load(Ordering::Relaxed) - before;
        start.elapsed().saturating_sub(Duration::from_nanos(inside))
    }
}

/// A TD that runs, with one leaf table of private memory and nothing mapped.
fn td(config: PlatformConfig) -> (Arc<Timed>, Vm) {
    let platform = common::platform_of(&config);
    let host = Host::new(platform).expect("a platform");
    let port = Arc::new(Timed {
        module: Module::new(config).expect("a platform"),
        nanos: AtomicU64::new(0),
    });
    let way: Arc<dyn SeamPort> = Arc::clone(&port) as Arc<dyn SeamPort>;
    let (vm, _) = Vm::create(host, way, VmConfig::default()).expect("a TD");
    vm.add_vcpu().expect("a vCPU");
    let slot = SlotSpec {
        size: SIZE,
        userspace_addr: 0x7F00_0000_0000,
        guest_memfd: true,
        ..SlotSpec::default()
    };
    vm.set_user_memory_region(slot).expect("a slot");
    vm.set_memory_attributes(0, SIZE, PRIVATE).expect("private");
    vm.finalize().expect("finalised");
    (port, vm)
}

fn map(vm: &Vm) {
    vm.pre_fault_memory(0, 0, SIZE, &mut |_| {})
        .expect("mapped");
}

fn zap(vm: &Vm) {
    vm.set_memory_attributes(0, SIZE, 0).expect("shared");
}

fn mirror(c: &mut Criterion) {
    let (port, vm) = td(PlatformConfig::roomy());
    let mut group = c.benchmark_group("mirror");
    group.throughput(Throughput::Elements(SIZE / PAGE));
    group.bench_function("begin and settle a leaf table", |b| {
        b.iter_custom(|rounds| {
            let one = || {
                zap(&vm);
                vm.set_memory_attributes(0, SIZE, PRIVATE).expect("private");
                port.outside(|| map(&vm))
            };
            (0..rounds).map(|_| one()).sum()
        });
    });
    group.bench_function("zap a leaf table", |b| {
        b.iter_custom(|rounds| {
            let one = || {
                vm.set_memory_attributes(0, SIZE, PRIVATE).expect("private");
                map(&vm);
                port.outside(|| zap(&vm))
            };
            (0..rounds).map(|_| one()).sum()
        });
    });
    vm.set_memory_attributes(0, SIZE, PRIVATE).expect("private");
    map(&vm);
    let faults: Vec<Fault> = (0..SIZE / PAGE)
        .map(|frame| Fault {
            gpa: frame * PAGE,
            qualification: 2,
            ..Fault::default()
        })
        .collect();
    group.bench_function("hit", |b| {
        b.iter(|| {
            let report = vm.handle_faults(0, &faults).expect("faults");
            assert_eq!(u64::from(report.spurious), SIZE / PAGE);
        });
    });
    group.finish();
    vm.destroy().expect("the end");
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = mirror
}
criterion_main!(benches);

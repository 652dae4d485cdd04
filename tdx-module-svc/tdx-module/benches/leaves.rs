//! What the module takes for one call: inside a run, alone, and for a chunk that is measured.
#![allow(
    missing_docs,
    reason = "the macros of criterion make undocumented functions"
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::hint::black_box;
use std::time::{Duration, Instant};

use common::{Host, PAGE};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tdx_defs::{Leaf, Repeat, Seamcall};
use tdx_module::{LpId, Module, PlatformConfig};

const GIB: u64 = 1 << 30;
/// Guest memory that calls are about: one leaf table.
const PAGES: u32 = 512;
const LP: LpId = LpId(0);

fn run_of(leaf: Leaf, tdr: u64, count: u32, strides: [u64; 2]) -> Seamcall {
    Seamcall::new(leaf).rdx(tdr).r8(8 * GIB).repeated(Repeat {
        count,
        rcx_stride: strides[0].cast_signed(),
        r8_stride: strides[1].cast_signed(),
        r9_stride: 0,
    })
}

fn must(module: &Module, call: &Seamcall) {
    let result = module.seamcall(LP, call);
    assert_eq!(
        result.completed,
        call.count(),
        "{} {}",
        call.leaf,
        result.status()
    );
}

/// Time of `rounds` runs of AUG, or of as many single calls; the pages go again in between.
fn aug(module: &Module, tdr: u64, rounds: u64, run: impl Fn(&Seamcall)) -> Duration {
    let aug = run_of(Leaf::MEM_PAGE_AUG, tdr, PAGES, [PAGE, PAGE]);
    let mut time = Duration::ZERO;
    for _ in 0..rounds {
        let start = Instant::now();
        run(&aug);
        time += start.elapsed();
        must(
            module,
            &run_of(Leaf::MEM_RANGE_BLOCK, tdr, PAGES, [PAGE, 0]),
        );
        must(module, &Seamcall::new(Leaf::MEM_TRACK).rcx(tdr));
        must(
            module,
            &run_of(Leaf::MEM_PAGE_REMOVE, tdr, PAGES, [PAGE, 0]),
        );
    }
    time
}

fn leaves(c: &mut Criterion) {
    let module = Module::new(PlatformConfig::roomy()).expect("a platform");
    let mut host = Host::new(&module, 0, 4 * GIB);
    let tdr = host.build_td(1025);
    host.link(tdr, 0);
    // Added at 2 MiB and on, for what needs contents.
    host.link(tdr, 2 << 20);
    let source = Seamcall {
        data: vec![7; 4096].into(),
        ..Seamcall::new(Leaf::MEM_PAGE_ADD)
    };
    host.must(source.rcx(2 << 20).rdx(tdr).r8(9 * GIB).r9(0x10_0000));

    let mut group = c.benchmark_group("module");
    group.throughput(Throughput::Elements(16));
    let extend = run_of(Leaf::MR_EXTEND, tdr, 16, [256, 0]).rcx(2 << 20);
    group.bench_function("MR.EXTEND of a page", |b| b.iter(|| must(&module, &extend)));

    host.build_vcpu(tdr);
    host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr));
    group.throughput(Throughput::Elements(PAGES.into()));
    group.bench_function("PAGE.AUG in a run", |b| {
        b.iter_custom(|rounds| aug(&module, tdr, rounds, |run| must(&module, run)));
    });
    group.bench_function("PAGE.AUG alone", |b| {
        b.iter_custom(|rounds| {
            aug(&module, tdr, rounds, |run| {
                let mut call = run.clone();
                for _ in 0..run.count() {
                    let single = Seamcall {
                        repeat: None,
                        ..call.clone()
                    };
                    must(&module, &single);
                    call.step();
                }
            })
        });
    });
    let read = run_of(Leaf::MEM_SEPT_RD, tdr, PAGES, [PAGE, 0]);
    group.bench_function("SEPT.RD in a run", |b| b.iter(|| must(&module, &read)));
    let walk = Seamcall::new(Leaf::MEM_SEPT_RD).rcx(0x5000).rdx(tdr);
    group.throughput(Throughput::Elements(1));
    group.bench_function("SEPT.RD with its walk", |b| {
        b.iter(|| black_box(module.seamcall(LP, &walk)));
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default().sample_size(20);
    targets = leaves
}
criterion_main!(benches);

//! `fault`: one cold private fault through the module link, beside a ping-pong on an open stream,
//! and beside both libraries in one process: what of it is the message and what the work.

use std::sync::Arc;
use std::time::Duration;

use mirror_proto::module::ExecuteRequest;
use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use tdp_mmu::{Fault, Host, Mode, SeamPort, SlotSpec, Vm, VmConfig};
use tdx_defs::Leaf;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::figure::{Figure, median, ns_per_op};
use super::in_process::{Pair, bench_error};
use super::{ModuleUrl, Plan, timed};
use crate::error::Error;
use crate::progress::Progress;

/// Faults of one sample: each in a 512 GiB region of its own, so each adds three tables.
const FAULTS: u64 = 100;
const REGION: u64 = 512 << 30;

pub(super) async fn run(
    module: ModuleUrl<'_>,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let linked = mmu_service::link_to(module, Duration::from_secs(10))
        .await
        .map_err(bench_error)?;
    let pair = Pair::new()?;
    let mut rpcs = 0;
    let samples = plan
        .repeat(progress, async || {
            tokio::task::block_in_place(|| {
                let (fault, messages) = cold_faults(linked.host(), linked.port())?;
                rpcs = messages;
                let ping = ping_pong(module)?;
                let (here, _) = cold_faults(pair.host(), pair.port())?;
                Ok(((fault, ping), (fault, here)))
            })
        })
        .await?;
    let (pings, works): (Vec<_>, Vec<_>) = samples.into_iter().unzip();
    let name = "cold private fault, p50";
    let figure = |floor, samples: &[_]| Figure::new((name, floor), FAULTS, samples).messages(rpcs);
    Ok(vec![
        figure("ping-pong on an open stream, p50", &pings),
        figure("both libraries in one process, p50", &works),
    ])
}

fn cold_faults(host: Arc<Host>, port: Arc<dyn SeamPort>) -> Result<(f64, u64), Error> {
    let config = VmConfig {
        mode: Mode::Batched,
        ..VmConfig::default()
    };
    let (vm, _) = Vm::create(host, port, config).map_err(bench_error)?;
    let measured = measure(&vm);
    vm.destroy().map_err(bench_error)?;
    measured
}

/// Nanoseconds of the fault in the middle, and the messages of all.
fn measure(vm: &Vm) -> Result<(f64, u64), Error> {
    vm.add_vcpu().map_err(bench_error)?;
    for (at, slot_id) in (0..FAULTS).zip(0..) {
        let gpa = at * REGION;
        vm.set_user_memory_region(SlotSpec {
            slot_id,
            gpa,
            size: 2 << 20,
            userspace_addr: 0x7F00_0000_0000 + at * (2 << 20),
            guest_memfd: true,
            ..SlotSpec::default()
        })
        .map_err(bench_error)?;
        vm.set_memory_attributes(gpa, 2 << 20, 8)
            .map_err(bench_error)?;
    }
    vm.finalize().map_err(bench_error)?;
    vm.load_mmu(0).map_err(bench_error)?;
    let (mut times, mut rpcs) = (Vec::new(), 0);
    for at in 0..FAULTS {
        let fault = Fault {
            gpa: at * REGION,
            qualification: 2,
            ..Fault::default()
        };
        let (report, time) = timed(|| vm.handle_fault(0, fault));
        let report = report.map_err(bench_error)?;
        // None shares a table with another.
        let tables = report.counts.seamcalls.get(Leaf::MEM_SEPT_ADD);
        if tables != 3 {
            let reason = format!("a cold fault added {tables} tables, not three");
            return Err(Error::Bench(reason.into()));
        }
        rpcs += report.counts.rpcs;
        times.push(ns_per_op(time, 1));
    }
    Ok((median(times), rpcs))
}

/// One empty batch at a time on an open stream, on a runtime of its own.
pub(super) fn ping_pong(module: ModuleUrl<'_>) -> Result<f64, Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let ping = async {
        let channel = transport::connect(module).await.map_err(bench_error)?;
        let (asks, requests) = mpsc::channel(1);
        let mut answers = TdxModuleServiceClient::new(channel)
            .execute_stream(ReceiverStream::new(requests))
            .await
            .map_err(bench_error)?
            .into_inner();
        let mut times = Vec::new();
        for _ in 0..10 * FAULTS {
            let start = std::time::Instant::now();
            let _ = asks.send(ExecuteRequest::default()).await;
            let answer = answers.message().await.map_err(bench_error)?;
            if answer.is_none() {
                return Err(Error::Truncated {
                    call: "ExecuteStream",
                });
            }
            times.push(ns_per_op(start.elapsed(), 1));
        }
        Ok(median(times))
    };
    // A runtime cannot be entered inside another one: a thread of its own.
    std::thread::scope(|scope| scope.spawn(|| runtime.block_on(ping)).join())
        .unwrap_or(Err(Error::Interrupted))
}

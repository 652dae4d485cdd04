//! What happens when the guest touches memory: HandleFault, HandleFaults, PreFaultMemory.

use std::sync::Arc;

use mirror_proto::{InvalidField, attach_spans, mmu as wire};
use tdp_mmu::{Fault, FaultOutcome, FaultsReport, RootKind};
use tdx_defs::{Gfn, Gpa, GpaLayout, Visibility};
use telemetry::KeyValue;
use telemetry::late::Untraced;
use telemetry::watch::Watch;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{Span, field, info_span};

use super::stream::{Answers, answer, send};
use super::traced;
use crate::config::size;
use crate::convert::{
    counts_to_wire, fault_from_wire, fault_report_to_wire, faults_report_to_wire, required,
};
use crate::shell::Shell;
use crate::status;

/// `caller` is the span of the caller, as a `traceparent`.
pub(crate) async fn handle_fault(
    shell: &Arc<Shell>,
    caller: &str,
    request: wire::HandleFaultRequest,
) -> Result<wire::HandleFaultResponse, Status> {
    let fault = required(request.fault, "fault").map_err(status::of_field)?;
    if request.explain && !telemetry::is_sampled(caller) {
        let reason = "the headers name no sampled span (traceparent)";
        return Err(status::of_field(InvalidField::new("explain", reason)));
    }
    let fault = fault_from_wire(&fault);
    let entry = shell.live_vm(request.vm_id)?;
    let vcpu = request.vcpu_id;
    let (gfn, visibility) = entry.layout.split(Gpa::new(fault.gpa));
    let metrics = Arc::clone(&shell.metrics);
    let watch = if request.explain {
        Watch::begin(caller)
    } else {
        None
    };
    // The layer around has decided, or the watch just did. A span of the log alone is no trace.
    let in_rpc_span = telemetry::current_trace_id().is_some();
    let (span, untraced) = if in_rpc_span || watch.is_some() {
        (fault_span(entry.id, vcpu, gfn), None)
    } else {
        (Span::none(), Untraced::begin("handle_fault", caller))
    };
    if !in_rpc_span {
        telemetry::set_remote_parent(&span, caller);
    }
    let outcome = shell
        .operate(&entry, span, move |vm| {
            let span = Span::current();
            match vm.handle_fault(vcpu, fault) {
                Ok(report) => {
                    metrics.fault(&report);
                    traced::record_fault(&span, &report);
                    Ok(report)
                }
                Err(error) => {
                    metrics.fault_failed(root_of(visibility));
                    span.record("otel.status_code", "ERROR");
                    span.record("error.message", field::display(&error));
                    Err(error)
                }
            }
        })
        .await;
    if let Some(untraced) = untraced {
        let attributes = vec![
            KeyValue::new("kvm.vm", entry.id.to_string()),
            KeyValue::new("kvm.vcpu", i64::from(vcpu)),
            KeyValue::new("kvm.gfn", gfn.to_string()),
        ];
        traced::tell_fault(untraced, &shell.gate, &outcome, attributes);
    }
    let spans = watch.map(|watch| watch.take()).unwrap_or_default();
    match outcome {
        Ok(report) => Ok(wire::HandleFaultResponse {
            spans,
            ..fault_report_to_wire(report)
        }),
        Err(mut refusal) => {
            attach_spans(&mut refusal, spans);
            Err(refusal)
        }
    }
}

fn fault_span(vm: u64, vcpu: u32, gfn: Gfn) -> Span {
    info_span!(
        "handle_fault",
        kvm.vm = vm,
        kvm.vcpu = vcpu,
        kvm.gfn = %gfn,
        kvm.mmu.root = field::Empty,
        kvm.level = field::Empty,
        kvm.pf.outcome = field::Empty,
        kvm.pf.taken = field::Empty,
        tdx.messages = field::Empty,
        otel.status_code = field::Empty,
        error.message = field::Empty,
    )
}

fn root_of(visibility: Visibility) -> RootKind {
    match visibility {
        Visibility::Private => RootKind::Mirror,
        Visibility::Shared => RootKind::Direct,
    }
}

/// The root that all of the faults are for, if there is one.
fn common_root(layout: GpaLayout, faults: &[Fault]) -> Option<RootKind> {
    let mut roots = faults
        .iter()
        .map(|fault| root_of(layout.split(Gpa::new(fault.gpa)).1));
    let first = roots.next()?;
    roots.all(|root| root == first).then_some(first)
}

/// Batches of one stream run in their order; a few are read ahead while one runs.
///
/// `caller` is the span of the caller, as a `traceparent`.
pub(super) fn handle_faults(
    shell: &Arc<Shell>,
    caller: String,
    requests: Streaming<wire::HandleFaultsRequest>,
) -> Answers<wire::HandleFaultsResponse> {
    let depth = size(shell.limits.max_fault_batches);
    let (ahead, batches) = mpsc::channel(depth);
    let (out, answers) = mpsc::channel(depth);
    shell.spawn(read_ahead(Arc::clone(shell), requests, ahead));
    shell.spawn(answer_batches(Arc::clone(shell), caller, batches, out));
    ReceiverStream::new(answers)
}

pub(super) type Batches = mpsc::Sender<Result<wire::HandleFaultsRequest, Status>>;

/// Reads until the client, the answering task or the service ends.
pub(super) async fn read_ahead(
    shell: Arc<Shell>,
    mut requests: Streaming<wire::HandleFaultsRequest>,
    ahead: Batches,
) {
    let mut draining = shell.draining();
    loop {
        let message = tokio::select! {
            biased;
            () = ahead.closed() => return,
            // Read batches are still answered; then the client learns why the stream ends.
            _ = draining.wait_for(|draining| *draining) => Err(status::draining()),
            message = requests.message() => match message {
                Ok(Some(request)) => Ok(request),
                // An error means that the client hung up or is not gRPC: nobody to answer.
                Ok(None) | Err(_) => return,
            },
        };
        let ends = message.is_err();
        if ahead.send(message).await.is_err() || ends {
            return;
        }
    }
}

pub(super) async fn answer_batches(
    shell: Arc<Shell>,
    caller: String,
    mut batches: mpsc::Receiver<Result<wire::HandleFaultsRequest, Status>>,
    out: mpsc::Sender<Result<wire::HandleFaultsResponse, Status>>,
) {
    while let Some(batch) = batches.recv().await {
        let outcome = match batch {
            Ok(batch) => answer_batch(&shell, &caller, batch).await,
            Err(end) => Err(end),
        };
        let ends = outcome.is_err();
        if let Err(refusal) = &outcome {
            shell.metrics.refused(refusal);
        }
        if !send(&out, outcome, shell.limits.stall()).await || ends {
            return;
        }
    }
}

async fn answer_batch(
    shell: &Arc<Shell>,
    caller: &str,
    batch: wire::HandleFaultsRequest,
) -> Result<wire::HandleFaultsResponse, Status> {
    let wire::HandleFaultsRequest {
        vm_id,
        vcpu_id,
        faults,
        tag,
        more,
        traceparent,
        links,
    } = batch;
    let limit = size(shell.limits.max_faults);
    if more.len() > limit {
        let reason = format!("{} runs, the limit is {limit}", more.len());
        return Err(status::of_field(InvalidField::new("more", reason)));
    }
    let count = faults.len() + more.iter().map(|run| run.faults.len()).sum::<usize>();
    if count > limit {
        let reason = format!("{count} faults, the limit is {limit}");
        return Err(status::of_field(InvalidField::new("faults", reason)));
    }
    if links.len() > traced::MAX_LINKS {
        let reason = format!("{} links, the limit is {}", links.len(), traced::MAX_LINKS);
        return Err(status::of_field(InvalidField::new("links", reason)));
    }
    let entry = shell.live_vm(vm_id)?;
    let asked =
        telemetry::is_sampled(&traceparent) || links.iter().any(|link| telemetry::is_sampled(link));
    // A stream's headers name a caller; that does not ask for a span of each message.
    let parent = if traceparent.is_empty() {
        caller
    } else {
        &traceparent
    };
    let (span, untraced) = if asked || shell.gate.admits(count) {
        let span = faults_span(vm_id, vcpu_id, count);
        if telemetry::is_sampled(parent) {
            telemetry::set_remote_parent(&span, parent);
        }
        traced::link_faults(&span, &links);
        (span, None)
    } else {
        (Span::none(), Untraced::begin("handle_faults", parent))
    };
    let (layout, metrics) = (entry.layout, Arc::clone(&shell.metrics));
    let outcome = shell
        .operate(&entry, span, move |vm| {
            let mut all = FaultsReport::default();
            let mut before = 0;
            let first = wire::FaultRun { vcpu_id, faults };
            for run in std::iter::once(first).chain(more) {
                let faults: Vec<Fault> = run.faults.iter().map(fault_from_wire).collect();
                let report = vm.handle_faults(run.vcpu_id, &faults)?;
                metrics.faults(&report, common_root(layout, &faults));
                append(&mut all, report, before);
                before += u32::try_from(faults.len()).unwrap_or(u32::MAX);
            }
            traced::record_faults(&Span::current(), &all);
            Ok(all)
        })
        .await;
    if let Some(untraced) = untraced {
        let attributes = vec![
            KeyValue::new("kvm.vm", vm_id.to_string()),
            KeyValue::new("kvm.vcpu", i64::from(vcpu_id)),
            KeyValue::new("kvm.faults", i64::try_from(count).unwrap_or(i64::MAX)),
        ];
        traced::tell_faults(untraced, &shell.gate, &outcome, attributes);
    }
    Ok(faults_report_to_wire(tag, &outcome?))
}

/// Adds the report of a run that stands behind `before` faults of its message.
fn append(all: &mut FaultsReport, run: FaultsReport, before: u32) {
    all.fixed += run.fixed;
    all.spurious += run.spurious;
    all.others_count += run.others_count;
    all.counts += &run.counts;
    let room = FaultsReport::MAX_OTHERS.saturating_sub(all.others.len());
    let others = run.others.into_iter().take(room);
    all.others.extend(others.map(|one| FaultOutcome {
        index: one.index + before,
        ..one
    }));
}

fn faults_span(vm: u64, vcpu: u32, faults: usize) -> Span {
    // Each message is a trace of its own unless somebody is named as its parent.
    info_span!(
        parent: None,
        "handle_faults",
        kvm.vm = vm,
        kvm.vcpu = vcpu,
        kvm.faults = faults,
        kvm.pf.fixed = field::Empty,
        kvm.pf.spurious = field::Empty,
        kvm.pf.others = field::Empty,
        kvm.pf.taken = field::Empty,
        tdx.messages = field::Empty,
        tdx.calls = field::Empty,
    )
}

pub(super) fn pre_fault_memory(
    shell: &Arc<Shell>,
    request: wire::PreFaultMemoryRequest,
) -> Result<Answers<wire::PreFaultMemoryResponse>, Status> {
    let wire::PreFaultMemoryRequest {
        vm_id,
        vcpu_id,
        gpa,
        size,
    } = request;
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "pre_fault_memory",
        kvm.vm = vm_id,
        kvm.vcpu = vcpu_id,
        kvm.gpa = gpa,
        kvm.size = size
    );
    let metrics = Arc::clone(&shell.metrics);
    Ok(answer(shell, entry, span, move |vm, pieces| {
        // Less than asked where the range leaves the slots behind its first pages.
        let mut last = 0;
        let counts = vm.pre_fault_memory(vcpu_id, gpa, size, &mut |done| {
            last = done;
            pieces.progress(wire::PreFaultMemoryResponse {
                done,
                counts: None,
                finished: false,
            });
        })?;
        metrics.did(&counts);
        let counts = Some(counts_to_wire(&counts));
        Ok(Some(wire::PreFaultMemoryResponse {
            done: last,
            counts,
            finished: true,
        }))
    }))
}

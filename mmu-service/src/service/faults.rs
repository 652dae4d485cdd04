//! What happens when the guest touches memory: HandleFault, HandleFaults, PreFaultMemory.

use std::sync::Arc;

use mirror_proto::{InvalidField, mmu as wire};
use tdp_mmu::Fault;
use tdx_defs::Gpa;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Status, Streaming};
use tracing::{Instrument as _, Span, field, info_span};

use super::stream::{Answers, answer, send};
use crate::config::size;
use crate::convert::{
    counts_to_wire, fault_from_wire, fault_report_to_wire, faults_report_to_wire, required,
    ret_pf_name, root_name,
};
use crate::shell::Shell;
use crate::status;

pub(super) async fn handle_fault(
    shell: &Arc<Shell>,
    request: wire::HandleFaultRequest,
) -> Result<wire::HandleFaultResponse, Status> {
    let fault = required(request.fault, "fault").map_err(status::of_field)?;
    let fault = fault_from_wire(&fault);
    let entry = shell.live_vm(request.vm_id)?;
    let vcpu = request.vcpu_id;
    let (gfn, _) = entry.layout.split(Gpa::new(fault.gpa));
    let span = info_span!(
        "handle_fault",
        vm = entry.id,
        vcpu,
        gfn = %gfn,
        root = field::Empty,
        level = field::Empty,
        ret_pf = field::Empty,
    );
    let report = shell
        .operate(&entry, span, move |vm| {
            let report = vm.handle_fault(vcpu, fault)?;
            let span = Span::current();
            span.record("root", root_name(report.root));
            span.record("ret_pf", ret_pf_name(report.ret_pf));
            if let Some(level) = report.level {
                span.record("level", level.get());
            }
            Ok(report)
        })
        .await?;
    Ok(fault_report_to_wire(report))
}

/// Batches of one stream run in their order; a few are read ahead while one runs.
pub(super) fn handle_faults(
    shell: &Arc<Shell>,
    requests: Streaming<wire::HandleFaultsRequest>,
) -> Answers<wire::HandleFaultsResponse> {
    let depth = size(shell.limits.max_fault_batches);
    let (ahead, batches) = mpsc::channel(depth);
    let (out, answers) = mpsc::channel(depth);
    shell.spawn(read_ahead(Arc::clone(shell), requests, ahead));
    shell.spawn(answer_batches(Arc::clone(shell), batches, out).in_current_span());
    ReceiverStream::new(answers)
}

type Batches = mpsc::Sender<Result<wire::HandleFaultsRequest, Status>>;

/// Reads until the client, the answering task or the service ends.
async fn read_ahead(
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

async fn answer_batches(
    shell: Arc<Shell>,
    mut batches: mpsc::Receiver<Result<wire::HandleFaultsRequest, Status>>,
    out: mpsc::Sender<Result<wire::HandleFaultsResponse, Status>>,
) {
    while let Some(batch) = batches.recv().await {
        let outcome = match batch {
            Ok(batch) => answer_batch(&shell, batch).await,
            Err(end) => Err(end),
        };
        let ends = outcome.is_err();
        if !send(&out, outcome, shell.limits.stall()).await || ends {
            return;
        }
    }
}

async fn answer_batch(
    shell: &Arc<Shell>,
    batch: wire::HandleFaultsRequest,
) -> Result<wire::HandleFaultsResponse, Status> {
    let wire::HandleFaultsRequest {
        vm_id,
        vcpu_id,
        faults,
        tag,
    } = batch;
    let limit = size(shell.limits.max_faults);
    if faults.len() > limit {
        let reason = format!("{} faults, the limit is {limit}", faults.len());
        return Err(status::of_field(InvalidField::new("faults", reason)));
    }
    let entry = shell.live_vm(vm_id)?;
    let span = info_span!(
        "handle_faults",
        vm = vm_id,
        vcpu = vcpu_id,
        faults = faults.len()
    );
    let report = shell
        .operate(&entry, span, move |vm| {
            let faults: Vec<Fault> = faults.iter().map(fault_from_wire).collect();
            vm.handle_faults(vcpu_id, &faults)
        })
        .await?;
    Ok(faults_report_to_wire(tag, &report))
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
    let span = info_span!("pre_fault_memory", vm = vm_id, vcpu = vcpu_id, gpa, size);
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
        let counts = Some(counts_to_wire(&counts));
        Ok(Some(wire::PreFaultMemoryResponse {
            done: last,
            counts,
            finished: true,
        }))
    }))
}

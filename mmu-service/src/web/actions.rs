//! POST: what the page's buttons do. The same operations as the RPCs of these names, and counted
//! with them.

use axum::Json;
use axum::extract::State;
use mirror_proto::{InvalidField, mmu as wire};
use serde::Deserialize;
use tdx_defs::Level;
use tokio_stream::StreamExt as _;
use tonic::Status;
use tracing::{Instrument as _, Span, info_span};

use super::Web;
use super::answers::{AuditAnswer, ConvertAnswer, FaultAnswer, MismatchRow, hex};
use super::error::ApiError;
use super::input::{Body, Number, VmId};
use crate::convert::root_name;
use crate::service::{faults, look, memory};

/// KVM_MEMORY_ATTRIBUTE_PRIVATE.
const PRIVATE: u64 = 8;

/// A fault, as the page asks for one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct FaultAsked {
    gpa: Number,
    #[serde(default)]
    vcpu: u32,
    #[serde(default)]
    access: Access,
}

#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Access {
    Read,
    #[default]
    Write,
    Fetch,
}

impl Access {
    /// Bits 2:0 of the exit qualification.
    fn qualification(self) -> u64 {
        match self {
            Self::Read => 1,
            Self::Write => 2,
            Self::Fetch => 4,
        }
    }
}

/// A conversion, as the page asks for one.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ConvertAsked {
    gpa: Number,
    size: Number,
    to: To,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum To {
    Private,
    Shared,
}

/// An audit has nothing to choose.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AuditAsked {}

/// A page has no span of its own: the action's is the root.
const NO_CALLER: &str = "";

pub(super) async fn fault(
    State(web): State<Web>,
    VmId(vm_id): VmId,
    Body(asked): Body<FaultAsked>,
) -> Result<Json<FaultAnswer>, ApiError> {
    let request = wire::HandleFaultRequest {
        vm_id,
        vcpu_id: asked.vcpu,
        fault: Some(wire::Fault {
            gpa: asked.gpa.0,
            qualification: asked.access.qualification(),
            ..Default::default()
        }),
        explain: false,
    };
    let span = action("POST /api/vms/{vm}/fault", vm_id);
    let trace_id = trace_id(&span);
    let answer = counted(
        &web,
        faults::handle_fault(&web.shell, NO_CALLER, request)
            .instrument(span)
            .await,
    )?;
    Ok(Json(FaultAnswer {
        ret_pf: answer.ret_pf().as_str_name(),
        root: match answer.root() {
            wire::Root::Mirror => root_name(tdp_mmu::RootKind::Mirror),
            wire::Root::Direct | wire::Root::Unspecified => root_name(tdp_mmu::RootKind::Direct),
        },
        level: answer.level,
        hpa: hex(answer.hpa),
        seamcalls: answer
            .seamcalls
            .into_iter()
            .map(|call| (call.name, call.status_name))
            .collect(),
        rpcs: answer.rpcs,
        trace_id,
    }))
}

pub(super) async fn convert(
    State(web): State<Web>,
    VmId(vm_id): VmId,
    Body(asked): Body<ConvertAsked>,
) -> Result<Json<ConvertAnswer>, ApiError> {
    let entry = web.shell.vms.get(vm_id)?;
    // The core takes any range; from a page a slip of the finger is likelier than a wish for more.
    let limit = Level::L512G.bytes() * 16;
    if asked.size.0 > limit {
        let reason = format!("{:#x}, the limit is {limit:#x}", asked.size.0);
        return Err(InvalidField::new("size", reason).into());
    }
    let request = wire::SetMemoryAttributesRequest {
        vm_id: entry.id,
        gpa: asked.gpa.0,
        size: asked.size.0,
        attributes: match asked.to {
            To::Private => PRIVATE,
            To::Shared => 0,
        },
    };
    let span = action("POST /api/vms/{vm}/convert", vm_id);
    let trace_id = trace_id(&span);
    let done = memory::set_memory_attributes(&web.shell, request)
        .instrument(span)
        .await;
    let counts = counted(&web, done)?.counts.unwrap_or_default();
    Ok(Json(ConvertAnswer {
        seamcalls: counts
            .seamcalls
            .into_iter()
            .map(|leaf| (leaf.name, leaf.count))
            .collect(),
        rpcs: counts.rpcs,
        kicks: counts.kicks,
        flushes: counts.flushes,
        pages_zapped: counts.pages_zapped,
        trace_id,
    }))
}

pub(super) async fn audit(
    State(web): State<Web>,
    VmId(vm_id): VmId,
    Body(AuditAsked {}): Body<AuditAsked>,
) -> Result<Json<AuditAnswer>, ApiError> {
    let span = action("POST /api/vms/{vm}/audit", vm_id);
    let trace_id = trace_id(&span);
    let request = wire::AuditRequest { vm_id };
    let started = span.in_scope(|| look::audit(&web.shell, request));
    let mut pieces = counted(&web, started)?;
    let mut report = wire::AuditResponse::default();
    while let Some(piece) = pieces.next().await {
        // Counted where it came about.
        report = piece?;
    }
    if !report.finished {
        return Err(crate::status::internal("the audit has no end").into());
    }
    Ok(Json(AuditAnswer {
        entries: report.entries,
        leaves: report.leaves,
        tables: report.tables,
        frozen: report.frozen,
        mismatches: report.mismatches,
        first_mismatches: report
            .first_mismatches
            .into_iter()
            .map(|mismatch| MismatchRow {
                gpa: hex(mismatch.gpa),
                level: mismatch.level,
                reason: mismatch.reason,
            })
            .collect(),
        trace_id,
    }))
}

/// The root of the action's trace.
fn action(route: &'static str, vm: u64) -> Span {
    info_span!(
        "page action",
        otel.name = route,
        otel.kind = "server",
        http.route = route,
        vm
    )
}

fn trace_id(span: &Span) -> Option<String> {
    span.in_scope(telemetry::current_trace_id)
}

fn counted<T>(web: &Web, outcome: Result<T, Status>) -> Result<T, ApiError> {
    Ok(outcome.inspect_err(|refusal| web.shell.metrics.refused(refusal))?)
}

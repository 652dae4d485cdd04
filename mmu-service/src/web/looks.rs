//! GET: what the page shows.

use axum::Json;
use axum::extract::State;
use mirror_proto::mmu as wire;
use tdp_mmu::MAX_MAP_CELLS;
use tracing::info_span;

use super::Web;
use super::answers::{
    Batches, Map, Module, Overview, RoundTrips, SlotRow, VmPage, VmRow, Walk, hex, runs,
};
use super::error::ApiError;
use super::input::{Asked, VmId};
use crate::convert;
use crate::link::LinkState;
use crate::metrics::REMEMBERED;
use crate::service::look;
use crate::status;

/// VMs, and slots of one, that an answer lists.
const LISTED: usize = 256;
/// Batches in an answer when nobody says.
const BATCHES: usize = 100;
/// Bytes of a cell when nobody says.
const CELL: u64 = 2 << 20;
/// Cells when nobody says.
const CELLS: usize = 512;

pub(super) async fn overview(State(web): State<Web>) -> Result<Json<Overview>, ApiError> {
    let shell = &web.shell;
    let module = match &*shell.link.state().borrow() {
        LinkState::Up(module) => Module {
            up: true,
            instance: Some(module.instance().to_owned()),
            reason: None,
            host_pages_in_use: module.host().pages_in_use(),
        },
        LinkState::Connecting => down("no answer yet"),
        LinkState::Down { reason, .. } => down(reason),
    };
    let all = shell.vms.all();
    let vms_total = all.len();
    let listed = shell
        .run(info_span!("list_vms"), move || {
            let listed = all.iter().take(LISTED);
            listed.map(|vm| VmRow::of(vm, &vm.vm.info())).collect()
        })
        .await?;
    Ok(Json(Overview {
        version: env!("CARGO_PKG_VERSION"),
        jaeger_url: web.page.jaeger_url.clone(),
        module,
        vms: listed,
        vms_total,
    }))
}

fn is_up(web: &Web) -> bool {
    matches!(&*web.shell.link.state().borrow(), LinkState::Up(_))
}

fn down(reason: &str) -> Module {
    Module {
        up: false,
        instance: None,
        reason: Some(reason.to_owned()),
        host_pages_in_use: 0,
    }
}

pub(super) async fn vm(State(web): State<Web>, VmId(id): VmId) -> Result<Json<VmPage>, ApiError> {
    let entry = web.shell.vms.get(id)?;
    let page = move || {
        let info = entry.vm.info();
        let end = info.slots.iter().map(|slot| slot.gpa + slot.size).max();
        VmPage {
            row: VmRow::of(&entry, &info),
            tdr: hex(info.tdr.get()),
            mrtd: info.mrtd.map(|mrtd| convert::hex(&mrtd)),
            shared_bit: entry.layout.shared_bit(),
            slots: info
                .slots
                .iter()
                .take(LISTED)
                .map(|slot| SlotRow {
                    slot_id: slot.slot_id,
                    gpa: hex(slot.gpa),
                    size: hex(slot.size),
                    guest_memfd: slot.guest_memfd,
                })
                .collect(),
            slots_total: info.slots.len(),
            memory_end: hex(end.unwrap_or(0)),
        }
    };
    Ok(Json(
        web.shell.run(info_span!("show_vm", vm = id), page).await?,
    ))
}

pub(super) async fn map(
    State(web): State<Web>,
    VmId(id): VmId,
    asked: Asked,
) -> Result<Json<Map>, ApiError> {
    let gpa = asked.number("gpa", 0)?;
    let cell = asked.number("cell", CELL)?;
    let cells = asked.count("cells", CELLS, MAX_MAP_CELLS)?;
    let module = asked.flag("module")?;
    let entry = if module {
        // Whoever looks once a second is better off with a refusal than with a long wait.
        if !is_up(&web) {
            return Err(status::module_unreachable("the module does not answer").into());
        }
        web.shell.live_vm(id)?
    } else {
        web.shell.vms.get(id)?
    };
    let span = info_span!("map", vm = id, gpa, cell, cells, module);
    let map = web
        .shell
        .operate(&entry, span, move |vm| vm.map(gpa, cell, cells, module))
        .await?;
    Ok(Json(Map {
        gpa: hex(gpa),
        cell: hex(cell),
        cells: map.cells.len(),
        sampled: map.sampled,
        runs: runs(&map.cells),
    }))
}

pub(super) async fn walk(
    State(web): State<Web>,
    VmId(vm_id): VmId,
    asked: Asked,
) -> Result<Json<Walk>, ApiError> {
    let gpa = asked.number("gpa", 0)?;
    // The tree of a dead VM is still there, but nobody to hold it against.
    let module = is_up(&web) && web.shell.live_vm(vm_id).is_ok();
    let request = wire::GetWalkRequest { vm_id, gpa, module };
    let walk = look::get_walk(&web.shell, request).await?;
    Ok(Json(Walk::of(gpa, &walk, module)))
}

pub(super) async fn batches(
    State(web): State<Web>,
    asked: Asked,
) -> Result<Json<Batches>, ApiError> {
    let after = asked.number("after", 0)?;
    let limit = asked.count("limit", BATCHES, REMEMBERED)?;
    let link = &web.shell.metrics.link;
    let (events, last) = link.timeline.after(after, limit);
    Ok(Json(Batches {
        last,
        batches: events.into_iter().map(Into::into).collect(),
        round_trips: RoundTrips::of(link.round_trips()),
    }))
}

//! `walk`, `tree`, `audit` and `stats`.

use mirror_proto::mmu::{
    DumpTreeRequest, GetStatsRequest, GetStatsResponse, GetWalkRequest, TreeEntry, WalkEntry,
};
use mirror_proto::module::{GetPlatformRequest, GetPlatformResponse};
use serde_json::{Value, json};
use tdx_defs::Level;

use super::fault::root_name;
use crate::args::{TreeArgs, WalkArgs};
use crate::client::{Client, wait, with_deadline};
use crate::error::Error;
use crate::output::{Answer, Table, hex, merge, pairs};
use crate::replay;
use crate::stop::Stop;
use crate::tally::Tally;

/// `mmuctl walk`.
pub(super) async fn walk(client: &Client, args: &WalkArgs) -> Result<Answer, Error> {
    let message = GetWalkRequest {
        vm_id: args.vm,
        gpa: args.gpa,
        module: true,
    };
    let walk = client
        .short("GetWalk", message, async |mut mmu, request| {
            mmu.get_walk(request).await
        })
        .await?;
    let root = root_name(walk.root());
    let mut table = Table::new(&[
        ">level",
        ">index",
        &format!(">{root} entry"),
        "kind",
        ">page",
        ">external page",
        ">module entry",
        "module state",
    ]);
    for entry in &walk.entries {
        table.row([
            level_name(entry.level),
            entry.index.to_string(),
            hex(entry.spte),
            entry.kind.clone(),
            hex(entry.hpa),
            entry.external_hpa_text(),
            entry.sept_entry.map(hex).unwrap_or_default(),
            entry.sept_state.clone(),
        ]);
    }
    let entries: Vec<Value> = walk.entries.iter().map(walk_entry_json).collect();
    let json = json!({
        "vm_id": args.vm,
        "gpa": hex(args.gpa),
        "root": root,
        "mapped": walk.mapped,
        "private_attribute": walk.private_attribute,
        "entries": entries,
    });
    let state = if walk.mapped { "mapped" } else { "not mapped" };
    let kind = if walk.private_attribute {
        "private"
    } else {
        "shared"
    };
    Ok(Answer::new(
        json,
        format!("{table}\n{:#x} is {state}, its memory is {kind}", args.gpa),
    ))
}

trait ExternalPage {
    fn external_hpa_text(&self) -> String;
}

impl ExternalPage for WalkEntry {
    fn external_hpa_text(&self) -> String {
        external(self.external_hpa)
    }
}

fn external(hpa: u64) -> String {
    if hpa == 0 { String::new() } else { hex(hpa) }
}

fn walk_entry_json(entry: &WalkEntry) -> Value {
    json!({
        "level": entry.level,
        "index": entry.index,
        "spte": hex(entry.spte),
        "kind": entry.kind,
        "hpa": hex(entry.hpa),
        "external_hpa": hex(entry.external_hpa),
        "sept_entry": entry.sept_entry.map(hex),
        "sept_level_state": entry.sept_level_state.map(hex),
        "sept_state": entry.sept_state,
    })
}

/// `mmuctl tree`.
pub(super) async fn tree(client: &Client, args: &TreeArgs) -> Result<Answer, Error> {
    const CALL: &str = "DumpTree";
    let message = DumpTreeRequest {
        vm_id: args.vm,
        root: args.root.to_wire().into(),
        min_level: args.min_level,
    };
    let mut stream = client
        .long(CALL, message, async |mut mmu, request| {
            mmu.dump_tree(request).await
        })
        .await?;
    let mut entries: Vec<TreeEntry> = Vec::new();
    while let Some(answer) = client.next(CALL, &mut stream).await? {
        entries.extend(answer.entries);
    }
    let mut table = Table::new(&[
        "root",
        ">level",
        ">gpa",
        ">count",
        ">entry",
        "kind",
        ">page",
        ">external page",
    ]);
    for entry in &entries {
        table.row([
            root_name(entry.root()).to_owned(),
            level_name(entry.level),
            hex(entry.gpa),
            entry.count.to_string(),
            hex(entry.spte),
            entry.kind.clone(),
            hex(entry.hpa),
            external(entry.external_hpa),
        ]);
    }
    let json: Vec<Value> = entries.iter().map(tree_entry_json).collect();
    let text = if entries.is_empty() {
        "no entries".to_owned()
    } else {
        table.to_string()
    };
    Ok(Answer::new(
        json!({ "vm_id": args.vm, "entries": json }),
        text,
    ))
}

fn tree_entry_json(entry: &TreeEntry) -> Value {
    json!({
        "root": root_name(entry.root()),
        "level": entry.level,
        "gpa": hex(entry.gpa),
        "count": entry.count,
        "spte": hex(entry.spte),
        "kind": entry.kind,
        "hpa": hex(entry.hpa),
        "external_hpa": hex(entry.external_hpa),
    })
}

fn level_name(level: u32) -> String {
    let known = u8::try_from(level)
        .ok()
        .and_then(|level| Level::new(level).ok());
    known.map_or_else(|| level.to_string(), |known| format!("{level} ({known})"))
}

/// `mmuctl audit`.
pub(super) async fn audit(client: &Client, vm_id: u64) -> Result<Answer, Error> {
    let result = replay::audit(client, vm_id).await?;
    let mut json = json!({ "vm_id": vm_id });
    if let Value::Object(members) = result.to_json() {
        merge(&mut json, members);
    }
    let mut text = format!(
        "{} entries compared: {} mismatches, {} frozen entries; {} leaves, {} tables",
        result.entries, result.mismatches, result.frozen, result.leaves, result.tables
    );
    if !result.first.is_empty() {
        let mut table = Table::new(&[">gpa", ">level", "what differs"]);
        for one in &result.first {
            table.row([hex(one.gpa), level_name(one.level), one.reason.clone()]);
        }
        text = format!("{text}\n{table}");
    }
    Ok(Answer {
        verdict: result.verdict(),
        ..Answer::new(json, text)
    })
}

/// `mmuctl stats`.
pub(super) async fn stats(client: &Client, vm: Option<u64>) -> Result<Answer, Error> {
    // VM ids start at 1; asking for VM 0 must not quietly mean the whole service.
    if vm == Some(0) {
        return Err(Error::NoVm { vm_id: 0 });
    }
    let message = GetStatsRequest {
        vm_id: vm.unwrap_or(0),
    };
    let stats = client
        .short("GetStats", message, async |mut mmu, request| {
            mmu.get_stats(request).await
        })
        .await?;
    let platform = match (vm, client.module.clone()) {
        (None, Some(mut module)) => {
            let limit = client.limits.short;
            let request = with_deadline(GetPlatformRequest {}, limit);
            let asked = module.get_platform(request);
            Some(wait("GetPlatform", limit, &Stop::never(), asked).await?)
        }
        _ => None,
    };
    let tally = Tally::of(stats.counts.as_ref());
    let mut json = stats_json(vm, &stats);
    merge(&mut json, tally.to_json());
    if let (Some(platform), Value::Object(object)) = (&platform, &mut json) {
        object.insert("module".into(), platform_json(platform));
    }
    let mut rows = tally.rows();
    rows.extend(
        [
            ("4K leaves", stats.pages_4k.to_string()),
            ("2M leaves", stats.pages_2m.to_string()),
            ("1G leaves", stats.pages_1g.to_string()),
            (
                "remote TLB flush requests",
                stats.remote_tlb_flush_requests.to_string(),
            ),
            ("nx splits", stats.nx_lpage_splits.to_string()),
            ("VMs", stats.vms.to_string()),
            ("host pages in use", stats.host_pages_in_use.to_string()),
            ("page table bytes", stats.page_table_bytes.to_string()),
            ("module instance", stats.module_instance.clone()),
        ]
        .map(|(name, value)| (name.to_owned(), value)),
    );
    if let Some(platform) = &platform {
        rows.push(("module release".into(), platform.release.clone()));
        rows.push((
            "private key ids in use".into(),
            platform.hkids_in_use.to_string(),
        ));
        for pages in &platform.pages {
            rows.push((format!("{} pages", pages.name), pages.pages_4k.to_string()));
        }
    }
    Ok(Answer::new(json, pairs(rows)))
}

fn stats_json(vm: Option<u64>, stats: &GetStatsResponse) -> Value {
    let counts = stats.counts.clone().unwrap_or_default();
    json!({
        "vm_id": vm,
        "pf_taken": counts.pf_taken,
        "pf_fixed": counts.pf_fixed,
        "pf_spurious": counts.pf_spurious,
        "pf_emulate": counts.pf_emulate,
        "pf_fast": counts.pf_fast,
        "pf_mmio_spte_created": counts.pf_mmio_spte_created,
        "pages_4k": stats.pages_4k,
        "pages_2m": stats.pages_2m,
        "pages_1g": stats.pages_1g,
        "remote_tlb_flush_requests": stats.remote_tlb_flush_requests,
        "nx_lpage_splits": stats.nx_lpage_splits,
        "vms": stats.vms,
        "host_pages_in_use": stats.host_pages_in_use,
        "page_table_bytes": stats.page_table_bytes,
        "module_instance": stats.module_instance,
    })
}

fn platform_json(platform: &GetPlatformResponse) -> Value {
    let pages: serde_json::Map<String, Value> = platform
        .pages
        .iter()
        .map(|pages| (pages.name.clone(), pages.pages_4k.into()))
        .collect();
    json!({
        "instance": platform.instance,
        "release": platform.release,
        "hkid_start": platform.hkid_start,
        "hkid_count": platform.hkid_count,
        "hkids_in_use": platform.hkids_in_use,
        "logical_processors": platform.logical_processors,
        "pages": pages,
    })
}

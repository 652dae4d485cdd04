//! `slot`.

use mirror_proto::mmu::{SetUserMemoryRegionRequest, Slot, VmKind};
use serde_json::json;

use super::vm;
use crate::args::{SlotDeleteArgs, SlotSetArgs};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, hex, merge};
use crate::tally::Tally;

/// Where guest memory lies in the host unless `--hva` says otherwise.
const DEFAULT_HVA_BASE: u64 = 0x7f00_0000_0000;

/// `mmuctl slot set`.
pub(super) async fn set(client: &Client, args: &SlotSetArgs) -> Result<Answer, Error> {
    if args.size == 0 {
        return Err(Error::Usage(
            "size 0 would delete the slot: use slot delete".into(),
        ));
    }
    let hva = match args.hva {
        Some(hva) => hva,
        None => args.gpa.checked_add(DEFAULT_HVA_BASE).ok_or_else(|| {
            Error::Usage(format!("gpa {:#x} is above the limit of 52 bits", args.gpa))
        })?,
    };
    let guest_memfd = match args.guest_memfd {
        Some(given) => given,
        None => !args.log_dirty && vm::info(client, args.vm).await?.kind() != VmKind::Ordinary,
    };
    let slot = Slot {
        slot_id: args.slot,
        gpa: args.gpa,
        size: args.size,
        userspace_addr: hva,
        guest_memfd,
        read_only: args.read_only,
        log_dirty: args.log_dirty,
        host_page_size: args.host_page_size.to_wire().into(),
        demand_zero: args.demand_zero,
    };
    let tally = change(client, args.vm, slot).await?;
    let mut json = json!({
        "vm_id": args.vm,
        "slot_id": args.slot,
        "gpa": hex(args.gpa),
        "size": args.size,
        "userspace_addr": hex(hva),
    });
    merge(&mut json, tally.to_json());
    let end = args.gpa.saturating_add(args.size);
    Ok(Answer::new(
        json,
        format!("slot {}: {:#x}-{end:#x} at {hva:#x}", args.slot, args.gpa),
    ))
}

/// `mmuctl slot delete`.
pub(super) async fn delete(client: &Client, args: &SlotDeleteArgs) -> Result<Answer, Error> {
    let slot = Slot {
        slot_id: args.slot,
        ..Default::default()
    };
    let tally = change(client, args.vm, slot).await?;
    let mut json = json!({ "vm_id": args.vm, "slot_id": args.slot });
    merge(&mut json, tally.to_json());
    Ok(Answer::new(json, format!("slot {} deleted", args.slot)))
}

async fn change(client: &Client, vm_id: u64, slot: Slot) -> Result<Tally, Error> {
    let message = SetUserMemoryRegionRequest {
        vm_id,
        slot: Some(slot),
    };
    let answer = client
        .long("SetUserMemoryRegion", message, async |mut mmu, request| {
            mmu.set_user_memory_region(request).await
        })
        .await?;
    Ok(Tally::of(answer.counts.as_ref()))
}

//! `prefault`, `convert` and `punch-hole`.

use mirror_proto::mmu::{
    PreFaultMemoryRequest, PunchHoleRequest, SetMemoryAttributesRequest, Slot,
};
use serde_json::{Value, json};

use super::vm;
use crate::args::{ConvertArgs, PrefaultArgs, PunchHoleArgs, Visibility};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, hex, merge, pairs};
use crate::progress::Progress;
use crate::tally::Tally;

/// `mmuctl prefault`.
pub(super) async fn prefault(client: &Client, args: &PrefaultArgs) -> Result<Answer, Error> {
    const CALL: &str = "PreFaultMemory";
    let message = PreFaultMemoryRequest {
        vm_id: args.vm,
        vcpu_id: args.vcpu,
        gpa: args.gpa,
        size: args.size,
    };
    let progress = Progress::new("bytes", args.size);
    let mut stream = client
        .long(CALL, message, async |mut mmu, request| {
            mmu.pre_fault_memory(request).await
        })
        .await?;
    let mut last = None;
    while let Some(answer) = client.next(CALL, &mut stream).await? {
        progress.set(answer.done);
        last = Some(answer);
    }
    let last = last
        .filter(|last| last.finished)
        .ok_or(Error::Truncated { call: CALL })?;
    let json =
        json!({ "vm_id": args.vm, "gpa": hex(args.gpa), "size": args.size, "done": last.done });
    Ok(counted(json, &Tally::of(last.counts.as_ref())))
}

/// `mmuctl convert`.
pub(super) async fn convert(client: &Client, args: &ConvertArgs) -> Result<Answer, Error> {
    let tally = set_attributes(client, args.vm, args.gpa, args.size, args.to).await?;
    let to = match args.to {
        Visibility::Private => "private",
        Visibility::Shared => "shared",
    };
    let json = json!({ "vm_id": args.vm, "gpa": hex(args.gpa), "size": args.size, "to": to });
    Ok(counted(json, &tally))
}

/// Makes a range private or shared.
pub(super) async fn set_attributes(
    client: &Client,
    vm_id: u64,
    gpa: u64,
    size: u64,
    to: Visibility,
) -> Result<Tally, Error> {
    let message = SetMemoryAttributesRequest {
        vm_id,
        gpa,
        size,
        attributes: to.attributes(),
    };
    let answer = client
        .long("SetMemoryAttributes", message, async |mut mmu, request| {
            mmu.set_memory_attributes(request).await
        })
        .await?;
    Ok(Tally::of(answer.counts.as_ref()))
}

/// `mmuctl punch-hole`.
pub(super) async fn punch_hole(client: &Client, args: &PunchHoleArgs) -> Result<Answer, Error> {
    let (slot_id, offset) = match (args.gpa, args.offset) {
        (Some(gpa), _) => {
            let vm = vm::info(client, args.vm).await?;
            slot_of(&vm.slots, gpa).ok_or(Error::NoSlot {
                vm_id: args.vm,
                gpa,
            })?
        }
        (None, offset) => (args.slot, offset.unwrap_or(0)),
    };
    let message = PunchHoleRequest {
        vm_id: args.vm,
        slot_id,
        offset,
        size: args.size,
    };
    let answer = client
        .long("PunchHole", message, async |mut mmu, request| {
            mmu.punch_hole(request).await
        })
        .await?;
    let json = json!({
        "vm_id": args.vm,
        "slot_id": slot_id,
        "offset": hex(offset),
        "size": args.size,
        "pages_freed": answer.pages_freed,
    });
    Ok(counted(json, &Tally::of(answer.counts.as_ref())))
}

/// The slot that covers an address, and how far behind its start the address is.
fn slot_of(slots: &[Slot], gpa: u64) -> Option<(u32, u64)> {
    slots.iter().find_map(|slot| {
        let offset = gpa.checked_sub(slot.gpa)?;
        (offset < slot.size).then_some((slot.slot_id, offset))
    })
}

fn counted(mut json: Value, tally: &Tally) -> Answer {
    merge(&mut json, tally.to_json());
    Answer::new(json, pairs(tally.rows()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_finds_its_slot() {
        let slot = |slot_id, gpa, size| Slot {
            slot_id,
            gpa,
            size,
            ..Default::default()
        };
        let slots = [slot(0, 0, 0x4000), slot(5, 0x10000, 0x2000)];
        for (gpa, want) in [
            (0x1000, Some((0, 0x1000))),
            (0x4000, None),
            (0x10000, Some((5, 0))),
            (0x12000, None),
        ] {
            assert_eq!(slot_of(&slots, gpa), want, "{gpa:#x}");
        }
    }
}

//! `host`, `write-protect`, `touch` and `nx`.

use mirror_proto::mmu::{
    ChangeHostMappingRequest, Counts, RecoverNxHugePagesRequest, SetNxHugePagesRequest,
    TouchMemoryRequest, UnmapHvaRequest, WriteProtectRequest, write_protect_request::Target,
};
use serde_json::{Value, json};

use crate::args::{
    HostChangeArgs, HostCommand, HostPageSizeArg, HostUnmapArgs, NxCommand, NxRecoverArgs,
    NxSetArgs, TouchArgs, WriteProtectArgs,
};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, hex, merge, pairs};
use crate::tally::Tally;

/// `mmuctl host …`.
pub(super) async fn run(client: &Client, command: &HostCommand) -> Result<Answer, Error> {
    match command {
        HostCommand::Change(args) => change(client, args).await,
        HostCommand::Unmap(args) => unmap(client, args).await,
    }
}

/// The end of a range of host addresses.
fn end_of(hva: u64, size: u64) -> Result<u64, Error> {
    hva.checked_add(size)
        .ok_or_else(|| Error::Usage(format!("hva {hva:#x} + {size:#x} is above 64 bits")))
}

fn counted(mut json: Value, counts: Option<&Counts>) -> Answer {
    let tally = Tally::of(counts);
    merge(&mut json, tally.to_json());
    Answer::new(json, pairs(tally.rows()))
}

async fn change(client: &Client, args: &HostChangeArgs) -> Result<Answer, Error> {
    let page_size = args.page_size.map(HostPageSizeArg::to_wire);
    let message = ChangeHostMappingRequest {
        vm_id: args.vm,
        start: args.hva,
        end: end_of(args.hva, args.size)?,
        change: args.to.to_wire().into(),
        page_size: page_size.unwrap_or_default().into(),
        silent: args.silent,
    };
    let answer = client
        .long("ChangeHostMapping", message, async |mut mmu, request| {
            mmu.change_host_mapping(request).await
        })
        .await?;
    let json = json!({ "vm_id": args.vm, "hva": hex(args.hva), "size": args.size });
    Ok(counted(json, answer.counts.as_ref()))
}

async fn unmap(client: &Client, args: &HostUnmapArgs) -> Result<Answer, Error> {
    let message = UnmapHvaRequest {
        vm_id: args.vm,
        start: args.hva,
        end: end_of(args.hva, args.size)?,
    };
    let answer = client
        .long("UnmapHva", message, async |mut mmu, request| {
            mmu.unmap_hva(request).await
        })
        .await?;
    let json = json!({ "vm_id": args.vm, "hva": hex(args.hva), "size": args.size });
    Ok(counted(json, answer.counts.as_ref()))
}

/// `mmuctl write-protect`.
pub(super) async fn write_protect(
    client: &Client,
    args: &WriteProtectArgs,
) -> Result<Answer, Error> {
    let target = match (args.slot, args.gpa) {
        (Some(slot), _) => Some(Target::SlotId(slot)),
        (None, gpa) => gpa.map(Target::Gpa),
    };
    let message = WriteProtectRequest {
        vm_id: args.vm,
        target,
        track: args.track,
    };
    let answer = client
        .long("WriteProtect", message, async |mut mmu, request| {
            mmu.write_protect(request).await
        })
        .await?;
    let mut json = json!({ "vm_id": args.vm });
    match (args.slot, args.gpa) {
        (Some(slot), _) => json["slot_id"] = slot.into(),
        (None, gpa) => {
            json["gpa"] = gpa.map(hex).into();
            json["was_writable"] = answer.was_writable.into();
        }
    }
    Ok(counted(json, answer.counts.as_ref()))
}

/// `mmuctl touch`.
pub(super) async fn touch(client: &Client, args: &TouchArgs) -> Result<Answer, Error> {
    let message = TouchMemoryRequest {
        vm_id: args.vm,
        gpa: args.gpa,
        count: args.count,
        stride: args.stride,
        write: args.write,
    };
    let answer = client
        .long("TouchMemory", message, async |mut mmu, request| {
            mmu.touch_memory(request).await
        })
        .await?;
    let json = json!({
        "vm_id": args.vm,
        "gpa": hex(args.gpa),
        "count": args.count,
        "faulting": answer.faulting,
    });
    let text = format!("{} of {} would fault", answer.faulting, args.count);
    Ok(Answer::new(json, text))
}

/// `mmuctl nx …`.
pub(super) async fn nx(client: &Client, command: &NxCommand) -> Result<Answer, Error> {
    match command {
        NxCommand::Set(args) => nx_set(client, args).await,
        NxCommand::Recover(args) => nx_recover(client, args).await,
    }
}

async fn nx_set(client: &Client, args: &NxSetArgs) -> Result<Answer, Error> {
    let message = SetNxHugePagesRequest {
        vm_id: args.vm,
        on: args.on,
    };
    client
        .long("SetNxHugePages", message, async |mut mmu, request| {
            mmu.set_nx_huge_pages(request).await
        })
        .await?;
    let json = json!({ "vm_id": args.vm, "nx_huge_pages": args.on });
    let text = if args.on {
        "huge pages come without X"
    } else {
        "huge pages come with X"
    };
    Ok(Answer::new(json, text))
}

async fn nx_recover(client: &Client, args: &NxRecoverArgs) -> Result<Answer, Error> {
    let message = RecoverNxHugePagesRequest {
        vm_id: args.vm,
        most: args.most,
    };
    let answer = client
        .long("RecoverNxHugePages", message, async |mut mmu, request| {
            mmu.recover_nx_huge_pages(request).await
        })
        .await?;
    let json = json!({ "vm_id": args.vm, "recovered": answer.recovered });
    Ok(counted(json, answer.counts.as_ref()))
}

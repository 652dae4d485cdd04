//! `vm` and `vcpu`.

use mirror_proto::mmu::{
    CreateVcpuRequest, CreateVmRequest, DestroyVmRequest, FinalizeVmRequest, HostPageSize,
    InitMemRegionRequest, InitVcpuRequest, InitVmRequest, ListVmsRequest, VmInfo, VmKind,
};
use serde_json::{Value, json};
use tdx_defs::PAGE_SIZE;

use crate::args::{InitRegionArgs, VcpuCommand, VmCommand, VmCreateArgs, VmKindArg};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, Table, hex, merge, pairs};
use crate::tally::Tally;

/// `mmuctl vm …`.
pub(super) async fn run(client: &Client, command: &VmCommand) -> Result<Answer, Error> {
    match command {
        VmCommand::Create(args) => create(client, args).await,
        VmCommand::Init(vm) => init(client, vm.vm_id()).await,
        VmCommand::List => list(client).await,
        VmCommand::Show(vm) => show(client, vm.vm_id()).await,
        VmCommand::Destroy(vm) => destroy(client, vm.vm_id()).await,
        VmCommand::InitRegion(args) => init_region(client, args).await,
        VmCommand::Finalize(vm) => finalize(client, vm.vm_id()).await,
    }
}

async fn create(client: &Client, args: &VmCreateArgs) -> Result<Answer, Error> {
    let message = CreateVmRequest {
        gpaw: args.gpaw,
        mode: args.mode.to_wire().into(),
        attributes: args.attributes,
        xfam: args.xfam,
        max_vcpus: args.max_vcpus,
        label: args.label.clone(),
        create_only: args.create_only,
        kind: args.kind.to_wire().into(),
        eager_page_split: Some(args.eager_page_split),
        dirty_log: args.dirty_log.to_wire().into(),
        pml: args.pml,
        nx_huge_pages: args.nx_huge_pages,
        slot_zap_all: args.slot_zap_all,
    };
    let vm = client
        .short("CreateVm", message, async |mut mmu, request| {
            mmu.create_vm(request).await
        })
        .await?;
    let mut json = json!({
        "vm_id": vm.vm_id,
        "hkid": vm.hkid,
        "tdr": hex(vm.tdr),
        "mode": args.mode.name(),
        "gpaw": args.gpaw,
        "kind": kind_name(args.kind.to_wire()),
    });
    merge(&mut json, Tally::of(vm.counts.as_ref()).to_json());
    let text = match args.kind {
        VmKindArg::Td => format!("vm {} (key id {}, TDR {:#x})", vm.vm_id, vm.hkid, vm.tdr),
        VmKindArg::Ordinary => format!("vm {}", vm.vm_id),
    };
    Ok(Answer::new(json, text))
}

async fn init(client: &Client, vm_id: u64) -> Result<Answer, Error> {
    let message = InitVmRequest { vm_id, hw_error: 0 };
    let td = client
        .short("InitVm", message, async |mut mmu, request| {
            mmu.init_vm(request).await
        })
        .await?;
    let mut json = json!({ "vm_id": vm_id, "hkid": td.hkid, "tdr": hex(td.tdr) });
    merge(&mut json, Tally::of(td.counts.as_ref()).to_json());
    Ok(Answer::new(
        json,
        format!("vm {vm_id} (key id {}, TDR {:#x})", td.hkid, td.tdr),
    ))
}

/// All VMs of the service.
pub(super) async fn infos(client: &Client) -> Result<Vec<VmInfo>, Error> {
    let answer = client
        .short("ListVms", ListVmsRequest {}, async |mut mmu, request| {
            mmu.list_vms(request).await
        })
        .await?;
    Ok(answer.vms)
}

/// One VM.
pub(super) async fn info(client: &Client, vm_id: u64) -> Result<VmInfo, Error> {
    let vms = infos(client).await?;
    vms.into_iter()
        .find(|vm| vm.vm_id == vm_id)
        .ok_or(Error::NoVm { vm_id })
}

async fn list(client: &Client) -> Result<Answer, Error> {
    let vms = infos(client).await?;
    let mut table = Table::new(&[
        ">vm", "label", "state", "mode", ">vcpus", ">4K", ">2M", ">1G", ">slots",
    ]);
    for vm in &vms {
        table.row([
            vm.vm_id.to_string(),
            vm.label.clone(),
            vm.state.clone(),
            mode(vm).to_owned(),
            vm.vcpus.to_string(),
            vm.pages_4k.to_string(),
            vm.pages_2m.to_string(),
            vm.pages_1g.to_string(),
            vm.slots.len().to_string(),
        ]);
    }
    let json = json!({ "vms": vms.iter().map(vm_json).collect::<Vec<_>>() });
    let text = if vms.is_empty() {
        "no VMs".to_owned()
    } else {
        table.to_string()
    };
    Ok(Answer::new(json, text))
}

async fn show(client: &Client, vm_id: u64) -> Result<Answer, Error> {
    let vm = info(client, vm_id).await?;
    let mut rows = vec![
        ("vm", vm.vm_id.to_string()),
        ("label", vm.label.clone()),
        ("state", vm.state.clone()),
        ("kind", kind_name(vm.kind()).to_owned()),
        ("mode", mode(&vm).to_owned()),
        ("address width", format!("{} bits", vm.gpaw)),
        ("vcpus", vm.vcpus.to_string()),
        ("key id", vm.hkid.to_string()),
        ("TDR", hex(vm.tdr)),
        (
            "4K, 2M, 1G leaves",
            format!("{}, {}, {}", vm.pages_4k, vm.pages_2m, vm.pages_1g),
        ),
        ("MRTD", vm.mrtd.clone()),
    ];
    if !vm.reason.is_empty() {
        rows.insert(3, ("reason", vm.reason.clone()));
    }
    let mut slots = Table::new(&[
        ">slot",
        ">gpa",
        ">size",
        ">hva",
        "guest_memfd",
        "read only",
        "log dirty",
        ">host pages",
    ]);
    for slot in &vm.slots {
        slots.row([
            slot.slot_id.to_string(),
            hex(slot.gpa),
            hex(slot.size),
            hex(slot.userspace_addr),
            slot.guest_memfd.to_string(),
            slot.read_only.to_string(),
            slot.log_dirty.to_string(),
            page_size_name(slot.host_page_size()).to_owned(),
        ]);
    }
    Ok(Answer::new(
        vm_json(&vm),
        format!("{}\n{slots}", pairs(rows)),
    ))
}

async fn destroy(client: &Client, vm_id: u64) -> Result<Answer, Error> {
    let answer = client
        .long(
            "DestroyVm",
            DestroyVmRequest { vm_id, mode: 0 },
            async |mut mmu, request| mmu.destroy_vm(request).await,
        )
        .await?;
    let tally = Tally::of(answer.counts.as_ref());
    let mut json = json!({ "vm_id": vm_id, "pages_leaked": answer.pages_leaked });
    merge(&mut json, tally.to_json());
    let mut rows = tally.rows();
    rows.push(("pages leaked".into(), answer.pages_leaked.to_string()));
    Ok(Answer::new(json, pairs(rows)))
}

async fn init_region(client: &Client, args: &InitRegionArgs) -> Result<Answer, Error> {
    let data = match &args.data {
        None => Vec::new(),
        Some(path) => std::fs::read(path).map_err(|source| Error::File {
            path: path.clone(),
            source,
        })?,
    };
    let size = match args.size {
        Some(size) => size,
        None if data.is_empty() => {
            return Err(Error::Usage("init-region needs --size or --data".into()));
        }
        None => (data.len() as u64).next_multiple_of(PAGE_SIZE),
    };
    let message = InitMemRegionRequest {
        vm_id: args.vm,
        vcpu_id: args.vcpu,
        gpa: args.gpa,
        size,
        data: data.into(),
        measure: args.measure,
        ..Default::default()
    };
    let answer = client
        .long("InitMemRegion", message, async |mut mmu, request| {
            mmu.init_mem_region(request).await
        })
        .await?;
    let tally = Tally::of(answer.counts.as_ref());
    let mut json = json!({ "vm_id": args.vm, "gpa": hex(args.gpa), "done": answer.done });
    merge(&mut json, tally.to_json());
    Ok(Answer::new(json, pairs(tally.rows())))
}

async fn finalize(client: &Client, vm_id: u64) -> Result<Answer, Error> {
    let answer = client
        .long(
            "FinalizeVm",
            FinalizeVmRequest { vm_id, hw_error: 0 },
            async |mut mmu, request| mmu.finalize_vm(request).await,
        )
        .await?;
    let mut json = json!({ "vm_id": vm_id, "mrtd": answer.mrtd });
    merge(&mut json, Tally::of(answer.counts.as_ref()).to_json());
    Ok(Answer::new(json, format!("MRTD {}", answer.mrtd)))
}

/// `mmuctl vcpu …`.
pub(super) async fn run_vcpu(client: &Client, command: &VcpuCommand) -> Result<Answer, Error> {
    match *command {
        VcpuCommand::Add {
            vm,
            count,
            create_only,
        } => add_vcpus(client, vm, count, create_only).await,
        VcpuCommand::Init { vm, vcpu } => init_vcpu(client, vm, vcpu).await,
    }
}

async fn init_vcpu(client: &Client, vm_id: u64, vcpu_id: u32) -> Result<Answer, Error> {
    let message = InitVcpuRequest {
        vm_id,
        vcpu_id,
        hw_error: 0,
    };
    let answer = client
        .short("InitVcpu", message, async |mut mmu, request| {
            mmu.init_vcpu(request).await
        })
        .await?;
    let tally = Tally::of(answer.counts.as_ref());
    let mut json = json!({ "vm_id": vm_id, "vcpu_id": vcpu_id });
    merge(&mut json, tally.to_json());
    Ok(Answer::new(json, pairs(tally.rows())))
}

async fn add_vcpus(
    client: &Client,
    vm: u64,
    count: u32,
    create_only: bool,
) -> Result<Answer, Error> {
    let mut tally = Tally::default();
    let mut ids = Vec::new();
    for _ in 0..count {
        let answer = client
            .short(
                "CreateVcpu",
                CreateVcpuRequest {
                    vm_id: vm,
                    create_only,
                },
                async |mut mmu, request| mmu.create_vcpu(request).await,
            )
            .await?;
        tally.add(answer.counts.as_ref());
        ids.push(answer.vcpu_id);
    }
    let names: Vec<String> = ids.iter().map(u32::to_string).collect();
    let mut json = json!({ "vm_id": vm, "vcpu_id": ids.first(), "vcpu_ids": ids });
    merge(&mut json, tally.to_json());
    Ok(Answer::new(json, format!("vcpu {}", names.join(", "))))
}

fn page_size_name(size: HostPageSize) -> &'static str {
    match size {
        HostPageSize::Unspecified => "",
        HostPageSize::HostPageSize4k => "4K",
        HostPageSize::HostPageSize2m => "2M",
        HostPageSize::HostPageSize1g => "1G",
    }
}

fn kind_name(kind: VmKind) -> &'static str {
    match kind {
        VmKind::Td => "td",
        VmKind::Ordinary => "ordinary",
        VmKind::Unspecified => "",
    }
}

fn mode(vm: &VmInfo) -> &'static str {
    match vm.mode() {
        mirror_proto::mmu::Mode::Kernel => "kernel",
        mirror_proto::mmu::Mode::Batched => "batched",
        mirror_proto::mmu::Mode::Unspecified => "",
    }
}

fn vm_json(vm: &VmInfo) -> Value {
    let slots: Vec<Value> = vm
        .slots
        .iter()
        .map(|slot| {
            json!({
                "slot_id": slot.slot_id,
                "gpa": hex(slot.gpa),
                "size": slot.size,
                "userspace_addr": hex(slot.userspace_addr),
                "guest_memfd": slot.guest_memfd,
                "read_only": slot.read_only,
                "log_dirty": slot.log_dirty,
                "host_page_size": page_size_name(slot.host_page_size()),
                "demand_zero": slot.demand_zero,
            })
        })
        .collect();
    json!({
        "vm_id": vm.vm_id,
        "label": vm.label,
        "gpaw": vm.gpaw,
        "mode": mode(vm),
        "kind": kind_name(vm.kind()),
        "state": vm.state,
        "reason": vm.reason,
        "vcpus": vm.vcpus,
        "hkid": vm.hkid,
        "tdr": hex(vm.tdr),
        "pages_4k": vm.pages_4k,
        "pages_2m": vm.pages_2m,
        "pages_1g": vm.pages_1g,
        "mrtd": vm.mrtd,
        "slots": slots,
    })
}

//! How records are written: protobuf, so that a later version can add to them.

use mirror_proto::mmu as wire;
use prost::Message as _;
use tdp_mmu::{SlotSpec, TdRecord, VcpuRecord, VmRecord};
use tdx_defs::Pfn;

use super::Kept;
use crate::convert::{slot_from_wire, slot_to_wire};
use crate::service::vm_config;

/// A VM, but for slots, vCPUs and attributes.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct VmRow {
    /// How it was asked for.
    #[prost(message, optional, tag = "1")]
    request: Option<wire::CreateVmRequest>,
    #[prost(string, tag = "2")]
    instance: String,
    #[prost(message, optional, tag = "3")]
    pub(super) td: Option<TdRow>,
    #[prost(bool, tag = "4")]
    pub(super) measuring: bool,
    #[prost(bool, tag = "5")]
    pub(super) going: bool,
    #[prost(string, optional, tag = "6")]
    pub(super) dead: Option<String>,
    #[prost(bool, tag = "7")]
    pub(super) nx_huge_pages: bool,
    #[prost(bool, tag = "8")]
    pub(super) exit_hypercall: bool,
    /// Frames.
    #[prost(uint64, repeated, tag = "9")]
    pub(super) kept: Vec<u64>,
}

/// A TD: frames and key id.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TdRow {
    #[prost(uint64, tag = "1")]
    tdr: u64,
    #[prost(uint32, tag = "2")]
    hkid: u32,
    #[prost(uint64, repeated, tag = "3")]
    pages: Vec<u64>,
}

/// A vCPU: frames.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct VcpuRow {
    #[prost(bool, tag = "1")]
    pub(super) created: bool,
    #[prost(uint64, repeated, tag = "2")]
    pub(super) pages: Vec<u64>,
}

/// A slot, as the wire has it.
pub(super) struct SlotRow;

impl SlotRow {
    pub(super) fn bytes(spec: &SlotSpec) -> Vec<u8> {
        slot_to_wire(spec).encode_to_vec()
    }

    pub(super) fn spec_of(bytes: &[u8]) -> Option<SlotSpec> {
        slot_from_wire(wire::Slot::decode(bytes).ok()?).ok()
    }
}

impl VcpuRow {
    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        Self::decode(bytes).ok()
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    pub(super) fn record_of(bytes: &[u8]) -> Option<VcpuRecord> {
        let row = Self::of(bytes)?;
        Some(VcpuRecord {
            created: row.created,
            pages: pages(&row.pages),
        })
    }
}

impl From<&TdRecord> for TdRow {
    fn from(td: &TdRecord) -> Self {
        Self {
            tdr: td.tdr.get(),
            hkid: td.hkid,
            pages: frames(&td.pages),
        }
    }
}

impl VmRow {
    pub(super) fn new(request: &wire::CreateVmRequest, record: &VmRecord, instance: &str) -> Self {
        Self {
            request: Some(request.clone()),
            instance: instance.to_owned(),
            td: record.td.as_ref().map(TdRow::from),
            measuring: record.measuring,
            going: record.going,
            dead: record.dead.clone(),
            nx_huge_pages: record.nx_huge_pages,
            exit_hypercall: record.exit_hypercall,
            kept: record.kept.iter().map(|page| page.get()).collect(),
        }
    }

    pub(super) fn of(bytes: &[u8]) -> Option<Self> {
        Self::decode(bytes).ok()
    }

    pub(super) fn bytes(&self) -> Vec<u8> {
        self.encode_to_vec()
    }

    /// None when the request is not one that would have been granted.
    pub(super) fn kept_as(self, id: u64) -> Option<Kept> {
        let request = self.request?;
        let mut record = VmRecord::new(vm_config(&request).ok()?);
        record.td = self.td.map(|td| TdRecord {
            tdr: Pfn::new(td.tdr),
            hkid: td.hkid,
            pages: pages(&td.pages),
        });
        record.measuring = self.measuring;
        record.going = self.going;
        record.dead = self.dead;
        record.nx_huge_pages = self.nx_huge_pages;
        record.exit_hypercall = self.exit_hypercall;
        record.kept = self.kept.into_iter().map(Pfn::new).collect();
        Some(Kept {
            id,
            request,
            instance: self.instance,
            record,
        })
    }
}

pub(super) fn frames(pages: &[Pfn]) -> Vec<u64> {
    pages.iter().map(|page| page.get()).collect()
}

fn pages(frames: &[u64]) -> Vec<Pfn> {
    frames.iter().copied().map(Pfn::new).collect()
}

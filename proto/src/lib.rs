//! The wire contract: generated code, and the only conversions between wire and domain types.

/// `tdx.module.v1`: the TDX module over a socket.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated; documented in the .proto files"
)]
pub mod module {
    tonic::include_proto!("tdx.module.v1");
}

/// `kvm.mmu.v1`: KVM's memory management for TDX guests.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated; documented in the .proto files"
)]
pub mod mmu {
    tonic::include_proto!("kvm.mmu.v1");
}

/// `mirror.trace.v1`: spans inside answers.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    clippy::allow_attributes_without_reason,
    reason = "generated; documented in the .proto files"
)]
pub mod trace {
    tonic::include_proto!("mirror.trace.v1");
}

pub mod codec;
mod convert;
mod refused;

pub use convert::{InvalidField, seamcall_to_wire};
pub use refused::{attach_spans, spans_of};

/// Encoded `FileDescriptorSet` of all packages, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

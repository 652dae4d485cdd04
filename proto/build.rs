//! Compiles the `.proto` files with protox, so that no protoc has to be installed.

use std::path::PathBuf;

use prost::Message as _;

/// Messages that the other packages share.
const SHARED: &str = "mirror/trace/v1/trace.proto";
const PROTOS: [&str; 6] = [
    SHARED,
    "tdx/module/v1/module.proto",
    "tdx/module/v1/guest.proto",
    "tdx/module/v1/fault.proto",
    "tdx/module/v1/platform.proto",
    "kvm/mmu/v1/mmu.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    for proto in PROTOS {
        println!("cargo:rerun-if-changed={proto}");
    }
    let descriptors = protox::compile(PROTOS, ["."])?;
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    std::fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;
    // Source page contents travel in `data`: shared buffers instead of copies.
    tonic_prost_build::configure()
        .codec_path("crate::codec::SizedCodec")
        .bytes(".tdx.module.v1.Seamcall.data")
        .bytes(".kvm.mmu.v1.InitMemRegionRequest.data")
        .extern_path(".mirror.trace.v1", "crate::trace")
        .compile_fds(descriptors)?;
    // Last, since the line above leaves an empty file for a package that lives elsewhere.
    tonic_prost_build::configure().compile_fds(protox::compile([SHARED], ["."])?)?;
    Ok(())
}

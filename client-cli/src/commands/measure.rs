//! `measure`: MRTD of a firmware image, by a TD that is built from it through both services.
//!
//! Source: TDX Virtual Firmware Design Guide, "TDVF metadata"; the order of KVM's
//! `tdx_vcpu_init_mem_region()`, and that of loaders that measure a section after all its adds.
//!
//! MRTD comes from the module, which hashes what is really added and extended. Nothing is hashed
//! here.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use mirror_proto::mmu::{
    CreateVcpuRequest, FinalizeVmRequest, InitMemRegionRequest, SetMemoryAttributesRequest,
    SetUserMemoryRegionRequest, Slot,
};
use serde_json::{Value, json};
use tdx_defs::{Gpaw, Leaf, PAGE_SIZE};

use crate::args::{AddressRange, MeasureArgs, MeasureOrder, Visibility};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, Table, hex, merge};
use crate::progress::Progress;
use crate::replay::{VmSpec, with_vm};
use crate::tally::Tally;
use crate::tdvf::{MAX_IMAGE_BYTES, Section, Tdvf, TdvfError};

/// Bytes of one InitMemRegion: far below the limit of a message, and often enough for a signal.
const CHUNK_BYTES: u64 = 2 << 20;
/// Where the slots are in the VMM's address space. Nothing is there; slots only may not overlap.
const HVA_BASE: u64 = 0x7000_0000_0000;

/// `mmuctl measure`.
pub(super) async fn run(client: &Client, args: &MeasureArgs) -> Result<Answer, Error> {
    let gpaw = match args.gpaw {
        48 => Gpaw::W48,
        52 => Gpaw::W52,
        other => {
            let text = format!("gpaw {other} is neither 48 nor 52");
            return Err(Error::Usage(text));
        }
    };
    let bytes = read(&args.file)?;
    let image = Tdvf::parse(&bytes)?;
    image.check_gpaw(gpaw)?;
    let spec = VmSpec {
        mode: args.mode.to_wire(),
        gpaw: args.gpaw,
        label: "measure",
    };
    let (mrtd, tally) = with_vm(client, spec, 1, async |vm_id| {
        let steps: u64 = image
            .added_memory()
            .into_iter()
            .map(AddressRange::size)
            .sum();
        let mut build = Build {
            client,
            vm_id,
            vcpu_id: 0,
            tally: Tally::default(),
            progress: Progress::new("pages", steps / PAGE_SIZE),
        };
        build.prepare(&image).await?;
        for section in image.sections().iter().filter(|section| section.is_added()) {
            build.section(&image, section, args.order).await?;
        }
        let mrtd = build.finalize().await?;
        Ok((mrtd, build.tally))
    })
    .await?;
    let pages = tally.count(Leaf::MEM_PAGE_ADD);
    let chunks = tally.count(Leaf::MR_EXTEND);
    let mut json = json!({
        "mrtd": mrtd,
        "pages_added": pages,
        "chunks_extended": chunks,
        "order": args.order.name(),
        "mode": args.mode.name(),
        "sections": image.sections().iter().map(section_json).collect::<Vec<_>>(),
    });
    merge(&mut json, tally.to_json());
    let text = format!(
        "MRTD {mrtd}\n{}\n{pages} pages added, {chunks} chunks of 256 bytes extended, {} messages",
        table(&image),
        tally.rpcs
    );
    Ok(Answer::new(json, text))
}

/// The whole file, or an error when it is larger than any image: a device file never ends.
fn read(path: &Path) -> Result<Vec<u8>, Error> {
    let failed = |source| Error::File {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(failed)?;
    let mut bytes = Vec::new();
    file.take(MAX_IMAGE_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(failed)?;
    let size = bytes.len() as u64;
    if size > MAX_IMAGE_BYTES {
        return Err(TdvfError::TooLarge { size }.into());
    }
    Ok(bytes)
}

/// A TD on its way from created to finalised.
struct Build<'a> {
    client: &'a Client,
    vm_id: u64,
    vcpu_id: u32,
    tally: Tally,
    progress: Progress,
}

impl Build<'_> {
    /// A vCPU, and private memory for each section that is added.
    async fn prepare(&mut self, image: &Tdvf<'_>) -> Result<(), Error> {
        let vm_id = self.vm_id;
        let message = CreateVcpuRequest {
            vm_id,
            create_only: false,
        };
        let vcpu = self
            .client
            .short("CreateVcpu", message, async |mut mmu, request| {
                mmu.create_vcpu(request).await
            })
            .await?;
        self.vcpu_id = vcpu.vcpu_id;
        self.tally.add(vcpu.counts.as_ref());
        let mut hva = HVA_BASE;
        for (slot_id, memory) in (0u32..).zip(image.added_memory()) {
            let slot = Slot {
                slot_id,
                gpa: memory.start,
                size: memory.size(),
                userspace_addr: hva,
                guest_memfd: true,
                ..Default::default()
            };
            hva += memory.size();
            let message = SetUserMemoryRegionRequest {
                vm_id,
                slot: Some(slot),
            };
            let answer = self
                .client
                .short("SetUserMemoryRegion", message, async |mut mmu, request| {
                    mmu.set_user_memory_region(request).await
                })
                .await?;
            self.tally.add(answer.counts.as_ref());
            let message = SetMemoryAttributesRequest {
                vm_id,
                gpa: memory.start,
                size: memory.size(),
                attributes: Visibility::Private.attributes(),
            };
            let answer = self
                .client
                .long("SetMemoryAttributes", message, async |mut mmu, request| {
                    mmu.set_memory_attributes(request).await
                })
                .await?;
            self.tally.add(answer.counts.as_ref());
        }
        Ok(())
    }

    /// Adds a section, and extends MRTD by it if it is measured.
    async fn section(
        &mut self,
        image: &Tdvf<'_>,
        section: &Section,
        order: MeasureOrder,
    ) -> Result<(), Error> {
        let apart = section.is_measured() && order == MeasureOrder::PerRegion;
        let regions = chunks(section.memory).map(|chunk| {
            let data = part(image.contents(section), chunk.start - section.memory.start);
            InitMemRegionRequest {
                data: data.to_vec().into(),
                measure: section.is_measured() && !apart,
                ..self.region(chunk)
            }
        });
        self.init(regions.collect()).await?;
        self.progress.advance(section.memory.size() / PAGE_SIZE);
        if apart {
            let regions = chunks(section.memory).map(|chunk| InitMemRegionRequest {
                extend_only: true,
                ..self.region(chunk)
            });
            self.init(regions.collect()).await?;
        }
        Ok(())
    }

    fn region(&self, memory: AddressRange) -> InitMemRegionRequest {
        InitMemRegionRequest {
            vm_id: self.vm_id,
            vcpu_id: self.vcpu_id,
            gpa: memory.start,
            size: memory.size(),
            ..Default::default()
        }
    }

    async fn init(&mut self, regions: Vec<InitMemRegionRequest>) -> Result<(), Error> {
        let regions = tokio_stream::iter(regions);
        let answer = self
            .client
            .long("InitMemRegions", regions, async |mut mmu, request| {
                mmu.init_mem_regions(request).await
            })
            .await?;
        self.tally.add(answer.counts.as_ref());
        Ok(())
    }

    /// Ends the build; answers MRTD as 96 hex digits.
    async fn finalize(&mut self) -> Result<String, Error> {
        let message = FinalizeVmRequest {
            vm_id: self.vm_id,
            hw_error: 0,
        };
        let answer = self
            .client
            .long("FinalizeVm", message, async |mut mmu, request| {
                mmu.finalize_vm(request).await
            })
            .await?;
        self.tally.add(answer.counts.as_ref());
        Ok(answer.mrtd)
    }
}

/// `memory` in pieces of one message each.
fn chunks(memory: AddressRange) -> impl Iterator<Item = AddressRange> {
    let starts = std::iter::successors(Some(memory.start), |start| start.checked_add(CHUNK_BYTES));
    starts
        .take_while(move |start| *start < memory.end)
        .map(move |start| AddressRange {
            start,
            end: memory.end.min(start + CHUNK_BYTES),
        })
}

/// What of `contents` belongs to the chunk that begins `offset` bytes into the section.
fn part(contents: &[u8], offset: u64) -> &[u8] {
    let clamp = |at: u64| usize::try_from(at).map_or(contents.len(), |at| at.min(contents.len()));
    &contents[clamp(offset)..clamp(offset + CHUNK_BYTES)]
}

fn section_json(section: &Section) -> Value {
    json!({
        "type": section.kind.name(),
        "gpa": hex(section.memory.start),
        "size": section.memory.size(),
        "measured": section.is_measured(),
        "added": section.is_added(),
    })
}

fn table(image: &Tdvf<'_>) -> Table {
    let mut table = Table::new(&["section", ">gpa", ">size", "added", "measured"]);
    let word = |yes| if yes { "yes" } else { "no" };
    for section in image.sections() {
        table.row([
            section.kind.name().to_owned(),
            hex(section.memory.start),
            hex(section.memory.size()),
            word(section.is_added()).to_owned(),
            word(section.is_measured()).to_owned(),
        ]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_cover_a_range_and_share_its_contents() {
        let mib = 1 << 20;
        let range = |start, end| AddressRange { start, end };
        for (memory, want) in [
            (range(0, mib), vec![range(0, mib)]),
            (range(mib, 3 * mib), vec![range(mib, 3 * mib)]),
            (
                range(mib, 5 * mib + 4096),
                vec![
                    range(mib, 3 * mib),
                    range(3 * mib, 5 * mib),
                    range(5 * mib, 5 * mib + 4096),
                ],
            ),
        ] {
            assert_eq!(chunks(memory).collect::<Vec<_>>(), want, "{memory:?}");
        }
        let contents = vec![7; (3 << 20) + 5];
        for (offset, want) in [(0, 2 << 20), (2 << 20, (1 << 20) + 5), (4 << 20, 0)] {
            assert_eq!(part(&contents, offset).len(), want, "{offset:#x}");
        }
    }

    #[test]
    fn a_file_without_an_end_is_refused() {
        let error = read(Path::new("/dev/zero")).unwrap_err();
        assert!(
            error.chain().contains("limit is 0x4000000"),
            "{}",
            error.chain()
        );
    }
}

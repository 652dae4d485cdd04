//! TDX virtual firmware images: which memory a TD starts with, and what of it is measured.
//!
//! Source: TDX Virtual Firmware Design Guide, section "TDVF metadata"; OVMF's reset vector, whose
//! GUID table ends 32 bytes before the end of the image and is read backwards.
//!
//! Invariants of a parsed image
//! - F1  Each section's contents lie inside the image and are not larger than its memory.
//! - F2  Memory ranges are page aligned, not empty, below 2^51 and do not overlap.
//! - F3  Memory that is added before the TD runs is at most [`MAX_ADDED_BYTES`] in all.

use tdx_defs::{GpaLayout, Gpaw, PAGE_SIZE};

use crate::args::AddressRange;

/// The table's footer ends so far before the end of the image: the reset vector is behind it.
const FOOTER_DISTANCE: usize = 32;
/// A length and a GUID end each entry of the table.
const ENTRY_TAIL: usize = 2 + 16;
const DESCRIPTOR_SIZE: usize = 16;
const SECTION_SIZE: usize = 32;
/// The guide sets no bound; real images have about ten.
const MAX_SECTIONS: u32 = 64;
/// Bit 51 is the SHARED bit of the widest guest address: private memory ends below it.
const MAX_GPA: u64 = 1 << 51;
/// Largest image, in bytes. Real ones have 2 to 16 MiB; a data offset could name up to 4 GiB.
pub const MAX_IMAGE_BYTES: u64 = 64 << 20;
/// Most memory that is added before the TD runs, in bytes. Each page of it is a call of the module
/// and, measured, sixteen more; real images need a few MiB.
pub const MAX_ADDED_BYTES: u64 = 1 << 30;

/// Attribute bit: contents are measured.
const MR_EXTEND: u32 = 1;
/// Attribute bit: memory comes while the TD runs, not before.
const PAGE_AUG: u32 = 2;

/// 96b582de-1fb2-45f7-baea-a366c55a082d, as stored.
const FOOTER_GUID: [u8; 16] = [
    0xde, 0x82, 0xb5, 0x96, 0xb2, 0x1f, 0xf7, 0x45, 0xba, 0xea, 0xa3, 0x66, 0xc5, 0x5a, 0x08, 0x2d,
];
/// e47a6535-984a-4798-865e-4685a7bf8ec2, as stored.
const METADATA_GUID: [u8; 16] = [
    0x35, 0x65, 0x7a, 0xe4, 0x4a, 0x98, 0x98, 0x47, 0x86, 0x5e, 0x46, 0x85, 0xa7, 0xbf, 0x8e, 0xc2,
];

/// An image that does not say what a TD starts with.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TdvfError {
    /// More bytes than any firmware has.
    #[error("the image has {size:#x} bytes, the limit is {MAX_IMAGE_BYTES:#x}")]
    TooLarge {
        /// Size of the image.
        size: u64,
    },
    /// Fewer bytes than a part that must be there.
    #[error("{part} needs {needed} bytes at offset {offset:#x}, the image has {size:#x}")]
    Short {
        /// The part.
        part: &'static str,
        /// Where it should be.
        offset: usize,
        /// How long it is.
        needed: usize,
        /// Size of the image.
        size: usize,
    },
    /// No table where it should be.
    #[error("no GUID table ends {FOOTER_DISTANCE} bytes before the end of the image")]
    NoTable,
    /// A length that cannot be.
    #[error(
        "length {length} of a GUID table entry is outside the limits of {ENTRY_TAIL} and {limit}"
    )]
    EntryLength {
        /// The length.
        length: usize,
        /// The room that is left.
        limit: usize,
    },
    /// Not a TDX image.
    #[error("the GUID table has no TDX metadata entry")]
    NoMetadata,
    /// The entry holds something else than four bytes.
    #[error("the TDX metadata entry holds {length} bytes, not 4")]
    MetadataLength {
        /// How many.
        length: usize,
    },
    /// The entry points outside of the image.
    #[error(
        "TDX metadata {distance:#x} bytes before the end is outside the image of {size:#x} bytes"
    )]
    MetadataOffset {
        /// As given.
        distance: u32,
        /// Size of the image.
        size: usize,
    },
    /// Not `TDVF`.
    #[error("TDX metadata has the signature {found:02x?}, not \"TDVF\"")]
    Signature {
        /// The bytes.
        found: [u8; 4],
    },
    /// Not version 1.
    #[error("TDX metadata has version {version}, only 1 is known")]
    Version {
        /// The version.
        version: u32,
    },
    /// A count that is zero or too large, or does not match the length.
    #[error(
        "TDX metadata names {count} sections in {length} bytes: at most {MAX_SECTIONS}, of {SECTION_SIZE} bytes behind {DESCRIPTOR_SIZE}"
    )]
    SectionCount {
        /// How many.
        count: u32,
        /// Bytes of the whole descriptor.
        length: u32,
    },
    /// The sections together ask for too much.
    #[error(
        "the sections add {bytes:#x} bytes of memory before the TD runs, the limit is {MAX_ADDED_BYTES:#x}"
    )]
    TooMuchMemory {
        /// Sum of the memory sizes without PAGE.AUG.
        bytes: u64,
    },
    /// A section that contradicts itself or the image.
    #[error("section {index}: {problem}")]
    Section {
        /// Which one, from 0.
        index: usize,
        /// What is wrong.
        problem: String,
    },
}

/// What a section holds; unknown numbers stay values.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SectionKind(pub u32);

impl SectionKind {
    /// Boot firmware volume: the code.
    pub const BFV: Self = Self(0);
    /// Configuration firmware volume: variables.
    pub const CFV: Self = Self(1);
    /// List of what the VMM gives to the firmware.
    pub const TD_HOB: Self = Self(2);
    /// Memory that the firmware needs while it starts.
    pub const TEMP_MEM: Self = Self(3);
    /// Memory that the TD is given, now or while it runs.
    pub const PERM_MEM: Self = Self(4);

    /// The guide's name.
    pub fn name(self) -> &'static str {
        match self {
            Self::BFV => "BFV",
            Self::CFV => "CFV",
            Self::TD_HOB => "TD_HOB",
            Self::TEMP_MEM => "TempMem",
            Self::PERM_MEM => "PermMem",
            _ => "unknown",
        }
    }
}

/// A part of the TD's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Section {
    /// What it holds.
    pub kind: SectionKind,
    /// Where it goes.
    pub memory: AddressRange,
    data_offset: usize,
    raw_size: usize,
    attributes: u32,
}

impl Section {
    /// MR.EXTEND: its contents are measured.
    pub fn is_measured(&self) -> bool {
        self.attributes & MR_EXTEND != 0
    }

    /// Whether the VMM adds it. PAGE.AUG memory comes only while the TD runs.
    pub fn is_added(&self) -> bool {
        self.attributes & PAGE_AUG == 0
    }
}

/// A parsed image.
#[derive(Debug, Clone)]
pub struct Tdvf<'a> {
    image: &'a [u8],
    sections: Vec<Section>,
}

impl<'a> Tdvf<'a> {
    /// Reads and checks the metadata.
    pub fn parse(image: &'a [u8]) -> Result<Self, TdvfError> {
        if image.len() as u64 > MAX_IMAGE_BYTES {
            let size = image.len() as u64;
            return Err(TdvfError::TooLarge { size });
        }
        let at = metadata_offset(image)?;
        let part = "the TDX metadata descriptor";
        let signature = bytes::<4>(image, at, part)?;
        if signature != *b"TDVF" {
            return Err(TdvfError::Signature { found: signature });
        }
        let word = |index: usize| Ok(u32::from_le_bytes(bytes(image, at + 4 * index, part)?));
        let (length, version, count) = (word(1)?, word(2)?, word(3)?);
        if version != 1 {
            return Err(TdvfError::Version { version });
        }
        let fitting = (DESCRIPTOR_SIZE as u64) + (SECTION_SIZE as u64) * u64::from(count);
        if count == 0 || count > MAX_SECTIONS || u64::from(length) != fitting {
            return Err(TdvfError::SectionCount { count, length });
        }
        let room = image.len() - at;
        let needed = usize::try_from(length).unwrap_or(usize::MAX);
        if needed > room {
            return Err(TdvfError::Short {
                part: "the TDX metadata",
                offset: at,
                needed,
                size: image.len(),
            });
        }
        let mut sections = Vec::new();
        for index in 0..usize::try_from(count).unwrap_or(0) {
            let at = at + DESCRIPTOR_SIZE + SECTION_SIZE * index;
            sections.push(section(image, at, index)?);
        }
        check_together(&sections)?;
        Ok(Self { image, sections })
    }

    /// In the order of the image, which is the order of measurement.
    pub fn sections(&self) -> &[Section] {
        &self.sections
    }

    /// Refuses memory that a guest with addresses of `gpaw` cannot have as private memory.
    pub fn check_gpaw(&self, gpaw: Gpaw) -> Result<(), TdvfError> {
        let layout = GpaLayout::new(gpaw);
        let limit = 1 << layout.shared_bit();
        for (index, section) in self.sections.iter().enumerate() {
            let end = section.memory.end;
            if end > limit {
                let problem = format!(
                    "memory ends at {end:#x}, private memory at {limit:#x} with addresses of {} bits",
                    layout.width()
                );
                return Err(TdvfError::Section { index, problem });
            }
        }
        Ok(())
    }

    /// Contents of a section; the rest of its memory is zero.
    pub fn contents(&self, section: &Section) -> &'a [u8] {
        self.image
            .get(section.data_offset..section.data_offset + section.raw_size)
            .unwrap_or(&[])
    }

    /// Memory of the sections that are added, in their order.
    pub fn added_memory(&self) -> Vec<AddressRange> {
        let added = self.sections.iter().filter(|section| section.is_added());
        added.map(|section| section.memory).collect()
    }
}

/// Follows the GUID table, from its end, to where the metadata is.
fn metadata_offset(image: &[u8]) -> Result<usize, TdvfError> {
    let size = image.len();
    let short = TdvfError::Short {
        part: "the GUID table",
        offset: 0,
        needed: FOOTER_DISTANCE + ENTRY_TAIL,
        size,
    };
    let end = size.checked_sub(FOOTER_DISTANCE).ok_or(short.clone())?;
    let footer = end.checked_sub(ENTRY_TAIL).ok_or(short)?;
    let (length, guid) = entry_tail(image, footer)?;
    if guid != FOOTER_GUID {
        return Err(TdvfError::NoTable);
    }
    // The footer's length covers the whole table.
    let start = end
        .checked_sub(length)
        .filter(|_| length >= ENTRY_TAIL)
        .ok_or(TdvfError::EntryLength { length, limit: end })?;
    let mut end = footer;
    while end > start {
        let room = end - start;
        let tail = end
            .checked_sub(ENTRY_TAIL)
            .filter(|tail| *tail >= start)
            .ok_or(TdvfError::EntryLength {
                length: room,
                limit: room,
            })?;
        let (length, guid) = entry_tail(image, tail)?;
        if !(ENTRY_TAIL..=room).contains(&length) {
            return Err(TdvfError::EntryLength {
                length,
                limit: room,
            });
        }
        if guid == METADATA_GUID {
            if length != ENTRY_TAIL + 4 {
                return Err(TdvfError::MetadataLength {
                    length: length - ENTRY_TAIL,
                });
            }
            let distance = u32::from_le_bytes(bytes(image, tail - 4, "the TDX metadata entry")?);
            let outside = TdvfError::MetadataOffset { distance, size };
            let back = usize::try_from(distance).map_err(|_| outside.clone())?;
            return size.checked_sub(back).filter(|_| back > 0).ok_or(outside);
        }
        end -= length;
    }
    Err(TdvfError::NoMetadata)
}

fn entry_tail(image: &[u8], at: usize) -> Result<(usize, [u8; 16]), TdvfError> {
    let part = "an entry of the GUID table";
    let length = u16::from_le_bytes(bytes(image, at, part)?);
    Ok((length.into(), bytes(image, at + 2, part)?))
}

fn section(image: &[u8], at: usize, index: usize) -> Result<Section, TdvfError> {
    let part = "a TDX metadata section";
    let wrong = |problem: String| TdvfError::Section { index, problem };
    let u32_at = |at| bytes(image, at, part).map(u32::from_le_bytes);
    let u64_at = |at| bytes(image, at, part).map(u64::from_le_bytes);
    let (data_offset, raw_size) = (u32_at(at)?, u32_at(at + 4)?);
    let (gpa, memory_size) = (u64_at(at + 8)?, u64_at(at + 16)?);
    let (kind, attributes) = (u32_at(at + 24)?, u32_at(at + 28)?);
    for (name, value) in [("memory address", gpa), ("memory size", memory_size)] {
        if value % PAGE_SIZE != 0 {
            return Err(wrong(format!(
                "{name} {value:#x} is not a multiple of {PAGE_SIZE:#x}"
            )));
        }
    }
    if memory_size == 0 {
        return Err(wrong("memory size is 0".into()));
    }
    let end = gpa
        .checked_add(memory_size)
        .filter(|end| *end <= MAX_GPA)
        .ok_or_else(|| {
            wrong(format!(
                "memory {gpa:#x} with {memory_size:#x} bytes ends above the limit of {MAX_GPA:#x}"
            ))
        })?;
    if u64::from(raw_size) > memory_size {
        return Err(wrong(format!(
            "raw size {raw_size:#x} is above the memory size {memory_size:#x}"
        )));
    }
    let size = image.len();
    let data_end = u64::from(data_offset) + u64::from(raw_size);
    if data_end > size as u64 {
        return Err(wrong(format!(
            "data ends at {data_end:#x}, the image at {size:#x}"
        )));
    }
    if attributes & !(MR_EXTEND | PAGE_AUG) != 0 {
        return Err(wrong(format!(
            "attributes {attributes:#x} have bits other than 0 and 1"
        )));
    }
    if attributes == MR_EXTEND | PAGE_AUG {
        return Err(wrong(
            "attributes 0x3 ask to measure memory that is not added".into(),
        ));
    }
    check_kind(SectionKind(kind), raw_size, attributes).map_err(wrong)?;
    let narrow = |value: u32| {
        usize::try_from(value).map_err(|_| wrong(format!("{value:#x} is above the address space")))
    };
    Ok(Section {
        kind: SectionKind(kind),
        memory: AddressRange { start: gpa, end },
        data_offset: narrow(data_offset)?,
        raw_size: narrow(raw_size)?,
        attributes,
    })
}

/// What the guide says of each kind. An unknown kind is as good as its attributes: loaders of other
/// firmware have kinds of their own, and the measurement asks for attributes alone.
fn check_kind(kind: SectionKind, raw_size: u32, attributes: u32) -> Result<(), String> {
    let name = kind.name();
    match kind {
        SectionKind::BFV | SectionKind::CFV if raw_size == 0 => {
            Err(format!("raw size is 0, {name} has contents"))
        }
        SectionKind::TD_HOB | SectionKind::TEMP_MEM | SectionKind::PERM_MEM if raw_size != 0 => {
            Err(format!(
                "raw size is {raw_size:#x}, {name} has no contents in the image"
            ))
        }
        SectionKind::BFV | SectionKind::CFV | SectionKind::TD_HOB | SectionKind::TEMP_MEM
            if attributes & PAGE_AUG != 0 =>
        {
            Err(format!(
                "attributes {attributes:#x} have PAGE.AUG, which only PermMem can have and not {name}"
            ))
        }
        _ => Ok(()),
    }
}

/// What sections must not be to each other.
fn check_together(sections: &[Section]) -> Result<(), TdvfError> {
    let mut added = 0u64;
    for (index, section) in sections.iter().enumerate() {
        for (other, before) in sections[..index].iter().enumerate() {
            let problem = if let Some(both) = section.memory.intersect(before.memory) {
                let start = both.start;
                format!("memory from {start:#x} is that of section {other} too")
            } else if section.kind == SectionKind::TD_HOB && before.kind == section.kind {
                format!("kind is TD_HOB as that of section {other}, the limit is one")
            } else {
                continue;
            };
            return Err(TdvfError::Section { index, problem });
        }
        if section.is_added() {
            added = added.saturating_add(section.memory.size());
        }
    }
    if added > MAX_ADDED_BYTES {
        return Err(TdvfError::TooMuchMemory { bytes: added });
    }
    Ok(())
}

fn bytes<const N: usize>(
    image: &[u8],
    at: usize,
    part: &'static str,
) -> Result<[u8; N], TdvfError> {
    let found = at.checked_add(N).and_then(|end| image.get(at..end));
    found
        .and_then(|found| found.try_into().ok())
        .ok_or(TdvfError::Short {
            part,
            offset: at,
            needed: N,
            size: image.len(),
        })
}

#[cfg(test)]
#[path = "tdvf_tests.rs"]
mod tests;

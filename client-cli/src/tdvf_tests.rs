use serde_json::Value;

use super::*;

const TINY: &[u8] = include_bytes!("../data/tiny.fd");
const TINY_AUG: &[u8] = include_bytes!("../tests/data/tiny-aug.fd");
const EXPECTED: &str = include_str!("../tests/data/tiny.json");
/// Where the descriptor is in both images, from the end.
const DESCRIPTOR: usize = 0x200;

#[test]
fn sample_images_have_the_expected_sections() {
    let expected: Value = serde_json::from_str(EXPECTED).unwrap();
    for (name, image) in [("tiny.fd", TINY), ("tiny-aug.fd", TINY_AUG)] {
        let parsed = Tdvf::parse(image).unwrap();
        let expected = expected["images"][name]["sections"].as_array().unwrap();
        assert_eq!(parsed.sections().len(), expected.len(), "{name}");
        for (section, expected) in parsed.sections().iter().zip(expected) {
            assert_eq!(section.memory.start, expected["gpa"], "{name} {expected}");
            assert_eq!(
                section.memory.size(),
                expected["mem_size"],
                "{name} {expected}"
            );
            assert_eq!(
                section.kind.name(),
                expected["type_name"],
                "{name} {expected}"
            );
            assert_eq!(
                section.is_measured(),
                expected["mr_extend"],
                "{name} {expected}"
            );
            assert_eq!(
                section.is_added(),
                !expected["page_aug"].as_bool().unwrap(),
                "{name}"
            );
            let contents = parsed.contents(section);
            assert_eq!(
                contents.len() as u64,
                expected["raw_size"].as_u64().unwrap(),
                "{name}"
            );
            let offset = usize::try_from(expected["data_offset"].as_u64().unwrap()).unwrap();
            assert_eq!(contents, &image[offset..offset + contents.len()], "{name}");
        }
    }
}

#[test]
fn memory_that_is_not_added_is_left_out() {
    let image = Tdvf::parse(TINY_AUG).unwrap();
    assert_eq!(image.added_memory().len(), image.sections().len() - 1);
}

/// The image with `value` at `at`, counted from the end.
fn patched(at: usize, value: &[u8]) -> Vec<u8> {
    let mut image = TINY.to_vec();
    let at = image.len() - at;
    image[at..at + value.len()].copy_from_slice(value);
    image
}

#[test]
fn images_that_contradict_themselves_are_refused() {
    let le = |value: u32| value.to_le_bytes().to_vec();
    let le64 = |value: u64| value.to_le_bytes().to_vec();
    let section = |index: usize, field: usize| DESCRIPTOR - 16 - 32 * index - field;
    // The table: footer at 50 bytes before the end, entries of 22 bytes before it.
    let (footer, metadata) = (FOOTER_DISTANCE + ENTRY_TAIL, 32 + 18 + 22 + 18);
    for (case, image, want) in [
        ("empty", vec![], "the GUID table needs 50 bytes"),
        ("49 bytes", vec![0; 49], "the GUID table needs 50 bytes"),
        ("zeroes", vec![0; 4096], "no GUID table"),
        (
            "table longer than the image",
            patched(footer, &[0xff, 0xff]),
            "length 65535",
        ),
        (
            "table shorter than its footer",
            patched(footer, &[17, 0]),
            "length 17",
        ),
        (
            "table that cuts an entry",
            patched(footer, &[60, 0]),
            "length",
        ),
        (
            "entry longer than the table",
            patched(metadata, &[0xff, 0]),
            "length 255",
        ),
        (
            "entry shorter than its tail",
            patched(metadata, &[1, 0]),
            "length 1 ",
        ),
        (
            "another entry",
            patched(metadata - 2, &[0]),
            "no TDX metadata entry",
        ),
        (
            "distance zero",
            patched(metadata + 4, &le(0)),
            "outside the image",
        ),
        (
            "distance above the size",
            patched(metadata + 4, &le(1 << 20)),
            "outside the image",
        ),
        (
            "descriptor cut off",
            patched(metadata + 4, &le(8)),
            "signature",
        ),
        ("signature", patched(DESCRIPTOR, b"TDVE"), "signature"),
        ("version", patched(DESCRIPTOR - 8, &le(2)), "version 2"),
        (
            "no section",
            patched(DESCRIPTOR - 12, &le(0)),
            "names 0 sections",
        ),
        (
            "too many",
            patched(DESCRIPTOR - 12, &le(u32::MAX)),
            "names 4294967295 sections",
        ),
        ("length", patched(DESCRIPTOR - 4, &le(17)), "in 17 bytes"),
        (
            "data outside",
            patched(section(0, 0), &le(0x7000)),
            "section 0: data ends at 0xd000",
        ),
        (
            "raw size",
            patched(section(0, 4), &le(0x7000)),
            "section 0: raw size 0x7000",
        ),
        (
            "address unaligned",
            patched(section(1, 8), &le64(1)),
            "section 1: memory address 0x1",
        ),
        (
            "size unaligned",
            patched(section(1, 16), &le64(0x2001)),
            "section 1: memory size 0x2001",
        ),
        (
            "size zero",
            patched(section(2, 16), &le64(0)),
            "section 2: memory size is 0",
        ),
        (
            "above 51 bits",
            patched(section(2, 8), &le64(1 << 51)),
            "above the limit of 0x8000000000000",
        ),
        (
            "address overflow",
            patched(section(2, 8), &le64(!0xfff)),
            "above the limit",
        ),
        (
            "overlap",
            patched(section(3, 8), &le64(0x81_2000)),
            "section 3: memory from 0x812000",
        ),
        (
            "attributes",
            patched(section(0, 28), &le(4)),
            "attributes 0x4",
        ),
        (
            "PAGE.AUG on a firmware volume",
            patched(section(0, 28), &le(2)),
            "section 0: attributes 0x2 have PAGE.AUG",
        ),
        (
            "PAGE.AUG on temporary memory",
            patched(section(2, 28), &le(2)),
            "section 2: attributes 0x2 have PAGE.AUG",
        ),
        (
            "volume without contents",
            patched(section(1, 4), &le(0)),
            "section 1: raw size is 0, CFV has contents",
        ),
        (
            "temporary memory with contents",
            patched(section(2, 4), &le(0x1000)),
            "section 2: raw size is 0x1000, TempMem has no contents",
        ),
        (
            "two TD_HOBs",
            patched(section(3, 24), &le(2)),
            "section 4: kind is TD_HOB as that of section 3",
        ),
        (
            "data offset that wraps 32 bits",
            patched(section(0, 0), &le(u32::MAX)),
            "section 0: data ends at 0x100005fff, the image at 0x8000",
        ),
        (
            "size that wraps 64 bits",
            patched(section(2, 16), &le64(!0xfff)),
            "section 2: memory 0x810000 with 0xfffffffffffff000 bytes",
        ),
        (
            "65 sections",
            patched(DESCRIPTOR - 12, &le(65)),
            "names 65 sections",
        ),
        (
            "metadata inside the table",
            patched(metadata + 4, &le(20)),
            "signature",
        ),
        (
            "measured but not added",
            patched(section(0, 28), &le(3)),
            "attributes 0x3",
        ),
    ] {
        let error = Tdvf::parse(&image).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(want), "{case}: {error}");
    }
}

#[test]
fn metadata_that_runs_out_of_the_image_is_refused() {
    let mut image = patched(DESCRIPTOR - 12, &64u32.to_le_bytes());
    let length = image.len() - DESCRIPTOR + 4;
    image[length..length + 4].copy_from_slice(&2064u32.to_le_bytes());
    assert_eq!(
        Tdvf::parse(&image).map(|_| ()),
        Err(TdvfError::Short {
            part: "the TDX metadata",
            offset: TINY.len() - DESCRIPTOR,
            needed: 2064,
            size: TINY.len()
        })
    );
}

#[test]
fn images_above_the_limit_are_refused_unread() {
    let mut image = TINY.to_vec();
    let size = usize::try_from(MAX_IMAGE_BYTES).unwrap();
    image.splice(..0, vec![0; size - TINY.len()]);
    assert!(Tdvf::parse(&image).is_ok());
    image.push(0);
    let error = Tdvf::parse(&image).map(|_| ()).unwrap_err().to_string();
    assert_eq!(
        error,
        "the image has 0x4000001 bytes, the limit is 0x4000000"
    );
}

#[test]
fn memory_that_is_added_has_a_limit_in_all() {
    let limit = MAX_ADDED_BYTES;
    // The other four sections of the image have eleven pages.
    let others = 11 * PAGE_SIZE;
    let with = |bytes: u64| {
        let mut image = patched(DESCRIPTOR - 16 - 32 * 2 - 16, &bytes.to_le_bytes());
        let gpa = image.len() - (DESCRIPTOR - 16 - 32 * 2 - 8);
        image[gpa..gpa + 8].copy_from_slice(&(1u64 << 33).to_le_bytes());
        Tdvf::parse(&image).map(|_| ())
    };
    assert_eq!(with(limit - others), Ok(()));
    assert_eq!(
        with(limit - others + PAGE_SIZE),
        Err(TdvfError::TooMuchMemory {
            bytes: limit + PAGE_SIZE
        })
    );
}

#[test]
fn memory_above_the_guests_address_width_is_refused() {
    let top = (1u64 << 47) - 0x3000;
    let at = DESCRIPTOR - 16 - 32 * 2 - 8;
    for (gpa, gpaw, fits) in [
        (top, Gpaw::W48, true),
        (top + 0x1000, Gpaw::W48, false),
        (top + 0x1000, Gpaw::W52, true),
    ] {
        let image = patched(at, &gpa.to_le_bytes());
        let checked = Tdvf::parse(&image).unwrap().check_gpaw(gpaw);
        assert_eq!(checked.is_ok(), fits, "{gpa:#x} {gpaw:?}: {checked:?}");
        if let Err(error) = checked {
            let text = error.to_string();
            assert!(
                text.contains("section 2: memory ends at 0x800000001000"),
                "{text}"
            );
            assert!(
                text.contains("0x800000000000 with addresses of 48 bits"),
                "{text}"
            );
        }
    }
}

#[test]
fn no_cut_of_an_image_panics() {
    for end in 0..TINY.len() {
        let _ = Tdvf::parse(&TINY[..end]);
        let _ = Tdvf::parse(&TINY[end..]);
    }
}

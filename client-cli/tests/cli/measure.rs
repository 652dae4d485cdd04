//! `mmuctl measure`: MRTD of images against values that are known, or computed here from the
//! records that the TDX module hashes, without any code of this project.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use serde_json::Value;
use sha2::{Digest as _, Sha384};

use crate::common::{Run, data, run};

/// Where Debian's package `ovmf` puts a real image.
const OVMF: &str = "/usr/share/ovmf/OVMF.fd";
const PAGE: u64 = 4096;

fn measure(image: &Path, options: &[&str]) -> Run {
    let image = image.to_str().unwrap();
    run([&["measure", image, "--output", "json"], options].concat())
}

#[track_caller]
fn measured(image: &Path, options: &[&str]) -> Value {
    let run = measure(image, options);
    assert_eq!(run.code, Some(0), "{image:?} {options:?}: {}", run.stderr);
    run.json()
}

#[test]
fn sample_images_have_their_published_measurements_in_both_orders_and_modes() {
    let expected = std::fs::read_to_string(data("tiny.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    for name in ["tiny.fd", "tiny-aug.fd"] {
        let image = &expected["images"][name];
        for (options, key) in [
            (&[][..], "mrtd_per_page"),
            (
                &["--order", "per-page", "--mode", "kernel"],
                "mrtd_per_page",
            ),
            (&["--order", "per-page", "--gpaw", "52"], "mrtd_per_page"),
            (&["--order", "per-region"], "mrtd_per_region"),
            (
                &["--order", "per-region", "--mode", "kernel", "--local"],
                "mrtd_per_region",
            ),
        ] {
            let answer = measured(&data(name), options);
            assert_eq!(answer["mrtd"], image[key], "{name} {options:?}");
            assert_eq!(answer["pages_added"], image["page_adds"], "{name}");
            assert_eq!(answer["chunks_extended"], image["mr_extends"], "{name}");
        }
    }
}

#[test]
fn a_real_image_has_the_measurement_that_its_records_hash_to() {
    let path = std::env::var_os("OVMF_FD").map_or_else(|| PathBuf::from(OVMF), PathBuf::from);
    if !path.exists() {
        assert!(
            std::env::var_os("OVMF_REQUIRED").is_none(),
            "OVMF_REQUIRED is set and {path:?} does not exist"
        );
        // Written past the test runner, which would keep a passing test's words to itself.
        let text = format!(
            "\n!!! SKIPPED: a_real_image_has_the_measurement_that_its_records_hash_to\n\
             !!!          {} does not exist: apt-get install ovmf, or set OVMF_FD\n",
            path.display()
        );
        std::io::stderr().write_all(text.as_bytes()).unwrap();
        return;
    }
    let image = std::fs::read(&path).unwrap();
    for (order, per_page) in [("per-page", true), ("per-region", false)] {
        let answer = measured(&path, &["--order", order]);
        let (mrtd, pages, chunks) = records(&image, per_page);
        assert!(pages > 500 && chunks > 0, "{pages} pages, {chunks} chunks");
        assert_eq!(answer["mrtd"], mrtd, "{order}");
        assert_eq!(answer["pages_added"], pages, "{order}");
        assert_eq!(answer["chunks_extended"], chunks, "{order}");
    }
}

#[test]
fn the_computation_here_agrees_with_the_published_measurements() {
    let expected = std::fs::read_to_string(data("tiny.json")).unwrap();
    let expected: Value = serde_json::from_str(&expected).unwrap();
    for name in ["tiny.fd", "tiny-aug.fd"] {
        let image = std::fs::read(data(name)).unwrap();
        let wanted = &expected["images"][name];
        for (per_page, key) in [(true, "mrtd_per_page"), (false, "mrtd_per_region")] {
            let (mrtd, pages, chunks) = records(&image, per_page);
            assert_eq!(mrtd, wanted[key], "{name} {key}");
            assert_eq!(pages, wanted["page_adds"], "{name}");
            assert_eq!(chunks, wanted["mr_extends"], "{name}");
        }
    }
}

#[test]
fn images_that_cannot_be_measured_are_refused_with_field_and_limit() {
    let tiny = std::fs::read(data("tiny.fd")).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let section = |index: usize, field: usize| tiny.len() - 0x200 + 16 + 32 * index + field;
    let patched = |at: usize, value: &[u8]| {
        let mut image = tiny.clone();
        image[at..at + value.len()].copy_from_slice(value);
        image
    };
    for (case, image, options, want) in [
        ("empty", vec![], &[][..], "the GUID table needs 50 bytes"),
        (
            "no firmware",
            vec![0; 8192],
            &[],
            "no GUID table ends 32 bytes",
        ),
        (
            "raw size",
            patched(section(0, 4), &0x7000u32.to_le_bytes()),
            &[],
            "section 0: raw size 0x7000 is above the memory size 0x6000",
        ),
        (
            "alignment",
            patched(section(3, 8), &0x80_b800u64.to_le_bytes()),
            &[],
            "section 3: memory address 0x80b800 is not a multiple of 0x1000",
        ),
        (
            "above 47 bits",
            patched(section(3, 8), &(1u64 << 47).to_le_bytes()),
            &[],
            "section 3: memory ends at 0x800000001000, private memory at 0x800000000000",
        ),
        (
            "memory",
            patched(section(2, 8), &[0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0x41]),
            &[],
            "the sections add 0x4100b000 bytes of memory before the TD runs, the limit is 0x40000000",
        ),
    ] {
        let path = directory.path().join("image.fd");
        std::fs::write(&path, image).unwrap();
        let run = measure(&path, options);
        assert_eq!((run.code, &*run.stdout), (Some(1), ""), "{case}: {run:?}");
        assert!(
            run.stderr.contains("the firmware image is malformed") && run.stderr.contains(want),
            "{case}: {run:?}"
        );
    }
    for (file, options, code, want) in [
        (
            "/nonexistent/x.fd",
            &[][..],
            1,
            "cannot read /nonexistent/x.fd",
        ),
        ("/dev/zero", &[], 1, "the limit is 0x4000000"),
        (
            "/dev/null",
            &["--gpaw", "50"],
            2,
            "gpaw 50 is neither 48 nor 52",
        ),
        ("/dev/null", &["--order", "random"], 2, "per-region"),
    ] {
        let run = measure(Path::new(file), options);
        assert_eq!((run.code, &*run.stdout), (Some(code), ""), "{run:?}");
        assert!(run.stderr.contains(want), "{file}: {run:?}");
    }
}

/// MRTD as 96 hex digits, pages added and chunks extended, from the layouts alone.
///
/// Source: TDX module base specification, "TD measurement": MRTD is one SHA-384 over records of
/// 128 bytes, `MEM.PAGE.ADD` with the GPA at byte 16 for a page, `MR.EXTEND` with the GPA at byte
/// 16 and then 256 bytes of contents for a chunk.
fn records(image: &[u8], per_page: bool) -> (String, u64, u64) {
    fn record(name: &str, gpa: u64) -> [u8; 128] {
        let mut record = [0; 128];
        record[..name.len()].copy_from_slice(name.as_bytes());
        record[16..24].copy_from_slice(&gpa.to_le_bytes());
        record
    }
    let mut hash = Sha384::new();
    let (mut pages, mut chunks) = (0, 0);
    for section in sections(image) {
        if section.attributes & 2 != 0 {
            continue;
        }
        let mut contents = image[section.data..][..section.raw].to_vec();
        contents.resize(usize::try_from(section.size).unwrap(), 0);
        let mut add = |hash: &mut Sha384, page: u64| {
            hash.update(record("MEM.PAGE.ADD", section.gpa + page * PAGE));
            pages += 1;
        };
        let mut extend = |hash: &mut Sha384, page: u64| {
            for chunk in (page * PAGE..(page + 1) * PAGE).step_by(256) {
                hash.update(record("MR.EXTEND", section.gpa + chunk));
                let at = usize::try_from(chunk).unwrap();
                hash.update(&contents[at..at + 256]);
                chunks += 1;
            }
        };
        let is_measured = section.attributes & 1 != 0;
        for page in 0..section.size / PAGE {
            add(&mut hash, page);
            if is_measured && per_page {
                extend(&mut hash, page);
            }
        }
        if is_measured && !per_page {
            (0..section.size / PAGE).for_each(|page| extend(&mut hash, page));
        }
    }
    let digest = hash.finalize();
    let hex = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    (hex, pages, chunks)
}

struct Section {
    data: usize,
    raw: usize,
    gpa: u64,
    size: u64,
    attributes: u32,
}

/// The section records of a well-formed image, found by the signature of their descriptor.
fn sections(image: &[u8]) -> Vec<Section> {
    let word = |at: usize| u32::from_le_bytes(image[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_le_bytes(image[at..at + 8].try_into().unwrap());
    let at = image
        .windows(4)
        .enumerate()
        .rposition(|(at, four)| four == b"TDVF" && at + 16 <= image.len() && word(at + 8) == 1)
        .unwrap();
    let count = usize::try_from(word(at + 12)).unwrap();
    let records = (0..count).map(|index| at + 16 + 32 * index);
    records
        .map(|at| Section {
            data: usize::try_from(word(at)).unwrap(),
            raw: usize::try_from(word(at + 4)).unwrap(),
            gpa: long(at + 8),
            size: long(at + 16),
            attributes: word(at + 28),
        })
        .collect()
}

//! The readers of files that others made, as a fuzzer sees them: raw bytes in, a value or an error
//! out.
//!
//! The functions need no fuzzer of a certain make; `fuzz/` drives them with libFuzzer, and the
//! tests of this file with samples that were valid before they were damaged.

use std::io::Read as _;

use tdx_defs::{Gpaw, PAGE_SIZE};

use crate::args::PrivateMemory;
use crate::compare::{self, Recording};
use crate::conformance::Sequence;
use crate::replay::{Plan, PlanOptions};
use crate::tdvf::{MAX_ADDED_BYTES, Tdvf};
use crate::trace::{self, Event, MAX_VCPU_ID};

/// Bytes of unpacked text that one input may become. A few bytes of zstd can be gigabytes.
const MAX_TEXT_BYTES: u64 = 1 << 20;

/// Reads a recording, plain or compressed with zstd, and plans its replay.
///
/// # Panics
///
/// When the reader counts a line twice or not at all (T1), loses the order of the file (T2), or
/// lets a value outside its range through.
pub fn fuzz_trace(bytes: &[u8]) {
    let Ok(input) = trace::unpack(std::io::Cursor::new(bytes.to_vec())) else {
        return;
    };
    let mut text = Vec::new();
    if input.take(MAX_TEXT_BYTES).read_to_end(&mut text).is_err() {
        return;
    }
    let mut reported = 0;
    let mut last_report = 0;
    let trace = trace::read(&*text, |unreadable| {
        assert!(unreadable.line > last_report, "T2: {unreadable}");
        last_report = unreadable.line;
        reported += 1;
    });
    let Ok(trace) = trace else {
        unreachable!("a slice can be read to its end");
    };
    let summary = trace.summary;
    assert_eq!(summary.unreadable, reported, "T1");
    assert_eq!(
        summary.faults + summary.unmaps,
        trace.events.len() as u64,
        "T1"
    );
    let lines = text.split(|byte| *byte == b'\n').count() as u64;
    let told = summary.faults + summary.unmaps + summary.ignored + summary.unreadable;
    assert!(told <= lines, "T1: {told} of {lines}");
    let mut before = 0;
    for event in &trace.events {
        let line = match event {
            Event::Fault(fault) => {
                assert!(fault.vcpu < MAX_VCPU_ID);
                fault.line
            }
            Event::Unmap(unmap) => {
                assert!(unmap.start < unmap.end);
                unmap.line
            }
        };
        assert!(before < line && line <= lines, "T2: {event:?}");
        before = line;
    }
    for gpaw in [Gpaw::W48, Gpaw::W52] {
        let options = PlanOptions {
            private: PrivateMemory::All,
            gpaw,
            hva_base: None,
            image: Vec::new(),
        };
        if let Ok(plan) = Plan::new(&trace, &options) {
            assert_eq!(plan.fault_count() + plan.out_of_range, summary.faults);
        }
    }
}

/// Parses a firmware image.
///
/// # Panics
///
/// When an accepted image breaks one of the invariants of [`Tdvf`] (F1 to F3).
pub fn fuzz_tdvf(bytes: &[u8]) {
    let Ok(image) = Tdvf::parse(bytes) else {
        return;
    };
    let sections = image.sections();
    for (at, section) in sections.iter().enumerate() {
        let memory = section.memory;
        assert!(image.contents(section).len() as u64 <= memory.size(), "F1");
        assert!(memory.start < memory.end && memory.end <= 1 << 51, "F2");
        assert_eq!((memory.start | memory.end) % PAGE_SIZE, 0, "F2");
        assert!(section.is_added() || !section.is_measured());
        for other in &sections[..at] {
            assert_eq!(other.memory.intersect(memory), None, "F2");
        }
    }
    let added = image.added_memory().into_iter();
    assert!(
        added.map(|memory| memory.size()).sum::<u64>() <= MAX_ADDED_BYTES,
        "F3"
    );
    let _ = image.check_gpaw(Gpaw::W48);
    assert_eq!(image.check_gpaw(Gpaw::W52), Ok(()), "F2");
}

/// Reads a marked recording of a KVM, and everything that its steps say.
///
/// # Panics
///
/// When a recording is accepted without steps (R1), or more events are understood than stand in it
/// (R2).
pub fn fuzz_recording(bytes: &[u8]) {
    let Ok(input) = trace::unpack(std::io::Cursor::new(bytes.to_vec())) else {
        return;
    };
    let input = std::io::BufReader::new(input.take(MAX_TEXT_BYTES));
    let Ok(recording) = Recording::read(input) else {
        return;
    };
    assert!(!recording.steps.is_empty(), "R1");
    let lines = recording.steps.iter().map(|step| step.lines.len());
    assert!(compare::understand(&recording) <= lines.sum(), "R2");
}

/// Reads recorded call sequences, one a line.
///
/// # Panics
///
/// When what an accepted step writes is not as long as it says (Q1), or a step has no name (Q2).
pub fn fuzz_sequence(bytes: &[u8]) {
    for line in String::from_utf8_lossy(bytes).lines() {
        let Ok(sequence) = Sequence::parse(line) else {
            continue;
        };
        for step in &sequence.steps {
            assert!(
                step.leaf.is_some() || step.guest.is_some() || step.hook.is_some(),
                "Q2: {}",
                step.name()
            );
            for register in ["rcx", "rdx", "r8", "gpa"] {
                let _ = step.input(register);
            }
            for write in &step.data {
                assert_eq!(write.contents().len() as u64, write.length.0, "Q1");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const TINY: &[u8] = include_bytes!("../data/tiny.fd");
    const TINY_AUG: &[u8] = include_bytes!("../tests/data/tiny-aug.fd");
    const TRACE: &[u8] = include_bytes!("../data/boot-small.trace");
    const SAMPLE: &[u8] = include_bytes!("../tests/data/sample.trace");
    const NOTIFIER: &[u8] = include_bytes!("../tests/data/notifier4k.trace");
    const MARKED: &[u8] = include_bytes!("../tests/data/memslots_noquirk.trace");
    const SEQUENCES: &[u8] =
        include_bytes!("../../tdx-module-svc/tdx-module/tests/data/directed.jsonl");
    const PACKED: &[u8] = include_bytes!("../tests/data/boot-1g-2vcpu.trace.zst");
    /// The metadata and the table of the sample images are in their last bytes.
    const METADATA: usize = 0x210;

    /// Bytes of a sample with a few of them changed, and perhaps cut.
    fn damaged(
        sample: &[u8],
        changes: &[(prop::sample::Index, u8)],
        cut: Option<prop::sample::Index>,
    ) -> Vec<u8> {
        let mut bytes = sample.to_vec();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = *value;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        bytes
    }

    fn changes() -> impl Strategy<Value = Vec<(prop::sample::Index, u8)>> {
        prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..16)
    }

    fn cut() -> impl Strategy<Value = Option<prop::sample::Index>> {
        prop::option::weighted(0.2, any::<prop::sample::Index>())
    }

    /// 4 KiB of a trace, from the start of a line on.
    fn excerpt(text: &[u8], at: prop::sample::Index) -> &[u8] {
        let from = at.index(text.len());
        let from = text[..from]
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |end| end + 1);
        &text[from..text.len().min(from + 4096)]
    }

    #[test]
    fn samples_pass_undamaged() {
        for image in [TINY, TINY_AUG] {
            assert!(Tdvf::parse(image).is_ok());
            fuzz_tdvf(image);
        }
        for text in [TRACE, SAMPLE, NOTIFIER, PACKED] {
            fuzz_trace(text);
        }
    }

    /// The samples below are read to their end, so that damage meets every part of the readers.
    #[test]
    fn recordings_and_sequences_are_understood_undamaged() {
        let recording = Recording::read(MARKED).unwrap();
        assert!(compare::understand(&recording) > 20);
        fuzz_recording(MARKED);
        let lines = String::from_utf8_lossy(SEQUENCES);
        for line in lines.lines() {
            assert!(Sequence::parse(line).is_ok(), "{line:.80}");
        }
        fuzz_sequence(SEQUENCES);
    }

    #[test]
    fn kept_inputs_pass() {
        let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../fuzz/corpus");
        for (name, run) in [
            ("trace", fuzz_trace as fn(&[u8])),
            ("tdvf", fuzz_tdvf as fn(&[u8])),
        ] {
            let mut inputs = 0;
            for entry in std::fs::read_dir(format!("{corpus}/{name}")).unwrap() {
                run(&std::fs::read(entry.unwrap().path()).unwrap());
                inputs += 1;
            }
            assert!(inputs > 0, "{corpus}/{name} is empty");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn damaged_images_are_parsed_or_refused(
            aug in any::<bool>(),
            changes in changes(),
            everywhere in any::<bool>(),
            cut in cut(),
        ) {
            let image = if aug { TINY_AUG } else { TINY };
            let (kept, tail) = image.split_at(if everywhere { 0 } else { image.len() - METADATA });
            fuzz_tdvf(&[kept, &damaged(tail, &changes, cut)].concat());
        }

        #[test]
        fn damaged_recordings_are_read_line_by_line(
            which in 0..3usize,
            at in any::<prop::sample::Index>(),
            changes in changes(),
            cut in cut(),
        ) {
            let text = excerpt([TRACE, SAMPLE, NOTIFIER][which], at);
            fuzz_trace(&damaged(text, &changes, cut));
        }

        #[test]
        fn damaged_marked_recordings_are_read_or_refused(
            changes in changes(),
            cut in cut(),
        ) {
            fuzz_recording(&damaged(MARKED, &changes, cut));
        }

        #[test]
        fn damaged_sequences_are_read_or_refused(
            line in any::<prop::sample::Index>(),
            changes in changes(),
            cut in cut(),
        ) {
            let lines: Vec<&[u8]> = SEQUENCES.split(|byte| *byte == b'\n').collect();
            let line = lines[line.index(lines.len())];
            if !line.is_empty() {
                fuzz_sequence(&damaged(line, &changes, cut));
            }
        }

        #[test]
        fn damaged_archives_are_unpacked_or_refused(changes in changes(), length in 0..8192usize) {
            fuzz_trace(&damaged(&PACKED[..length.max(1)], &changes, None));
        }
    }
}

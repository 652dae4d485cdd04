//! The state directory's file as a fuzzer sees it: records that nobody wrote, bytes that a disk
//! changed.
//!
//! An input begins with a byte that says what is wrong:
//!
//! | byte | what follows |
//! |---|---|
//! | 0, 1, 2 | a record of a VM, of a slot, of a vCPU |
//! | 3 | a range of private frames: first and end, 8 bytes each, little-endian |
//! | 4 | changes of a file that was closed: place (4 bytes, little-endian) and new byte each |
//! | 5 | the same of a file whose process was killed |
//! | 6 | a new length of that file, 4 bytes |
//!
//! What holds for every input
//! - U1  Nothing panics: a state is opened and read, or refused with the reason.
//! - U2  What is read makes sense: ranges have a length, and every record is written again as it
//!   was read.
//! - U3  A state that could be read takes notes.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::{fmt, io};

use mirror_proto::mmu as wire;
use prost::Message as _;
use redb::StorageBackend;
use tdp_mmu::{Note, SlotSpec, TdRecord, VmRecord};
use tdx_defs::Pfn;

use crate::service::vm_config;
use crate::store::Store;

/// The run of the module that the records belong to.
const INSTANCE: &str = "instance";
/// Largest file that an input may ask for.
const MAX_FILE_BYTES: usize = 8 << 20;

/// A file in memory.
#[derive(Clone, Default)]
struct Image(Arc<Mutex<Vec<u8>>>);

impl Image {
    fn holding(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(bytes)))
    }

    fn bytes(&self) -> Vec<u8> {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Gives the bytes of a range to `access`, as far as the file has them.
    fn range(
        &self,
        offset: u64,
        length: usize,
        access: impl FnOnce(&mut [u8]),
    ) -> Result<(), io::Error> {
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        let end = start.checked_add(length);
        match end.and_then(|end| bytes.get_mut(start..end)) {
            Some(range) => {
                access(range);
                Ok(())
            }
            None => Err(outside()),
        }
    }
}

fn outside() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "outside of the file")
}

impl fmt::Debug for Image {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Image").finish_non_exhaustive()
    }
}

impl StorageBackend for Image {
    fn len(&self) -> Result<u64, io::Error> {
        Ok(self.0.lock().unwrap_or_else(PoisonError::into_inner).len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        self.range(offset, out.len(), |range| out.copy_from_slice(range))
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        if len > MAX_FILE_BYTES {
            return Err(outside());
        }
        let mut bytes = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        bytes.resize(len, 0);
        Ok(())
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.range(offset, data.len(), |range| range.copy_from_slice(data))
    }
}

/// A state with every kind of record, as it is when its process was killed and when it was closed.
fn samples() -> &'static (Vec<u8>, Vec<u8>) {
    static SAMPLES: OnceLock<(Vec<u8>, Vec<u8>)> = OnceLock::new();
    SAMPLES.get_or_init(|| {
        let image = Image::default();
        let Ok(store) = Store::on(image.clone(), Path::new("sample")) else {
            unreachable!("an empty file becomes a state");
        };
        assert!(write_sample(&store).is_some(), "the sample can be written");
        let killed = image.bytes();
        drop(store);
        (killed, image.bytes())
    })
}

fn write_sample(store: &Arc<Store>) -> Option<()> {
    store.begin_sessions("mmu-sample").ok()?;
    for label in ["one", "two"] {
        let request = wire::CreateVmRequest {
            label: label.to_owned(),
            max_vcpus: 4,
            ..Default::default()
        };
        let record = VmRecord::new(vm_config(&request).ok()?);
        let id = store.create(&request, &record, INSTANCE).ok()?;
        store.created(id).ok()?;
        let ledger = store.ledger(id);
        let slot = |slot_id, gpa| SlotSpec {
            slot_id,
            gpa,
            size: 1 << 21,
            guest_memfd: true,
            ..SlotSpec::default()
        };
        for note in [
            Note::Td(TdRecord {
                tdr: Pfn::new(7),
                hkid: 33,
                pages: vec![Pfn::new(8), Pfn::new(9)],
            }),
            Note::VcpuPages {
                vcpu_id: 0,
                pages: vec![Pfn::new(20), Pfn::new(21)],
            },
            Note::Vcpu { vcpu_id: 0 },
            Note::Slot(slot(0, 0)),
            Note::Slot(slot(3, 1 << 30)),
            Note::Attributes {
                gfns: 0..512,
                private: true,
            },
            Note::Attributes {
                gfns: 100..110,
                private: false,
            },
            Note::Kept(Pfn::new(77)),
        ] {
            ledger.note(note).ok()?;
        }
        store.pool(INSTANCE).split(Pfn::new(512)).ok()?;
    }
    Some(())
}

/// Opens a state with the damage that the bytes describe.
///
/// # Panics
///
/// When the store does something that it must not do, see the module.
pub fn fuzz_state(bytes: &[u8]) {
    let Some((kind, rest)) = bytes.split_first() else {
        return;
    };
    let (killed, closed) = samples();
    match kind {
        0..=3 => {
            let image = Image::holding(closed.clone());
            let Ok(store) = Store::on(image, Path::new("sample")) else {
                unreachable!("the sample opens");
            };
            if store.put_raw(*kind, rest) {
                look(&store);
            }
        }
        4 => open(changed(closed, rest)),
        5 => open(changed(killed, rest)),
        6 => {
            let length = number(rest).min(MAX_FILE_BYTES);
            let mut file = killed.clone();
            file.resize(length, 0);
            open(file);
        }
        _ => {}
    }
}

fn number(bytes: &[u8]) -> usize {
    let number = bytes.iter().take(4).rev();
    number.fold(0, |number, byte| number << 8 | usize::from(*byte))
}

fn changed(file: &[u8], changes: &[u8]) -> Vec<u8> {
    let mut file = file.to_vec();
    for change in changes.as_chunks::<5>().0.iter().take(64) {
        let at = number(change) % file.len().max(1);
        if let Some(byte) = file.get_mut(at) {
            *byte = change[4];
        }
    }
    file
}

fn open(file: Vec<u8>) {
    if let Ok(store) = Store::on(Image::holding(file), Path::new("damaged")) {
        look(&store);
    }
}

/// U1 to U3.
fn look(store: &Arc<Store>) {
    let (all, last) = (store.all(), store.last_id());
    let (Ok(all), Ok(_)) = (all, last) else {
        return;
    };
    for kept in &all {
        for (first, end) in &kept.record.private {
            assert!(first < end, "U2: {first}..{end} of VM {}", kept.id);
        }
        assert!(store.reads_again(kept.id), "U2");
    }
    if store.split(INSTANCE).is_ok() && store.begin_sessions("mmu-fuzz").is_ok() {
        for kept in all {
            let noted = store.ledger(kept.id).note(Note::Measuring(true));
            assert!(noted.is_ok(), "U3: {noted:?}");
        }
    }
}

/// Damage of each kind, for a fuzzer to begin with.
pub fn state_seeds() -> Vec<(&'static str, Vec<u8>)> {
    let request = wire::CreateVmRequest {
        label: "seed".to_owned(),
        max_vcpus: 4,
        ..Default::default()
    };
    let vm = vm_config(&request).map(|config| {
        let record = VmRecord::new(config);
        Store::row_of(&request, &record, INSTANCE)
    });
    let slot = wire::Slot {
        slot_id: 5,
        gpa: 1 << 32,
        size: 1 << 21,
        guest_memfd: true,
        ..wire::Slot::default()
    };
    let range = [512u64.to_le_bytes(), 1024u64.to_le_bytes()].concat();
    let change = |at: u32, byte| [&at.to_le_bytes()[..], &[byte]].concat();
    [
        ("vm", 0, vm.unwrap_or_default()),
        ("slot", 1, slot.encode_to_vec()),
        ("vcpu", 2, vec![8, 1, 18, 2, 20, 21]),
        ("range", 3, range),
        ("closed", 4, change(9, 1)),
        ("killed", 5, change(64, 1)),
        ("cut", 6, 8192u32.to_le_bytes().to_vec()),
    ]
    .map(|(name, kind, rest)| (name, [vec![kind], rest].concat()))
    .into()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_sample_opens_however_its_process_ended() {
        let (killed, closed) = samples();
        for file in [killed, closed] {
            let store = Store::on(Image::holding(file.clone()), Path::new("sample")).unwrap();
            let all = store.all().unwrap();
            assert_eq!(all.len(), 2);
            assert_eq!(all[0].record.slots.len(), 2);
            assert_eq!(all[0].record.vcpus.len(), 1);
            assert_eq!(all[0].record.private.len(), 2);
            look(&store);
        }
    }

    #[test]
    fn seeds_and_kept_damage_pass() {
        for (_, seed) in state_seeds() {
            fuzz_state(&seed);
        }
        super::super::each_kept("state", fuzz_state);
    }

    /// A range without a length would be one that never ends for whoever walks it.
    #[test]
    fn a_range_that_ends_before_it_begins_is_refused() {
        let (_, closed) = samples();
        let store = Store::on(Image::holding(closed.clone()), Path::new("sample")).unwrap();
        let range = [9u64.to_le_bytes(), 4u64.to_le_bytes()].concat();
        assert!(store.put_raw(3, &range));
        let error = store.all().err().unwrap().reason;
        assert!(error.contains("private range"), "{error}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        fn damaged_records_are_read_or_refused(
            seed in 0..4usize,
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
            more in prop::collection::vec(any::<u8>(), 0..8),
        ) {
            let mut input = state_seeds().swap_remove(seed).1;
            for (at, byte) in changes {
                let at = 1 + at.index(input.len() - 1);
                input[at] = byte;
            }
            input.extend(more);
            fuzz_state(&input);
        }

        #[test]
        fn damaged_files_are_opened_or_refused(
            kind in 4..6u8,
            changes in prop::collection::vec((any::<u32>(), any::<u8>(), any::<bool>()), 1..8),
        ) {
            let mut input = vec![kind];
            for (at, byte, in_front) in changes {
                // The head of the file decides the most.
                let at = if in_front { at % 512 } else { at };
                input.extend(at.to_le_bytes());
                input.push(byte);
            }
            fuzz_state(&input);
        }
    }
}

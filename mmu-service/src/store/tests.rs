use std::os::unix::fs::PermissionsExt as _;

use tdp_mmu::{Note, SlotSpec, TdRecord, VmConfig};

use super::*;

fn request() -> CreateVmRequest {
    CreateVmRequest {
        label: "kept".into(),
        max_vcpus: 4,
        ..CreateVmRequest::default()
    }
}

fn config() -> VmConfig {
    crate::service::vm_config(&request()).unwrap()
}

/// A sequence of notes that touches every kind, and comes back to places where it was.
fn notes() -> Vec<Note> {
    let page = Pfn::new;
    let slot = |slot_id, gpa| SlotSpec {
        slot_id,
        gpa,
        size: 1 << 21,
        guest_memfd: true,
        ..SlotSpec::default()
    };
    let attributes = |gfns, private| Note::Attributes { gfns, private };
    vec![
        Note::Td(TdRecord {
            tdr: page(7),
            hkid: 33,
            pages: vec![page(8), page(9)],
        }),
        Note::VcpuPages {
            vcpu_id: 0,
            pages: vec![page(20), page(21)],
        },
        Note::Vcpu { vcpu_id: 0 },
        Note::VcpuPages {
            vcpu_id: 1,
            pages: vec![page(30)],
        },
        Note::NoVcpuPages { vcpu_id: 1 },
        Note::Vcpu { vcpu_id: 1 },
        Note::NoVcpuPages { vcpu_id: 1 },
        Note::Slot(slot(0, 0)),
        Note::Slot(slot(3, 1 << 30)),
        Note::Slot(slot(3, 1 << 31)),
        Note::NoSlot(0),
        attributes(0..100, true),
        attributes(100..200, true),
        attributes(300..400, true),
        attributes(50..60, false),
        attributes(150..350, false),
        attributes(55..56, true),
        attributes(0..1, false),
        attributes(1000..2000, false),
        Note::Measuring(true),
        Note::Settings {
            nx_huge_pages: true,
            exit_hypercall: false,
        },
        Note::Kept(page(77)),
        Note::Kept(page(77)),
        Note::Dead("first".into()),
        Note::Dead("second".into()),
        Note::Going,
    ]
}

#[test]
fn what_was_noted_is_there_when_the_state_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let mut expected = VmRecord::new(config());
    for (at, note) in notes().into_iter().enumerate() {
        // Opened anew for every note, as by a process that dies after each.
        let store = Store::open(&state).unwrap();
        if at == 0 {
            assert_eq!(store.create(&request(), &expected, "run").unwrap(), 1);
            assert!(store.all().unwrap()[0].record.going, "not created yet");
            store.created(1).unwrap();
        }
        store.ledger(1).note(note.clone()).unwrap();
        expected.apply(note);
        let all = store.all().unwrap();
        assert_eq!(all[0].record, expected);
        assert_eq!((all[0].id, &*all[0].instance), (1, "run"));
        assert_eq!(all[0].request, request());
    }
    let store = Store::open(&state).unwrap();
    store.remove(1).unwrap();
    assert!(store.all().unwrap().is_empty());
    // Ids are never used again, and nothing of the old VM is left for a new one.
    let new = VmRecord::new(config());
    assert_eq!(store.create(&request(), &new, "run").unwrap(), 2);
    store.created(2).unwrap();
    assert_eq!(store.all().unwrap()[0].record, new);
    assert_eq!(store.last_id().unwrap(), 2);
}

#[test]
fn blocks_belong_to_one_run_of_the_module_and_sessions_to_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let store = Store::open(&dir.path().join("state")).unwrap();
    for (instance, block) in [("a", 512), ("b", 1024), ("b", 512)] {
        store.pool(instance).split(Pfn::new(block)).unwrap();
    }
    assert_eq!(store.split("b").unwrap(), [Pfn::new(512), Pfn::new(1024)]);
    assert!(store.split("a").unwrap().is_empty(), "that run is over");

    assert!(store.begin_sessions("one").unwrap().is_empty());
    assert_eq!(store.begin_sessions("two").unwrap(), ["one"]);
    assert_eq!(store.begin_sessions("three").unwrap(), ["one", "two"]);
    store.end_sessions(&["one".into(), "two".into()]).unwrap();
    assert_eq!(store.begin_sessions("four").unwrap(), ["three"]);
}

#[test]
fn a_state_that_cannot_be_trusted_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().join("state");
    let open = Store::open(&state).unwrap();
    let mode = |path: &Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&state), mode(&state.join(FILE))), (0o700, 0o600));
    let second = Store::open(&state).err().unwrap();
    assert!(matches!(second, StateError::Database { .. }), "{second}");
    drop(open);

    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o750)).unwrap();
    let error = Store::open(&state).err().unwrap();
    assert!(
        matches!(error, StateError::Open { mode: 0o750, .. }),
        "{error}"
    );
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();

    std::fs::write(state.join(FILE), [7; 70_000]).unwrap();
    let error = Store::open(&state).err().unwrap();
    assert!(matches!(error, StateError::Database { .. }), "{error}");
}

use super::*;
use crate::trace::{Fault, Unmap, read};

const HVA: u64 = 0x7f00_0000_0000;

fn fault(vcpu: u32, address: u64) -> Event {
    Event::Fault(Fault {
        line: 1,
        time_ns: 0,
        vcpu,
        address,
        error_code: 0x182,
    })
}

fn unmap(start: u64, end: u64) -> Event {
    Event::Unmap(Unmap {
        line: 1,
        time_ns: 0,
        start: HVA + start,
        end: HVA + end,
    })
}

fn options(private: &str) -> PlanOptions {
    PlanOptions {
        private: private.parse().unwrap(),
        gpaw: Gpaw::W48,
        hva_base: Some(HVA),
        image: Vec::new(),
    }
}

fn plan(events: &[Event], private: &str) -> Plan {
    let trace = Trace {
        events: events.to_vec(),
        ..Trace::default()
    };
    Plan::new(&trace, &options(private)).unwrap()
}

fn range(start: u64, end: u64) -> AddressRange {
    AddressRange { start, end }
}

#[test]
fn unmaps_end_segments_and_become_holes_of_private_memory() {
    let events = [
        fault(0, 0x1000),
        fault(3, 0x20_2000),
        unmap(0x1000, 0x3000),
        fault(0, 0x1000),
        unmap(1 << 40, (1 << 40) + 0x1000),
    ];
    for (private, holes) in [
        (
            "all",
            vec![Hole {
                slot: 0,
                offset: 0x1000,
                size: 0x2000,
            }],
        ),
        ("none", vec![]),
        (
            "2000-10000",
            vec![Hole {
                slot: 0,
                offset: 0x2000,
                size: 0x1000,
            }],
        ),
    ] {
        let plan = plan(&events, private);
        assert_eq!(plan.vcpus, [0, 3]);
        assert_eq!(plan.segments.len(), 2, "{private}");
        assert_eq!(plan.segments[0].faults.len(), 2, "{private}");
        let unmap = plan.segments[0].unmap.as_ref().unwrap();
        assert_eq!(unmap.range, range(HVA + 0x1000, HVA + 0x3000), "{private}");
        assert_eq!(unmap.holes, holes, "{private}");
        assert_eq!(plan.segments[1].unmap, None, "{private}");
        assert_eq!(
            (plan.fault_count(), plan.unmap_count(), plan.unmap_outside),
            (3, 1, 1)
        );
    }
}

#[test]
fn an_unmap_over_slot_bounds_is_cut_to_the_slots() {
    let plan = plan(
        &[fault(0, 0), fault(0, 0xffff_f000), unmap(0x1000, 1 << 33)],
        "all",
    );
    let rom = (4 << 30) - (2 << 20);
    assert_eq!(plan.slots[1].range, range(rom, 4 << 30));
    assert_eq!(
        plan.segments[0].unmap.as_ref().unwrap().holes,
        [
            Hole {
                slot: 0,
                offset: 0x1000,
                size: (2 << 20) - 0x1000
            },
            Hole {
                slot: 1,
                offset: 0,
                size: 2 << 20
            },
        ]
    );
}

#[test]
fn pages_first_touched_as_shared_start_as_shared_memory() {
    let shared = 1 << 47;
    let events = [
        fault(0, shared | 0x1000),
        fault(0, 0x2000),
        fault(0, shared | 0x2000),
    ];
    let plan = plan(&events, "all");
    assert_eq!(plan.private, [range(0, 0x1000), range(0x2000, 2 << 20)]);
    assert_eq!(plan.segments[0].faults[0].gpa, shared | 0x1000);
}

#[test]
fn ranges_are_cut_to_the_slots() {
    assert_eq!(
        plan(&[fault(0, 0x1000)], "0-1000,1000000-2000000").private,
        [range(0, 0x1000)]
    );
}

#[test]
fn addresses_that_are_too_wide_are_counted_and_left_out() {
    let plan = plan(&[fault(0, 0xffff_ffff_8100_0000), fault(1, 0x1000)], "all");
    assert_eq!((plan.out_of_range, plan.fault_count()), (1, 1));
    assert_eq!(plan.vcpus, [1]);
}

#[test]
fn recordings_that_cannot_be_played_are_refused() {
    let too_many: Vec<Event> = (0..577).map(|vcpu| fault(vcpu, 0x1000)).collect();
    for (events, want) in [
        (vec![], "no kvm_page_fault event"),
        (vec![unmap(0, 0x1000)], "no kvm_page_fault event"),
        (vec![fault(0, 1 << 60)], "1 addresses are wider"),
        (too_many, "577 vcpus, above the limit of 576"),
    ] {
        let trace = Trace {
            events,
            ..Trace::default()
        };
        let error = Plan::new(&trace, &options("all")).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
}

#[test]
fn a_real_recording_with_notifier_events_finds_its_host_addresses() {
    let raw = include_bytes!("../../tests/data/notifier4k.trace");
    let trace = read(&raw[..], |_| {}).unwrap();
    let options = PlanOptions {
        hva_base: None,
        ..options("none")
    };
    let plan = Plan::new(&trace, &options).unwrap();
    // Slot 1 of that VM: guest 0x10000000 at host 0x7fa1ce000000.
    assert_eq!(
        plan.hva,
        HvaBase {
            base: 0x7fa1_be00_0000,
            source: HvaSource::Inferred
        }
    );
    // The driver also unmapped memory of its own, which no slot covers.
    assert_eq!((plan.unmap_count(), plan.unmap_outside), (13, 1));
    assert_eq!(plan.fault_count(), 41);
}

#[test]
fn the_initial_image_is_covered_as_well() {
    let trace = Trace {
        events: vec![fault(0, 0x1000)],
        ..Trace::default()
    };
    let image = vec![range(0xffff_8000, 1 << 32)];
    let plan = Plan::new(
        &trace,
        &PlanOptions {
            image,
            ..options("all")
        },
    )
    .unwrap();
    assert_eq!(plan.slots.last().unwrap().range.end, 1 << 32);
}

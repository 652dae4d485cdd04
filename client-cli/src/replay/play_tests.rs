use super::*;
use crate::args::AddressRange;
use crate::replay::fake::{Asked, BUSY_PAGE, Fake, Script, Scripted};
use crate::replay::hva::{HvaBase, HvaSource};
use crate::replay::plan::{Hole, Segment};
use crate::replay::vm::{VmSpec, with_vm};
use tdx_defs::Visibility;

/// A plan with vCPUs 0 and 1 and one segment for each list of (vcpu, gpa), with unmaps between.
fn plan(segments: &[&[(usize, u64)]]) -> Plan {
    let unmap = UnmapStep {
        range: AddressRange {
            start: 0x7000,
            end: 0x9000,
        },
        holes: vec![Hole {
            slot: 3,
            offset: 0x1000,
            size: 0x1000,
        }],
    };
    let last = segments.len().saturating_sub(1);
    Plan {
        vcpus: vec![0, 1],
        slots: Vec::new(),
        private: Vec::new(),
        hva: HvaBase {
            base: 0,
            source: HvaSource::None,
        },
        segments: (0..)
            .zip(segments)
            .map(|(index, faults)| Segment {
                faults: faults
                    .iter()
                    .map(|&(vcpu, gpa)| PlannedFault {
                        vcpu,
                        gpa,
                        qualification: 2,
                        visibility: Visibility::Private,
                    })
                    .collect(),
                unmap: (index != last).then(|| unmap.clone()),
            })
            .collect(),
        out_of_range: 0,
        unmap_outside: 0,
    }
}

async fn play(fake: &Fake, plan: &Plan, order: Order) -> Result<Played, Error> {
    // The service's numbers of the vCPUs differ from the recording's.
    let vm = Arc::new(TdVm::with_vcpus(7, vec![10, 11]));
    Player::new(&fake.client, vm, Progress::new("faults", 0))
        .play(plan, order)
        .await
}

async fn play_accepting(fake: &Fake, plan: &Plan, order: Order) -> Result<Played, Error> {
    let vm = Arc::new(TdVm::with_vcpus(7, vec![10, 11]));
    Player::new(&fake.client, vm, Progress::new("faults", 0))
        .accepting(true)
        .play(plan, order)
        .await
}

const FIXED: Script = |_, _| Scripted::Fixed;

fn faults(vcpu_id: u32, gpas: &[u64]) -> Asked {
    Asked::Faults {
        vcpu_id,
        gpas: gpas.to_vec(),
    }
}

#[tokio::test]
async fn the_recorded_order_is_kept_over_vcpus_and_unmaps() {
    let fake = Fake::start(FIXED).await;
    let plan = plan(&[&[(0, 1), (0, 2), (1, 3), (0, 4)], &[(1, 5)]]);
    let played = play(&fake, &plan, Order::Recorded).await.unwrap();
    assert_eq!(
        fake.asked(),
        [
            faults(10, &[1, 2]),
            faults(11, &[3]),
            faults(10, &[4]),
            Asked::Unmap(0x7000, 0x9000),
            Asked::Hole(3, 0x1000, 0x1000),
            faults(11, &[5]),
        ]
    );
    assert_eq!(
        played.ret_pf,
        BTreeMap::from([("FIXED", 5), ("SPURIOUS", 0)])
    );
    assert_eq!((played.faults, played.unmaps, played.tally.rpcs), (5, 1, 4));
    assert_eq!(fake.messages(), 2, "one before the unmap and one behind");
}

#[test]
fn messages_are_filled_with_whole_runs() {
    let run = |vcpu, length| {
        std::iter::repeat_n(vcpu, length).map(|vcpu| PlannedFault {
            vcpu,
            gpa: 0,
            qualification: 2,
            visibility: Visibility::Private,
        })
    };
    for (case, of, expected) in [
        ("nothing", vec![], vec![]),
        ("two fit", vec![1, MAX_BATCH - 1], vec![MAX_BATCH]),
        ("two do not", vec![2, MAX_BATCH - 1], vec![2, MAX_BATCH - 1]),
        (
            "a long run is cut as if it were alone",
            vec![3, MAX_BATCH + 5, 7],
            vec![3, MAX_BATCH, 12],
        ),
    ] {
        let faults: Vec<PlannedFault> = (0..)
            .zip(of)
            .flat_map(|(vcpu, length)| run(vcpu, length))
            .collect();
        let lengths: Vec<usize> = messages(&faults).map(<[_]>::len).collect();
        assert_eq!(lengths, expected, "{case}");
    }
}

#[tokio::test]
async fn each_vcpu_keeps_its_own_order_and_unmaps_wait_for_all() {
    let fake = Fake::start(FIXED).await;
    let plan = plan(&[&[(0, 1), (1, 2), (0, 3)], &[(0, 4)]]);
    let played = play(&fake, &plan, Order::PerVcpu).await.unwrap();
    let asked = fake.asked();
    assert_eq!(asked.len(), 5, "{asked:?}");
    assert!(asked[..2].contains(&faults(10, &[1, 3])), "{asked:?}");
    assert!(asked[..2].contains(&faults(11, &[2])), "{asked:?}");
    assert_eq!(asked[2], Asked::Unmap(0x7000, 0x9000));
    assert_eq!(asked[4], faults(10, &[4]));
    assert_eq!(played.faults, 4);
}

#[tokio::test]
async fn long_runs_are_cut_into_messages_and_all_of_them_arrive() {
    let fake = Fake::start(FIXED).await;
    let all: Vec<(usize, u64)> = (0..MAX_BATCH as u64 * 20 + 5).map(|gpa| (0, gpa)).collect();
    let played = play(&fake, &plan(&[&all]), Order::Recorded).await.unwrap();
    let asked = fake.asked();
    assert_eq!(asked.len(), 21);
    let gpas = asked.iter().flat_map(|asked| match asked {
        Asked::Faults { gpas, .. } => gpas.clone(),
        other => panic!("{other:?}"),
    });
    assert!(gpas.eq(all.iter().map(|(_, gpa)| *gpa)));
    assert_eq!(played.faults, all.len() as u64);
}

#[tokio::test]
async fn a_fault_that_ends_with_retry_is_sent_again_until_it_is_settled() {
    let fake = Fake::start(|gpa, before| match (gpa, before) {
        (2, 0..3) => Scripted::Other(RetPf::Retry),
        (3, _) => Scripted::Other(RetPf::Retry),
        _ => Scripted::Fixed,
    })
    .await;
    let played = play(&fake, &plan(&[&[(0, 1), (0, 2), (0, 3)]]), Order::Recorded)
        .await
        .unwrap();
    assert_eq!(
        played.ret_pf,
        BTreeMap::from([("FIXED", 2), ("RETRY", 1), ("SPURIOUS", 0)])
    );
    assert_eq!(
        (played.faults, played.retries),
        (3, 3 + u64::from(MAX_RETRIES))
    );
}

#[tokio::test]
async fn other_outcomes_are_counted_by_name() {
    let fake = Fake::start(|gpa, _| match gpa {
        1 => Scripted::Spurious,
        2 => Scripted::Other(RetPf::Emulate),
        3 | 4 => Scripted::Errno(-14),
        5 => Scripted::Unlisted,
        _ => Scripted::Fixed,
    })
    .await;
    let all = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5), (0, 6)];
    let played = play(&fake, &plan(&[&all]), Order::PerVcpu).await.unwrap();
    assert_eq!(
        played.ret_pf,
        BTreeMap::from([("FIXED", 1), ("SPURIOUS", 1), ("EMULATE", 1)])
    );
    assert_eq!(played.errors, BTreeMap::from([("EFAULT".to_owned(), 2)]));
    assert_eq!(played.first_error.as_deref(), Some("because of 0x3"));
    assert_eq!((played.faults, played.unlisted), (6, 1));
}

#[tokio::test]
async fn a_stream_that_fails_ends_the_replay_and_the_vm() {
    for order in [Order::Recorded, Order::PerVcpu] {
        let fake = Fake::start(|gpa, _| {
            if gpa == 9 {
                Scripted::Fail
            } else {
                Scripted::Fixed
            }
        })
        .await;
        let all: Vec<(usize, u64)> = (0..100)
            .map(|gpa| (usize::from(gpa % 2 == 0), gpa))
            .collect();
        let spec = VmSpec {
            mode: mirror_proto::mmu::Mode::Batched,
            gpaw: 48,
            label: "",
        };
        let result = with_vm(&fake.client, spec, 2, async |_| {
            play(&fake, &plan(&[&all]), order).await
        })
        .await;
        let error = result.unwrap_err().chain();
        assert_eq!(
            error, "HandleFaults was refused: FAILED_PRECONDITION: the VM is bugged",
            "{order:?}"
        );
        let asked = fake.asked();
        assert_eq!(asked.first(), Some(&Asked::Create), "{order:?}");
        assert!(asked.contains(&Asked::Destroy(7)), "{order:?}: {asked:?}");
    }
}

#[test]
fn outcomes_have_their_kernel_names() {
    assert_eq!(ret_pf_name(RetPf::Fixed), "FIXED");
    assert_eq!(ret_pf_name(RetPf::WriteProtected), "WRITE_PROTECTED");
    assert_eq!(errno_name(-14), "EFAULT");
    assert_eq!(errno_name(-77), "77");
}

fn accepts(vcpu_id: u32, pages: &[u64]) -> Asked {
    Asked::Accepts {
        vcpu_id,
        pages: pages.to_vec(),
    }
}

#[tokio::test]
async fn a_guest_accepts_what_was_mapped_before_its_next_access() {
    let script: Script = |gpa, before| match gpa {
        0x2000 => Scripted::Errno(14),
        0x3000 if before == 0 => Scripted::Other(RetPf::Retry),
        0x4000 => Scripted::Spurious,
        _ => Scripted::Fixed,
    };
    let fake = Fake::start(script).await;
    let mut plan = plan(&[
        &[(0, 0x1008), (0, 0x2000), (0, 0x3000), (1, BUSY_PAGE)],
        &[(0, 0x1008), (1, 0x4000), (1, 0x5000)],
    ]);
    plan.segments[1].faults[2].visibility = Visibility::Shared;
    let played = play_accepting(&fake, &plan, Order::Recorded).await.unwrap();
    assert_eq!(
        fake.asked(),
        [
            faults(10, &[0x1008, 0x2000, 0x3000]),
            faults(10, &[0x3000]),
            accepts(10, &[0x1000, 0x3000]),
            faults(11, &[BUSY_PAGE]),
            accepts(11, &[BUSY_PAGE]),
            accepts(11, &[BUSY_PAGE]),
            Asked::Unmap(0x7000, 0x9000),
            Asked::Hole(3, 0x1000, 0x1000),
            faults(10, &[0x1008]),
            accepts(10, &[0x1000]),
            faults(11, &[0x4000, 0x5000]),
            accepts(11, &[0x4000]),
        ]
    );
    let want = Accepted {
        pages: 4,
        again: 1,
        busy: 1,
    };
    assert_eq!(played.accepted, Some(want));

    let played = play(&fake, &plan, Order::Recorded).await.unwrap();
    assert_eq!(played.accepted, None);
}

#[tokio::test]
async fn each_vcpu_accepts_its_own_pages() {
    let fake = Fake::start(FIXED).await;
    let plan = plan(&[&[(0, 0x1000), (1, 0x2000), (0, 0x3000)]]);
    let played = play_accepting(&fake, &plan, Order::PerVcpu).await.unwrap();
    let asked = fake.asked();
    for accepted in [accepts(10, &[0x1000, 0x3000]), accepts(11, &[0x2000])] {
        assert!(asked.contains(&accepted), "{asked:?}");
    }
    assert_eq!(played.accepted.map(|accepted| accepted.pages), Some(3));
}

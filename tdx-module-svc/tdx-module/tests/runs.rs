//! A run answers exactly as its calls do one by one: for every leaf, and for every call of a run at
//! which it can stop.
//!
//! Each case is a run of [`COUNT`] calls that all succeed when nothing is in the way. An obstacle
//! puts something in the way of call number `k`. Two modules in the same state make the run and
//! its single calls; answers and states must agree.

mod common;

use common::{Host, PAGE};
use proptest::prelude::*;
use tdx_defs::{Gpa, Hpa, Leaf, Repeat, Seamcall, SeamcallResult, TdxLevel};
use tdx_module::hooks::LockObject;
use tdx_module::{Entry, LockMode, LpId, Module, PageSize, PlatformConfig};

const TDR: u64 = 0x4000_0000;
/// Pages for the calls.
const POOL: u64 = 0x4080_0000;
/// Addresses that have tables, and those that have pages.
const HOLE: u64 = 0;
const MAPPED: u64 = 0x20_0000;
const COUNT: u32 = 6;
const LARGE: u64 = 2 << 20;
const LP: LpId = LpId(0);

/// What a case starts from.
struct Start {
    module: Module,
    tdvpr: u64,
    /// A vCPU without its other pages.
    bare_tdvpr: u64,
}

/// How far the TD of a case has come.
#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Initialized,
    Runnable,
    Teardown,
}

impl Start {
    /// A debuggable TD with tables for 4 MiB, and eight pages mapped in the upper half.
    fn new(stage: Stage) -> Self {
        let module = Module::new(PlatformConfig::conformance()).unwrap();
        let mut host = Host::new(&module, 0, TDR);
        let tdr = host.build_td_with(0x21, &common::td_params().with_attributes(1));
        host.link(tdr, HOLE);
        host.link(tdr, MAPPED);
        let tdvpr = host.build_vcpu(tdr);
        let bare_tdvpr = host.page();
        host.must(Seamcall::new(Leaf::VP_CREATE).rcx(bare_tdvpr).rdx(tdr));
        for page in 0..8 {
            let add = Seamcall::new(Leaf::MEM_PAGE_ADD)
                .rcx(MAPPED + page * PAGE)
                .rdx(tdr);
            let source = Seamcall {
                data: vec![7; 4096].into(),
                ..add
            };
            host.must(source.r8(POOL + LARGE + page * PAGE).r9(0x10_0000));
        }
        if stage != Stage::Initialized {
            host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr));
        }
        if stage == Stage::Teardown {
            host.must(Seamcall::new(Leaf::VP_FLUSH).rcx(tdvpr));
            host.must(Seamcall::new(Leaf::MNG_VPFLUSHDONE).rcx(tdr));
            host.must(Seamcall::new(Leaf::PHYMEM_CACHE_WB));
            host.must(Seamcall::new(Leaf::MNG_KEY_FREEID).rcx(tdr));
        }
        Self {
            module,
            tdvpr,
            bare_tdvpr,
        }
    }

    fn must(&self, call: Seamcall) {
        Host::new(&self.module, 0, 0).must(call);
    }

    /// Blocks the mapped pages and tracks.
    fn block_all(&self) {
        for page in 0..8 {
            let gpa = MAPPED + page * PAGE;
            self.must(Seamcall::new(Leaf::MEM_RANGE_BLOCK).rcx(gpa).rdx(TDR));
        }
        self.must(Seamcall::new(Leaf::MEM_TRACK).rcx(TDR));
    }
}

/// A run, from which state it starts, and what happens before it.
struct Case {
    leaf: Leaf,
    stage: Stage,
    call: Seamcall,
    strides: [u64; 3],
    before: fn(&Start),
}

impl Case {
    fn call(&self) -> Seamcall {
        let [rcx, r8, r9] = self.strides.map(u64::cast_signed);
        self.call.clone().repeated(Repeat {
            count: COUNT,
            rcx_stride: rcx,
            r8_stride: r8,
            r9_stride: r9,
        })
    }

    /// RCX and R8 of call number `k`.
    fn operands(&self, k: u32) -> (u64, u64) {
        let at = |first: u64, stride: u64| first.wrapping_add(stride.wrapping_mul(k.into()));
        (
            at(self.call.rcx, self.strides[0]),
            at(self.call.r8, self.strides[1]),
        )
    }
}

fn case(leaf: Leaf, stage: Stage, call: Seamcall, strides: [u64; 3]) -> Case {
    Case {
        leaf,
        stage,
        call: Seamcall { leaf, ..call },
        strides,
        before: |_| {},
    }
}

/// Runs that succeed to the end.
fn cases() -> Vec<Case> {
    use Stage::{Initialized, Runnable, Teardown};
    let on = |rcx: u64| Seamcall::default().rcx(rcx).rdx(TDR);
    let pages = [PAGE, PAGE, 0];
    let gpas = [PAGE, 0, 0];
    let mapped = POOL + LARGE;
    vec![
        case(Leaf::MEM_PAGE_AUG, Runnable, on(HOLE).r8(POOL), pages),
        case(Leaf::MEM_PAGE_AUG, Initialized, on(HOLE).r8(POOL), pages),
        case(
            Leaf::MEM_PAGE_AUG,
            Runnable,
            on((2 * LARGE) | 1).r8(POOL + 2 * LARGE),
            [LARGE, LARGE, 0],
        ),
        case(
            Leaf::MEM_PAGE_ADD,
            Initialized,
            on(HOLE).r8(POOL).r9(0x10_0000),
            pages,
        ),
        case(
            Leaf::MEM_SEPT_ADD,
            Runnable,
            on((2 * LARGE) | 1).r8(POOL),
            [LARGE, PAGE, 0],
        ),
        case(Leaf::MEM_SEPT_RD, Runnable, on(MAPPED), gpas),
        case(Leaf::MEM_RANGE_BLOCK, Runnable, on(MAPPED), gpas),
        Case {
            before: Start::block_all,
            ..case(Leaf::MEM_RANGE_UNBLOCK, Runnable, on(MAPPED), gpas)
        },
        Case {
            before: Start::block_all,
            ..case(Leaf::MEM_PAGE_REMOVE, Runnable, on(MAPPED), gpas)
        },
        case(Leaf::MEM_PAGE_REMOVE, Initialized, on(MAPPED), gpas),
        Case {
            before: Start::block_all,
            ..case(
                Leaf::MEM_PAGE_RELOCATE,
                Runnable,
                on(MAPPED).r8(POOL),
                pages,
            )
        },
        case(Leaf::MEM_RD, Runnable, on(MAPPED), gpas),
        case(Leaf::MEM_WR, Runnable, on(MAPPED).r8(5), gpas),
        case(Leaf::MR_EXTEND, Initialized, on(MAPPED), gpas),
        case(Leaf::MR_EXTEND, Initialized, on(MAPPED), [256, 0, 0]),
        case(Leaf::MEM_TRACK, Runnable, on(TDR), [0; 3]),
        case(Leaf::VP_CREATE, Initialized, on(POOL), gpas),
        case(Leaf::PHYMEM_PAGE_RDMD, Runnable, on(mapped), gpas),
        case(Leaf::PHYMEM_PAGE_WBINVD, Runnable, on(POOL), gpas),
        case(Leaf::PHYMEM_PAGE_RECLAIM, Teardown, on(mapped), gpas),
        case(Leaf::SYS_TDMR_INIT, Runnable, on(0x1_8000_0000), [0; 3]),
        case(Leaf::MNG_KEY_RECLAIMID, Runnable, on(TDR), [0; 3]),
    ]
}

/// Something in the way of call number `k`.
type Obstacle = fn(&Start, &Case, u32);

const OBSTACLES: [(&str, Obstacle); 6] = [
    ("nothing", |_, _, _| {}),
    ("the entry is held", |start, case, k| {
        let (rcx, _) = case.operands(k);
        let gpa = Gpa::new(rcx & !0xFFF);
        let level =
            TdxLevel::new(u8::try_from(rcx & 7).unwrap()).unwrap_or(TdxLevel::new(0).unwrap());
        let entry = LockObject::SeptEntry {
            tdr: Hpa::new(TDR),
            gpa,
            level,
        };
        start.module.hold_lock(entry, LockMode::Exclusive);
    }),
    ("the new page is held", |start, case, k| {
        let (_, r8) = case.operands(k);
        let page = LockObject::Pamt {
            hpa: Hpa::new(r8),
            size: PageSize::Small,
        };
        start.module.hold_lock(page, LockMode::Exclusive);
    }),
    ("the page is held", |start, case, k| {
        // The page that RCX names, or the one that is mapped there.
        let (rcx, _) = case.operands(k);
        let hpa = if rcx < TDR {
            rcx - MAPPED.min(rcx) + POOL + LARGE
        } else {
            rcx
        };
        let page = LockObject::Pamt {
            hpa: Hpa::new(hpa),
            size: PageSize::Small,
        };
        start.module.hold_lock(page, LockMode::Exclusive);
    }),
    ("the entry is taken", |start, case, k| {
        let (rcx, _) = case.operands(k);
        let spare = POOL + 16 * LARGE;
        let leaf = if rcx & 7 == 0 {
            Leaf::MEM_PAGE_AUG
        } else {
            Leaf::MEM_SEPT_ADD
        };
        let call = Seamcall::new(leaf).rcx(rcx).rdx(TDR).r8(spare);
        Host::new(&start.module, 0, 0).call(&call);
    }),
    ("the entry is blocked", |start, case, k| {
        let (rcx, _) = case.operands(k);
        let call = Seamcall::new(Leaf::MEM_RANGE_BLOCK).rcx(rcx).rdx(TDR);
        Host::new(&start.module, 0, 0).call(&call);
    }),
];

/// Everything that can be seen of a module.
fn state(module: &Module) -> impl PartialEq + std::fmt::Debug {
    let mut pages = Vec::new();
    module.inspect_pamt(|page| pages.push(page));
    (
        pages,
        module.inspect_tds(),
        module.inspect_sept(Hpa::new(TDR)),
        module.usage(),
    )
}

fn one_by_one(module: &Module, call: &Seamcall) -> SeamcallResult {
    common::one_by_one(module, LP, call)
}

#[test]
fn every_leaf_stops_at_every_call_as_single_calls_do() {
    for case in cases() {
        let mut stops = std::collections::BTreeSet::new();
        for (obstacle, hinder) in OBSTACLES {
            for k in 0..COUNT {
                let [runs, singles] = [(), ()].map(|()| {
                    let start = Start::new(case.stage);
                    (case.before)(&start);
                    hinder(&start, &case, k);
                    start.module
                });
                let call = case.call();
                let result = runs.seamcall(LP, &call);
                let what = format!("{} {obstacle} at {k}", case.leaf);
                assert_eq!(result, one_by_one(&singles, &call), "{what}");
                assert_eq!(state(&runs), state(&singles), "{what}");
                if obstacle == "nothing" {
                    assert_eq!(result.completed, COUNT, "{what}: {}", result.status());
                }
                stops.insert(result.completed);
            }
        }
        // Calls that all name one object stop at the first or not at all; those that measure
        // parts of one page stop as one, too.
        let one_object = case.strides[0] < PAGE;
        let everywhere = stops.iter().copied().eq(0..=COUNT);
        assert!(everywhere || one_object, "{} stops at {stops:?}", case.leaf);
    }
}

#[test]
fn a_run_longer_than_one_hold_of_the_locks_stops_anywhere_around_it() {
    let long = 1030;
    for leaf in [Leaf::MEM_PAGE_AUG, Leaf::MEM_SEPT_RD, Leaf::MEM_RANGE_BLOCK] {
        for stop in [0, 510, 511, 512, 513, 1023, 1024, 1025, long] {
            let [runs, singles] = [(), ()].map(|()| {
                let start = Start::new(Stage::Runnable);
                let mut host = Host::new(&start.module, 0, POOL + 32 * LARGE);
                for table in 2..6 {
                    host.link(TDR, table * LARGE);
                }
                let aug = long + u32::from(leaf != Leaf::MEM_PAGE_AUG);
                if leaf != Leaf::MEM_PAGE_AUG {
                    host.aug(TDR, 2 * LARGE, POOL + 4 * LARGE, aug);
                }
                if stop < long {
                    let gpa = Gpa::new(2 * LARGE + u64::from(stop) * PAGE);
                    let level = TdxLevel::new(0).unwrap();
                    let entry = LockObject::SeptEntry {
                        tdr: Hpa::new(TDR),
                        gpa,
                        level,
                    };
                    assert!(start.module.hold_lock(entry, LockMode::Exclusive));
                }
                start.module
            });
            let repeat = Repeat {
                count: long,
                rcx_stride: PAGE.cast_signed(),
                r8_stride: PAGE.cast_signed(),
                r9_stride: 0,
            };
            let call = Seamcall::new(leaf)
                .rcx(2 * LARGE)
                .rdx(TDR)
                .r8(POOL + 4 * LARGE);
            let call = call.repeated(repeat);
            let result = runs.seamcall(LP, &call);
            assert_eq!(result.completed, stop, "{leaf}: {}", result.status());
            assert_eq!(result, one_by_one(&singles, &call), "{leaf} at {stop}");
            assert_eq!(state(&runs), state(&singles), "{leaf} at {stop}");
        }
    }
}

#[test]
fn a_run_of_track_stops_where_a_vcpu_is_inside() {
    let [runs, singles] = [(), ()].map(|()| {
        let start = Start::new(Stage::Runnable);
        let enter = Seamcall::default().rcx(start.tdvpr);
        assert!(matches!(
            start.module.enter_vcpu(LP, &enter),
            Entry::Entered { .. }
        ));
        start.module
    });
    let repeat = Repeat {
        count: 4,
        ..Repeat::default()
    };
    let call = Seamcall::new(Leaf::MEM_TRACK).rcx(TDR).repeated(repeat);
    let result = runs.seamcall(LP, &call);
    assert_eq!(result.completed, 1, "{}", result.status());
    assert_eq!(result, one_by_one(&singles, &call));
}

#[test]
fn a_run_of_entries_and_of_control_pages_equals_single_calls() {
    for (leaf, call) in [
        (Leaf::VP_ENTER, |start: &Start| {
            Seamcall::default().rcx(start.tdvpr)
        }),
        (Leaf::VP_ADDCX, |start: &Start| {
            Seamcall::default().rcx(POOL).rdx(start.bare_tdvpr)
        }),
    ] as [(Leaf, fn(&Start) -> Seamcall); 2]
    {
        let stage = if leaf == Leaf::VP_ENTER {
            Stage::Runnable
        } else {
            Stage::Initialized
        };
        let [runs, singles] = [(), ()].map(|()| Start::new(stage));
        let repeat = Repeat {
            count: 20,
            rcx_stride: if leaf == Leaf::VP_ENTER {
                0
            } else {
                PAGE.cast_signed()
            },
            ..Repeat::default()
        };
        let call = Seamcall {
            leaf,
            ..call(&runs)
        }
        .repeated(repeat);
        let result = runs.module.seamcall(LP, &call);
        assert_eq!(result, one_by_one(&singles.module, &call), "{leaf}");
        assert_eq!(state(&runs.module), state(&singles.module), "{leaf}");
    }
}

/// Leaves of a random batch, with the places that RCX, R8 and R9 are drawn from.
const LEAVES: [(Leaf, [Draw; 3]); 14] = [
    (Leaf::MEM_PAGE_AUG, [Draw::Gpa, Draw::Free, Draw::Zero]),
    (Leaf::MEM_PAGE_ADD, [Draw::Gpa, Draw::Free, Draw::Source]),
    (Leaf::MEM_SEPT_ADD, [Draw::Table, Draw::Free, Draw::Zero]),
    (Leaf::MEM_SEPT_RD, [Draw::Gpa, Draw::Zero, Draw::Zero]),
    (Leaf::MEM_RANGE_BLOCK, [Draw::Gpa, Draw::Zero, Draw::Zero]),
    (Leaf::MEM_RANGE_UNBLOCK, [Draw::Gpa, Draw::Zero, Draw::Zero]),
    (Leaf::MEM_PAGE_REMOVE, [Draw::Gpa, Draw::Zero, Draw::Zero]),
    (Leaf::MEM_PAGE_RELOCATE, [Draw::Gpa, Draw::Free, Draw::Zero]),
    (Leaf::MEM_TRACK, [Draw::Tdr, Draw::Zero, Draw::Zero]),
    (Leaf::MEM_RD, [Draw::Gpa, Draw::Zero, Draw::Zero]),
    (Leaf::MEM_WR, [Draw::Gpa, Draw::Free, Draw::Zero]),
    (Leaf::MR_EXTEND, [Draw::Gpa, Draw::Zero, Draw::Zero]),
    (
        Leaf::PHYMEM_PAGE_WBINVD,
        [Draw::Free, Draw::Zero, Draw::Zero],
    ),
    (Leaf::PHYMEM_PAGE_RDMD, [Draw::Free, Draw::Zero, Draw::Zero]),
];

/// Where a register of a random call comes from.
#[derive(Debug, Clone, Copy)]
enum Draw {
    Zero,
    /// A frame in or beside the tables.
    Gpa,
    /// The same at the level of a 2 MiB entry.
    Table,
    /// A page that is free, taken, or becomes either.
    Free,
    Source,
    Tdr,
}

impl Draw {
    fn value(self, at: u64) -> u64 {
        match self {
            Self::Zero => 0,
            Self::Gpa => MAPPED + at % 24 * PAGE - 8 * PAGE,
            Self::Table => (at % 4 * LARGE) | 1,
            Self::Free => POOL + LARGE + at % 32 * PAGE - 8 * PAGE,
            Self::Source => 0x10_0000,
            Self::Tdr => TDR,
        }
    }
}

/// Strides of a random run: none, neighbours, every other page, backwards.
const STRIDES: [i64; 5] = [0, 4096, 8192, -4096, 256];

fn random_call() -> impl Strategy<Value = Seamcall> {
    let leaf = 0..LEAVES.len();
    let places = [0u64..64, 0..64];
    let strides = [0..STRIDES.len(), 0..STRIDES.len()];
    // Most calls are about the TD: one in eight names a page that is none.
    (leaf, places, 1u32..9, strides, 0u8..8).prop_map(|(leaf, at, count, strides, other)| {
        let (leaf, [rcx, r8, r9]) = LEAVES[leaf];
        let rdx = match leaf {
            Leaf::PHYMEM_PAGE_WBINVD | Leaf::PHYMEM_PAGE_RDMD | Leaf::MEM_TRACK => 5,
            _ if other == 0 => POOL,
            _ => TDR,
        };
        let call = Seamcall::new(leaf)
            .rcx(rcx.value(at[0]))
            .rdx(rdx)
            .r8(r8.value(at[1]))
            .r9(r9.value(0));
        let repeat = Repeat {
            count,
            rcx_stride: STRIDES[strides[0]],
            r8_stride: STRIDES[strides[1]],
            r9_stride: 0,
        };
        match count {
            1 => call,
            _ => call.repeated(repeat),
        }
    })
}

/// Calls of the same leaf come in a row, as in real batches.
fn random_batch() -> impl Strategy<Value = Vec<Seamcall>> {
    let rows = (random_call(), 1usize..4).prop_map(|(call, times)| {
        let next = |at: usize| {
            let step = PAGE * at as u64 * u64::from(call.count());
            let moved = |register: u64| match register {
                0 | TDR | 0x10_0000 => register,
                register => register.wrapping_add(step),
            };
            call.clone().rcx(moved(call.rcx)).r8(moved(call.r8))
        };
        (0..times).map(next).collect::<Vec<_>>()
    });
    proptest::collection::vec(rows, 1..8).prop_map(|rows| rows.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn a_batch_answers_as_its_calls_do_one_by_one(
        batch in random_batch(),
        stage in 0usize..3,
        stop_on_error: bool,
        blocked: bool,
        held in proptest::option::of(0u64..24),
    ) {
        let stage = [Stage::Initialized, Stage::Runnable, Stage::Teardown][stage];
        let [batched, singles] = [(), ()].map(|()| {
            let start = Start::new(stage);
            if blocked && stage == Stage::Runnable {
                start.block_all();
            }
            if let Some(at) = held {
                let page = LockObject::Pamt {
                    hpa: Hpa::new(Draw::Free.value(at)),
                    size: PageSize::Small,
                };
                start.module.hold_lock(page, LockMode::Shared);
            }
            start.module
        });
        let mut expected = Vec::new();
        for call in &batch {
            let result = one_by_one(&singles, call);
            expected.push(result);
            if stop_on_error && result.status().is_error() {
                break;
            }
        }
        prop_assert_eq!(batched.seamcalls(LP, &batch, stop_on_error), expected);
        prop_assert_eq!(state(&batched), state(&singles));
    }
}

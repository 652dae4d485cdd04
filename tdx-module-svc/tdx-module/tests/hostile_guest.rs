//! Random hosts and random guests at once: two TDs that share a pool of pages, vCPUs that go in and
//! out, and a host that obeys no rule.
//!
//! Invariants, beside those of every quiet module
//! - H1  A vCPU that is inside has no translation to a page that its TD does not own there.
//! - H2  A guest reads what it wrote last, or zero after an acceptance; never anything else.
//! - H3  REFCOUNT counts the vCPUs that are inside.

mod common;

use std::collections::HashMap;

use common::{Host, PAGE, check_invariants};
use proptest::prelude::*;
use tdx_defs::{
    CompletionStatus as Status, Gpa, Hpa, Leaf, PageType, Repeat, Seamcall, TdAttributes, TdxLevel,
};
use tdx_module::{Entry, GuestOp, GuestStep, LpId, Module, PageSize, PlatformConfig, Violations};

/// TDs, each with a vCPU on the logical processor of its number.
const TDS: u64 = 2;
const CONTROL: u64 = 0x4000_0000;
/// The pool: 40 small pages, and three ranges of 2 MiB.
const POOL: u64 = 0x4040_0000;
const LARGE: u64 = 2 << 20;

/// One move of somebody. Addresses are numbers of pages in a small space.
#[derive(Debug, Clone)]
enum Move {
    /// The host makes calls about the TD of this number.
    Call { td: u64, lp: u32, call: Seamcall },
    /// The guest of this number makes an access or a call.
    Guest { td: u64, op: GuestOp },
    /// The host interrupts the guest of this number.
    Interrupt { td: u64 },
    /// The vCPU leaves its processor, and comes back at its next entry.
    Flush { td: u64 },
}

fn tdr(td: u64) -> u64 {
    CONTROL + td * 64 * PAGE
}

fn page() -> impl Strategy<Value = u64> {
    prop_oneof![
        6 => (0..40u64).prop_map(|page| POOL + page * PAGE),
        2 => (1..4u64).prop_map(|range| POOL + range * LARGE),
        1 => (0..512u64).prop_map(|page| POOL + LARGE + page * PAGE),
    ]
}

/// An operand of a Secure EPT leaf: pages of the first 2 MiB, and ranges.
fn operand() -> impl Strategy<Value = u64> {
    prop_oneof![
        16 => (0..6u64).prop_map(|page| page * PAGE),
        2 => (0..4u64).prop_map(|page| LARGE + page * PAGE),
        2 => (0..3u64).prop_map(|range| (range * LARGE) | 1),
    ]
}

fn call() -> impl Strategy<Value = Seamcall> {
    let leaf = prop::sample::select(vec![
        Leaf::MEM_PAGE_AUG,
        Leaf::MEM_PAGE_AUG,
        Leaf::MEM_PAGE_AUG,
        Leaf::MEM_PAGE_AUG,
        Leaf::MEM_RANGE_BLOCK,
        Leaf::MEM_RANGE_BLOCK,
        Leaf::MEM_TRACK,
        Leaf::MEM_TRACK,
        Leaf::MEM_PAGE_REMOVE,
        Leaf::MEM_PAGE_REMOVE,
        Leaf::MEM_RANGE_UNBLOCK,
        Leaf::MEM_RANGE_UNBLOCK,
        Leaf::MEM_RANGE_UNBLOCK,
        Leaf::MEM_PAGE_RELOCATE,
        Leaf::MEM_PAGE_DEMOTE,
        Leaf::MEM_PAGE_PROMOTE,
        Leaf::MEM_SEPT_ADD,
        Leaf::MEM_SEPT_ADD,
        Leaf::MEM_SEPT_REMOVE,
        Leaf::MEM_SEPT_RD,
    ]);
    (leaf, operand(), page(), 1..4u32, 0..4u8).prop_map(|(leaf, rcx, r8, count, seldom)| {
        // Blocking a whole table hides it from guest and host; that is only now and then of use.
        let rcx = if leaf == Leaf::MEM_RANGE_BLOCK && seldom > 0 {
            rcx & !7
        } else {
            rcx
        };
        let stride = PAGE.cast_signed();
        let repeat = Repeat {
            count,
            rcx_stride: stride,
            r8_stride: stride,
            r9_stride: 0,
        };
        Seamcall::new(leaf).rcx(rcx).r8(r8).repeated(repeat)
    })
}

/// A guest's event. A write carries a number that no other write of the test has.
fn guest_op() -> impl Strategy<Value = GuestOp> {
    let gpa = || (0..6u64, 0..2u64).prop_map(|(page, range)| Gpa::new(range * LARGE + page * PAGE));
    prop_oneof![
        3 => gpa().prop_map(|gpa| GuestOp::Read { gpa, len: 8 }),
        3 => gpa().prop_map(|gpa| GuestOp::Write { gpa, data: vec![0; 8] }),
        1 => gpa().prop_map(|gpa| GuestOp::Execute { gpa }),
        8 => gpa().prop_map(|gpa| GuestOp::accept(gpa, TdxLevel::new(0).unwrap())),
        1 => (0..3u64).prop_map(|range| {
            GuestOp::accept(Gpa::new(range * LARGE), TdxLevel::new(1).unwrap())
        }),
    ]
}

fn a_move() -> impl Strategy<Value = Move> {
    prop_oneof![
        8 => (0..TDS, 0..4u32, call()).prop_map(|(td, lp, call)| Move::Call { td, lp, call }),
        8 => (0..TDS, guest_op()).prop_map(|(td, op)| Move::Guest { td, op }),
        2 => (0..TDS).prop_map(|td| Move::Interrupt { td }),
        1 => (0..TDS).prop_map(|td| Move::Flush { td }),
    ]
}

/// Everybody who moves.
struct Game {
    module: Module,
    tdvprs: Vec<u64>,
}

impl Game {
    fn new() -> Self {
        let module = Module::new(PlatformConfig::conformance()).unwrap();
        let params = common::td_params().with_attributes(TdAttributes::SEPT_VE_DISABLE.bits());
        let tdvprs = (0..TDS).map(|td| {
            let lp = u32::try_from(td).unwrap();
            let mut host = Host::new(&module, lp, tdr(td));
            let root = host.build_td_with(0x21 + td, &params);
            assert_eq!(root, tdr(td));
            host.link(root, 0);
            let tdvpr = host.build_vcpu(root);
            host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(root));
            tdvpr
        });
        let tdvprs = tdvprs.collect();
        Self { module, tdvprs }
    }

    fn enter(&self, td: u64) -> bool {
        let lp = lp_of(td);
        let index = usize::try_from(td).unwrap();
        let call = Seamcall::default().rcx(self.tdvprs[index]);
        self.module.vcpu_inside(lp).is_some()
            || matches!(self.module.enter_vcpu(lp, &call), Entry::Entered { .. })
    }

    /// Makes a move; answers what happened to a guest.
    fn play(&self, a_move: &Move) -> Option<GuestStep> {
        match a_move {
            Move::Call { td, lp, call } => {
                let call = match call.leaf {
                    Leaf::MEM_TRACK => Seamcall {
                        rcx: tdr(*td),
                        repeat: None,
                        ..call.clone()
                    },
                    _ => call.clone().rdx(tdr(*td)),
                };
                self.module.seamcall(LpId(*lp), &call);
                None
            }
            Move::Guest { td, op } => {
                let inside = self.enter(*td);
                inside.then(|| self.module.guest(lp_of(*td), op))
            }
            Move::Interrupt { td } => {
                let interrupt = GuestOp::ExternalInterrupt { vector: 0x20 };
                self.module.guest(lp_of(*td), &interrupt);
                None
            }
            Move::Flush { td } => {
                let index = usize::try_from(*td).unwrap();
                let flush = Seamcall::new(Leaf::VP_FLUSH).rcx(self.tdvprs[index]);
                self.module.seamcall(lp_of(*td), &flush);
                None
            }
        }
    }

    /// H1 and H3, and what holds in every quiet module.
    fn check(&self) {
        check_invariants(&self.module);
        assert_eq!(self.module.violations(), Violations::default());
        for (td, info) in (0..TDS).zip(self.module.inspect_tds()) {
            let inside = self.module.vcpu_inside(lp_of(td)).is_some();
            let counted: u16 = info.epoch_refcount.iter().sum();
            assert_eq!(counted, u16::from(inside), "H3: {info:?}");
            if inside {
                self.check_translations(td);
            }
        }
    }

    /// H1.
    fn check_translations(&self, td: u64) {
        let entries = self.module.inspect_sept(Hpa::new(tdr(td)));
        let mut owned = HashMap::new();
        self.module.inspect_pamt(|page| {
            if page.page_type == PageType::REG {
                owned.insert((page.hpa, page.size), page.owner);
            }
        });
        let cached = self.module.inspect_tlb(lp_of(td));
        for translation in cached.iter().filter(|entry| entry.tdr == Hpa::new(tdr(td))) {
            let mapped = entries.iter().any(|entry| {
                let same = (entry.gpa, entry.level) == (translation.gpa, translation.level);
                same && entry.page == translation.page && entry.state.is_leaf()
            });
            assert!(mapped, "H1: {translation:?} is not mapped");
            let size = [PageSize::Small, PageSize::Large, PageSize::Giant];
            let size = size[usize::from(translation.level)];
            let owner = owned.get(&(translation.page, size));
            assert_eq!(owner, Some(&Hpa::new(tdr(td))), "H1: {translation:?}");
        }
    }
}

fn lp_of(td: u64) -> LpId {
    LpId(u32::try_from(td).unwrap())
}

/// What each guest wrote last, by address.
#[derive(Default)]
struct Shadow {
    written: HashMap<(u64, Gpa), u64>,
    next: u64,
}

impl Shadow {
    /// Gives a write its number.
    fn number(&mut self, a_move: &mut Move) {
        if let Move::Guest {
            op: GuestOp::Write { data, .. },
            ..
        } = a_move
        {
            self.next += 1;
            *data = self.next.to_le_bytes().to_vec();
        }
    }

    /// H2, and what follows from a step.
    fn follow(&mut self, a_move: &Move, step: Option<GuestStep>) {
        let (Move::Guest { td, op }, Some(GuestStep::Resumed(resumed))) = (a_move, step) else {
            return;
        };
        match op {
            GuestOp::Read { gpa, .. } => {
                let read = u64::from_le_bytes(resumed.data.try_into().unwrap());
                let expected = self.written.get(&(*td, *gpa)).copied().unwrap_or(0);
                assert_eq!(read, expected, "H2: TD {td} at {gpa}");
            }
            GuestOp::Write { gpa, data } => {
                let number = u64::from_le_bytes(data.clone().try_into().unwrap());
                self.written.insert((*td, *gpa), number);
            }
            GuestOp::Tdcall(call)
                if resumed
                    .regs
                    .is_some_and(|regs| regs[tdx_defs::Gpr::Rax] == 0) =>
            {
                let rcx = call.regs[tdx_defs::Gpr::Rcx];
                let level = rcx & 7;
                let range = rcx & !7..(rcx & !7) + (PAGE << (9 * level));
                self.written
                    .retain(|(owner, gpa), _| owner != td || !range.contains(&gpa.get()));
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn guests_keep_their_memory_whatever_their_host_does(
        mut moves in prop::collection::vec(a_move(), 1..200),
    ) {
        let game = Game::new();
        let mut shadow = Shadow::default();
        for a_move in &mut moves {
            shadow.number(a_move);
            let step = game.play(a_move);
            shadow.follow(a_move, step);
        }
        game.check();
    }
}

#[test]
fn the_game_reaches_what_it_is_about() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let moves = prop::collection::vec(a_move(), 20_000);
    let mut moves = moves.new_tree(&mut runner).unwrap().current();
    let game = Game::new();
    let mut shadow = Shadow::default();
    let (mut reads, mut writes, mut accepted, mut removed) = (0, 0, 0, 0);
    for (count, a_move) in moves.iter_mut().enumerate() {
        shadow.number(a_move);
        if let Move::Call { td, call, .. } = a_move
            && call.leaf == Leaf::MEM_PAGE_REMOVE
        {
            let single = Seamcall {
                repeat: None,
                ..call.clone()
            };
            let result = game.module.seamcall(LpId(3), &single.rdx(tdr(*td)));
            removed += u32::from(result.status() == Status::SUCCESS);
        }
        let step = game.play(a_move);
        if let (Move::Guest { op, .. }, Some(GuestStep::Resumed(resumed))) = (&*a_move, &step) {
            match op {
                GuestOp::Read { .. } => reads += 1,
                GuestOp::Write { .. } => writes += 1,
                GuestOp::Tdcall(_) if resumed.status() == Some(Status::SUCCESS) => accepted += 1,
                _ => {}
            }
        }
        shadow.follow(a_move, step);
        if count % 100 == 0 {
            game.check();
        }
    }
    for (what, count) in [
        ("reads", reads),
        ("writes", writes),
        ("acceptances", accepted),
        ("removals", removed),
    ] {
        assert!(count > 100, "{what}: {count}");
    }
}

#[test]
fn hosts_and_guests_on_real_threads_break_nothing() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;

    let mut runner = TestRunner::deterministic();
    let mut moves = |by: fn(&Move) -> bool| -> Vec<Move> {
        let moves = prop::collection::vec(a_move(), 6000);
        let moves = moves.new_tree(&mut runner).unwrap().current();
        moves.into_iter().filter(by).collect()
    };
    // A guest belongs to one thread, with its shadow; two more threads are hosts of both.
    let guests = [
        moves(|a_move| {
            matches!(
                a_move,
                Move::Guest { td: 0, .. } | Move::Interrupt { td: 0 }
            )
        }),
        moves(|a_move| {
            matches!(
                a_move,
                Move::Guest { td: 1, .. } | Move::Interrupt { td: 1 }
            )
        }),
    ];
    let hosts = [
        moves(|a_move| matches!(a_move, Move::Call { .. } | Move::Interrupt { .. })),
        moves(|a_move| matches!(a_move, Move::Call { .. } | Move::Flush { .. })),
    ];
    for _ in 0..4 {
        let game = Game::new();
        std::thread::scope(|scope| {
            for (guest, moves) in (0u64..).zip(&guests) {
                let game = &game;
                scope.spawn(move || {
                    let mut shadow = Shadow {
                        next: guest << 32,
                        ..Shadow::default()
                    };
                    for a_move in moves {
                        let mut a_move = a_move.clone();
                        shadow.number(&mut a_move);
                        let step = game.play(&a_move);
                        shadow.follow(&a_move, step);
                    }
                });
            }
            for moves in &hosts {
                let game = &game;
                scope.spawn(move || {
                    for a_move in moves {
                        game.play(a_move);
                    }
                });
            }
        });
        game.check();
    }
}

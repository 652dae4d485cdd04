//! What a run does, from its seed alone: rounds of operations for each VM, and one strike a round.
//! Pure: no clock, no service.
//!
//! Invariant P1: round `n` of a seed is the same in every run, however many rounds come before it.

use fastrand::Rng;
use mirror_proto::module::fault_rule::{Action, When};
use mirror_proto::module::{
    FaultAbort, FaultCut, FaultDelay, FaultLoseReply, FaultRule, FaultStatus,
};
use tdx_defs::Leaf;

/// Private memory of a VM: slot 0, from address 0, in bytes.
pub(super) const PRIVATE_BYTES: u64 = 32 << 20;
/// Shared memory of a VM, with a dirty log: slot 1.
pub(super) const SHARED_GPA: u64 = 1 << 30;
/// Its size in bytes.
pub(super) const SHARED_BYTES: u64 = 4 << 20;
/// The initial image lies below; operations stay above.
pub(super) const IMAGE_END: u64 = 2 << 20;
/// Unit of the ranges that operations work on, in bytes.
const UNIT: u64 = 1 << 20;
/// Operations of one VM in a round.
pub(super) const OPS_A_ROUND: usize = 6;
/// How long a batch is held up while a process is killed over it, in milliseconds.
const HOLD_MS: u32 = 1500;

/// What a VM is asked to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Op {
    /// KVM_PRE_FAULT_MEMORY of a private range.
    Populate { gpa: u64, size: u64 },
    /// A private access.
    Fault { gpa: u64 },
    /// A write to shared memory, and a look at the dirty log.
    Write { page: u64 },
    /// Makes a range shared or private.
    Convert { gpa: u64, size: u64, private: bool },
    /// Gives pages back.
    PunchHole { offset: u64, size: u64 },
    /// Takes the direct root's mappings away.
    ZapDirect { fast: bool },
    /// Destroys the VM and builds another.
    Rebuild,
}

/// What is under way when something is struck.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Phase {
    Populate,
    Convert,
    Zap,
    Build,
    Destroy,
    /// Anything else.
    Other,
}

impl Phase {
    /// A word for the result.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Populate => "populate",
            Self::Convert => "convert",
            Self::Zap => "zap",
            Self::Build => "build",
            Self::Destroy => "destroy",
            Self::Other => "other",
        }
    }

    /// The leaves that a strike in this phase waits for.
    fn leaves(self) -> &'static [Leaf] {
        match self {
            Self::Populate | Self::Other => &[Leaf::MEM_SEPT_ADD, Leaf::MEM_PAGE_AUG],
            Self::Convert | Self::Zap => &[
                Leaf::MEM_RANGE_BLOCK,
                Leaf::MEM_TRACK,
                Leaf::MEM_PAGE_REMOVE,
            ],
            Self::Build => &[
                Leaf::MNG_CREATE,
                Leaf::MNG_ADDCX,
                Leaf::MNG_INIT,
                Leaf::VP_CREATE,
                Leaf::VP_INIT,
                Leaf::MEM_PAGE_ADD,
                Leaf::MR_EXTEND,
                Leaf::MR_FINALIZE,
            ],
            Self::Destroy => &[
                Leaf::MNG_VPFLUSHDONE,
                Leaf::PHYMEM_CACHE_WB,
                Leaf::MNG_KEY_FREEID,
                Leaf::PHYMEM_PAGE_RECLAIM,
            ],
        }
    }
}

/// What is struck, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Blow {
    /// The module aborts by itself.
    Abort {
        /// When the batch has run.
        after: bool,
    },
    /// kill -9 of the module.
    KillModule,
    /// kill -9 of the MMU service.
    KillMmu,
    /// A stream ends, its batch has not run.
    Cut,
    /// A stream ends, the answer of its batch is lost.
    LoseReply,
}

/// The one strike of a round.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Strike {
    /// Which VM's operation it waits for.
    pub(super) worker: usize,
    /// Before which of its operations it is armed.
    pub(super) at: usize,
    pub(super) phase: Phase,
    pub(super) blow: Blow,
    pub(super) rule: FaultRule,
}

/// One round.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Round {
    /// For each VM, in order.
    pub(super) ops: Vec<Vec<Op>>,
    pub(super) strike: Strike,
    /// Rules that are there for the whole round.
    pub(super) noise: Vec<FaultRule>,
}

fn rng(seed: u64, round: u64, lane: u64) -> Rng {
    // Neighbouring seeds must not have rounds in common.
    let mixed =
        Rng::with_seed(seed).u64(..) ^ (round << 8 | lane).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    Rng::with_seed(mixed)
}

fn range(rng: &mut Rng) -> (u64, u64) {
    let units = (PRIVATE_BYTES - IMAGE_END) / UNIT;
    let size = rng.u64(1..=4);
    let first = rng.u64(0..=units - size);
    (IMAGE_END + first * UNIT, size * UNIT)
}

fn op(rng: &mut Rng) -> Op {
    let (gpa, size) = range(rng);
    match rng.u32(0..100) {
        0..30 => Op::Populate { gpa, size },
        30..50 => Op::Fault { gpa },
        50..65 => Op::Convert {
            gpa,
            size,
            private: rng.bool(),
        },
        65..77 => Op::PunchHole { offset: gpa, size },
        77..90 => Op::Write {
            page: rng.u64(..SHARED_BYTES >> 12),
        },
        90..95 => Op::ZapDirect { fast: rng.bool() },
        _ => Op::Rebuild,
    }
}

/// Operations that lead to `phase` in a range where it has something to do, and which of them it
/// is.
fn towards(phase: Phase, rng: &mut Rng) -> (Vec<Op>, usize) {
    let (gpa, size) = range(rng);
    let private = Op::Convert {
        gpa,
        size,
        private: true,
    };
    let hole = Op::PunchHole { offset: gpa, size };
    let populate = Op::Populate { gpa, size };
    match phase {
        Phase::Populate | Phase::Other => (vec![private, hole, populate], 2),
        Phase::Convert => {
            let shared = Op::Convert {
                gpa,
                size,
                private: false,
            };
            (vec![private, populate, shared], 2)
        }
        Phase::Zap => (vec![private, populate, hole], 2),
        Phase::Build | Phase::Destroy => (vec![populate, Op::Rebuild], 1),
    }
}

impl Strike {
    fn new(rng: &mut Rng, round: u64, vms: usize) -> (Self, Vec<Op>) {
        const PHASES: [Phase; 5] = [
            Phase::Populate,
            Phase::Convert,
            Phase::Zap,
            Phase::Build,
            Phase::Destroy,
        ];
        // One after the other, so that few rounds meet them all.
        let phase = PHASES[usize::try_from(round).unwrap_or(0) % PHASES.len()];
        let blow = match rng.u32(0..10) {
            // Of the kills two thirds.
            0..4 => Blow::KillMmu,
            4 => Blow::KillModule,
            5 => Blow::Abort { after: rng.bool() },
            6..8 => Blow::Cut,
            _ => Blow::LoseReply,
        };
        let leaf = phase.leaves()[rng.usize(..phase.leaves().len())];
        let action = match blow {
            Blow::Abort { after } => Action::Abort(FaultAbort { after }),
            // Held up until the process is killed: in the middle for certain.
            Blow::KillModule | Blow::KillMmu => Action::Delay(FaultDelay { ms: HOLD_MS }),
            Blow::Cut => Action::Cut(FaultCut {}),
            Blow::LoseReply => Action::LoseReply(FaultLoseReply {}),
        };
        let rule = FaultRule {
            leaf: Some(leaf.0.into()),
            when: Some(When::Nth(match leaf {
                Leaf::MEM_PAGE_AUG | Leaf::MEM_PAGE_REMOVE | Leaf::MEM_RANGE_BLOCK => {
                    rng.u64(1..=200)
                }
                Leaf::PHYMEM_PAGE_RECLAIM | Leaf::MR_EXTEND => rng.u64(1..=20),
                _ => 1,
            })),
            action: Some(action),
            ..FaultRule::default()
        };
        let (mut ops, mut at) = towards(phase, rng);
        for _ in 0..rng.usize(..=OPS_A_ROUND - ops.len()) {
            ops.insert(0, op(rng));
            at += 1;
        }
        while ops.len() < OPS_A_ROUND {
            ops.push(op(rng));
        }
        let strike = Self {
            worker: rng.usize(..vms),
            at,
            phase,
            blow,
            rule,
        };
        (strike, ops)
    }
}

/// Busy answers that a host must get over, and delays, all by chance.
fn noise(rng: &mut Rng) -> Vec<FaultRule> {
    let chance = |leaf: Leaf, per_million, times, action, seed| FaultRule {
        leaf: Some(leaf.0.into()),
        when: Some(When::PerMillion(per_million)),
        seed,
        times,
        action: Some(action),
        ..FaultRule::default()
    };
    let busy = || Action::Status(FaultStatus { rax: 0 });
    let mut rules = Vec::new();
    for leaf in [Leaf::MEM_SEPT_ADD, Leaf::MEM_PAGE_AUG, Leaf::MEM_PAGE_ADD] {
        rules.push(chance(leaf, rng.u32(500..5_000), 0, busy(), rng.u64(..)));
    }
    // KVM calls these twice, with vCPUs kept out, and takes a second busy answer for a bug. Once a
    // round is not twice in a row.
    for leaf in [
        Leaf::MEM_RANGE_BLOCK,
        Leaf::MEM_TRACK,
        Leaf::MEM_PAGE_REMOVE,
    ] {
        rules.push(chance(leaf, rng.u32(1_000..20_000), 1, busy(), rng.u64(..)));
    }
    let delay = Action::Delay(FaultDelay {
        ms: rng.u32(1..=10),
    });
    let tracks = chance(Leaf::MEM_TRACK, 200_000, 0, delay, rng.u64(..));
    let lost = Action::LoseReply(FaultLoseReply {});
    let losses = chance(Leaf::MEM_PAGE_AUG, 200, 2, lost, rng.u64(..));
    let cuts = chance(
        Leaf::MEM_PAGE_REMOVE,
        200,
        2,
        Action::Cut(FaultCut {}),
        rng.u64(..),
    );
    rules.extend([tracks, losses, cuts]);
    rules
}

impl Round {
    /// Round `number`, from 0 on, of a seed.
    pub(super) fn new(seed: u64, number: u64, vms: usize) -> Self {
        let mut ops: Vec<Vec<Op>> = (0..vms)
            .map(|vm| {
                let mut rng = rng(seed, number, 1 + vm as u64);
                (0..OPS_A_ROUND).map(|_| op(&mut rng)).collect()
            })
            .collect();
        let mut rng = rng(seed, number, 0);
        let (strike, struck) = Strike::new(&mut rng, number, vms);
        ops[strike.worker] = struck;
        Self {
            ops,
            strike,
            noise: noise(&mut rng),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_seed_repeats_its_rounds_and_another_has_others() {
        for round in 0..50 {
            let one = Round::new(7, round, 4);
            assert_eq!(one, Round::new(7, round, 4));
            assert_ne!(one, Round::new(8, round, 4));
            assert_ne!(one, Round::new(7, round + 1, 4));
        }
    }

    #[test]
    fn a_hundred_rounds_strike_every_phase_in_every_way() {
        let mut met = HashSet::new();
        let (mut kills, mut mmu) = (0, 0);
        for round in 0..100 {
            let Round { ops, strike, .. } = Round::new(3, round, 4);
            met.insert((strike.phase.name(), std::mem::discriminant(&strike.blow)));
            assert_eq!(ops.len(), 4);
            assert!(ops.iter().all(|ops| ops.len() == OPS_A_ROUND));
            assert!(strike.at < OPS_A_ROUND);
            match strike.blow {
                Blow::KillMmu => mmu += 1,
                Blow::KillModule | Blow::Abort { .. } => kills += 1,
                Blow::Cut | Blow::LoseReply => {}
            }
        }
        assert!(met.len() >= 20, "{} of 25", met.len());
        assert!(
            mmu >= kills,
            "{mmu} kills of the MMU service, {kills} others"
        );
    }

    #[test]
    fn ranges_stay_inside_private_memory() {
        let mut rng = Rng::with_seed(1);
        for _ in 0..10_000 {
            let (gpa, size) = range(&mut rng);
            assert!(gpa >= IMAGE_END && gpa + size <= PRIVATE_BYTES && size > 0);
        }
    }
}

//! `scale`: two vCPUs beside one, both libraries in this process.

use std::sync::Barrier;
use std::time::{Duration, Instant};

use tdp_mmu::{Fault, Vm};
use tdx_defs::{Leaf, PAGE_SIZE};

use super::Plan;
use super::figure::{Figure, ns_per_op};
use super::in_process::{Pair, bench_error};
use crate::error::Error;
use crate::progress::Progress;

/// Faults of one batch: less than a leaf table, so that two vCPUs really meet.
const BATCH: usize = 64;

/// Which frames each of two vCPUs faults on.
#[derive(Debug, Clone, Copy)]
enum Share {
    /// Halves of the range.
    Disjoint,
    /// Every other frame.
    Interleaved,
    /// All of them, both.
    Same,
}

/// What one vCPU does, in order.
type Batches = Vec<Vec<Fault>>;

impl Share {
    /// The batches of two vCPUs.
    fn of_two(self, pages: u64) -> [Batches; 2] {
        match self {
            Self::Disjoint => [batches(0..pages / 2), batches(pages / 2..pages)],
            Self::Interleaved => [
                batches((0..pages).step_by(2)),
                batches((1..pages).step_by(2)),
            ],
            Self::Same => [batches(0..pages), batches(0..pages)],
        }
    }

    /// The same batches for one vCPU, in the order in which two of equal speed would do them.
    /// What both would do it does once.
    fn of_one(self, pages: u64) -> Batches {
        let [first, second] = self.of_two(pages);
        match self {
            Self::Disjoint => first.into_iter().chain(second).collect(),
            Self::Interleaved => std::iter::zip(first, second)
                .flat_map(|(one, other)| [one, other])
                .collect(),
            Self::Same => first,
        }
    }
}

fn batches(frames: impl Iterator<Item = u64>) -> Batches {
    let faults: Vec<Fault> = frames
        .map(|frame| Fault {
            gpa: frame * PAGE_SIZE,
            qualification: 2,
            ..Fault::default()
        })
        .collect();
    faults.chunks(BATCH).map(<[Fault]>::to_vec).collect()
}

pub(super) async fn run(plan: Plan, progress: &Progress) -> Result<Vec<Figure>, Error> {
    let size = plan.size(256 << 20);
    let pages = size / PAGE_SIZE;
    let mut figures = Vec::new();
    for (name, share) in [
        ("one vCPU, beside two in disjoint regions", Share::Disjoint),
        ("one vCPU, beside two in one region", Share::Interleaved),
        ("one vCPU, beside two on the same pages", Share::Same),
    ] {
        let mut augs = 0;
        let samples = plan
            .repeat(progress, async || {
                tokio::task::block_in_place(|| {
                    let (one, _) = sample(size, &[share.of_one(pages)])?;
                    let (two, made) = sample(size, &share.of_two(pages))?;
                    augs = made;
                    Ok((ns_per_op(one, pages), ns_per_op(two, pages)))
                })
            })
            .await?;
        let figure = Figure::new((name, "two vCPUs"), pages, &samples).with("augs", augs);
        figures.push(figure);
    }
    Ok(figures)
}

/// How long it takes until all pages are mapped, and how many TDH.MEM.PAGE.AUG were made.
fn sample(size: u64, vcpus: &[Batches]) -> Result<(Duration, u64), Error> {
    let pair = Pair::new()?;
    let vm = pair.vm(u16::try_from(vcpus.len()).unwrap_or(1), size)?;
    let start = Barrier::new(vcpus.len() + 1);
    let times = std::thread::scope(|scope| {
        let threads: Vec<_> = (0u32..)
            .zip(vcpus)
            .map(|(vcpu, batches)| {
                let (vm, start) = (&vm, &start);
                scope.spawn(move || {
                    start.wait();
                    fault(vm, vcpu, batches)
                })
            })
            .collect();
        let from = Instant::now();
        start.wait();
        let done: Result<Vec<()>, Error> = threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or(Err(Error::Interrupted)))
            .collect();
        done.map(|_| from.elapsed())
    })?;
    let augs = vm.stats().counts.seamcalls.get(Leaf::MEM_PAGE_AUG);
    vm.destroy().map_err(bench_error)?;
    Ok((times, augs))
}

fn fault(vm: &Vm, vcpu: u32, batches: &Batches) -> Result<(), Error> {
    for batch in batches {
        vm.handle_faults(vcpu, batch).map_err(bench_error)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_vcpu_does_what_two_share() {
        let frames = |batches: &Batches| -> Vec<u64> {
            let faults = batches.iter().flatten();
            faults.map(|fault| fault.gpa / PAGE_SIZE).collect()
        };
        for share in [Share::Disjoint, Share::Interleaved, Share::Same] {
            let one = share.of_one(512);
            let mut all = frames(&one);
            assert_eq!(all.len(), 512, "{share:?}");
            all.sort_unstable();
            assert!(all.into_iter().eq(0..512), "{share:?}");
            assert!(one.iter().all(|batch| batch.len() == BATCH));
        }
        let [even, odd] = Share::Interleaved.of_two(512);
        assert!(frames(&even).iter().all(|frame| frame % 2 == 0));
        assert!(frames(&odd).iter().all(|frame| frame % 2 == 1));
        assert_eq!(Share::Interleaved.of_one(512)[1], odd[0]);
    }
}

//! What an operation cost: the numbers that make the two propagation modes comparable.

use std::ops::AddAssign;

use tdx_defs::Leaf;

/// SEAMCALLs made, by leaf; each call of a run counts.
///
/// Most operations call no leaf or a few, and a fault that the mirror answers calls none: its report
/// moves several times, and half a kilobyte of zeros would move with it.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct SeamcallCounts(
    /// Ascending by leaf; no count is 0.
    Vec<(Leaf, u64)>,
);

impl SeamcallCounts {
    /// How often `leaf` was called.
    pub fn get(&self, leaf: Leaf) -> u64 {
        self.place(leaf).map_or(0, |at| self.0[at].1)
    }

    /// The leaves that were called, ascending by number.
    pub fn iter(&self) -> impl Iterator<Item = (Leaf, u64)> + '_ {
        self.0.iter().copied()
    }

    /// All calls.
    pub fn total(&self) -> u64 {
        self.0.iter().map(|&(_, count)| count).sum()
    }

    pub(crate) fn add(&mut self, leaf: Leaf, calls: u64) {
        match self.place(leaf) {
            Ok(at) => self.0[at].1 += calls,
            Err(at) if calls > 0 => self.0.insert(at, (leaf, calls)),
            Err(_) => {}
        }
    }

    fn place(&self, leaf: Leaf) -> Result<usize, usize> {
        self.0.binary_search_by_key(&leaf, |&(leaf, _)| leaf)
    }
}

impl std::fmt::Debug for SeamcallCounts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

macro_rules! counts {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What an operation did. Counters are KVM's where KVM has them.
        #[derive(Debug, Clone, Default, PartialEq, Eq)]
        pub struct Counts {
            /// SEAMCALLs by leaf.
            pub seamcalls: SeamcallCounts,
            $($(#[$doc])* pub $name: u64,)*
        }

        impl AddAssign<&Counts> for Counts {
            fn add_assign(&mut self, other: &Counts) {
                for (leaf, calls) in other.seamcalls.iter() {
                    self.seamcalls.add(leaf, calls);
                }
                $(self.$name += other.$name;)*
            }
        }
    };
}

counts! {
    /// Batches sent to the module.
    rpcs,
    /// KVM_REQ_OUTSIDE_GUEST_MODE rounds.
    kicks,
    /// kvm_flush_remote_tlbs.
    flushes,
    /// Private faults that the mirror answered without the module.
    mirror_hits,
    /// Leaves installed, both roots.
    pages_mapped,
    /// Leaves removed by zaps of ranges, both roots.
    pages_zapped,
    /// Passes through the fault handler, local retries included.
    pf_taken,
    /// Faults that installed a mapping.
    pf_fixed,
    /// Faults that found the mapping there.
    pf_spurious,
    /// Faults that ended in emulation.
    pf_emulate,
    /// Faults that the lockless fast path answered.
    pf_fast,
    /// MMIO SPTEs installed.
    pf_mmio_spte_created,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_listed_by_leaf_in_whatever_order_they_came() {
        let mut counts = SeamcallCounts::default();
        for (leaf, calls) in [
            (Leaf::MEM_TRACK, 1),
            (Leaf::MEM_PAGE_AUG, 3),
            (Leaf::MEM_RANGE_BLOCK, 0),
            (Leaf::MEM_TRACK, 4),
        ] {
            counts.add(leaf, calls);
        }
        let listed: Vec<_> = counts.iter().collect();
        assert_eq!(listed, [(Leaf::MEM_PAGE_AUG, 3), (Leaf::MEM_TRACK, 5)]);
        assert_eq!(counts.get(Leaf::MEM_TRACK), 5);
        assert_eq!(counts.get(Leaf::MEM_RANGE_BLOCK), 0);
        assert_eq!(counts.total(), 8);
    }

    #[test]
    fn counts_add_up_field_by_field() {
        let mut one = Counts {
            rpcs: 1,
            kicks: 2,
            ..Counts::default()
        };
        one.seamcalls.add(Leaf::MEM_PAGE_AUG, 3);
        let mut sum = one.clone();
        sum += &one;
        assert_eq!((sum.rpcs, sum.kicks), (2, 4));
        assert_eq!(
            sum.seamcalls.iter().collect::<Vec<_>>(),
            [(Leaf::MEM_PAGE_AUG, 6)]
        );
        assert_eq!(sum.seamcalls.total(), 6);
    }
}

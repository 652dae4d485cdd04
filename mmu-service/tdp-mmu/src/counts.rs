//! What an operation cost: the numbers that make the two propagation modes comparable.

use std::ops::AddAssign;

use tdx_defs::Leaf;

/// Leaf numbers below this bound are counted one by one; the ABI ends at 64 and a bit.
const LEAVES: usize = 64;

/// SEAMCALLs made, by leaf; each call of a run counts.
#[derive(Clone, PartialEq, Eq)]
pub struct SeamcallCounts([u64; LEAVES]);

impl Default for SeamcallCounts {
    fn default() -> Self {
        Self([0; LEAVES])
    }
}

impl SeamcallCounts {
    /// How often `leaf` was called.
    pub fn get(&self, leaf: Leaf) -> u64 {
        self.0.get(usize::from(leaf.0)).copied().unwrap_or(0)
    }

    /// The leaves that were called, ascending by number.
    pub fn iter(&self) -> impl Iterator<Item = (Leaf, u64)> + '_ {
        (0u16..)
            .zip(self.0)
            .filter(|&(_, count)| count != 0)
            .map(|(leaf, n)| (Leaf(leaf), n))
    }

    /// All calls.
    pub fn total(&self) -> u64 {
        self.0.iter().sum()
    }

    pub(crate) fn add(&mut self, leaf: Leaf, calls: u64) {
        if let Some(count) = self.0.get_mut(usize::from(leaf.0)) {
            *count += calls;
        }
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

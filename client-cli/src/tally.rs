//! Sums of what operations did.

use std::collections::BTreeMap;

use mirror_proto::mmu::Counts;
use serde_json::{Map, Value, json};
use tdx_defs::Leaf;

/// Counts of several operations together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Tally {
    /// SEAMCALLs by leaf number.
    seamcalls: BTreeMap<u32, (String, u64)>,
    /// Messages to the module.
    pub rpcs: u64,
    /// Rounds of `KVM_REQ_OUTSIDE_GUEST_MODE`.
    pub kicks: u64,
    /// `kvm_flush_remote_tlbs`.
    pub flushes: u64,
    /// Private faults that the mirror answered alone.
    pub mirror_hits: u64,
    /// 4 KiB leaves installed.
    pub pages_mapped: u64,
    /// 4 KiB leaves removed.
    pub pages_zapped: u64,
}

impl Tally {
    /// The counts of one operation.
    pub fn of(counts: Option<&Counts>) -> Self {
        let mut tally = Self::default();
        tally.add(counts);
        tally
    }

    /// Adds the counts of one more operation.
    pub fn add(&mut self, counts: Option<&Counts>) {
        let Some(counts) = counts else { return };
        for leaf in &counts.seamcalls {
            self.seamcalls
                .entry(leaf.leaf)
                .or_insert_with(|| (leaf_name(leaf.leaf, &leaf.name), 0))
                .1 += leaf.count;
        }
        self.rpcs += counts.rpcs;
        self.kicks += counts.kicks;
        self.flushes += counts.flushes;
        self.mirror_hits += counts.mirror_hits;
        self.pages_mapped += counts.pages_mapped;
        self.pages_zapped += counts.pages_zapped;
    }

    /// Adds another sum.
    pub fn merge(&mut self, other: Self) {
        for (leaf, (name, count)) in other.seamcalls {
            self.seamcalls.entry(leaf).or_insert((name, 0)).1 += count;
        }
        self.rpcs += other.rpcs;
        self.kicks += other.kicks;
        self.flushes += other.flushes;
        self.mirror_hits += other.mirror_hits;
        self.pages_mapped += other.pages_mapped;
        self.pages_zapped += other.pages_zapped;
    }

    /// How many SEAMCALLs there were in all.
    pub fn seamcall_count(&self) -> u64 {
        self.seamcalls.values().map(|(_, count)| count).sum()
    }

    /// How many there were of one leaf.
    pub fn count(&self, leaf: Leaf) -> u64 {
        self.seamcalls
            .get(&leaf.0.into())
            .map_or(0, |(_, count)| *count)
    }

    /// Leaf names with their counts, by leaf number.
    pub fn seamcalls(&self) -> impl Iterator<Item = (&str, u64)> {
        self.seamcalls
            .values()
            .map(|(name, count)| (name.as_str(), *count))
    }

    /// The members that every command with counts has.
    pub fn to_json(&self) -> Map<String, Value> {
        let seamcalls: Map<String, Value> = self
            .seamcalls()
            .map(|(name, count)| (name.to_owned(), count.into()))
            .collect();
        let members = json!({
            "seamcalls": seamcalls,
            "rpcs": self.rpcs,
            "kicks": self.kicks,
            "flushes": self.flushes,
            "mirror_hits": self.mirror_hits,
            "pages_mapped": self.pages_mapped,
            "pages_zapped": self.pages_zapped,
        });
        match members {
            Value::Object(members) => members,
            _ => Map::new(),
        }
    }

    /// The same as rows of a table.
    pub fn rows(&self) -> Vec<(String, String)> {
        let mut rows: Vec<(String, String)> = self
            .seamcalls()
            .map(|(name, count)| (name.to_owned(), count.to_string()))
            .collect();
        for (name, count) in [
            ("messages to the module", self.rpcs),
            ("kicks", self.kicks),
            ("TLB flushes", self.flushes),
            ("answered by the mirror", self.mirror_hits),
            ("pages mapped", self.pages_mapped),
            ("pages zapped", self.pages_zapped),
        ] {
            rows.push((name.to_owned(), count.to_string()));
        }
        rows
    }
}

fn leaf_name(number: u32, given: &str) -> String {
    if !given.is_empty() {
        return given.to_owned();
    }
    match u16::try_from(number) {
        Ok(number) => Leaf(number).to_string(),
        Err(_) => format!("leaf {number}"),
    }
}

#[cfg(test)]
mod tests {
    use mirror_proto::mmu::LeafCount;

    use super::*;

    #[test]
    fn counts_add_up_by_leaf() {
        let aug = |count| LeafCount {
            leaf: 6,
            name: "TDH.MEM.PAGE.AUG".into(),
            count,
        };
        let unnamed = LeafCount {
            leaf: 3,
            name: String::new(),
            count: 1,
        };
        let mut tally = Tally::of(Some(&Counts {
            seamcalls: vec![unnamed, aug(2)],
            rpcs: 1,
            ..Default::default()
        }));
        tally.add(Some(&Counts {
            seamcalls: vec![aug(5)],
            rpcs: 2,
            kicks: 1,
            ..Default::default()
        }));
        tally.add(None);
        assert_eq!(
            tally.seamcalls().collect::<Vec<_>>(),
            [("TDH.MEM.SEPT.ADD", 1), ("TDH.MEM.PAGE.AUG", 7)]
        );
        assert_eq!((tally.seamcall_count(), tally.rpcs, tally.kicks), (8, 3, 1));
        assert_eq!(tally.count(Leaf::MEM_PAGE_AUG), 7);
        assert_eq!(tally.count(Leaf::MEM_TRACK), 0);
        assert_eq!(tally.to_json()["seamcalls"]["TDH.MEM.PAGE.AUG"], 7);
    }
}

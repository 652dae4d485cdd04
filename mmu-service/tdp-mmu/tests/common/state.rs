//! What a VM and its module look like, and what must hold of both while the VM is quiet.
//!
//! The numbers are those of the invariants that a mirror root keeps:
//! I1 nothing is FROZEN; I2 a mirror leaf is present exactly when the private one is PENDING or
//! PRESENT; I3 each linked mirror table stands for one private table; I4 page counters are the
//! leaves; I5 AUG + ADD − REMOVE are the private leaves; I6 mirror leaves are 4 KiB; I8 no
//! invalidation is in progress; I9 a root's count is 1 and one for each vCPU that has it.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use tdp_mmu::{RootKind, SpteKind, TreeEntry, Vm, VmKind};
use tdx_defs::{Leaf, Level, PageType};
use tdx_module::Module;

use super::Rig;
use super::port::Port;

/// Leaves by frame, tables by (level of the entry, frame).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Trees {
    pub(crate) mirror: BTreeMap<u64, u64>,
    /// Leaves of every level, by their first frame.
    pub(crate) direct: BTreeMap<u64, u64>,
    /// Leaves of both trees, by level.
    pub(crate) levels: [u64; 3],
    pub(crate) mirror_tables: Vec<(u8, u64)>,
    pub(crate) direct_tables: Vec<(u8, u64)>,
    pub(crate) mmio: Vec<u64>,
}

/// Every entry that is there.
pub(crate) fn trees(vm: &Vm) -> Trees {
    let mut trees = Trees::default();
    let mut take = |entry: TreeEntry| {
        assert_ne!(entry.kind, SpteKind::Frozen, "I1: {entry:?}");
        let gfn = entry.gfn.get();
        let at = (entry.level.get(), gfn);
        match (entry.kind, entry.root) {
            (SpteKind::Leaf, root) => {
                let (pages, bytes) = (entry.level.pages(), entry.level.bytes());
                let mirror = root == RootKind::Mirror;
                assert!(!mirror || entry.level == Level::L4K, "I6: {entry:?}");
                trees.levels[usize::from(entry.level.get()) - 1] += entry.count;
                let leaves = match root {
                    RootKind::Mirror => &mut trees.mirror,
                    RootKind::Direct => &mut trees.direct,
                };
                leaves.extend((0..entry.count).map(|n| (gfn + n * pages, entry.spte + n * bytes)));
            }
            (SpteKind::Table, RootKind::Mirror) => trees.mirror_tables.push(at),
            (SpteKind::Table, RootKind::Direct) => trees.direct_tables.push(at),
            (SpteKind::Mmio, _) => trees.mmio.push(gfn),
            (kind, root) => panic!("{kind} in the {root:?} tree: {entry:?}"),
        }
        ControlFlow::Continue(())
    };
    vm.dump_tree(None, Level::L4K, &mut take).unwrap();
    trees
}

/// GPA, TDX level and state of private entries.
pub(crate) type PrivateTree = Vec<(u64, u8, String)>;

/// Every private entry that is not free.
pub(crate) fn private_tree(vm: &Vm, module: &Module) -> PrivateTree {
    let entries = module.inspect_sept(vm.info().tdr);
    entries
        .iter()
        .map(|e| (e.gpa.get(), e.level, format!("{:?}", e.state)))
        .collect()
}

/// The page behind each private table → level of its entries and its first frame, as `1:200`.
pub(crate) fn table_pages(vm: &Vm, module: &Module) -> BTreeMap<u64, String> {
    let entries = module.inspect_sept(vm.info().tdr);
    let tables = entries.iter().filter(|entry| !entry.state.is_leaf());
    tables
        .map(|e| (e.page.get(), format!("{}:{:x}", e.level, e.gpa.get() >> 12)))
        .collect()
}

/// I1 to I9 and the audit, of a VM that is alone on its module, alive and quiet.
pub(crate) fn check_invariants(vm: &Vm, rig: &Rig) {
    let trees = trees(vm);
    if vm.info().kind == VmKind::Td {
        check_private(vm, &rig.module, &trees);
        check_calls(&rig.port, &trees);
    }
    let info = vm.info();
    let counted = [info.pages_4k, info.pages_2m, info.pages_1g];
    assert_eq!(counted, trees.levels, "I4");
    assert_eq!(vm.invalidations_in_progress(), 0, "I8");
    for root in vm.roots() {
        let count = u64::from(root.count);
        assert!(
            (1..=1 + u64::from(info.vcpus)).contains(&count),
            "I9: {root:x?}"
        );
    }
    if info.kind == VmKind::Td {
        check_audit(vm, &trees);
    }
}

fn check_private(vm: &Vm, module: &Module, trees: &Trees) {
    let entries = module.inspect_sept(vm.info().tdr);
    let leaves: BTreeMap<u64, u64> = entries
        .iter()
        .filter(|entry| entry.state.is_leaf())
        .map(|entry| (entry.gpa.get() >> 12, entry.page.get()))
        .collect();
    let mirror: BTreeMap<u64, u64> = trees
        .mirror
        .iter()
        .map(|(&gfn, &spte)| (gfn, spte & 0x000F_FFFF_FFFF_F000))
        .collect();
    assert_eq!(
        mirror, leaves,
        "I2: mirror leaves and private leaves, with their pages"
    );
    let mut tables: Vec<(u8, u64)> = entries
        .iter()
        .filter(|entry| !entry.state.is_leaf())
        .map(|entry| (entry.level + 1, entry.gpa.get() >> 12))
        .collect();
    tables.sort_unstable();
    let mut mirror_tables = trees.mirror_tables.clone();
    mirror_tables.sort_unstable();
    assert_eq!(
        mirror_tables, tables,
        "I3: mirror tables and private tables"
    );
    let usage = module.usage();
    for (page_type, pages) in usage.pages {
        if page_type == PageType::REG {
            assert_eq!(pages, trees.mirror.len() as u64, "pages of the TD");
        } else if page_type == PageType::EPT {
            assert_eq!(
                pages,
                trees.mirror_tables.len() as u64,
                "table pages of the TD"
            );
        }
    }
}

fn check_calls(port: &Port, trees: &Trees) {
    let calls = |leaf| port.succeeded(leaf);
    assert_eq!(
        calls(Leaf::MEM_SEPT_ADD),
        trees.mirror_tables.len() as u64,
        "I3: SEPT.ADD"
    );
    let added = calls(Leaf::MEM_PAGE_AUG) + calls(Leaf::MEM_PAGE_ADD);
    assert_eq!(
        added - calls(Leaf::MEM_PAGE_REMOVE),
        trees.mirror.len() as u64,
        "I5"
    );
}

fn check_audit(vm: &Vm, trees: &Trees) {
    let report = vm.audit(&mut |_, _| {}).unwrap();
    assert_eq!(
        (report.mismatches, report.frozen),
        (0, 0),
        "{:#?}",
        report.first_mismatches
    );
    let found = (trees.mirror.len() as u64, trees.mirror_tables.len() as u64);
    assert_eq!((report.leaves, report.tables), found);
}

/// Destroys the VM, the only one of its host: everything must come back.
pub(crate) fn destroy(vm: &Vm, rig: &Rig) {
    let (_, leaked) = vm.destroy().unwrap();
    assert_eq!(leaked, 0, "leaked pages: {:?}", vm.bugs().reports());
    assert_nothing_left(rig);
    assert_eq!(vm.roots(), [], "roots");
    assert_eq!(vm.info().pages_4k, 0, "pages counted");
}

/// Neither host nor module holds anything.
pub(crate) fn assert_nothing_left(rig: &Rig) {
    let usage = rig.module.usage();
    assert_eq!(usage.hkids_in_use, 0, "key ids");
    assert!(
        usage.pages.iter().all(|(_, pages)| *pages == 0),
        "{:?}",
        usage.pages
    );
    assert_eq!(rig.host.pages_in_use(), 0, "host pages");
}

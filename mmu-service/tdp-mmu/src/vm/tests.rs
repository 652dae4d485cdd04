//! Scenarios that need a hand inside: states that no sequence of calls reaches.
#![cfg_attr(
    not(test),
    allow(
        dead_code,
        unused_imports,
        reason = "only the rows of the tables are scenarios"
    )
)]

use tdx_defs::{Gfn, Gpaw, Leaf, Level, Pfn, Visibility};

use super::fault::Roots;
use super::faulting::Faulting;
use super::mmio::Mmio;
use super::prefault::Done;
use super::resolve::Early;
use super::wanted::{GuestWalk, Wanted};
use super::*;
use crate::bugs::Check;
use crate::common::port::{Rule, When};
use crate::common::{self, Rig, witness};
use crate::error::errno;
use crate::memory::slots::SlotSpec;
use crate::mmu::direct::{DirectFault, Installed, Target};
use crate::mmu::mirror::{Begin, Depth};
use crate::mmu::removal::ExternalOp;
use crate::mmu::role::RootKind;
use crate::mmu::roots::RootTypes;
use crate::mmu::spte::{self, Access, DirectTraits, LeafTraits};

const GFN: Gfn = Gfn::new(1);

fn e4(mode: Mode) -> (Rig, Vm) {
    let rig = Rig::new();
    let vm = rig.empty(mode, Gpaw::W48);
    rig.forget_calls();
    (rig, vm)
}

fn checks(vm: &Vm) -> Vec<Check> {
    vm.bugs()
        .reports()
        .into_iter()
        .map(|(check, _)| check)
        .collect()
}

fn leaves(rig: &Rig) -> Vec<Leaf> {
    rig.look_at_calls()
        .into_iter()
        .map(|call| call.leaf)
        .collect()
}

fn wanted(gfn: Gfn, visibility: Visibility, prefetch: bool) -> Wanted {
    let access = Access {
        write: !prefetch,
        exec: false,
    };
    Wanted {
        index: 0,
        gfn,
        visibility,
        access,
        present: false,
        prefetch,
        guest_walk: GuestWalk::Unknown,
        offset: 0,
    }
}

const REMOVAL: [Leaf; 4] = [
    Leaf::MEM_RANGE_BLOCK,
    Leaf::MEM_TRACK,
    Leaf::MEM_PAGE_REMOVE,
    Leaf::PHYMEM_PAGE_WBINVD,
];

#[cfg_attr(test, test)]
pub(crate) fn r07_a_root_of_another_level_is_not_shown_to_the_module() {
    let (rig, vm) = e4(witness::mode_or(Mode::Batched));
    assert!(!vm.check_root_level(Level::L256T));
    assert_eq!(checks(&vm), [Check::B32]);
    assert_eq!(leaves(&rig), [], "no TDH.VP.WR");
}

#[cfg_attr(test, test)]
pub(crate) fn r15_a_vcpu_that_goes_puts_both_roots() {
    let (rig, vm) = e4(witness::mode_or(Mode::Batched));
    let counts = |vm: &Vm| vm.roots().iter().map(|root| root.count).collect::<Vec<_>>();
    assert_eq!(counts(&vm), [2, 2]);
    let vcpu = vm.vcpu(0).unwrap();
    let mut run = lock(&vcpu.run);
    vm.put_roots(&mut run);
    assert_eq!((run.root, run.mirror_root), (None, None));
    assert_eq!(counts(&vm), [1, 1], "the VM's own references are left");
    assert_eq!(leaves(&rig), [], "its control pages wait for the VM's end");
}

#[test]
fn a_prefault_whose_root_is_obsolete_says_so() {
    let rig = Rig::new();
    let vm = rig.ordinary(VmConfig::default());
    vm.set_user_memory_region(common::user_slot(0, 0, 8))
        .unwrap();
    let vcpu = vm.vcpu(0).unwrap();
    let roots = vm.roots_of(&vcpu, &mut lock(&vcpu.run)).unwrap();
    // Between the look at the roots and the first page.
    vm.zap_all_fast().unwrap();
    let mut faulting = Faulting::new(&vm, &vcpu, roots, vm.seam(vcpu.lp));
    faulting.push(wanted(GFN, Visibility::Shared, true));
    faulting.finish();
    let mut done = Done::default();
    done.collect(&vm, roots, &mut faulting, 1..2);
    let (_, error) = done.failed.unwrap();
    assert_eq!(error, VmError::RootObsolete(GFN.base()));
    assert_eq!(error.errno(), errno::EAGAIN);
    assert!(error.to_string().contains("obsolete"), "{error}");
    // The next call loads a new root.
    let mut bytes = 0;
    vm.pre_fault_memory(0, 0x1000, 0x1000, &mut |done| bytes = done)
        .unwrap();
    assert_eq!(bytes, 0x1000);
}

#[test]
fn a_prefault_that_loses_its_root_half_way_tells_how_far_it_came() {
    // Behind this many pages a prefault tells how far it is.
    const STRIDE: u64 = 4096;
    let rig = Rig::new();
    let vm = rig.ordinary(VmConfig::default());
    let pages = STRIDE * 2;
    vm.set_user_memory_region(common::user_slot(0, 0, pages))
        .unwrap();
    let mut done = 0;
    std::thread::scope(|scope| {
        let mut zap = None;
        let mut zap_once = |bytes| {
            done = bytes;
            if zap.is_some() {
                return;
            }
            zap = Some(scope.spawn(|| vm.zap_all_fast().unwrap()));
            // The prefault holds the read side; it makes way once a writer waits.
            while !vm.mmu.lock.is_wanted() {
                std::thread::yield_now();
            }
        };
        vm.pre_fault_memory(0, 0, pages << 12, &mut zap_once)
            .unwrap();
    });
    assert_eq!(done, STRIDE << 12);
    vm.pre_fault_memory(0, done, STRIDE << 12, &mut |bytes| done = bytes)
        .unwrap();
    assert_eq!(done, STRIDE << 12);
}

#[cfg_attr(test, test)]
pub(crate) fn d10_a_slot_on_its_way_out_is_retried_and_refuses_prefault() {
    let (rig, vm) = e4(witness::mode_or(Mode::Batched));
    vm.slots
        .by_id(0)
        .unwrap()
        .going
        .store(true, Ordering::SeqCst);
    let early = vm
        .resolve(
            &mut vm.slots.lookups(),
            &wanted(GFN, Visibility::Private, false),
        )
        .err()
        .unwrap();
    assert!(matches!(early, Early::SlotGoing));
    let report = vm.handle_fault(0, common::private(1)).unwrap();
    assert_eq!(report.ret_pf, RetPf::Retry);
    assert_eq!(report.counts.pf_taken, 1, "not retried here");
    let error = vm
        .pre_fault_memory(0, 0x1000, 0x1000, &mut |_| {})
        .unwrap_err();
    assert_eq!(error.errno(), errno::EAGAIN);
    assert_eq!(leaves(&rig), []);
}

#[cfg_attr(test, test)]
pub(crate) fn d15_a_frame_with_the_shared_bit_is_a_bug() {
    let (_rig, vm) = e4(witness::mode_or(Mode::Batched));
    let alias = Gfn::new(1 | vm.mmu.layout.direct_bits());
    let Err(Early::Error(error)) = vm.resolve(
        &mut vm.slots.lookups(),
        &wanted(alias, Visibility::Shared, false),
    ) else {
        panic!("resolved");
    };
    assert_eq!(error.errno(), errno::EFAULT);
    assert_eq!(checks(&vm), [Check::B24]);
    assert!(vm.bugs().is_bugged());
}

#[cfg_attr(test, test)]
pub(crate) fn d16_faults_on_an_obsolete_direct_root_start_over() {
    for mode in witness::modes() {
        for visibility in [Visibility::Shared, Visibility::Private] {
            let (rig, vm) = e4(mode);
            vm.set_memory_attributes(0x2000, 0x1000, 0).unwrap();
            let vcpu = vm.vcpu(0).unwrap();
            let roots = {
                let run = lock(&vcpu.run);
                Roots {
                    direct: run.root.unwrap(),
                    mirror: run.mirror_root,
                }
            };
            drop(vm.mmu.invalidate_roots(RootTypes::DIRECT));
            let gfn = Gfn::new(if visibility == Visibility::Shared {
                2
            } else {
                1
            });
            let mut faulting = Faulting::new(&vm, &vcpu, roots, vm.seam(0));
            faulting.push(wanted(gfn, visibility, false));
            faulting.finish();
            assert_eq!(
                faulting.ended[0].result,
                Ok(RetPf::Retry),
                "{mode:?} {visibility:?}"
            );
            assert_eq!(leaves(&rig), []);
        }
    }
}

#[cfg_attr(test, test)]
pub(crate) fn p16_a_goal_above_4k_is_refused_by_the_leaf_hook() {
    let (rig, vm) = e4(witness::mode_or(Mode::Kernel));
    let mut seam = vm.seam(0);
    let level = Level::L2M;
    let ops = [ExternalOp::SetSpte {
        gfn: Gfn::new(0),
        level,
        spte: spte::NP,
    }];
    assert!(!vm.hooks().would_call(&mut seam, &ops));
    assert_eq!(checks(&vm), [Check::B27]);
    assert_eq!(leaves(&rig), []);
}

#[cfg_attr(test, test)]
pub(crate) fn i19_an_error_on_the_way_in_is_refused() {
    let rig = Rig::new();
    let vm = rig.uninitialized(witness::mode_or(Mode::Batched), Gpaw::W48);
    // As whoever takes the command from user space does it.
    let init = |hw_error| crate::check_hw_error(hw_error).and_then(|()| vm.init());
    let error = init(1 << 63).unwrap_err();
    assert_eq!(
        (error.errno(), error.field()),
        (errno::EINVAL, Some("hw_error"))
    );
    assert_eq!(leaves(&rig), []);
    assert!(init(0).is_ok());
}

#[cfg_attr(test, test)]
pub(crate) fn i21_a_leaf_before_finalisation_needs_a_source_page() {
    let rig = Rig::new();
    let vm = rig.pre(witness::mode_or(Mode::Batched), Gpaw::W48);
    vm.load_mmu(0).unwrap();
    rig.forget_calls();
    let root = vm.mmu.root_of(RootKind::Mirror).unwrap();
    assert!(vm.mmu.top_up_external(|| vm.host.memory.page()));
    let leaf = spte::leaf_4k(
        Pfn::new(7),
        LeafTraits {
            map_writable: true,
            prefetch: true,
        },
    );
    let Begin::Held(unit) = vm.mmu.begin(root, GFN, leaf, Depth::Chain) else {
        panic!("not held")
    };
    let mut seam = vm.seam(0);
    let sent = vm.hooks().send(&mut seam, vec![unit], None);
    let settled = vm.hooks().settle(&mut seam, sent).unwrap();
    assert!(!settled.complete && settled.failed.is_none());
    assert_eq!(leaves(&rig), [Leaf::MEM_SEPT_ADD; 3], "tables, and no page");
    assert_eq!(checks(&vm), [Check::B29]);
    assert_eq!(vm.mmu.last(root, GFN).unwrap().spte, spte::NP);
}

#[cfg_attr(test, test)]
pub(crate) fn x03_a_mirror_leaf_made_present_by_force_loses_the_old_page() {
    let (rig, vm) = e4(witness::mode_or(Mode::Kernel));
    common::map_private(&vm, 1..2);
    rig.forget_calls();
    let root = vm.mmu.root_of(RootKind::Mirror).unwrap();
    let step = vm.mmu.last(root, GFN).unwrap();
    let mut ops = Vec::new();
    let held = vm.mmu.lock.write();
    vm.mmu
        .set_spte(&held, &step, GFN, step.spte & !spte::WRITE, &mut ops);
    vm.carry_out(&held, &mut vm.seam(0), &ops).unwrap();
    drop(held);
    assert_eq!(checks(&vm), [Check::B11]);
    assert_eq!(leaves(&rig), REMOVAL);
}

#[cfg_attr(test, test)]
pub(crate) fn x04_a_private_table_is_not_freed_while_a_key_is_assigned() {
    let (rig, vm) = e4(witness::mode_or(Mode::Kernel));
    common::map_private(&vm, 1..2);
    rig.forget_calls();
    let root = vm.mmu.root_of(RootKind::Mirror).unwrap();
    let table = vm.mmu.path(root, GFN)[2];
    let mut ops = Vec::new();
    let held = vm.mmu.lock.write();
    vm.mmu
        .set_spte(&held, &table, Gfn::new(0), spte::NP, &mut ops);
    vm.carry_out(&held, &mut vm.seam(0), &ops).unwrap();
    drop(held);
    assert_eq!(checks(&vm), [Check::B31, Check::B14]);
    assert_eq!(leaves(&rig), REMOVAL, "the leaf goes, the table is leaked");
    assert_eq!(vm.leaked.load(Ordering::Relaxed), 1);
}

#[cfg_attr(test, test)]
pub(crate) fn t07_a_leaf_left_behind_the_key_is_a_bug() {
    let (rig, vm) = e4(witness::mode_or(Mode::Kernel));
    common::map_private(&vm, 1..2);
    rig.forget_calls();
    let root = vm.mmu.root_of(RootKind::Mirror).unwrap();
    let hkid = vm.td.release_hkid().unwrap();
    let mut ops = Vec::new();
    let held = vm.mmu.lock.write();
    vm.mmu.zap_leafs(&held, root, 0..16, u64::MAX, &mut ops);
    vm.carry_out(&held, &mut vm.seam(0), &ops).unwrap();
    drop(held);
    assert_eq!(checks(&vm), [Check::B30], "key id {hkid} was gone");
    assert_eq!(leaves(&rig), []);
    assert_eq!(
        vm.mmu.last(root, GFN).unwrap().spte,
        spte::NP,
        "the mirror is cleared"
    );
}

#[test]
fn b26_a_root_that_somebody_keeps_is_noticed_at_the_end() {
    let (_rig, vm) = e4(witness::mode_or(Mode::Batched));
    let root = vm.mmu.root_of(RootKind::Direct).unwrap();
    assert!(vm.mmu.get_root(root));
    vm.destroy().unwrap();
    assert_eq!(checks(&vm), [Check::B26]);
    assert!(!vm.bugs().is_bugged(), "WARN, not BUG");
}

#[test]
fn b28_the_leaf_hook_wants_a_present_entry_with_all_rights() {
    let (rig, vm) = e4(witness::mode_or(Mode::Batched));
    let traits = LeafTraits {
        map_writable: true,
        prefetch: false,
    };
    let leaf = spte::leaf_4k(Pfn::new(7), traits);
    let set = |spte| {
        [ExternalOp::SetSpte {
            gfn: GFN,
            level: Level::L4K,
            spte,
        }]
    };
    let mut seam = vm.seam(0);
    assert!(vm.hooks().would_call(&mut seam, &set(leaf)));
    assert_eq!(checks(&vm), []);
    for (case, spte) in [
        ("not writable", leaf & !spte::WRITE),
        ("not present", leaf & !spte::MMU_PRESENT),
    ] {
        assert!(vm.hooks().would_call(&mut seam, &set(spte)), "{case}");
    }
    assert_eq!(checks(&vm), [Check::B28, Check::B28]);
    assert!(!vm.bugs().is_bugged(), "WARN, not BUG");
    assert_eq!(leaves(&rig), [], "nothing was sent");
}

#[test]
fn b35_a_vcpu_that_was_not_flushed_is_not_freed() {
    let (rig, vm) = e4(witness::mode_or(Mode::Kernel));
    // The key goes behind the back of the VM's end, which therefore flushes nobody.
    vm.td.release_hkid().unwrap();
    let (_, leaked) = vm.destroy().unwrap();
    assert_eq!(checks(&vm), [Check::B35]);
    assert!(vm.bugs().is_bugged());
    let tdvps = rig.host.platform().tdvps_pages;
    assert!(leaked >= tdvps as u64, "{leaked} of at least {tdvps}");
    assert!(!leaves(&rig).contains(&Leaf::VP_FLUSH));
}

#[cfg_attr(test, test)]
pub(crate) fn z28_a_generation_that_comes_round_zaps_everything_shared() {
    let (_rig, vm) = e4(witness::mode_or(Mode::Batched));
    common::map_private(&vm, 1..2);
    common::map_shared(&vm, 2..3);
    vm.slots
        .generation
        .store(spte::MMIO_GEN_MASK, Ordering::SeqCst);
    vm.set_user_memory_region(common::user_slot(1, 0x8_0000, 16))
        .unwrap();
    assert_eq!(vm.slots.generation(), 0);
    let roles: Vec<u32> = vm.roots().iter().map(|root| root.role).collect();
    assert_eq!(roles, [0x3F84, 0x8_3784], "the direct root is obsolete");
    assert_eq!(vm.info().pages_4k, 1, "the private page stays");
    vm.set_user_memory_region(common::user_slot(2, 0x9_0000, 16))
        .unwrap();
    assert_eq!(vm.roots()[0].role, 0x3F84, "no second zap");
}

/// An invalidation of some ranges in progress; mmu_lock is free.
fn begin_invalidation(vm: &Vm, ranges: &[std::ops::Range<u64>]) {
    let held = vm.mmu.lock.write();
    vm.invalidation.begin(&held);
    ranges
        .iter()
        .for_each(|range| vm.invalidation.range_add(&held, range));
}

#[cfg_attr(test, test)]
pub(crate) fn c09_a_fault_outside_an_invalidation_goes_on() {
    for mode in witness::modes() {
        let (rig, vm) = e4(mode);
        begin_invalidation(&vm, std::slice::from_ref(&(0x100..0x200)));
        let report = vm.handle_fault(0, common::private(1)).unwrap();
        assert_eq!((report.ret_pf, report.counts.pf_taken), (RetPf::Fixed, 1));
        let path = [
            Leaf::MEM_SEPT_ADD,
            Leaf::MEM_SEPT_ADD,
            Leaf::MEM_SEPT_ADD,
            Leaf::MEM_PAGE_AUG,
        ];
        assert_eq!(leaves(&rig), path);
        vm.invalidation.end(&vm.mmu.lock.write());
    }
}

#[cfg_attr(test, test)]
pub(crate) fn c10_a_fault_between_two_ranges_of_one_invalidation_starts_over() {
    for mode in witness::modes() {
        let (rig, vm) = e4(mode);
        begin_invalidation(&vm, &[0..9, 100..109]);
        // An event ends the retries.
        vm.queue_event(0).unwrap();
        let report = vm.handle_fault(0, common::private(50)).unwrap();
        assert_eq!((report.ret_pf, report.counts.pf_taken), (RetPf::Retry, 1));
        assert_eq!(leaves(&rig), []);
        vm.invalidation.end(&vm.mmu.lock.write());
        let report = vm.handle_fault(0, common::private(50)).unwrap();
        assert_eq!(report.ret_pf, RetPf::Fixed);
    }
}

/// A vCPU that faults on frame 1, whose AUG never gets through, while `act` happens inside the
/// first AUG; what the fault came to.
fn during_local_retry(
    rig: &Rig,
    vm: &Vm,
    act: impl FnOnce(),
) -> Result<crate::FaultReport, VmError> {
    rig.port.inject(Rule::busy(Leaf::MEM_PAGE_AUG, u32::MAX));
    let gate = rig.port.gate(Leaf::MEM_PAGE_AUG, None, When::Before);
    std::thread::scope(|scope| {
        let fault = scope.spawn(|| vm.handle_fault(0, common::private(1)));
        gate.wait_for_arrival();
        act();
        gate.open();
        fault.join().unwrap()
    })
}

const BUSY_ONCE: [Leaf; 4] = [
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_PAGE_AUG,
];

#[cfg_attr(test, test)]
pub(crate) fn c20_a_fault_in_local_retry_lets_the_deletion_of_its_slot_pass() {
    for mode in witness::modes() {
        let (rig, vm) = e4(mode);
        let (rig, vm) = (&rig, &vm);
        std::thread::scope(|scope| {
            let slot = vm.slots.by_id(0).unwrap();
            let mut deletion = None;
            let report = during_local_retry(rig, vm, || {
                let delete = || vm.set_user_memory_region(SlotSpec::default());
                deletion = Some(scope.spawn(delete));
                while !slot.is_going() {
                    std::thread::yield_now();
                }
            });
            assert_eq!(report.unwrap().ret_pf, RetPf::Retry);
            deletion.unwrap().join().unwrap().unwrap();
        });
        assert_eq!(leaves(rig), BUSY_ONCE, "{mode:?}: none further");
        let error = vm.handle_fault(0, common::private(1)).unwrap_err();
        assert_eq!(error.errno(), errno::EFAULT);
        assert_eq!(error.memory_fault().map(|record| record.flags), Some(8));
        assert_eq!(leaves(rig), []);
    }
}

#[cfg_attr(test, test)]
pub(crate) fn c21_a_fault_in_local_retry_ends_with_the_vm() {
    for mode in witness::modes() {
        let (rig, vm) = e4(mode);
        let report = during_local_retry(&rig, &vm, || {
            vm.mmu
                .bugs
                .kill(Check::PendingAccess, || "elsewhere".into());
        });
        assert_eq!(report.unwrap_err().errno(), errno::EIO);
        assert_eq!(leaves(&rig), BUSY_ONCE, "{mode:?}: none further");
    }
}

#[cfg_attr(test, test)]
pub(crate) fn c22_a_root_that_becomes_obsolete_is_replaced_on_the_next_entry() {
    let (rig, vm) = e4(witness::mode_or(Mode::Kernel));
    common::map_shared(&vm, 2..3);
    rig.forget_calls();
    let vcpu = vm.vcpu(0).unwrap();
    let roots = vm.enter(&vcpu, &mut lock(&vcpu.run)).unwrap();
    vm.zap_all_fast().unwrap();
    for visibility in [Visibility::Shared, Visibility::Private] {
        let gfn = Gfn::new(if visibility == Visibility::Shared {
            2
        } else {
            1
        });
        let mut faulting = Faulting::new(&vm, &vcpu, roots, vm.seam(0));
        faulting.push(wanted(gfn, visibility, false));
        faulting.finish();
        assert_eq!(faulting.ended[0].result, Ok(RetPf::Retry), "{visibility:?}");
    }
    assert_eq!(leaves(&rig), []);
    let report = vm.handle_fault(0, common::shared(&vm, 2)).unwrap();
    assert_eq!(report.ret_pf, RetPf::Fixed);
    assert_eq!(leaves(&rig), [Leaf::VP_WR]);
}

#[cfg_attr(test, test)]
pub(crate) fn c23_a_removed_table_is_not_reused_while_somebody_walks_it() {
    let rig = Rig::new();
    let vm = rig.ordinary(VmConfig::default());
    vm.set_user_memory_region(common::user_slot(0, 0, 0x400))
        .unwrap();
    vm.handle_fault(0, common::shared(&vm, 1)).unwrap();
    let root = vm.mmu.root_of(RootKind::Direct).unwrap();
    let walker = crossbeam_epoch::pin();
    let leaf = vm.mmu.last(root, GFN).unwrap();
    vm.zap_all_fast().unwrap();
    // The walker still holds the entry: frozen, in a table that nobody is given meanwhile.
    assert_eq!(vm.mmu.read(leaf.slot), spte::FROZEN);
    for gfn in 1..40 {
        vm.handle_fault(0, common::shared(&vm, gfn)).unwrap();
        let new = vm.mmu.root_of(RootKind::Direct).unwrap();
        let tables = vm.mmu.path(new, Gfn::new(gfn));
        assert!(tables.iter().all(|step| step.slot.table != leaf.slot.table));
    }
    drop(walker);
}

#[test]
fn an_mmio_entry_is_no_younger_than_the_slots_that_were_asked() {
    let rig = Rig::new();
    let vm = rig.ordinary(VmConfig::default());
    vm.load_mmu(0).unwrap();
    let Ok(resolved) = vm.resolve(
        &mut vm.slots.lookups(),
        &wanted(GFN, Visibility::Shared, false),
    ) else {
        panic!("no slot is no error");
    };
    // The slot comes after the look-up and before the entry.
    vm.set_user_memory_region(common::user_slot(0, 0, 16))
        .unwrap();
    assert_ne!(resolved.generation, vm.slots.generation());
    let vcpu = vm.vcpu(0).unwrap();
    let roots = vm.enter(&vcpu, &mut lock(&vcpu.run)).unwrap();
    let fault = DirectFault {
        gfn: GFN,
        access: Access {
            write: false,
            exec: false,
        },
        prefetch: false,
        req_level: Level::L4K,
        target: Target::Mmio {
            spte: vm.mmio_spte(GFN, resolved.generation),
        },
        traits: DirectTraits {
            ignore_pat: true,
            nx_huge_pages: false,
            write_tracked: false,
        },
    };
    let mapped = vm.mmu.map_direct(roots.direct, &fault);
    assert_eq!(mapped.installed, Installed::Mmio);
    assert_eq!(vm.meet_mmio(&vcpu, roots.direct, GFN), Mmio::Fault);
    let report = vm.handle_fault(0, common::shared(&vm, 1)).unwrap();
    assert_eq!(report.ret_pf, RetPf::Fixed);
}

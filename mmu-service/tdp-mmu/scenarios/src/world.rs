//! What a row acts on, and the words that it acts with.

use std::collections::BTreeMap;
use std::ops::Range;

use tdp_mmu::{
    Counts, DirtyLogMode, Event, Fault, InitRegion, Measure, Mode, RetPf, SlotSpec, Vm, VmConfig,
    VmError, VmKind, errno,
};
use tdx_defs::{CompletionStatus, Gpaw, Leaf};

use super::actions;
use crate::common::calls;
use crate::common::port::{Effect, Rule};
use crate::common::state::{self, check_invariants};
use crate::common::{self, Rig};

/// Bits of an SPTE that do not name a page.
const NOT_PFN: u64 = !0x000F_FFFF_FFFF_F000;

pub(crate) struct World {
    rig: Rig,
    mode: Mode,
    vm: Option<Vm>,
    gpaw: Gpaw,
    /// Before the last `do`.
    before: Before,
    /// Private tables that the end of the VM reclaimed, as level:frame.
    reclaimed: Vec<String>,
    destroyed: bool,
    /// Tracepoints of the last action.
    events: Vec<Event>,
    /// The calls of every action.
    made: Vec<String>,
}

/// What `do` changes is measured against this.
#[derive(Default)]
struct Before {
    counts: Counts,
    seq: u64,
    pages: [u64; 3],
    calls: Vec<String>,
}

type Outcome = Result<(), String>;

fn same<T: PartialEq + std::fmt::Debug>(found: T, expected: T) -> Outcome {
    if found == expected {
        Ok(())
    } else {
        Err(format!("found {found:x?}, expected {expected:x?}"))
    }
}

pub(crate) fn hex(word: &str) -> u64 {
    u64::from_str_radix(word, 16).unwrap_or_else(|_| panic!("{word} is not hexadecimal"))
}

pub(crate) fn range(first: &str, pages: &str) -> Range<u64> {
    hex(first)..hex(first) + hex(pages)
}

pub(crate) fn bytes(range: &Range<u64>) -> (u64, u64) {
    (range.start << 12, (range.end - range.start) << 12)
}

impl World {
    pub(crate) fn new(mode: Mode) -> Self {
        let (rig, gpaw) = (Rig::new(), Gpaw::W48);
        Self {
            rig,
            mode,
            vm: None,
            gpaw,
            before: Before::default(),
            reclaimed: Vec::new(),
            destroyed: false,
            events: Vec::new(),
            made: Vec::new(),
        }
    }

    fn vm(&self) -> &Vm {
        self.vm.as_ref().expect("a row starts with its base")
    }

    /// The calls that the actions made.
    pub(crate) fn take_calls(&mut self) -> Vec<String> {
        std::mem::take(&mut self.made)
    }

    /// One line of a row.
    pub(crate) fn line(&mut self, text: &str) -> Outcome {
        let words: Vec<&str> = text.split_whitespace().collect();
        if let Some(action) = text.strip_prefix("do ") {
            let (action, expected) = action.split_once("=>").unwrap_or((action, "ok"));
            return self.act(action, expected.trim());
        }
        match words[..] {
            ["base", name] => self.base(name),
            ["p", first] => common::map_private(self.vm(), range(first, "1")),
            ["p", first, pages] => common::map_private(self.vm(), range(first, pages)),
            ["s", first] => common::map_shared(self.vm(), range(first, "1")),
            ["s", first, pages] => common::map_shared(self.vm(), range(first, pages)),
            // Maps a shared frame where there is memory.
            ["m", gfn] => {
                let report = self
                    .vm()
                    .handle_fault(0, common::shared(self.vm(), hex(gfn)));
                assert_eq!(
                    report.map(|report| report.ret_pf),
                    Ok(RetPf::Fixed),
                    "{gfn}"
                );
            }
            ["spoil", call, how, ref rest @ ..] => self.spoil(call, how, rest),
            ["calls", ..] => return self.check_calls(&text["calls".len()..]),
            ["kicks", n] => return same(self.delta(|counts| counts.kicks), decimal(n)),
            ["flushes", n] => return same(self.delta(|counts| counts.flushes), decimal(n)),
            ["seq", n] => return same(self.vm().invalidate_seq() - self.before.seq, decimal(n)),
            ["pages", n] => return self.check_pages(0, n),
            ["pages2m", n] => return self.check_pages(1, n),
            ["pages1g", n] => return self.check_pages(2, n),
            ["splits", n] => return same(self.vm().stats().nx_lpage_splits, decimal(n)),
            ["events", ref names @ ..] => return self.check_events(names),
            ["event", ..] => return self.check_event(&text["event ".len()..]),
            ["level", gfn, level] => return self.check_level(gfn, decimal(level)),
            ["stat", name, n] => return same(self.stat(name), decimal(n)),
            ["state", state] => return same(self.vm().info().state, state),
            ["roots", ref roots @ ..] => return self.check_roots(roots),
            ["spte", tree, gfn, value] => return self.check_spte(tree, gfn, value),
            ["tables", tree, n] => return self.check_tables(tree, decimal(n)),
            ["index", gfn, index] => return self.check_index(gfn, decimal(index)),
            ["sept", gfn, state] => return self.check_sept(gfn, state),
            ["reclaimed", ref tables @ ..] => {
                return same(self.reclaimed.join(" "), tables.join(" "));
            }
            ["checks", ref checks @ ..] => return self.check_checks(checks),
            // Anything else is an action that has to succeed.
            _ => return self.act(text, "ok"),
        }
        Ok(())
    }

    fn base(&mut self, name: &str) {
        self.gpaw = if name == "E5" { Gpaw::W52 } else { Gpaw::W48 };
        self.vm = match name {
            "E4" | "E5" => Some(self.rig.empty(self.mode, self.gpaw)),
            "Pre" => Some(self.rig.pre(self.mode, self.gpaw)),
            "TD" => Some(self.rig.create(self.mode, self.gpaw).unwrap()),
            // KVM_CREATE_VM and nothing else.
            "new" => Some(self.rig.uninitialized(self.mode, self.gpaw)),
            "ordinary" => Some(self.rig.ordinary(VmConfig::default())),
            _ if name.starts_with("ordinary-") => Some(self.rig.ordinary(ordinary(name))),
            "E4-lazy" => Some(self.rig.empty_with(VmConfig {
                mode: self.mode,
                eager_page_split: false,
                ..VmConfig::default()
            })),
            "none" => None,
            "none52" => {
                self.gpaw = Gpaw::W52;
                let config = common::platform_config();
                let platform = common::platform_of(&config);
                let platform = tdp_mmu::Platform {
                    five_level: false,
                    ..platform
                };
                self.rig.host = tdp_mmu::Host::new(platform).unwrap();
                None
            }
            _ => panic!("{name} is no base"),
        };
    }

    fn spoil(&self, call: &str, how: &str, rest: &[&str]) {
        let status = match how {
            "busy" => CompletionStatus::OPERAND_BUSY,
            "epoch" => CompletionStatus::PREVIOUS_TLB_EPOCH_BUSY,
            "err" => CompletionStatus::EPT_ENTRY_STATE_INCORRECT,
            "invalid" => CompletionStatus::OPERAND_INVALID,
            "entropy" => CompletionStatus::RND_NO_ENTROPY,
            "interrupted" => CompletionStatus::INTERRUPTED_RESUMABLE,
            "not-done" => CompletionStatus::FLUSHVP_NOT_DONE,
            _ => panic!("{how} is no way to spoil a call"),
        };
        let (mut times, mut skip) = (1, 0);
        for word in rest {
            match word.split_once('=') {
                Some(("times", "always")) => times = u32::MAX,
                Some(("times", n)) => times = n.parse().unwrap(),
                Some(("skip", n)) => skip = n.parse().unwrap(),
                _ => panic!("{word}"),
            }
        }
        let effect = match how {
            "interrupted" => Effect::Interrupt,
            _ => Effect::Answer(status),
        };
        let rule = Rule::next(calls::leaf(call), effect);
        self.rig.port.inject(Rule {
            times,
            skip,
            ..rule
        });
    }

    /// Acts, and compares the result.
    fn act(&mut self, action: &str, expected: &str) -> Outcome {
        self.rig.port.take_calls();
        self.before = match &self.vm {
            Some(vm) => Before {
                counts: vm.stats().counts,
                seq: vm.invalidate_seq(),
                pages: pages_of(vm),
                calls: Vec::new(),
            },
            None => Before::default(),
        };
        let tables = match &self.vm {
            Some(vm) if vm.info().kind == VmKind::Ordinary => BTreeMap::new(),
            Some(vm) => state::table_pages(vm, &self.rig.module),
            None => BTreeMap::new(),
        };
        if let Some(vm) = &self.vm {
            vm.trace(1 << 16);
            vm.take_events();
        }
        let words: Vec<&str> = action.split_whitespace().collect();
        let result = match self.perform(&words) {
            Ok(done) => done,
            Err(error) => name_of(&error),
        };
        self.events = self.vm.as_ref().map_or(Vec::new(), |vm| vm.take_events().0);
        let platform = self.rig.host.platform();
        let (global, shift) = (platform.global_hkid.into(), platform.hkid_shift());
        let made = self.rig.port.take_calls();
        let reclaims = made
            .iter()
            .filter(|call| call.leaf == Leaf::PHYMEM_PAGE_RECLAIM);
        self.reclaimed = reclaims
            .filter_map(|call| tables.get(&call.rcx).cloned())
            .collect();
        self.before.calls = made
            .iter()
            .map(|call| calls::short(call, global, shift))
            .collect();
        self.made.extend(self.before.calls.iter().cloned());
        same(result.as_str(), expected).map_err(|why| {
            format!(
                "{why}; {:?}",
                self.vm.as_ref().map(|vm| vm.bugs().reports())
            )
        })
    }

    fn perform(&mut self, words: &[&str]) -> Result<String, VmError> {
        if words == ["create"] {
            self.vm = Some(self.rig.create(self.mode, self.gpaw)?);
            return Ok("ok".into());
        }
        let vm = self.vm();
        let ok = |_: Counts| "ok".to_owned();
        let number = |word: &str| word.parse::<u32>().unwrap();
        let fault = |vcpu: u32, fault: Fault| {
            vm.handle_fault(vcpu, fault)
                .map(|report| format!("{:?}", report.ret_pf))
        };
        match *words {
            ["fault", gfn] => fault(0, common::private(hex(gfn))),
            // An exit for a page that the guest has not accepted: extended type 6.
            ["pending", gfn] => fault(
                0,
                Fault {
                    extended: 6,
                    ..common::private(hex(gfn))
                },
            ),
            ["fault", gfn, vcpu] => fault(number(vcpu), common::private(hex(gfn))),
            ["shared", how, gfn] => {
                let qualification = match how {
                    "read" => 1,
                    "write" => 2,
                    "fetch" => 4,
                    // The entry was there, readable only.
                    "present-write" => 2 | 1 << 3,
                    _ => panic!("{how} is no access"),
                };
                fault(
                    0,
                    Fault {
                        qualification,
                        ..common::shared(vm, hex(gfn))
                    },
                )
            }
            ["prefault", first, pages] => {
                let (gpa, size) = bytes(&range(first, pages));
                let mut done = 0;
                let counts = vm.pre_fault_memory(0, gpa, size, &mut |bytes| done = bytes >> 12)?;
                Ok(format!("{} {done:x}", ok(counts)))
            }
            ["attr", to, first, pages] => {
                let (gpa, size) = bytes(&range(first, pages));
                let attributes = if to == "private" { 8 } else { 0 };
                vm.set_memory_attributes(gpa, size, attributes).map(ok)
            }
            ["delete", id] => {
                let spec = SlotSpec {
                    slot_id: number(id),
                    ..SlotSpec::default()
                };
                vm.set_user_memory_region(spec).map(ok)
            }
            ["punch", id, first, pages] => {
                let (offset, size) = bytes(&range(first, pages));
                vm.punch_hole(number(id), offset, size)
                    .map(|(counts, _)| ok(counts))
            }
            ["close", id] => vm
                .close_guest_memfd(number(id))
                .map(|(counts, _)| ok(counts)),
            ["unmap", first, pages] => {
                let (start, size) = bytes(&range(first, pages));
                let start = start + common::USER_BASE;
                vm.unmap_hva(start, start + size).map(ok)
            }
            ["image", first, pages, ref measure @ ..] => {
                let (gpa, size) = bytes(&range(first, pages));
                let measure = if measure.is_empty() {
                    Measure::No
                } else {
                    Measure::Extend
                };
                vm.init_mem_region(
                    0,
                    InitRegion {
                        gpa,
                        size,
                        data: vec![7; 64].into(),
                        measure,
                    },
                )
                .map(ok)
            }
            ["poison", gfn] => vm.poison(hex(gfn) << 12).map(|()| "ok".into()),
            ["vcpu"] => vm.add_vcpu().map(|(_, counts)| ok(counts)),
            ["init"] => vm.init().map(ok),
            ["create-vcpu"] => vm.create_vcpu().map(|_| "ok".into()),
            ["init-vcpu", id] => vm.init_vcpu(number(id)).map(ok),
            ["load", id] => vm.load_mmu(number(id)).map(ok),
            ["load-both"] => std::thread::scope(|scope| {
                let loads = [0, 1].map(|vcpu| scope.spawn(move || vm.load_mmu(vcpu)));
                loads
                    .into_iter()
                    .try_for_each(|load| load.join().unwrap().map(drop))
            })
            .map(|()| "ok".into()),
            ["unload", id] => vm.unload_mmu(number(id)).map(|()| "ok".into()),
            ["finalize"] => vm.finalize().map(|(_, counts)| ok(counts)),
            ["zap-fast"] => vm.zap_all_fast().map(|()| "ok".into()),
            ["queue-event", id] => vm.queue_event(number(id)).map(|()| "ok".into()),
            ["release"] => vm.release_user_memory().map(|()| "ok".into()),
            ["destroy"] => {
                let destroyed = vm.destroy().map(|(_, leaked)| match leaked {
                    0 => "ok".into(),
                    pages => format!("leaked {pages}"),
                });
                self.destroyed = true;
                destroyed
            }
            _ => actions::shared(vm, words),
        }
    }

    fn delta(&self, of: impl Fn(&Counts) -> u64) -> u64 {
        of(&self.vm().stats().counts) - of(&self.before.counts)
    }

    fn stat(&self, name: &str) -> u64 {
        self.delta(|counts| match name {
            "pf_taken" => counts.pf_taken,
            "pf_fixed" => counts.pf_fixed,
            "pf_spurious" => counts.pf_spurious,
            "pf_emulate" => counts.pf_emulate,
            "pf_fast" => counts.pf_fast,
            "pf_mmio_spte_created" => counts.pf_mmio_spte_created,
            _ => panic!("{name} is no statistic"),
        })
    }

    fn check_calls(&self, expected: &str) -> Outcome {
        let expected = calls::expand(expected);
        if self.before.calls == expected {
            return Ok(());
        }
        Err(format!("found {}", calls::fold(&self.before.calls)))
    }

    /// `+n`, `-n`: what the last action added or took.
    fn check_pages(&self, level: usize, change: &str) -> Outcome {
        let now = pages_of(self.vm())[level];
        let found = now.cast_signed() - self.before.pages[level].cast_signed();
        same(found, change.parse().unwrap())
    }

    /// Names of the last action's tracepoints, in order, `kvm_` and `mmu_` left out; a name stands
    /// for all its neighbours of the same kind.
    fn check_events(&self, expected: &[&str]) -> Outcome {
        let mut names: Vec<&str> = self
            .events
            .iter()
            .map(|event| {
                let name = event.name();
                let name = name.strip_prefix("kvm_").unwrap_or(name);
                let name = name.strip_prefix("tdp_").unwrap_or(name);
                name.strip_prefix("mmu_").unwrap_or(name)
            })
            .collect();
        names.dedup();
        same(names.join(" "), expected.join(" "))
    }

    /// One of the last action's tracepoints, to the letter.
    fn check_event(&self, expected: &str) -> Outcome {
        let texts: Vec<String> = self
            .events
            .iter()
            .map(|event| format!("{}: {event}", event.name()))
            .collect();
        if texts.iter().any(|text| text == expected) {
            return Ok(());
        }
        Err(format!("not among {texts:#?}"))
    }

    /// Level at which a shared frame is mapped.
    fn check_level(&self, gfn: &str, expected: u64) -> Outcome {
        let gpa = common::shared(self.vm(), hex(gfn)).gpa;
        let walk = self.vm().walk(gpa, false).unwrap();
        let last = walk.entries.last().filter(|_| walk.mapped);
        same(
            last.map(|entry| u64::from(entry.level.get())),
            Some(expected),
        )
    }

    /// Role word and references of each root, newest first.
    fn check_roots(&self, expected: &[&str]) -> Outcome {
        let roots = self.vm().roots();
        let found: Vec<String> = roots
            .iter()
            .map(|root| format!("{:x}:{}", root.role, root.count))
            .collect();
        same(found.join(" "), expected.join(" "))
    }

    fn check_spte(&self, tree: &str, gfn: &str, value: &str) -> Outcome {
        let trees = state::trees(self.vm());
        let leaves = if tree == "mirror" {
            &trees.mirror
        } else {
            &trees.direct
        };
        let found = leaves.get(&hex(gfn)).copied();
        match value {
            "np" => same(found, None),
            "mmio" => same(trees.mmio.contains(&hex(gfn)), true),
            value => same(found.map(|spte| spte & NOT_PFN), Some(hex(value))),
        }
    }

    fn check_tables(&self, tree: &str, expected: u64) -> Outcome {
        let trees = state::trees(self.vm());
        let tables = if tree == "mirror" {
            trees.mirror_tables
        } else {
            trees.direct_tables
        };
        same(tables.len() as u64, expected)
    }

    /// Index in the root of the shared path to a frame.
    fn check_index(&self, gfn: &str, expected: u64) -> Outcome {
        let walk = self
            .vm()
            .walk(common::shared(self.vm(), hex(gfn)).gpa, false)
            .unwrap();
        same(u64::from(walk.entries[0].index), expected)
    }

    fn check_sept(&self, gfn: &str, expected: &str) -> Outcome {
        let tree = state::private_tree(self.vm(), &self.rig.module);
        let entry = tree
            .iter()
            .find(|(gpa, level, _)| *gpa == hex(gfn) << 12 && *level == 0);
        let found = entry.map_or("FREE", |(_, _, state)| state.as_str());
        same(found, expected)
    }

    fn check_checks(&self, expected: &[&str]) -> Outcome {
        let reports = self.vm().bugs().reports();
        let found: Vec<String> = reports
            .iter()
            .map(|(check, _)| format!("{check:?}"))
            .collect();
        same(found.join(" "), expected.join(" "))
    }

    /// What holds behind every row.
    pub(crate) fn end(self) -> Outcome {
        let Some(vm) = &self.vm else {
            state::assert_nothing_left(&self.rig);
            return Ok(());
        };
        self.rig.port.clear_rules();
        if self.destroyed {
            if !vm.bugs().is_dead() && vm.bugs().reports().is_empty() {
                state::assert_nothing_left(&self.rig);
            }
            return Ok(());
        }
        if vm.bugs().is_dead() {
            // A bugged VM keeps what it has for whoever looks; its end must still come to an end.
            return vm.destroy().map(drop).map_err(|error| error.to_string());
        }
        check_invariants(vm, &self.rig);
        state::destroy(vm, &self.rig);
        Ok(())
    }
}

fn decimal(word: &str) -> u64 {
    word.parse()
        .unwrap_or_else(|_| panic!("{word} is not a number"))
}

/// The errno, and the flags of a memory fault.
fn name_of(error: &VmError) -> String {
    let name = match error.errno() {
        errno::ENOENT => "ENOENT",
        errno::EIO => "EIO",
        errno::EAGAIN => "EAGAIN",
        errno::ENOMEM => "ENOMEM",
        errno::EFAULT => "EFAULT",
        errno::EBUSY => "EBUSY",
        errno::EEXIST => "EEXIST",
        errno::EINVAL => "EINVAL",
        errno::EOPNOTSUPP => "EOPNOTSUPP",
        errno::EHWPOISON => "EHWPOISON",
        _ => "?",
    };
    match error.memory_fault() {
        Some(fault) => format!("{name} flags {}", fault.flags),
        None => name.into(),
    }
}

fn pages_of(vm: &Vm) -> [u64; 3] {
    let info = vm.info();
    [info.pages_4k, info.pages_2m, info.pages_1g]
}

/// `ordinary-noquirk-pml`: an ordinary VM with other settings.
fn ordinary(name: &str) -> VmConfig {
    let mut config = VmConfig::default();
    for word in name.split('-').skip(1) {
        match word {
            "noquirk" => config.slot_zap_all = false,
            "pml" => config.pml = true,
            "nx" => config.nx_huge_pages = true,
            "lazy" => config.eager_page_split = false,
            "manual" => config.dirty_log = DirtyLogMode::Manual,
            "allset" => config.dirty_log = DirtyLogMode::ManualInitiallySet,
            "5" => config.gpaw = Gpaw::W52,
            _ => panic!("{word} is no setting"),
        }
    }
    config
}

//! A guest's life inside its TD: accesses through the TLB, TDCALLs, exits, and what is noticed when
//! somebody breaks the rules.

mod common;

use common::Host;
use tdx_defs::{
    CompletionStatus as Status, Gpa, Gpr, Gprs, GuestLeaf, Hpa, Leaf, OperandId, Seamcall,
    TdAttributes, TdxLevel,
};
use tdx_module::hooks::LockObject;
use tdx_module::{
    Entry, GuestError, GuestOp, GuestStep, LockMode, LpId, Module, PRIVATE_PATTERN, PlatformConfig,
    Resumed, TdExit, Vector, Violation,
};

const FIRST: u64 = 0x4000_0000;
const LARGE: u64 = 0x4020_0000;
const LP: LpId = LpId(0);
/// Exit reasons.
const INTERRUPT: u16 = 1;
const EPT_VIOLATION: u16 = 48;
const TDCALL: u16 = 77;

/// A runnable TD with a vCPU on processor 0 and tables for its first 4 MiB.
struct Guest<'m> {
    host: Host<'m>,
    tdr: u64,
    tdvpr: u64,
}

impl<'m> Guest<'m> {
    fn new(module: &'m Module) -> Self {
        Self::with_attributes(module, TdAttributes::SEPT_VE_DISABLE)
    }

    fn with_attributes(module: &'m Module, attributes: TdAttributes) -> Self {
        let mut host = Host::new(module, 0, FIRST);
        let params = common::td_params().with_attributes(attributes.bits());
        let tdr = host.build_td_with(0x21, &params);
        host.link(tdr, 0);
        let tdvpr = host.build_vcpu(tdr);
        host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr));
        Self { host, tdr, tdvpr }
    }

    fn module(&self) -> &'m Module {
        self.host.module
    }

    fn enter(&self) -> Option<Gprs> {
        match self
            .module()
            .enter_vcpu(LP, &Seamcall::default().rcx(self.tdvpr))
        {
            Entry::Entered { vmcall } => vmcall,
            Entry::Refused(result) => panic!("refused: {}", result.status()),
        }
    }

    fn refused(&self) -> Status {
        match self
            .module()
            .enter_vcpu(LP, &Seamcall::default().rcx(self.tdvpr))
        {
            Entry::Refused(result) => result.status(),
            entered @ Entry::Entered { .. } => panic!("{entered:?}"),
        }
    }

    fn step(&self, op: &GuestOp) -> GuestStep {
        self.module().guest(LP, op)
    }

    fn resumed(&self, op: &GuestOp) -> Resumed {
        match self.step(op) {
            GuestStep::Resumed(resumed) => resumed,
            other => panic!("{op:?}: {other:?}"),
        }
    }

    fn exits(&self, op: &GuestOp) -> TdExit {
        match self.step(op) {
            GuestStep::Exited(exit) => exit,
            other => panic!("{op:?}: {other:?}"),
        }
    }

    fn leave(&self) {
        assert_eq!(
            self.exits(&GuestOp::ExternalInterrupt { vector: 0x20 })
                .reason(),
            INTERRUPT
        );
    }

    /// Gives the guest a 4 KiB page and lets it accept it.
    fn map(&self, gpa: u64, page: u64) {
        let aug = Seamcall::new(Leaf::MEM_PAGE_AUG).rcx(gpa).rdx(self.tdr);
        self.host.must(aug.r8(page));
        self.enter();
        let accepted = self.resumed(&GuestOp::accept(Gpa::new(gpa), level(0)));
        assert_eq!(accepted.status(), Some(Status::SUCCESS));
        self.leave();
    }

    fn on(&self, leaf: Leaf, gpa: u64) -> Seamcall {
        Seamcall::new(leaf).rcx(gpa).rdx(self.tdr)
    }

    fn track(&self) {
        self.host.must(Seamcall::new(Leaf::MEM_TRACK).rcx(self.tdr));
    }

    fn remove(&self, gpa: u64) {
        self.host.must(self.on(Leaf::MEM_RANGE_BLOCK, gpa));
        self.track();
        self.host.must(self.on(Leaf::MEM_PAGE_REMOVE, gpa));
    }
}

fn module() -> Module {
    Module::new(PlatformConfig::conformance()).unwrap()
}

fn level(level: u8) -> TdxLevel {
    TdxLevel::new(level).unwrap()
}

fn read(gpa: u64, len: usize) -> GuestOp {
    let gpa = Gpa::new(gpa);
    GuestOp::Read { gpa, len }
}

fn write(gpa: u64, data: &[u8]) -> GuestOp {
    let (gpa, data) = (Gpa::new(gpa), data.to_vec());
    GuestOp::Write { gpa, data }
}

#[test]
fn a_guest_reads_what_it_wrote_and_an_accepted_page_is_zero() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.enter();
    assert_eq!(guest.resumed(&read(0x1FFE, 2)).data, [0, 0]);
    guest.resumed(&write(0x1010, b"secret"));
    assert_eq!(guest.resumed(&read(0x100E, 4)).data, [0, 0, b's', b'e']);
    assert_eq!(
        guest.resumed(&GuestOp::Execute {
            gpa: Gpa::new(0x1000)
        }),
        Resumed::default()
    );
    guest.leave();
    guest.remove(0x1000);
    guest.map(0x1000, LARGE);
    guest.enter();
    assert_eq!(
        guest.resumed(&read(0x1010, 6)).data,
        [0; 6],
        "the old content is gone"
    );
    assert_eq!(module.violations(), tdx_module::Violations::default());
}

#[test]
fn accesses_that_cannot_be_change_nothing() {
    let module = module();
    let guest = Guest::new(&module);
    let not_inside = GuestStep::Impossible(GuestError::NotInside { lp: LP });
    assert_eq!(guest.step(&read(0x1000, 1)), not_inside);
    let nowhere = LpId(99);
    assert_eq!(
        module.guest(nowhere, &GuestOp::Hlt),
        GuestStep::Impossible(GuestError::NotInside { lp: nowhere })
    );
    guest.enter();
    for (gpa, len) in [(0x1000, 0), (0x1FFF, 2), (0x1000, 4097), (u64::MAX, 1)] {
        let step = guest.step(&read(gpa, len));
        let impossible = matches!(step, GuestStep::Impossible(_));
        assert!(impossible || gpa == u64::MAX, "{gpa:#x} {len}: {step:?}");
    }
    assert_eq!(
        module.vcpu_inside(LP),
        Some((Hpa::new(guest.tdr), Hpa::new(guest.tdvpr)))
    );
}

#[test]
fn a_missing_page_exits_with_the_qualification_of_the_access() {
    let module = module();
    let guest = Guest::new(&module);
    let shared = 1 << 47 | 0x3000;
    for (op, gpa, qualification) in [
        (read(0x2008, 8), 0x2000, 1),
        (write(0x2008, &[1]), 0x2000, 2),
        (
            GuestOp::Execute {
                gpa: Gpa::new(0x2FFF),
            },
            0x2000,
            4,
        ),
        (read(shared, 8), shared, 1),
    ] {
        guest.enter();
        let exit = guest.exits(&op);
        let [rcx, rdx, r8] = [Gpr::Rcx, Gpr::Rdx, Gpr::R8].map(|register| exit.regs[register]);
        assert_eq!(exit.reason(), EPT_VIOLATION);
        assert_eq!((rcx, rdx, r8), (qualification, 0, gpa), "{op:?}");
    }
}

#[test]
fn a_pending_page_is_reported_to_the_host_or_to_the_guest() {
    for (attributes, exits) in [
        (TdAttributes::SEPT_VE_DISABLE, true),
        (TdAttributes::empty(), false),
    ] {
        let module = module();
        let guest = Guest::with_attributes(&module, attributes);
        guest
            .host
            .must(guest.on(Leaf::MEM_PAGE_AUG, 0x1000).r8(LARGE));
        guest.enter();
        let touch = read(0x1234, 1);
        if exits {
            assert_eq!(guest.exits(&touch).regs[Gpr::Rdx], 6);
            continue;
        }
        assert_eq!(guest.resumed(&touch).injected, Some(Vector::VE));
        let ve_info = GuestOp::tdcall(GuestLeaf::VP_VEINFO_GET, Gprs::default());
        let info = guest.resumed(&ve_info).regs.unwrap();
        let shown = [Gpr::Rax, Gpr::Rcx, Gpr::Rdx, Gpr::R9].map(|register| info[register]);
        assert_eq!(shown, [0, 48, 0x181, 0x1234]);
        assert_eq!(
            guest.resumed(&ve_info).status(),
            Some(Status::NO_VALID_VE_INFO)
        );
        // The second #VE before the first one is fetched is a double fault.
        assert_eq!(guest.resumed(&GuestOp::Hlt).injected, Some(Vector::VE));
        assert_eq!(guest.resumed(&touch).injected, Some(Vector::DF));
    }
}

#[test]
fn a_cached_translation_is_used_while_its_page_is_blocked_and_gone_after_tracking() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.enter();
    guest.resumed(&write(0x1000, &[7]));
    assert_eq!(module.inspect_tlb(LP).len(), 1);
    guest.host.must(guest.on(Leaf::MEM_RANGE_BLOCK, 0x1000));
    guest.track();
    assert_eq!(guest.resumed(&read(0x1000, 1)).data, [7], "still cached");
    let remove = guest.on(Leaf::MEM_PAGE_REMOVE, 0x1000);
    let not_done = Status::TLB_TRACKING_NOT_DONE.with(OperandId::RCX);
    assert_eq!(guest.host.call(&remove).status(), not_done);
    assert_eq!(module.processors_inside(Hpa::new(guest.tdr)), [LP]);
    guest.leave();
    guest.host.must(remove);
    guest.enter();
    assert!(module.inspect_tlb(LP).is_empty(), "the entry flushed");
    assert_eq!(guest.exits(&read(0x1000, 1)).reason(), EPT_VIOLATION);
}

#[test]
fn a_missing_flush_is_reported_by_name_and_never_served() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.enter();
    guest.resumed(&write(0x1000, &[7]));
    guest.leave();
    module.leave_out_tlb_flushes(true);
    guest.remove(0x1000);
    guest.enter();
    let (gpa, page) = (Gpa::new(0x1008), Hpa::new(LARGE));
    let stale = GuestStep::Violated(Violation::StaleTranslation { gpa, page });
    assert_eq!(guest.step(&read(0x1008, 1)), stale);
    assert_eq!(guest.step(&write(0x1008, &[1])), stale);
    assert_eq!(module.violations().stale_translations, 2);
    assert!(module.vcpu_inside(LP).is_some());
}

#[test]
fn flushing_a_vcpu_takes_its_translations() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.enter();
    guest.resumed(&read(0x1000, 1));
    guest.leave();
    assert_eq!(module.inspect_tlb(LP).len(), 1);
    guest
        .host
        .must(Seamcall::new(Leaf::VP_FLUSH).rcx(guest.tdvpr));
    assert!(module.inspect_tlb(LP).is_empty());
    guest.enter();
    assert_eq!(module.inspect_tds()[0].num_assoc_vcpus, 1);
}

#[test]
fn the_host_never_reads_a_private_page_and_writing_one_is_a_machine_check() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.enter();
    guest.resumed(&write(0x1000, b"secret"));
    let hpa = Hpa::new(LARGE - 2);
    assert_eq!(
        module.read_host_memory(hpa, 4),
        [0, 0, PRIVATE_PATTERN, PRIVATE_PATTERN]
    );
    module.write_host_memory(Hpa::new(LARGE + 0x800), &[1]);
    let exit = guest.exits(&read(0x1000, 6));
    let violation = Violation::MachineCheck {
        gpa: Gpa::new(0x1000),
        page: Hpa::new(LARGE),
    };
    assert_eq!(exit.violation, Some(violation));
    assert!(exit.status().is(Status::NON_RECOVERABLE_TD_NON_ACCESSIBLE));
    assert_eq!(module.violations().machine_checks, 1);
    assert_eq!(guest.refused(), Status::TD_FATAL);
    let td = &module.inspect_tds()[0];
    assert!(
        td.is_fatal && td.epoch_refcount == [0, 1],
        "the epoch is not given back: {td:?}"
    );
}

#[test]
fn a_spoilt_page_is_good_again_once_it_is_accepted_anew() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    module.write_host_memory(Hpa::new(LARGE), &[1]);
    guest.remove(0x1000);
    guest.map(0x1000, LARGE);
    guest.enter();
    assert_eq!(guest.resumed(&read(0x1000, 1)).data, [0]);
    module.write_host_memory(Hpa::new(guest.tdr), &[1]);
    assert!(
        module.inspect_tds()[0].is_fatal,
        "a control page was written"
    );
}

#[test]
fn an_interrupted_acceptance_goes_on_where_it_stopped() {
    let module = module();
    let guest = Guest::new(&module);
    let gpa = 0x20_0001;
    guest.host.must(guest.on(Leaf::MEM_PAGE_AUG, gpa).r8(LARGE));
    guest.enter();
    module.set_interrupt_pending(true, 0);
    let accept = GuestOp::accept(Gpa::new(0x20_0000), level(1));
    assert_eq!(guest.exits(&accept).reason(), INTERRUPT);
    let shown = guest.host.must(guest.on(Leaf::MEM_SEPT_RD, gpa));
    assert_eq!(
        (shown.rcx, shown.rdx),
        (0x8000_0000_4020_10F0, 0x201),
        "one part is zeroed"
    );
    module.set_interrupt_pending(false, 0);
    guest.enter();
    assert_eq!(guest.resumed(&accept).status(), Some(Status::SUCCESS));
    let shown = guest.host.must(guest.on(Leaf::MEM_SEPT_RD, gpa));
    assert_eq!((shown.rcx, shown.rdx), (0x8000_0000_4020_00F7, 0x401));
}

#[test]
fn a_page_that_was_accepted_in_part_is_removed_or_split_as_a_whole() {
    for leaf in [Leaf::MEM_PAGE_REMOVE, Leaf::MEM_PAGE_DEMOTE] {
        let module = module();
        let mut guest = Guest::new(&module);
        let gpa = 0x20_0001;
        guest.host.must(guest.on(Leaf::MEM_PAGE_AUG, gpa).r8(LARGE));
        guest.enter();
        module.set_interrupt_pending(true, 5);
        guest.exits(&GuestOp::accept(Gpa::new(0x20_0000), level(1)));
        module.set_interrupt_pending(false, 0);
        guest.host.must(guest.on(Leaf::MEM_RANGE_BLOCK, gpa));
        guest.track();
        let table = guest.host.page();
        let done = guest.host.must(guest.on(leaf, gpa).r8(table));
        if leaf == Leaf::MEM_PAGE_REMOVE {
            assert_eq!(done.rcx, LARGE);
        } else {
            let shown = guest.host.must(guest.on(Leaf::MEM_SEPT_RD, 0x20_3000));
            assert_eq!(
                (shown.rcx, shown.rdx),
                (1 << 63 | (LARGE + 0x3000) | 0xF0, 0x200)
            );
        }
        common::check_invariants(&module);
    }
}

#[test]
fn a_call_to_the_host_passes_the_chosen_registers_both_ways() {
    let module = module();
    let guest = Guest::new(&module);
    assert_eq!(guest.enter(), None);
    let call = GuestOp::map_gpa(Gpa::new(1 << 47), 0x1000);
    let exit = guest.exits(&call);
    let shown = [Gpr::Rcx, Gpr::R10, Gpr::R11, Gpr::R12, Gpr::R13].map(|r| exit.regs[r]);
    assert_eq!(exit.reason(), TDCALL);
    assert_eq!(shown, [0x3C00, 0, 0x1_0001, 1 << 47, 0x1000]);
    let answer = Seamcall {
        rcx: guest.tdvpr,
        r11: 0x2000,
        ..Seamcall::default()
    };
    let Entry::Entered { vmcall } = module.enter_vcpu(LP, &answer) else {
        panic!("refused");
    };
    let regs = vmcall.unwrap();
    assert_eq!(
        (regs[Gpr::R11], regs[Gpr::R12]),
        (0x2000, 0),
        "all four come back"
    );
    let forbidden = GuestOp::tdcall(GuestLeaf::VP_VMCALL, Gprs::default().with(Gpr::Rcx, 0x10));
    let invalid = Status::OPERAND_INVALID.with(OperandId::RCX);
    assert_eq!(
        guest.resumed(&forbidden).status(),
        Some(invalid),
        "RSP stays the guest's"
    );
}

#[test]
fn run_time_measurements_grow_and_their_lock_is_respected() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.enter();
    let extend = GuestOp::rtmr_extend(Gpa::new(0x1000), 3);
    assert_eq!(guest.resumed(&extend).status(), Some(Status::SUCCESS));
    let rtmr = module.inspect_tds()[0].rtmrs[3];
    assert_eq!(rtmr[..4], [0xF5, 0x7B, 0xB7, 0xED], "of 48 zero bytes");
    let lock = LockObject::Rtmr {
        tdr: Hpa::new(guest.tdr),
    };
    assert!(module.hold_lock(lock, LockMode::Exclusive));
    let busy = Status::OPERAND_BUSY.with(OperandId::RTMR);
    assert_eq!(guest.resumed(&extend).status(), Some(busy));
    assert!(module.release_lock(lock, LockMode::Exclusive));
    assert_eq!(module.inspect_tds()[0].rtmrs[3], rtmr);
}

#[test]
fn a_page_tells_how_it_is_mapped() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.host.must(
        guest
            .on(Leaf::MEM_PAGE_AUG, 0x20_0001)
            .r8(LARGE + (2 << 20)),
    );
    guest.enter();
    let call = |leaf, rcx, rdx| {
        GuestOp::tdcall(
            leaf,
            Gprs::default().with(Gpr::Rcx, rcx).with(Gpr::Rdx, rdx),
        )
    };
    for (gpa, rcx) in [(0x1234, 0x1000), (0x20_5000, 1 << 62 | 0x20_0001)] {
        let regs = guest
            .resumed(&call(GuestLeaf::MEM_PAGE_ATTR_RD, gpa, 0))
            .regs
            .unwrap();
        assert_eq!(
            (regs[Gpr::Rax], regs[Gpr::Rcx], regs[Gpr::Rdx]),
            (0, rcx, 0),
            "{gpa:#x}"
        );
    }
    let write = |rcx, rdx| call(GuestLeaf::MEM_PAGE_ATTR_WR, rcx, rdx);
    for (op, status) in [
        (write(0x1000, 0), Status::SUCCESS),
        (write(0x1, 0), Status::PAGE_SIZE_MISMATCH.with_details(1)),
        (
            write(0x1000, 1),
            Status::OPERAND_INVALID.with(OperandId::RDX),
        ),
        (
            write(0x1008, 0),
            Status::OPERAND_INVALID.with(OperandId::RCX),
        ),
    ] {
        assert_eq!(guest.resumed(&op).status(), Some(status), "{op:?}");
    }
    let exit = guest.exits(&write(0x20_5000, 0));
    assert_eq!(
        exit.regs[Gpr::Rdx],
        0x4088 << 32 | 5,
        "a 2 MiB page is in the way"
    );
    guest.enter();
    let exit = guest.exits(&call(GuestLeaf::MEM_PAGE_ATTR_RD, 0x5000, 0));
    assert_eq!((exit.regs[Gpr::Rcx], exit.regs[Gpr::Rdx]), (1, 0));
}

#[test]
fn the_guest_learns_about_its_td_and_unknown_calls_are_refused() {
    let module = module();
    let guest = Guest::new(&module);
    guest.enter();
    let info = GuestOp::tdcall(GuestLeaf::VP_INFO, Gprs::default());
    let regs = guest.resumed(&info).regs.unwrap();
    let shown = [Gpr::Rcx, Gpr::Rdx, Gpr::R8, Gpr::R9].map(|register| regs[register]);
    assert_eq!(shown, [48, 1 << 28, 4 << 32 | 1, 0]);
    let invalid = Some(Status::OPERAND_INVALID.with(OperandId::RAX));
    let unknown = GuestOp::tdcall(GuestLeaf(99), Gprs::default());
    assert_eq!(guest.resumed(&unknown).status(), invalid);
}

#[test]
fn a_host_without_a_guest_gets_its_vcpu_back_by_an_interrupt() {
    let module = module();
    let guest = Guest::new(&module);
    let enter = Seamcall::new(Leaf::VP_ENTER).rcx(guest.tdvpr);
    for _ in 0..3 {
        let result = guest.host.call(&enter);
        let shown = (result.rax, result.r9 >> 31, result.completed);
        assert_eq!(shown, (1, 1, 1), "{}", result.status());
    }
    assert_eq!(module.inspect_tds()[0].epoch_refcount, [0, 0]);
    guest.enter();
    let busy = Status::OPERAND_BUSY.with(OperandId::TDVPR);
    let second = Host::new(&module, 0, FIRST + 0x10_0000).call(&enter);
    // The vCPU itself is not looked at: its processor is taken.
    assert_eq!(second.status(), busy);
    guest.leave();
    guest.host.call(&enter);
}

#[test]
fn a_host_that_lets_the_guest_fault_in_place_is_kept_from_entering() {
    let module = module();
    let guest = Guest::new(&module);
    let touch = write(0x2000, &[1]);
    for _ in 0..7 {
        guest.enter();
        assert_eq!(guest.exits(&touch).reason(), EPT_VIOLATION);
    }
    // The next entry would fault again, so there is none.
    assert_eq!(guest.refused(), Status::SUCCESS.with_details(48));
    assert_eq!(module.inspect_tds()[0].epoch_refcount, [0, 0]);
    guest
        .host
        .must(guest.on(Leaf::MEM_PAGE_AUG, 0x2000).r8(LARGE));
    assert_eq!(
        guest.refused(),
        Status::SUCCESS.with_details(48),
        "pending is not enough"
    );
}

#[test]
fn a_second_vcpu_on_a_processor_starts_without_translations() {
    let module = module();
    let mut host = Host::new(&module, 0, FIRST);
    let params = common::td_params().with_attributes(TdAttributes::SEPT_VE_DISABLE.bits());
    let tdr = host.build_td_with(0x21, &params);
    host.link(tdr, 0);
    let [first, second] = [(), ()].map(|()| host.build_vcpu(tdr));
    host.must(Seamcall::new(Leaf::MR_FINALIZE).rcx(tdr));
    let guest = Guest {
        host,
        tdr,
        tdvpr: first,
    };
    guest.map(0x1000, LARGE);
    guest.enter();
    guest.resumed(&read(0x1000, 1));
    guest.leave();
    let other = Guest {
        tdvpr: second,
        ..guest
    };
    other.enter();
    assert!(module.inspect_tlb(LP).is_empty());
    other.leave();
    common::check_invariants(&module);
}

#[test]
fn a_td_that_a_machine_check_has_lost_can_be_torn_down() {
    let module = module();
    let guest = Guest::new(&module);
    guest.map(0x1000, LARGE);
    guest.enter();
    module.write_host_memory(Hpa::new(LARGE), &[1]);
    assert!(guest.exits(&read(0x1000, 1)).violation.is_some());
    let host = &guest.host;
    host.must(Seamcall::new(Leaf::VP_FLUSH).rcx(guest.tdvpr));
    host.must(Seamcall::new(Leaf::MNG_VPFLUSHDONE).rcx(guest.tdr));
    host.must(Seamcall::new(Leaf::PHYMEM_CACHE_WB));
    host.must(Seamcall::new(Leaf::MNG_KEY_FREEID).rcx(guest.tdr));
    let mut pages = Vec::new();
    module.inspect_pamt(|page| pages.push(page.hpa.get()));
    for page in pages.into_iter().filter(|page| *page != guest.tdr) {
        host.must(Seamcall::new(Leaf::PHYMEM_PAGE_RECLAIM).rcx(page));
    }
    host.must(Seamcall::new(Leaf::PHYMEM_PAGE_RECLAIM).rcx(guest.tdr));
    common::check_invariants(&module);
    // The page that the host wrote to is good for another TD.
    let other = Guest::new(&module);
    other.map(0x1000, LARGE);
    other.enter();
    assert_eq!(other.resumed(&read(0x1000, 1)).data, [0]);
}

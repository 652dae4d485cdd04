//! Several logical processors at once.

mod common;

use common::{Host, PAGE, check_invariants};
use tdx_defs::{CompletionStatus, Leaf, OperandId, PageType, Seamcall};
use tdx_module::{Module, PlatformConfig};

const GIB: u64 = 1 << 30;
const PAGES: u32 = 64 * 512;

#[test]
fn two_processors_fill_disjoint_ranges_of_one_td() {
    let module = Module::new(PlatformConfig::roomy()).unwrap();
    let mut host = Host::new(&module, 0, 4 * GIB);
    let tdr = host.build_td(1025);
    let bytes = u64::from(PAGES) * PAGE;
    for gpa in (0..2 * bytes).step_by(2 << 20) {
        host.link(tdr, gpa);
    }
    let fill = |lp: u32| {
        let host = Host::new(&module, lp, 0);
        let base = u64::from(lp) * bytes;
        let mut done = 0;
        // A lock word may be busy for a moment, as on the real thing; the host tries again.
        while done < PAGES {
            let at = base + u64::from(done) * PAGE;
            let result = host.aug(tdr, at, 8 * GIB + at, PAGES - done);
            done += result.completed;
            assert!(
                done == PAGES || result.status().is_busy(),
                "{}",
                result.status()
            );
        }
    };
    std::thread::scope(|scope| {
        scope.spawn(|| fill(0));
        scope.spawn(|| fill(1));
    });

    let regular = module
        .usage()
        .pages
        .into_iter()
        .find(|(kind, _)| *kind == PageType::REG);
    assert_eq!(regular, Some((PageType::REG, 2 * u64::from(PAGES))));
    let td = &module.inspect_tds()[0];
    let mut owned = 0;
    module.inspect_pamt(|page| {
        owned += if page.owner == td.tdr {
            page.size.pages()
        } else {
            0
        }
    });
    assert_eq!(td.children, owned);
}

#[test]
fn one_page_goes_to_one_of_two_processors() {
    let module = Module::new(PlatformConfig::roomy()).unwrap();
    let mut host = Host::new(&module, 0, 4 * GIB);
    let tdr = host.build_td(1025);
    host.link(tdr, 0);
    const ROUNDS: u64 = 512;
    let grab = |lp: u32| {
        let host = Host::new(&module, lp, 0);
        let mut won = 0;
        for round in 0..ROUNDS {
            // Both want the same physical page, at different guest addresses.
            let gpa = (round / 2 * 2 + u64::from(lp)) * PAGE;
            let aug = Seamcall::new(Leaf::MEM_PAGE_AUG).rcx(gpa).rdx(tdr);
            won += u64::from(host.call(&aug.r8(8 * GIB + round / 2 * PAGE)).completed);
        }
        won
    };
    let (first, second) = std::thread::scope(|scope| {
        let first = scope.spawn(|| grab(0));
        let second = scope.spawn(|| grab(1));
        (first.join().unwrap(), second.join().unwrap())
    });
    assert!(first + second <= ROUNDS / 2);
    check_invariants(&module);
}

#[test]
fn a_processor_that_holds_a_td_alone_makes_others_busy() {
    let module = Module::new(PlatformConfig::roomy()).unwrap();
    let mut host = Host::new(&module, 0, 4 * GIB);
    let tdr = host.build_td(1025);
    let lock = tdx_module::hooks::LockObject::Pamt {
        hpa: tdx_defs::Hpa::new(tdr),
        size: tdx_module::PageSize::Small,
    };
    assert!(module.hold_lock(lock, tdx_module::LockMode::Exclusive));
    let track = Seamcall::new(Leaf::MEM_TRACK).rcx(tdr);
    let busy = CompletionStatus::OPERAND_BUSY.with(OperandId::RCX);
    assert_eq!(host.call(&track).status(), busy);
    assert!(module.release_lock(lock, tdx_module::LockMode::Exclusive));
    host.must(track);
}

#[test]
fn a_range_is_merged_and_split_while_another_processor_works_in_it() {
    let module = Module::new(PlatformConfig::conformance()).unwrap();
    let mut host = Host::new(&module, 0, 0x4000_0000);
    let tdr = host.build_td(0x21);
    host.link(tdr, 0);
    let first = 0x4020_0000;
    assert_eq!(host.aug(tdr, 0, first, 512).completed, 512);
    let spare = [host.page(), host.page()];
    let on = |leaf, rcx| Seamcall::new(leaf).rcx(rcx).rdx(tdr);
    let merge = || {
        let host = Host::new(&module, 1, 0);
        let mut merged = 0;
        for round in 0..4000 {
            merged += host.call(&on(Leaf::MEM_PAGE_PROMOTE, 1)).completed;
            let page = spare[round % 2];
            host.call(&on(Leaf::MEM_PAGE_DEMOTE, 1).r8(page));
        }
        merged
    };
    let work = || {
        let host = Host::new(&module, 2, 0);
        for round in 0..8000u64 {
            let gpa = round % 512 * PAGE;
            if host.call(&on(Leaf::MEM_PAGE_REMOVE, gpa)).completed == 1 {
                // The page has to come back, or nothing is ever merged again.
                let back = on(Leaf::MEM_PAGE_AUG, gpa).r8(first + gpa);
                while host.call(&back).status().is_busy() {}
            }
            host.call(&on(Leaf::MEM_RANGE_BLOCK, gpa));
            while host
                .call(&on(Leaf::MEM_RANGE_UNBLOCK, gpa))
                .status()
                .is_busy()
            {}
        }
    };
    let merged = std::thread::scope(|scope| {
        let merging = scope.spawn(merge);
        scope.spawn(work);
        merging.join().unwrap()
    });
    assert!(merged > 0);
    check_invariants(&module);
}

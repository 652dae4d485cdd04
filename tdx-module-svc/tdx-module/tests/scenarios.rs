//! Scenarios whose precondition no sequence of calls reaches: a hook makes it.

mod common;

use common::Host;
use tdx_defs::{CompletionStatus as Status, Hpa, Leaf, Seamcall};
use tdx_module::hooks::SystemState;
use tdx_module::{Module, PlatformConfig, Release};

const TDR: u64 = 0x4000_0000;

fn modules() -> [Module; 2] {
    [Release::R1_5_05, Release::R1_5_34].map(|release| {
        Module::new(PlatformConfig {
            release,
            ..PlatformConfig::conformance()
        })
        .unwrap()
    })
}

#[test]
fn sa_21_a_fatal_td_is_refused() {
    for module in modules() {
        let mut host = Host::new(&module, 0, TDR);
        host.build_td(0x21);
        assert!(module.mark_fatal(Hpa::new(TDR)));
        let call = Seamcall::new(Leaf::MEM_SEPT_ADD)
            .rcx(3)
            .rdx(TDR)
            .r8(0x4001_0000);
        let result = host.call(&call);
        assert_eq!(
            (result.status(), result.rcx, result.rdx),
            (Status::TD_FATAL, 0, 0)
        );
        let tds = module.inspect_tds();
        assert!(tds[0].is_fatal && tds[0].children == 6, "{tds:?}");
    }
}

#[test]
fn td_23_no_td_is_made_before_the_module_is_ready() {
    for module in modules() {
        let host = Host::new(&module, 0, TDR);
        module.set_system_state(SystemState::InitDone);
        let call = Seamcall::new(Leaf::MNG_CREATE).rcx(TDR).rdx(0x21);
        assert_eq!(host.call(&call).status(), Status::SYS_NOT_READY);
        assert!(module.inspect_tds().is_empty());
        module.set_system_state(SystemState::Ready);
        host.must(call);
    }
}

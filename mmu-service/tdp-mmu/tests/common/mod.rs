//! A host, a VM and the real module core in one process, for tests of the public face.
#![allow(dead_code, reason = "each test uses the part that it needs")]

pub(crate) mod calls;
pub(crate) mod direct_pairs;
pub(crate) mod gate;
pub(crate) mod guest;
pub(crate) mod pairs;
pub(crate) mod port;
pub(crate) mod state;
pub(crate) mod witness;

use std::sync::Arc;

use tdp_mmu::{
    Fault, Host, InitRegion, Measure, MemoryRange, Mode, Platform, RetPf, SlotSpec, Vm, VmConfig,
    VmError, VmKind,
};
use tdx_defs::{Gpaw, Hpa};
use tdx_module::{Module, PlatformConfig, Tdmr};

use port::{Call, Port};

const GIB: u64 = 1 << 30;
/// Pages of the slot that the baselines have: 1 GiB.
pub(crate) const SLOT_PAGES: u64 = 0x4_0000;
/// User address of the first frame.
pub(crate) const USER_BASE: u64 = 0x7F00_0000_0000;

/// Host, module and the way between them.
pub(crate) struct Rig {
    pub(crate) module: Arc<Module>,
    pub(crate) port: Arc<Port>,
    pub(crate) host: Arc<Host>,
}

/// Two TDMRs of 4 GiB with a hole between them and a reserved area in the first.
pub(crate) fn platform_config() -> PlatformConfig {
    let tdmr = |gib: u64, reserved| Tdmr {
        base: Hpa::new(gib * GIB),
        size: 4 * GIB,
        reserved,
        initialized: true,
    };
    let reserved = std::ops::Range {
        start: 4 * GIB,
        end: 4 * GIB + (2 << 20),
    };
    PlatformConfig {
        tdmrs: vec![tdmr(4, vec![reserved]), tdmr(12, vec![])],
        ..PlatformConfig::conformance()
    }
}

/// What the host learns of the module's platform.
pub(crate) fn platform_of(config: &PlatformConfig) -> Platform {
    let tdmrs = config.tdmrs.iter().filter(|tdmr| tdmr.initialized);
    Platform {
        tdmrs: tdmrs
            .map(|tdmr| MemoryRange {
                base: tdmr.base.get(),
                size: tdmr.size,
                reserved: tdmr
                    .reserved
                    .iter()
                    .map(|r| (r.start, r.end - r.start))
                    .collect(),
            })
            .collect(),
        hkid_start: config.hkid_start.into(),
        hkid_count: config.hkid_count.into(),
        global_hkid: config.global_hkid.into(),
        maxpa: config.maxpa.into(),
        hkid_bits: config.hkid_bits.into(),
        logical_processors: config.logical_processors,
        packages: config.packages,
        tdcs_pages: config.tdcs_pages.into(),
        tdvps_pages: config.tdvps_pages.into(),
        attributes_fixed0: config.attributes.fixed0,
        attributes_fixed1: config.attributes.fixed1,
        xfam_fixed0: config.xfam.fixed0,
        xfam_fixed1: config.xfam.fixed1,
        five_level: config.five_level,
    }
}

impl Default for Rig {
    fn default() -> Self {
        Self::new()
    }
}

impl Rig {
    pub(crate) fn new() -> Self {
        Self::on(platform_config())
    }

    /// On another platform.
    pub(crate) fn on(config: PlatformConfig) -> Self {
        let host = Host::new(platform_of(&config)).unwrap();
        let module = Arc::new(Module::new(config).unwrap());
        let port = Arc::new(Port::new(Arc::clone(&module)));
        Self { module, port, host }
    }

    /// Calls of a preparation that nobody looks at.
    pub(crate) fn forget_calls(&self) {
        self.port.take_calls();
    }

    /// The calls since the last time, shown to whoever plays a scenario.
    pub(crate) fn look_at_calls(&self) -> Vec<Call> {
        let made = self.port.take_calls();
        let platform = self.host.platform();
        let (global, shift) = (platform.global_hkid.into(), platform.hkid_shift());
        witness::show(made.iter().map(|call| calls::short(call, global, shift)));
        made
    }

    /// A VM that is no TD yet.
    pub(crate) fn uninitialized(&self, mode: Mode, gpaw: Gpaw) -> Vm {
        let config = VmConfig {
            gpaw,
            mode,
            ..VmConfig::default()
        };
        let port = Arc::clone(&self.port);
        Vm::new(Arc::clone(&self.host), port, config)
    }

    /// A TD that is initialised, with nothing in it.
    pub(crate) fn create(&self, mode: Mode, gpaw: Gpaw) -> Result<Vm, VmError> {
        let vm = self.uninitialized(mode, gpaw);
        vm.init().map(|_| vm)
    }

    /// An ordinary VM with one vCPU, no slot.
    pub(crate) fn ordinary(&self, config: VmConfig) -> Vm {
        let vm = Vm::create_ordinary(Arc::clone(&self.host), config).unwrap();
        vm.add_vcpu().unwrap();
        vm
    }

    /// Baseline Pre: one vCPU, one private guest_memfd slot, roots not loaded, not finalised.
    pub(crate) fn pre(&self, mode: Mode, gpaw: Gpaw) -> Vm {
        let vm = self.create(mode, gpaw).unwrap();
        fill(&vm);
        vm
    }

    /// E4 with other settings.
    pub(crate) fn empty_with(&self, config: VmConfig) -> Vm {
        let port = Arc::clone(&self.port);
        let (vm, _) = Vm::create(Arc::clone(&self.host), port, config).unwrap();
        fill(&vm);
        vm.load_mmu(0).unwrap();
        vm.finalize().unwrap();
        vm
    }

    /// Baselines E4 and E5: Pre with roots loaded, finalised.
    pub(crate) fn empty(&self, mode: Mode, gpaw: Gpaw) -> Vm {
        let vm = self.pre(mode, gpaw);
        vm.load_mmu(0).unwrap();
        vm.finalize().unwrap();
        vm
    }
}

/// One vCPU and one private guest_memfd slot.
fn fill(vm: &Vm) {
    vm.add_vcpu().unwrap();
    vm.set_user_memory_region(gmem_slot(0, 0, SLOT_PAGES))
        .unwrap();
    vm.set_memory_attributes(0, SLOT_PAGES << 12, 8).unwrap();
}

/// A slot with guest_memfd over frames `first..first + pages`.
pub(crate) fn gmem_slot(slot_id: u32, first: u64, pages: u64) -> SlotSpec {
    SlotSpec {
        guest_memfd: true,
        ..user_slot(slot_id, first, pages)
    }
}

/// A slot without guest_memfd.
pub(crate) fn user_slot(slot_id: u32, first: u64, pages: u64) -> SlotSpec {
    SlotSpec {
        slot_id,
        gpa: first << 12,
        size: pages << 12,
        userspace_addr: USER_BASE + (first << 12),
        ..SlotSpec::default()
    }
}

/// A private access to a frame.
pub(crate) fn private(gfn: u64) -> Fault {
    Fault {
        gpa: gfn << 12,
        qualification: 2,
        ..Fault::default()
    }
}

/// A shared write of a frame, not present before.
pub(crate) fn shared(vm: &Vm, gfn: u64) -> Fault {
    Fault {
        gpa: gfn << 12 | shared_bit(vm),
        qualification: 2,
        ..Fault::default()
    }
}

pub(crate) fn shared_bit(vm: &Vm) -> u64 {
    if vm.info().kind == VmKind::Ordinary {
        return 0;
    }
    match vm.info().gpaw {
        Gpaw::W48 => 1 << 47,
        Gpaw::W52 => 1 << 51,
    }
}

/// +P(range): maps private frames, in a TD that runs or (with zeroes) in one that is built.
pub(crate) fn map_private(vm: &Vm, gfns: std::ops::Range<u64>) {
    if vm.info().state == "initialized" {
        let (gpa, size) = (gfns.start << 12, (gfns.end - gfns.start) << 12);
        let region = InitRegion {
            gpa,
            size,
            data: Default::default(),
            measure: Measure::No,
        };
        vm.init_mem_region(0, region).unwrap();
        return;
    }
    for gfn in gfns {
        assert_eq!(
            vm.handle_fault(0, private(gfn)).unwrap().ret_pf,
            RetPf::Fixed,
            "gfn {gfn:#x}"
        );
    }
}

/// +S(range): makes frames shared and maps them.
pub(crate) fn map_shared(vm: &Vm, gfns: std::ops::Range<u64>) {
    vm.set_memory_attributes(gfns.start << 12, (gfns.end - gfns.start) << 12, 0)
        .unwrap();
    for gfn in gfns {
        let report = vm.handle_fault(0, shared(vm, gfn)).unwrap();
        assert_eq!(report.ret_pf, RetPf::Fixed, "gfn {gfn:#x}");
    }
}

//! Both libraries in this process: a host, a module, and nothing between them.

use std::sync::Arc;

use tdp_mmu::{
    Batch, Host, MemoryRange, Mode, Platform, SeamPort, SlotSpec, Ticket, Vm, VmConfig, VmError,
};
use tdx_module::{LpId, Module, PlatformConfig};

use crate::error::Error;

/// What a host is told of a module in the same process.
pub fn platform_of(config: &PlatformConfig) -> Platform {
    let tdmrs = config.tdmrs.iter().filter(|tdmr| tdmr.initialized);
    let size = |area: &std::ops::Range<u64>| (area.start, area.end - area.start);
    Platform {
        tdmrs: tdmrs
            .map(|tdmr| MemoryRange {
                base: tdmr.base.get(),
                size: tdmr.size,
                reserved: tdmr.reserved.iter().map(size).collect(),
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

/// A host and its module.
pub(super) struct Pair {
    host: Arc<Host>,
    port: Arc<dyn SeamPort>,
}

/// Calls the module at once.
struct Direct(Arc<Module>);

impl SeamPort for Direct {
    fn submit(&self, batch: Batch) -> Ticket {
        let results = self
            .0
            .seamcalls(LpId(batch.lp), &batch.calls, batch.stop_on_error);
        Ticket::ready(Ok(results))
    }
}

impl Pair {
    pub(super) fn new() -> Result<Self, Error> {
        let config = PlatformConfig::roomy();
        let host = Host::new(platform_of(&config)).map_err(bench_error)?;
        let module = Arc::new(Module::new(config).map_err(bench_error)?);
        Ok(Self {
            host,
            port: Arc::new(Direct(module)),
        })
    }

    /// A TD that runs, with `size` bytes of private memory from address 0 and nothing mapped.
    pub(super) fn vm(&self, vcpus: u16, size: u64) -> Result<Vm, Error> {
        let config = VmConfig {
            mode: Mode::Batched,
            max_vcpus: vcpus,
            ..VmConfig::default()
        };
        let build = || -> Result<Vm, VmError> {
            let (vm, _) = Vm::create(Arc::clone(&self.host), Arc::clone(&self.port), config)?;
            for _ in 0..vcpus {
                vm.add_vcpu()?;
            }
            vm.set_user_memory_region(SlotSpec {
                size,
                userspace_addr: 0x7F00_0000_0000,
                guest_memfd: true,
                ..SlotSpec::default()
            })?;
            vm.set_memory_attributes(0, size, 8)?;
            vm.finalize()?;
            Ok(vm)
        };
        build().map_err(bench_error)
    }
}

/// Something that the benchmark itself relies on did not work.
pub(super) fn bench_error(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    Error::Bench(Box::new(error))
}

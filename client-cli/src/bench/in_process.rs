//! Both libraries in this process: a host, a module, and nothing between them.

use std::sync::Arc;

use tdp_mmu::{Batch, Host, Mode, SeamPort, SlotSpec, Ticket, Vm, VmConfig, VmError};
use tdp_mmu_scenarios::platform_of;
use tdx_module::{LpId, Module, PlatformConfig};

use crate::error::Error;

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

    /// The host that VMs are built on.
    pub(super) fn host(&self) -> Arc<Host> {
        Arc::clone(&self.host)
    }

    /// The way to its module.
    pub(super) fn port(&self) -> Arc<dyn SeamPort> {
        Arc::clone(&self.port)
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

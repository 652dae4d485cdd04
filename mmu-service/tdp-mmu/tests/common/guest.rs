//! The inside of a TD: the module core in the same process.

use std::sync::Arc;

use tdp_mmu::{Entry, GuestOp, GuestPort, GuestStep, Resumed, SeamError};
use tdx_defs::{GuestLeaf, Hpa, Seamcall};
use tdx_module::{self as module, LpId, Module};

/// A vCPU's way into the module.
pub(crate) struct Guest {
    module: Arc<Module>,
    lp: LpId,
}

impl Guest {
    pub(crate) fn new(module: &Arc<Module>) -> Self {
        Self {
            module: Arc::clone(module),
            lp: LpId(0),
        }
    }
}

fn op_of(op: &GuestOp) -> module::GuestOp {
    match op {
        GuestOp::Read { gpa, len } => module::GuestOp::Read {
            gpa: *gpa,
            len: *len,
        },
        GuestOp::Write { gpa, data } => module::GuestOp::Write {
            gpa: *gpa,
            data: data.clone(),
        },
        GuestOp::Execute { gpa } => module::GuestOp::Execute { gpa: *gpa },
        GuestOp::Accept { gpa, level } => module::GuestOp::accept(*gpa, *level),
        GuestOp::Tdcall {
            leaf,
            version,
            regs,
        } => module::GuestOp::Tdcall(module::Tdcall {
            leaf: GuestLeaf(*leaf),
            version: *version,
            regs: *regs,
        }),
        GuestOp::Interrupt => module::GuestOp::ExternalInterrupt { vector: 0xEC },
    }
}

impl GuestPort for Guest {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        self.lp = LpId(lp);
        Ok(match self.module.enter_vcpu(self.lp, &call) {
            module::Entry::Entered { vmcall } => Entry::Entered { vmcall },
            module::Entry::Refused(result) => Entry::Refused(result),
        })
    }

    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError> {
        let mut steps = Vec::new();
        for op in ops {
            match self.module.guest(self.lp, &op_of(op)) {
                module::GuestStep::Resumed(resumed) => {
                    steps.push(GuestStep::Resumed(Resumed {
                        regs: resumed.regs,
                        injected: resumed.injected.map(|vector| vector.0),
                        data: resumed.data,
                    }));
                }
                module::GuestStep::Exited(exit) => {
                    steps.push(GuestStep::Exited(exit.regs));
                    break;
                }
                module::GuestStep::Violated(violation) => {
                    steps.push(GuestStep::Violated(violation.to_string()));
                }
                module::GuestStep::Impossible(why) => panic!("{why}"),
            }
        }
        Ok(steps)
    }

    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError> {
        Ok(self.module.read_host_memory(Hpa::new(hpa), len))
    }

    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError> {
        self.module.write_host_memory(Hpa::new(hpa), data);
        Ok(())
    }
}

//! The TDX module, as a pure and synchronous model.
//!
//! [`Module`] holds what the real module keeps in its own memory: the metadata of every physical
//! page, the TDs with their Secure EPT, the key table. [`Module::seamcall`] is the SEAMCALL
//! instruction: registers in, registers out. There is no I/O, no clock and no runtime here.
//!
//! Source: Intel TDX module 1.5, source and ABI; by default answers are those of release 1.5.05.
//!
//! # Map
//!
//! | module | content |
//! |---|---|
//! | [`platform`] | memory regions, key ids, processors, release |
//! | `dispatch` | from RAX to a leaf, and runs of one leaf |
//! | `leaves` | one file a leaf, checks in the order of the specification |
//! | `checks` | the check sequences that leaves share |
//! | `td` | TDR, TDCS, TLB tracking, vCPUs, key ownership |
//! | `sept` | Secure EPT entries, their states, tables and the walk |
//! | `guest` | what happens inside a TD, one event at a time |
//! | `pamt` | metadata of physical pages |
//! | `locks` | try-locks with host priority |
//! | `measure`, `memory` | MRTD, page contents |
//!
//! # Concurrency
//!
//! Every method takes `&self`, and many logical processors run at once. Locks are the module's
//! own: attempts, never waits, and a failed one is `TDX_OPERAND_BUSY` with the id of the object.
//! Standard mutexes guard short sections without any lock inside (page contents, spare tables).

pub mod platform;

mod dispatch;
mod leaves;

mod checks;

mod guest;

mod td;

mod sept;

mod pamt;

mod locks;

mod measure;
mod memory;

mod conditions;
pub mod hooks;
mod host_access;
pub mod inspect;
mod system;
mod usage;

use std::sync::Mutex;

use tdx_defs::{Seamcall, SeamcallResult};

pub use guest::{
    AccessKind, Entry, GuestError, GuestOp, GuestStep, MAX_ACCESS, Resumed, TdExit, Tdcall,
    Translation, Vector, Violation, Violations,
};
pub use host_access::PRIVATE_PATTERN;
pub use inspect::{SeptInfo, TdInfo};
pub use locks::LockMode;
pub use measure::{CHUNK_SIZE, DIGEST_SIZE};
pub use memory::HOST_PAGES;
pub use pamt::{PageInfo, PageSize};
pub use platform::{Features, PlatformConfig, PlatformError, Release, Tdmr};
pub use sept::SeptState;
pub use td::{Lifecycle, OpState};
pub use usage::Usage;

use conditions::Conditions;
use guest::{Processors, ViolationCounters};
use leaves::CacheWriteBack;
use memory::{HostMemory, PrivateMemory};
use pamt::Pamt;
use sept::EntryFormat;
use system::System;
use td::{Kot, Registry, Td, Vcpu};
use usage::Counters;

/// Number of a logical processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct LpId(pub u32);

/// The module and everything that it keeps.
pub struct Module {
    config: PlatformConfig,
    format: EntryFormat,
    pamt: Pamt,
    kot: Kot,
    tds: Registry<Td>,
    vcpus: Registry<Vcpu>,
    private: PrivateMemory,
    host: HostMemory,
    /// One for each package.
    write_back: Box<[Mutex<CacheWriteBack>]>,
    counters: Counters,
    conditions: Conditions,
    processors: Processors,
    violations: ViolationCounters,
    system: System,
}

impl std::fmt::Debug for Module {
    /// The platform and what is in use: the rest would fill a disk.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Module")
            .field("config", &self.config)
            .field("usage", &self.usage())
            .finish_non_exhaustive()
    }
}

impl Module {
    /// A module on a platform, already brought to SYS_READY: processors initialised, TDMRs
    /// configured, the global key programmed.
    pub fn new(config: PlatformConfig) -> Result<Self, PlatformError> {
        config.validate()?;
        Ok(Self {
            format: EntryFormat::new(config.release),
            pamt: Pamt::new(&config),
            kot: Kot::new(&config),
            tds: Registry::default(),
            vcpus: Registry::default(),
            private: PrivateMemory::default(),
            host: HostMemory::default(),
            write_back: (0..config.packages).map(|_| Mutex::default()).collect(),
            counters: Counters::new(config.logical_processors),
            conditions: Conditions::default(),
            processors: Processors::new(config.logical_processors),
            violations: ViolationCounters::default(),
            system: System::new(),
            config,
        })
    }

    /// One SEAMCALL on a logical processor, or the run of them that its `repeat` names. A run ends
    /// at the first call that does not return TDX_SUCCESS; the result is that of the last call.
    pub fn seamcall(&self, lp: LpId, call: &Seamcall) -> SeamcallResult {
        dispatch::seamcall(self, lp, call)
    }

    /// SEAMCALLs in order, each answered as [`Module::seamcall`] answers it alone. Neighbours of one
    /// leaf and TD share its locks, as the calls of a run do. With `stop_on_error` the first call
    /// that ends with the error bit is the last: there are as many answers as calls that were made.
    pub fn seamcalls(
        &self,
        lp: LpId,
        calls: &[Seamcall],
        stop_on_error: bool,
    ) -> Vec<SeamcallResult> {
        dispatch::seamcalls(self, lp, calls, stop_on_error)
    }

    /// The platform.
    pub fn config(&self) -> &PlatformConfig {
        &self.config
    }

    /// Key ids and pages in use.
    pub fn usage(&self) -> Usage {
        Usage {
            hkids_in_use: self.kot.in_use(),
            pages: self.counters.pages(),
        }
    }
}

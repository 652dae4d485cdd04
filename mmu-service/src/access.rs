//! Who may call this service: its settings, and the role that each RPC needs.

use transport::{Refusals, Roles, Rule};

use crate::{reasons, status};

/// For whoever accesses memory as a guest does, and for the VMM around it.
const ACCESS: Roles = Roles::GUEST.union(Roles::HOST);
/// For whoever looks.
const LOOK: Roles = Roles::HOST.union(Roles::OPERATOR);

/// Roles of the service.
pub const RULES: &[Rule] = &[
    ("/kvm.mmu.v1.MmuService/CreateVm", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/InitVm", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/DestroyVm", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/ListVms", LOOK),
    ("/kvm.mmu.v1.MmuService/CreateVcpu", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/InitVcpu", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/SetUserMemoryRegion", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/SetMemoryAttributes", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/InitMemRegion", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/InitMemRegions", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/FinalizeVm", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/HandleFault", ACCESS),
    ("/kvm.mmu.v1.MmuService/HandleFaults", ACCESS),
    ("/kvm.mmu.v1.MmuService/RunVcpu", ACCESS),
    ("/kvm.mmu.v1.MmuService/PreFaultMemory", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/PunchHole", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/UnmapHva", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/GetWalk", LOOK),
    ("/kvm.mmu.v1.MmuService/DumpTree", LOOK),
    ("/kvm.mmu.v1.MmuService/Audit", LOOK),
    ("/kvm.mmu.v1.MmuService/GetStats", LOOK),
    ("/kvm.mmu.v1.MmuService/SetDirtyLog", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/GetDirtyLog", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/ClearDirtyLog", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/AgeRange", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/TouchMemory", ACCESS),
    ("/kvm.mmu.v1.MmuService/ZapAllFast", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/ZapAll", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/ZapRange", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/WriteProtect", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/ChangeHostMapping", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/SetNxHugePages", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/RecoverNxHugePages", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/WatchEvents", LOOK),
];

transport::access_settings!(
    "MMU_",
    RULES,
    Refusals {
        not_admitted: reasons::NOT_ADMITTED,
        role_needed: reasons::ROLE_NEEDED,
        domain: status::DOMAIN,
    }
);

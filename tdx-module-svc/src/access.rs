//! Who may call this service: its settings, and the role that each RPC needs.

use transport::{Refusals, Roles, Rule};

use crate::{reasons, status};

/// Roles of the four services. GetPlatform is for everybody who has a role: it says what the
/// machine is, and what the limits of a request are.
pub const RULES: &[Rule] = &[
    ("/tdx.module.v1.TdxModuleService/Execute", Roles::HOST),
    ("/tdx.module.v1.TdxModuleService/ExecuteStream", Roles::HOST),
    ("/tdx.module.v1.TdxModuleService/GetPlatform", Roles::all()),
    ("/tdx.module.v1.TdxModuleService/EndSessions", Roles::HOST),
    ("/tdx.module.v1.TdxGuestService/EnterVcpu", Roles::GUEST),
    ("/tdx.module.v1.TdxPlatformService/ReadMemory", Roles::HOST),
    ("/tdx.module.v1.TdxPlatformService/WriteMemory", Roles::HOST),
    (
        "/tdx.module.v1.TdxPlatformService/GetState",
        Roles::OPERATOR.union(Roles::INJECTOR),
    ),
    ("/tdx.module.v1.TdxPlatformService/Reset", Roles::INJECTOR),
    (
        "/tdx.module.v1.TdxPlatformService/SetConditions",
        Roles::INJECTOR,
    ),
    (
        "/tdx.module.v1.TdxPlatformService/HoldLock",
        Roles::INJECTOR,
    ),
    (
        "/tdx.module.v1.TdxPlatformService/ReleaseLock",
        Roles::INJECTOR,
    ),
    (
        "/tdx.module.v1.TdxFaultService/SetFaultRules",
        Roles::INJECTOR,
    ),
    (
        "/tdx.module.v1.TdxFaultService/ListFaultRules",
        Roles::INJECTOR,
    ),
    (
        "/tdx.module.v1.TdxFaultService/ClearFaultRules",
        Roles::INJECTOR,
    ),
];

transport::access_settings!(
    "TDX_MODULE_",
    RULES,
    Refusals {
        not_admitted: reasons::NOT_ADMITTED,
        role_needed: reasons::ROLE_NEEDED,
        domain: status::DOMAIN,
    }
);

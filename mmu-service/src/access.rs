//! Who may call this service: its settings, and the role that each RPC needs.

use std::path::PathBuf;

use transport::{
    AccessLayer, AllowedUid, ClientTls, ClientTlsFiles, Exposure, Peers, Policy, Refusals, Roles,
    Rule, ServerTlsFiles, TlsError,
};

use crate::{reasons, status};

/// For whoever accesses memory as a guest does, and for the VMM around it.
const ACCESS: Roles = Roles::GUEST.union(Roles::HOST);
/// For whoever looks.
const LOOK: Roles = Roles::HOST.union(Roles::OPERATOR);

/// Roles of the service.
pub(crate) const RULES: &[Rule] = &[
    ("/kvm.mmu.v1.MmuService/CreateVm", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/InitVm", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/DestroyVm", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/ListVms", LOOK),
    ("/kvm.mmu.v1.MmuService/CreateVcpu", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/InitVcpu", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/SetUserMemoryRegion", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/SetMemoryAttributes", Roles::HOST),
    ("/kvm.mmu.v1.MmuService/InitMemRegion", Roles::HOST),
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

/// Who may call.
#[derive(Debug, Clone, clap::Args)]
#[command(next_help_heading = "Access")]
pub struct Access {
    /// Certificate of the service, PEM, for https:// addresses; read again when it changes
    #[arg(long, value_name = "FILE", env = "MMU_TLS_CERT", requires_all = ["tls_key", "tls_client_ca"])]
    pub tls_cert: Option<PathBuf>,

    /// Its private key
    #[arg(long, value_name = "FILE", env = "MMU_TLS_KEY", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,

    /// Authority whose certificates callers have to show; their URIs urn:tdx-mmu:role:ROLE say
    /// which roles they hold
    #[arg(
        long,
        value_name = "FILE",
        env = "MMU_TLS_CLIENT_CA",
        requires = "tls_cert"
    )]
    pub tls_client_ca: Option<PathBuf>,

    /// Listen on plain TCP where other machines can connect; whoever does holds the roles of
    /// --tcp-roles
    #[arg(long, env = "MMU_INSECURE_TCP")]
    pub insecure_tcp: bool,

    /// User besides the service's own and root who may call on Unix sockets, by number, perhaps
    /// with roles: 1000 or 1000:guest+operator; more than once for several users
    #[arg(
        long,
        value_name = "UID[:ROLES]",
        env = "MMU_ALLOW_UID",
        value_delimiter = ','
    )]
    pub allow_uid: Vec<AllowedUid>,

    /// Roles of the service's own user and root on Unix sockets: guest, host, operator, injector
    /// with + between them, all or none
    #[arg(
        long,
        value_name = "ROLES",
        env = "MMU_UNIX_ROLES",
        default_value = "all"
    )]
    pub unix_roles: Roles,

    /// Roles of whoever calls over plain TCP, where nobody has an identity
    #[arg(
        long,
        value_name = "ROLES",
        env = "MMU_TCP_ROLES",
        default_value = "all"
    )]
    pub tcp_roles: Roles,
}

impl Default for Access {
    fn default() -> Self {
        Self {
            tls_cert: None,
            tls_key: None,
            tls_client_ca: None,
            insecure_tcp: false,
            allow_uid: Vec::new(),
            unix_roles: Roles::all(),
            tcp_roles: Roles::all(),
        }
    }
}

impl Access {
    /// How the service may be reached.
    pub fn exposure(&self) -> Exposure {
        let tls = match (&self.tls_cert, &self.tls_key, &self.tls_client_ca) {
            (Some(cert), Some(key), Some(client_ca)) => Some(ServerTlsFiles {
                cert: cert.clone(),
                key: key.clone(),
                client_ca: client_ca.clone(),
            }),
            _ => None,
        };
        Exposure {
            tls,
            insecure_tcp: self.insecure_tcp,
            other_users: !self.allow_uid.is_empty(),
        }
    }

    /// The layer that holds callers to the rules.
    pub(crate) fn layer(&self) -> AccessLayer {
        let peers = Peers {
            owner_roles: self.unix_roles,
            allowed: self.allow_uid.clone(),
            tcp_roles: self.tcp_roles,
            ..Peers::default()
        };
        let refusals = Refusals {
            not_admitted: reasons::NOT_ADMITTED,
            role_needed: reasons::ROLE_NEEDED,
            domain: status::DOMAIN,
        };
        AccessLayer::new(peers, Policy::new(&[RULES]), refusals)
    }
}

/// Certificates for calling a service at an https:// address.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct CallerTls {
    /// Authority of the service's certificate, PEM
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,

    /// Certificate to show, PEM
    #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
    pub tls_cert: Option<PathBuf>,

    /// Its private key
    #[arg(long, value_name = "FILE", requires = "tls_cert")]
    pub tls_key: Option<PathBuf>,
}

impl CallerTls {
    /// Reads the files, when there are any.
    pub(crate) fn load(&self) -> Result<Option<ClientTls>, TlsError> {
        let Some(ca) = self.tls_ca.clone() else {
            return Ok(None);
        };
        let identity = self.tls_cert.clone().zip(self.tls_key.clone());
        ClientTls::load(ClientTlsFiles { ca, identity }).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::FileDescriptorSet;

    use super::*;

    #[test]
    fn every_rpc_has_a_rule_and_every_rule_an_rpc() {
        let descriptors = FileDescriptorSet::decode(mirror_proto::FILE_DESCRIPTOR_SET).unwrap();
        let mut rpcs = Vec::new();
        for file in &descriptors.file {
            for service in file
                .service
                .iter()
                .filter(|_| file.package() == status::DOMAIN)
            {
                for method in &service.method {
                    rpcs.push(format!(
                        "/{}.{}/{}",
                        file.package(),
                        service.name(),
                        method.name()
                    ));
                }
            }
        }
        let mut ruled: Vec<_> = RULES.iter().map(|(path, _)| (*path).to_owned()).collect();
        rpcs.sort_unstable();
        ruled.sort_unstable();
        assert!(!rpcs.is_empty());
        assert_eq!(ruled, rpcs);
        assert!(RULES.iter().all(|(_, roles)| !roles.is_empty()));
    }

    #[test]
    fn the_rules_are_documented() {
        let documented = include_str!("../../docs/security.md");
        for (path, roles) in RULES {
            let (service, method) = path[1..].rsplit_once('/').unwrap();
            let service = service.rsplit_once('.').unwrap().1;
            let words = if roles.is_all() {
                "any".to_owned()
            } else {
                roles.words().collect::<Vec<_>>().join(" or ")
            };
            let row = format!("| `{service}` | {method} | {words} |");
            assert!(documented.contains(&row), "{row}");
        }
    }
}

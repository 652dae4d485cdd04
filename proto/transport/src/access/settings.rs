//! The settings of who may call, which every service has under names of its own.

/// Defines `Access`, the settings of who may call a service, and `CallerTls`, those of its callers.
///
/// `$prefix` begins the names of the environment variables, `$rules` are the [`Rule`](crate::Rule)s
/// of the service, `$refusals` what it says to whom it refuses. A macro because clap takes the name
/// of a variable when it is compiled, and the two services' differ.
#[macro_export]
macro_rules! access_settings {
    ($prefix:literal, $rules:expr, $refusals:expr) => {
        /// Who may call.
        #[derive(Debug, Clone, clap::Args)]
        #[command(next_help_heading = "Access")]
        pub struct Access {
            /// Certificate of the service, PEM, for https:// addresses; read again when it changes
            #[arg(long, value_name = "FILE", env = concat!($prefix, "TLS_CERT"), requires_all = ["tls_key", "tls_client_ca"])]
            pub tls_cert: Option<::std::path::PathBuf>,

            /// Its private key
            #[arg(long, value_name = "FILE", env = concat!($prefix, "TLS_KEY"), requires = "tls_cert")]
            pub tls_key: Option<::std::path::PathBuf>,

            /// Authority whose certificates callers have to show; their URIs urn:tdx-mmu:role:ROLE say
            /// which roles they hold
            #[arg(
                long,
                value_name = "FILE",
                env = concat!($prefix, "TLS_CLIENT_CA"),
                requires = "tls_cert"
            )]
            pub tls_client_ca: Option<::std::path::PathBuf>,

            /// Listen on plain TCP where other machines can connect; whoever does holds the roles of
            /// --tcp-roles
            #[arg(long, env = concat!($prefix, "INSECURE_TCP"))]
            pub insecure_tcp: bool,

            /// User besides the service's own and root who may call on Unix sockets, by number, perhaps
            /// with roles: 1000 or 1000:guest+operator; more than once for several users
            #[arg(
                long,
                value_name = "UID[:ROLES]",
                env = concat!($prefix, "ALLOW_UID"),
                value_delimiter = ','
            )]
            pub allow_uid: Vec<$crate::AllowedUid>,

            /// Roles of the service's own user and root on Unix sockets: guest, host, operator, injector
            /// with + between them, all or none
            #[arg(
                long,
                value_name = "ROLES",
                env = concat!($prefix, "UNIX_ROLES"),
                default_value = "all"
            )]
            pub unix_roles: $crate::Roles,

            /// Roles of whoever calls over plain TCP, where nobody has an identity
            #[arg(
                long,
                value_name = "ROLES",
                env = concat!($prefix, "TCP_ROLES"),
                default_value = "all"
            )]
            pub tcp_roles: $crate::Roles,
        }

        impl Default for Access {
            fn default() -> Self {
                Self {
                    tls_cert: None,
                    tls_key: None,
                    tls_client_ca: None,
                    insecure_tcp: false,
                    allow_uid: Vec::new(),
                    unix_roles: $crate::Roles::all(),
                    tcp_roles: $crate::Roles::all(),
                }
            }
        }

        impl Access {
            /// How the service may be reached.
            pub fn exposure(&self) -> $crate::Exposure {
                let tls = match (&self.tls_cert, &self.tls_key, &self.tls_client_ca) {
                    (Some(cert), Some(key), Some(client_ca)) => Some($crate::ServerTlsFiles {
                        cert: cert.clone(),
                        key: key.clone(),
                        client_ca: client_ca.clone(),
                    }),
                    _ => None,
                };
                $crate::Exposure {
                    tls,
                    insecure_tcp: self.insecure_tcp,
                    other_users: !self.allow_uid.is_empty(),
                }
            }

            /// The layer that holds callers to the rules.
            pub(crate) fn layer(&self) -> $crate::AccessLayer {
                let peers = $crate::Peers {
                    owner_roles: self.unix_roles,
                    allowed: self.allow_uid.clone(),
                    tcp_roles: self.tcp_roles,
                    ..$crate::Peers::default()
                };
                $crate::AccessLayer::new(peers, $crate::Policy::new(&[$rules]), $refusals)
            }
        }

        /// Certificates for calling a service at an https:// address.
        #[derive(Debug, Clone, Default, clap::Args)]
        pub struct CallerTls {
            /// Authority of the service's certificate, PEM
            #[arg(long, value_name = "FILE")]
            pub tls_ca: Option<::std::path::PathBuf>,

            /// Certificate to show, PEM
            #[arg(long, value_name = "FILE", requires_all = ["tls_ca", "tls_key"])]
            pub tls_cert: Option<::std::path::PathBuf>,

            /// Its private key
            #[arg(long, value_name = "FILE", requires = "tls_cert")]
            pub tls_key: Option<::std::path::PathBuf>,
        }

        impl CallerTls {
            /// Reads the files, when there are any.
            pub(crate) fn load(&self) -> Result<Option<$crate::ClientTls>, $crate::TlsError> {
                let Some(ca) = self.tls_ca.clone() else {
                    return Ok(None);
                };
                let identity = self.tls_cert.clone().zip(self.tls_key.clone());
                $crate::ClientTls::load($crate::ClientTlsFiles { ca, identity }).map(Some)
            }
        }
    };
}

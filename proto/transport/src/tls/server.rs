//! The end that is called.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use rustls::pki_types::CertificateDer;
use rustls::server::{StoresServerSessions, WebPkiClientVerifier};
use tokio_rustls::TlsAcceptor;

use super::watched::Watched;
use super::{TlsError, files, provider};
use crate::access::{Roles, roles_of_names};

/// Time between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// Files of a service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServerTlsFiles {
    /// Certificate of the service, with those between it and its authority.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
    /// Authorities whose certificates clients may show.
    pub client_ca: PathBuf,
}

/// What a service needs to accept TLS connections. The files are watched (L1).
#[derive(Clone)]
pub struct ServerTls(Arc<Watched<ServerConfig>>);

impl ServerTls {
    /// Reads the files.
    pub fn load(files: ServerTlsFiles) -> Result<Self, TlsError> {
        Self::watching(files, LOOK_EVERY)
    }

    /// Reads the files, and looks at them no more often than `every`.
    pub fn watching(files: ServerTlsFiles, every: Duration) -> Result<Self, TlsError> {
        let watch = [&files.cert, &files.key, &files.client_ca]
            .map(PathBuf::clone)
            .into();
        Ok(Self(Arc::new(Watched::new(watch, every, move || {
            config(&files)
        })?)))
    }

    pub(crate) fn acceptor(&self) -> TlsAcceptor {
        self.0.get().into()
    }
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ServerTls")
    }
}

fn config(files: &ServerTlsFiles) -> Result<ServerConfig, TlsError> {
    let roots = Arc::new(files::authorities(&files.client_ca)?);
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider())
        .build()
        .map_err(|source| TlsError::Verifier {
            path: files.client_ca.clone(),
            source,
        })?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .with_client_cert_verifier(verifier)
        .with_single_cert(files::certificates(&files.cert)?, files::key(&files.key)?)
        .map_err(|source| TlsError::Identity {
            cert: files.cert.clone(),
            key: files.key.clone(),
            source,
        })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    config.session_storage = Arc::new(Forgetful);
    config.send_tls13_tickets = 1;
    Ok(config)
}

/// Sessions that nobody remembers (L2): resumed, a certificate would live on that is not accepted
/// any more. A ticket is sent all the same, since it tells the client that its own certificate was
/// accepted; TLS 1.3 has no other word for that.
#[derive(Debug)]
struct Forgetful;

impl StoresServerSessions for Forgetful {
    fn put(&self, _: Vec<u8>, _: Vec<u8>) -> bool {
        true
    }

    fn get(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn take(&self, _: &[u8]) -> Option<Vec<u8>> {
        None
    }

    fn can_cache(&self) -> bool {
        true
    }
}

/// The roles that a verified certificate gives.
pub(crate) fn roles_of(chain: Option<&[CertificateDer<'_>]>) -> Roles {
    let parsed = chain
        .and_then(<[_]>::first)
        .and_then(|certificate| webpki::EndEntityCert::try_from(certificate).ok());
    parsed.map_or(Roles::empty(), |certificate| {
        roles_of_names(certificate.valid_uri_names())
    })
}

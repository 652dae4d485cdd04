//! Certificates and keys in PEM files.

use std::fs::File;
use std::io::Read as _;
use std::path::Path;

use rustls::RootCertStore;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use super::TlsError;

/// Longest file that is read, in bytes: some hundred certificates.
const MAX_BYTES: u64 = 1 << 20;

fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    let mut bytes = Vec::new();
    let limit = MAX_BYTES;
    File::open(path)
        .and_then(|file| file.take(limit + 1).read_to_end(&mut bytes))
        .map_err(|source| TlsError::Read {
            path: path.into(),
            source,
        })?;
    if bytes.len() as u64 > limit {
        let path = path.into();
        return Err(TlsError::TooLong { path, limit });
    }
    Ok(bytes)
}

/// The certificates of a file, at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    // The errors of the PEM reader quote the file, so they go no further (L3).
    let not_pem = || TlsError::NotPem {
        path: path.into(),
        wanted: "certificate",
    };
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(path)?).collect();
    found
        .ok()
        .filter(|found| !found.is_empty())
        .ok_or_else(not_pem)
}

/// The first key of a file.
pub(super) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    PrivateKeyDer::from_pem_slice(&read(path)?).map_err(|_| TlsError::NotPem {
        path: path.into(),
        wanted: "private key",
    })
}

/// The authorities of a file.
pub(super) fn authorities(path: &Path) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for certificate in certificates(path)? {
        roots
            .add(certificate)
            .map_err(|source| TlsError::NoAuthority {
                path: path.into(),
                source,
            })?;
    }
    Ok(roots)
}

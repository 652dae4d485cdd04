//! What goes wrong with TLS, in words.

use std::io;
use std::path::PathBuf;

use rustls::{AlertDescription, CertificateError, InvalidMessage};

/// Certificates that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("{} cannot be read", path.display())]
    Read {
        /// Its name.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file is longer than any certificate chain.
    #[error("{} has more than {limit} bytes", path.display())]
    TooLong {
        /// Its name.
        path: PathBuf,
        /// The limit.
        limit: u64,
    },
    /// A file does not hold what it should.
    #[error("{} holds no {wanted} in PEM form", path.display())]
    NotPem {
        /// Its name.
        path: PathBuf,
        /// `certificate` or `private key`.
        wanted: &'static str,
    },
    /// A certificate authority that is none.
    #[error("{} is no certificate of an authority", path.display())]
    NoAuthority {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// Certificate and key do not fit together.
    #[error("the certificate in {} and the key in {} cannot be used together", cert.display(), key.display())]
    Identity {
        /// File of the certificate.
        cert: PathBuf,
        /// File of the key.
        key: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The verifier of client certificates cannot be built.
    #[error("client certificates cannot be verified with {}", path.display())]
    Verifier {
        /// File of the authority.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::server::VerifierBuilderError,
    },
    /// This build cannot speak TLS 1.3.
    #[error("TLS 1.3 is not available")]
    Protocol(#[source] rustls::Error),
}

/// What a failure of TLS means for whoever reads it, if rustls' own words do not say.
///
/// `peer` is what is at the other end: `service` or `client`.
pub(crate) fn explain(error: &io::Error, peer: &str) -> Option<String> {
    let inner = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    Some(match inner {
        rustls::Error::InvalidMessage(InvalidMessage::InvalidContentType) => {
            format!("the {peer} does not speak TLS")
        }
        rustls::Error::NoCertificatesPresented => format!("the {peer} shows no certificate"),
        rustls::Error::InvalidCertificate(reason) => match reason {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => {
                format!("the certificate of the {peer} is of an authority that is not trusted here")
            }
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                format!("the certificate of the {peer} has expired")
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                format!("the certificate of the {peer} is not valid yet")
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                format!("the certificate of the {peer} is for another name")
            }
            CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
                format!("the certificate of the {peer} is for another purpose")
            }
            _ => return None,
        },
        rustls::Error::AlertReceived(alert) => match *alert {
            AlertDescription::CertificateRequired => {
                format!("the {peer} asks for a certificate, and none was shown")
            }
            AlertDescription::UnknownCA | AlertDescription::DecryptError => {
                format!("the {peer} does not trust the authority of the certificate shown")
            }
            AlertDescription::CertificateExpired => {
                format!("the {peer} says that the certificate shown has expired")
            }
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown => {
                format!("the {peer} does not accept the certificate shown")
            }
            _ => return None,
        },
        _ => return None,
    })
}

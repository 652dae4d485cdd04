//! Certificates for development: an authority made for the occasion, and what it signs.
//!
//! The authority's key is never written: who needs another certificate makes all of them anew. In
//! earnest, certificates come from an authority that is there for it; what a certificate has to
//! say is in `docs/security.md`.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa,
    KeyPair, KeyUsagePurpose, SanType,
};
use transport::Roles;

use crate::args::CertsArgs;

/// Names of the machine itself.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// How long before now certificates begin to hold: clocks differ.
const SLACK: Duration = Duration::from_secs(3600);
/// One day.
const DAY: Duration = Duration::from_secs(24 * 3600);

/// Certificates cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CertsError {
    /// A certificate cannot be signed: a name in it is impossible, as a rule.
    #[error("the certificate of {name} cannot be made")]
    Sign {
        /// Whose.
        name: String,
        /// Why.
        #[source]
        source: rcgen::Error,
    },
    /// A file cannot be written.
    #[error("{} cannot be written", path.display())]
    Write {
        /// Its name.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// What a certificate says.
#[derive(Debug, Clone)]
pub struct Subject<'a> {
    /// Common name, for people, and the name of the files.
    pub name: &'a str,
    /// Names and addresses of a service; none for a mere caller.
    pub hosts: &'a [String],
    /// Roles of a caller; none for a mere service.
    pub roles: Roles,
    /// From when on it holds.
    pub not_before: SystemTime,
    /// Until when.
    pub not_after: SystemTime,
}

/// A certificate and its key, as PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub cert: String,
    /// The key.
    pub key: String,
}

/// An authority whose key lives as long as this value.
pub struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    /// A new authority that holds for `days`.
    pub fn new(days: u32) -> Result<Self, CertsError> {
        let name = "tdx-mmu development authority";
        let failed = |source| CertsError::Sign {
            name: name.into(),
            source,
        };
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, name);
        // It signs certificates of ends, and no further authority.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let now = SystemTime::now();
        params.not_before = (now - SLACK).into();
        params.not_after = (now + DAY * days).into();
        let key = KeyPair::generate().map_err(failed)?;
        CertifiedIssuer::self_signed(params, key)
            .map(Self)
            .map_err(failed)
    }

    /// Its certificate, as PEM.
    pub fn cert(&self) -> String {
        self.0.pem()
    }

    /// A certificate and a new key.
    pub fn issue(&self, subject: &Subject<'_>) -> Result<Issued, CertsError> {
        let failed = |source| CertsError::Sign {
            name: subject.name.into(),
            source,
        };
        let mut params = CertificateParams::new(subject.hosts).map_err(failed)?;
        for uri in subject.roles.uris() {
            let uri = uri.try_into().map_err(failed)?;
            params.subject_alt_names.push(SanType::URI(uri));
        }
        let common_name = (DnType::CommonName, subject.name);
        params.distinguished_name.push(common_name.0, common_name.1);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        if !subject.hosts.is_empty() {
            let purpose = ExtendedKeyUsagePurpose::ServerAuth;
            params.extended_key_usages.push(purpose);
        }
        if !subject.roles.is_empty() {
            let purpose = ExtendedKeyUsagePurpose::ClientAuth;
            params.extended_key_usages.push(purpose);
        }
        params.not_before = subject.not_before.into();
        params.not_after = subject.not_after.into();
        let key = KeyPair::generate().map_err(failed)?;
        let cert = params.signed_by(&key, &self.0).map_err(failed)?;
        Ok(Issued {
            cert: cert.pem(),
            key: key.serialize_pem(),
        })
    }
}

/// Who gets a certificate, and which roles. The MMU service is a service and calls the module.
const SUBJECTS: [(&str, bool, Roles); 7] = [
    ("module", true, Roles::empty()),
    ("mmu", true, Roles::HOST.union(Roles::GUEST)),
    ("guest", false, Roles::GUEST),
    ("host", false, Roles::HOST),
    ("operator", false, Roles::OPERATOR),
    ("injector", false, Roles::INJECTOR),
    ("admin", false, Roles::all()),
];

/// Makes all of them, and returns the files that were written.
pub fn write(args: &CertsArgs) -> Result<Vec<PathBuf>, CertsError> {
    let ca = args.dir.join("ca.pem");
    if args.if_missing && ca.exists() {
        return Ok(Vec::new());
    }
    let hosts: Vec<String> = LOCAL
        .into_iter()
        .map(str::to_owned)
        .chain(args.host.iter().cloned())
        .collect();
    let now = SystemTime::now();
    let authority = Authority::new(args.days)?;
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(&args.dir)
        .map_err(|source| CertsError::Write {
            path: args.dir.clone(),
            source,
        })?;
    let mut files = Vec::new();
    let mut put = |name: String, text: &str, mode: u32| {
        let path = args.dir.join(name);
        put(&path, text, mode, args).map_err(|source| CertsError::Write {
            path: path.clone(),
            source,
        })?;
        files.push(path);
        Ok(())
    };
    for (name, is_service, roles) in SUBJECTS {
        let issued = authority.issue(&Subject {
            name,
            hosts: if is_service { &hosts } else { &[] },
            roles,
            not_before: now - SLACK,
            not_after: now + DAY * args.days,
        })?;
        put(format!("{name}.key"), &issued.key, 0o600)?;
        put(format!("{name}.pem"), &issued.cert, 0o644)?;
    }
    // Last: where it is, the others are.
    put("ca.pem".into(), &authority.cert(), 0o644)?;
    Ok(files)
}

/// Writes a file under another name first: a service that watches it never sees half of it.
fn put(path: &Path, text: &str, mode: u32, args: &CertsArgs) -> io::Result<()> {
    let new = path.with_extension("new");
    let _ = fs::remove_file(&new);
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(&new)?;
    file.write_all(text.as_bytes())?;
    if let Some(owner) = args.owner {
        chown(&new, Some(owner.uid), Some(owner.gid))?;
    }
    fs::rename(&new, path)
}

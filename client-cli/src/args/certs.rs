//! `certs`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;

/// Certificates for development.
#[derive(Debug, Args)]
pub struct CertsArgs {
    /// Folder for ca.pem, and NAME.pem with NAME.key for module, mmu, guest, host, operator,
    /// injector and admin (every role)
    #[arg(value_name = "DIR")]
    pub dir: PathBuf,

    /// Name or address by which the services are reached, besides localhost, 127.0.0.1 and ::1;
    /// more than once for several
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    pub host: Vec<String>,

    /// Days for which the certificates hold
    #[arg(long, value_name = "N", default_value_t = 30, value_parser = clap::value_parser!(u32).range(1..=3650))]
    pub days: u32,

    /// Give the files to a user and a group, by number
    #[arg(long, value_name = "UID:GID")]
    pub owner: Option<Owner>,

    /// Do nothing when there is a ca.pem already
    #[arg(long)]
    pub if_missing: bool,
}

/// A user and a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Owner {
    /// The user.
    pub uid: u32,
    /// The group.
    pub gid: u32,
}

impl FromStr for Owner {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str = "not of the form UID:GID, two numbers";
        let (uid, gid) = text.split_once(':').ok_or(FORM)?;
        Ok(Self {
            uid: uid.parse().map_err(|_| FORM)?,
            gid: gid.parse().map_err(|_| FORM)?,
        })
    }
}

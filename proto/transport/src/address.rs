//! Where a service listens: `unix:///path`, `http://host:port` or `https://host:port`.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A place to listen at or to connect to.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// A Unix socket, by its absolute path.
    Unix(PathBuf),
    /// TCP, as `host:port`; an IPv6 host keeps its brackets.
    Tcp(String),
    /// TLS over TCP, as `host:port`.
    Tls(String),
}

/// Text that is no [`Address`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// Neither `unix:` nor `http://` nor `https://`.
    #[error("{url:?} is none of unix:///path, http://host:port and https://host:port")]
    Scheme {
        /// The text as given.
        url: String,
    },
    /// A Unix socket path that depends on the working directory, or none at all.
    #[error("{url:?} names no absolute path, as in unix:///run/module.sock")]
    RelativePath {
        /// The text as given.
        url: String,
    },
    /// No host, no port or more than that.
    #[error("{url:?} is not of the form http://host:port or https://host:port")]
    Authority {
        /// The text as given.
        url: String,
    },
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(url: &str) -> Result<Self, AddressError> {
        let given = || url.to_owned();
        if let Some(rest) = url.strip_prefix("unix:") {
            let path = PathBuf::from(rest.strip_prefix("//").unwrap_or(rest));
            return if path.is_absolute() && path.file_name().is_some() {
                Ok(Self::Unix(path))
            } else {
                Err(AddressError::RelativePath { url: given() })
            };
        }
        let (rest, of): (_, fn(String) -> Self) = match url.strip_prefix("https://") {
            Some(rest) => (rest, Self::Tls),
            None => match url.strip_prefix("http://") {
                Some(rest) => (rest, Self::Tcp),
                None => return Err(AddressError::Scheme { url: given() }),
            },
        };
        let malformed = || AddressError::Authority { url: given() };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        let authority: http::uri::Authority = rest.parse().map_err(|_| malformed())?;
        if authority.host().is_empty() || authority.port_u16().is_none() || rest.contains('@') {
            return Err(malformed());
        }
        Ok(of(authority.to_string()))
    }
}

impl Address {
    /// The server as spans name it: host and port, or the path of a socket.
    pub fn server(&self) -> (String, Option<u16>) {
        match self {
            Self::Unix(path) => (path.display().to_string(), None),
            Self::Tcp(authority) | Self::Tls(authority) => match authority.rsplit_once(':') {
                Some((host, port)) => (host.to_owned(), port.parse().ok()),
                None => (authority.clone(), None),
            },
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
            Self::Tcp(authority) => write!(f, "http://{authority}"),
            Self::Tls(authority) => write!(f, "https://{authority}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_of_both_kinds_survive_printing() {
        for (url, printed) in [
            ("unix:///run/module.sock", "unix:///run/module.sock"),
            ("unix:/run/module.sock", "unix:///run/module.sock"),
            ("http://127.0.0.1:50051", "http://127.0.0.1:50051"),
            ("http://[::1]:0/", "http://[::1]:0"),
            ("http://module:50051", "http://module:50051"),
            ("https://module:50051/", "https://module:50051"),
        ] {
            let address: Address = url.parse().unwrap();
            assert_eq!(address.to_string(), printed);
            assert_eq!(printed.parse(), Ok(address));
        }
    }

    #[test]
    fn urls_that_name_no_place_are_refused() {
        for (url, expected) in [
            ("", "none of"),
            ("/run/module.sock", "none of"),
            ("127.0.0.1:50051", "none of"),
            ("https://module", "form"),
            ("unix://", "absolute"),
            ("unix:///", "absolute"),
            ("unix://run/module.sock", "absolute"),
            ("http://module", "form"),
            ("http://:50051", "form"),
            ("http://user@module:1", "form"),
            ("http://module:99999", "form"),
            ("http://module:1/path", "form"),
        ] {
            let error = url.parse::<Address>().unwrap_err().to_string();
            assert!(error.contains(expected), "{url}: {error}");
        }
    }
}

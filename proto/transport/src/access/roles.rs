//! What a caller may be.

use std::fmt;
use std::str::FromStr;

bitflags::bitflags! {
    /// Roles that a caller holds, or of which one is needed.
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
    pub struct Roles: u8 {
        /// Does what a guest does: enters a vCPU, accesses memory, faults.
        const GUEST = 1;
        /// Does what a VMM and the kernel do: SEAMCALLs, VMs, memory.
        const HOST = 1 << 1;
        /// Looks: lists, trees, audits, statistics, the page, `/metrics`.
        const OPERATOR = 1 << 2;
        /// Makes faults happen, and starts the module anew.
        const INJECTOR = 1 << 3;
    }
}

/// Roles and their names, on the command line and in certificates.
const NAMES: [(&str, Roles); 4] = [
    ("guest", Roles::GUEST),
    ("host", Roles::HOST),
    ("operator", Roles::OPERATOR),
    ("injector", Roles::INJECTOR),
];

/// What a URI among the names of a certificate begins with when it gives its holder a role.
const URI_PREFIX: &str = "urn:tdx-mmu:role:";

/// A word that is no role.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{word:?} is none of guest, host, operator, injector, all and none")]
pub struct RoleError {
    word: String,
}

impl Roles {
    /// The URIs that give these roles, as a certificate holds them.
    pub fn uris(self) -> impl Iterator<Item = String> {
        self.words().map(|word| format!("{URI_PREFIX}{word}"))
    }

    /// The names of the roles.
    pub fn words(self) -> impl Iterator<Item = &'static str> {
        NAMES
            .into_iter()
            .filter(move |(_, role)| self.contains(*role))
            .map(|(word, _)| word)
    }

    /// The names with a word between them, or "none".
    pub(super) fn joined(self, between: &str) -> String {
        if self.is_empty() {
            return "none".into();
        }
        self.words().collect::<Vec<_>>().join(between)
    }
}

impl FromStr for Roles {
    type Err = RoleError;

    /// Names with `+` between them, `all` or `none`.
    fn from_str(text: &str) -> Result<Self, RoleError> {
        match text {
            "all" => return Ok(Self::all()),
            "none" => return Ok(Self::empty()),
            _ => {}
        }
        text.split('+')
            .map(|word| by_name(word).ok_or_else(|| RoleError { word: word.into() }))
            .collect()
    }
}

impl fmt::Display for Roles {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.joined("+"))
    }
}

fn by_name(word: &str) -> Option<Roles> {
    NAMES
        .iter()
        .find(|(name, _)| *name == word)
        .map(|(_, role)| *role)
}

/// The roles that the URIs of a certificate give. Other URIs, and roles that are not known here,
/// give none.
pub(crate) fn roles_of_names<'a>(uris: impl Iterator<Item = &'a str>) -> Roles {
    uris.filter_map(|uri| by_name(uri.strip_prefix(URI_PREFIX)?))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_are_read_as_they_are_printed() {
        for (text, roles) in [
            ("none", Roles::empty()),
            ("guest", Roles::GUEST),
            ("guest+operator", Roles::GUEST | Roles::OPERATOR),
            ("guest+host+operator+injector", Roles::all()),
        ] {
            assert_eq!(text.parse(), Ok(roles));
            assert_eq!(roles.to_string(), text);
        }
        assert_eq!("all".parse(), Ok(Roles::all()));
        for text in ["", "root", "host+", "host,guest", "Host"] {
            let error = text.parse::<Roles>().unwrap_err();
            assert!(error.to_string().contains("none of guest"), "{text}");
        }
    }

    #[test]
    fn only_whole_uris_of_known_roles_count() {
        let roles = |uris: &[&str]| roles_of_names(uris.iter().copied());
        assert_eq!(
            roles(&["urn:tdx-mmu:role:host", "urn:tdx-mmu:role:guest"]),
            Roles::HOST | Roles::GUEST
        );
        assert_eq!(
            roles(&[
                "urn:tdx-mmu:role:boss",
                "urn:tdx-mmu:role:host/..",
                "https://x/urn:tdx-mmu:role:host",
                "URN:tdx-mmu:role:host",
                "urn:tdx-mmu:role:all",
            ]),
            Roles::empty()
        );
        for role in Roles::all().iter() {
            let uris: Vec<_> = role.uris().collect();
            assert_eq!(roles_of_names(uris.iter().map(String::as_str)), role);
        }
    }
}

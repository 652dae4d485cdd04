//! Which roles the other end of a connection holds.

use std::str::FromStr;

use super::Roles;
use crate::PeerInfo;

/// The user whose processes may do everything on the machine anyway.
const ROOT: u32 = 0;

/// A user besides the service's own who may connect to its Unix sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AllowedUid {
    /// The user, by number.
    pub uid: u32,
    /// What this user may be.
    pub roles: Roles,
}

/// Text that is no [`AllowedUid`].
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllowedUidError {
    /// No number.
    #[error("{text:?} is not of the form UID or UID:ROLE+ROLE")]
    Uid {
        /// As given.
        text: String,
    },
    /// A number, and no roles behind it.
    #[error(transparent)]
    Roles(#[from] super::RoleError),
}

impl FromStr for AllowedUid {
    type Err = AllowedUidError;

    /// `UID` for all roles, `UID:ROLE+ROLE` for some.
    fn from_str(text: &str) -> Result<Self, AllowedUidError> {
        let (uid, roles) = match text.split_once(':') {
            Some((uid, roles)) => (uid, roles.parse()?),
            None => (text, Roles::all()),
        };
        let uid = uid
            .parse()
            .map_err(|_| AllowedUidError::Uid { text: text.into() })?;
        Ok(Self { uid, roles })
    }
}

/// The roles of callers by the way they come.
#[derive(Debug, Clone)]
pub struct Peers {
    /// The user that the service runs as.
    pub owner: u32,
    /// Roles of that user and of root on Unix sockets.
    pub owner_roles: Roles,
    /// Further users of Unix sockets.
    pub allowed: Vec<AllowedUid>,
    /// Roles of whoever comes over plain TCP, where nobody has an identity.
    pub tcp_roles: Roles,
}

impl Default for Peers {
    /// The service's own user and root, and plain TCP, hold every role.
    fn default() -> Self {
        Self {
            owner: rustix::process::geteuid().as_raw(),
            owner_roles: Roles::all(),
            allowed: Vec::new(),
            tcp_roles: Roles::all(),
        }
    }
}

/// A caller who is nobody here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Stranger {
    #[error(
        "uid {uid} may not call: this socket is for uid {owner}, root, and those of --allow-uid"
    )]
    Uid { uid: u32, owner: u32 },
    #[error("the connection does not tell who is at its other end")]
    Unknown,
}

impl Peers {
    /// What the caller at the other end may be.
    pub(super) fn roles(&self, peer: Option<&PeerInfo>) -> Result<Roles, Stranger> {
        match peer {
            None => Err(Stranger::Unknown),
            Some(PeerInfo::Tcp(_)) => Ok(self.tcp_roles),
            Some(PeerInfo::Tls(peer)) => Ok(peer.roles),
            Some(PeerInfo::Unix(peer)) => {
                let cred = peer.peer_cred.ok_or(Stranger::Unknown)?;
                self.roles_of_uid(cred.uid())
            }
        }
    }

    fn roles_of_uid(&self, uid: u32) -> Result<Roles, Stranger> {
        if uid == self.owner || uid == ROOT {
            return Ok(self.owner_roles);
        }
        let mut entries = self.allowed.iter().filter(|allowed| allowed.uid == uid);
        let first = entries.next().ok_or(Stranger::Uid {
            uid,
            owner: self.owner,
        })?;
        Ok(entries.fold(first.roles, |roles, more| roles | more.roles))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_the_owner_root_listed_or_nobody() {
        let peers = Peers {
            owner: 1000,
            owner_roles: Roles::HOST | Roles::GUEST,
            allowed: ["1001:operator", "1002", "1001:guest"]
                .map(|text| text.parse().unwrap())
                .into(),
            tcp_roles: Roles::empty(),
        };
        for (uid, roles) in [
            (1000, Some(Roles::HOST | Roles::GUEST)),
            (0, Some(Roles::HOST | Roles::GUEST)),
            (1001, Some(Roles::OPERATOR | Roles::GUEST)),
            (1002, Some(Roles::all())),
            (1003, None),
            (u32::MAX, None),
        ] {
            assert_eq!(peers.roles_of_uid(uid).ok(), roles, "{uid}");
        }
        assert_eq!(peers.roles(None), Err(Stranger::Unknown));
    }

    #[test]
    fn a_list_entry_is_a_number_and_perhaps_roles() {
        for (text, wrong) in [
            ("", "form UID"),
            ("nobody", "form UID"),
            ("-1", "form UID"),
            ("4294967296", "form UID"),
            ("1000:", "none of guest"),
            ("1000:root", "none of guest"),
        ] {
            let error = text.parse::<AllowedUid>().unwrap_err();
            assert!(error.to_string().contains(wrong), "{text}: {error}");
        }
    }
}

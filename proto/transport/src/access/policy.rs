//! Which role a request needs.

use std::collections::HashMap;
use std::sync::Arc;

use http::{Method, Request};

use super::Roles;

/// An RPC, as `/package.Service/Method`, and the roles of which a caller needs one.
pub type Rule = (&'static str, Roles);

/// Services of gRPC itself: they say what is there and how it is, and are open to whoever may
/// connect at all.
const OPEN: [&str; 2] = ["/grpc.health.v1.Health/", "/grpc.reflection."];

/// The rules of a server.
#[derive(Debug, Clone)]
pub struct Policy {
    rules: Arc<HashMap<&'static str, Roles>>,
}

/// What a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Need {
    /// To come from somebody who may connect.
    Nothing,
    /// One of these roles.
    OneOf(Roles),
}

impl Policy {
    /// Rules from the tables of several services.
    pub fn new(tables: &[&[Rule]]) -> Self {
        let rules = tables.iter().copied().flatten().copied().collect();
        Self {
            rules: Arc::new(rules),
        }
    }

    /// The roles for an RPC, when a rule names it.
    pub fn rule(&self, path: &str) -> Option<Roles> {
        self.rules.get(path).copied()
    }

    /// What a request needs. Without a rule, looking (GET) is for operators and hosts, and
    /// everything else for hosts (A1).
    pub(super) fn need<B>(&self, request: &Request<B>) -> Need {
        let path = request.uri().path();
        if let Some(roles) = self.rule(path) {
            return Need::OneOf(roles);
        }
        if OPEN.iter().any(|open| path.starts_with(open)) {
            return Need::Nothing;
        }
        if matches!(*request.method(), Method::GET | Method::HEAD) {
            Need::OneOf(Roles::OPERATOR | Roles::HOST)
        } else {
            Need::OneOf(Roles::HOST)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_no_rule_names_is_not_open() {
        let policy = Policy::new(&[
            &[("/a.A/Guest", Roles::GUEST)],
            &[("/b.B/Inject", Roles::INJECTOR)],
        ]);
        for (method, path, need) in [
            ("POST", "/a.A/Guest", Need::OneOf(Roles::GUEST)),
            ("POST", "/b.B/Inject", Need::OneOf(Roles::INJECTOR)),
            ("POST", "/a.A/Forgotten", Need::OneOf(Roles::HOST)),
            ("POST", "/grpc.health.v1.Health/Check", Need::Nothing),
            (
                "POST",
                "/grpc.health.v1.Healthy/Check",
                Need::OneOf(Roles::HOST),
            ),
            (
                "GET",
                "/metrics",
                Need::OneOf(Roles::OPERATOR | Roles::HOST),
            ),
            ("POST", "/api/vms/1/fault", Need::OneOf(Roles::HOST)),
            ("DELETE", "/", Need::OneOf(Roles::HOST)),
        ] {
            let request = Request::builder()
                .method(method)
                .uri(path)
                .body(())
                .unwrap();
            assert_eq!(policy.need(&request), need, "{method} {path}");
        }
    }
}

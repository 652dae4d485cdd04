//! The layer that refuses callers without the role that a request needs.
//!
//! Source: gRPC status PERMISSION_DENIED with google.rpc.ErrorInfo. Nothing has run when it is
//! answered. A request that is not gRPC gets 403 and the same text.

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use http::{Request, Response, StatusCode, header};
use tonic::Status;
use tonic::body::Body;
use tonic_types::{ErrorDetails, StatusExt as _};
use tower::{Layer, Service};

use super::policy::Need;
use super::{Peers, Policy, Roles};
use crate::sparingly::Sparingly;
use crate::{PeerInfo, Reason};

/// How a server words its refusals.
#[derive(Debug, Clone, Copy)]
pub struct Refusals {
    /// The caller is nobody here.
    pub not_admitted: Reason,
    /// The caller lacks the role.
    pub role_needed: Reason,
    /// ErrorInfo.domain.
    pub domain: &'static str,
}

/// Layer that lets a request pass when its caller holds the role that it needs.
#[derive(Debug, Clone)]
pub struct AccessLayer {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    peers: Peers,
    policy: Policy,
    refusals: Refusals,
    log: Sparingly,
}

impl AccessLayer {
    /// Holds callers, known by `peers`, to the rules of `policy`.
    pub fn new(peers: Peers, policy: Policy, refusals: Refusals) -> Self {
        Self {
            shared: Arc::new(Shared {
                peers,
                policy,
                refusals,
                log: Sparingly::new(),
            }),
        }
    }
}

impl Shared {
    fn check<B>(&self, request: &Request<B>) -> Result<(), Status> {
        let peer = request.extensions().get::<PeerInfo>();
        let path = request.uri().path();
        let held = self.peers.roles(peer).map_err(|stranger| {
            self.log(peer, path, &stranger.to_string());
            let reason = self.refusals.not_admitted;
            self.status(reason, stranger.to_string(), HashMap::new())
        })?;
        match self.policy.need(request) {
            Need::Nothing => Ok(()),
            Need::OneOf(needed) if held.intersects(needed) => Ok(()),
            Need::OneOf(needed) => {
                let message = lacking(path, needed, held);
                self.log(peer, path, &message);
                let metadata = HashMap::from([
                    ("needed".to_owned(), needed.joined(" or ")),
                    ("held".to_owned(), held.joined(" and ")),
                ]);
                Err(self.status(self.refusals.role_needed, message, metadata))
            }
        }
    }

    fn status(&self, reason: Reason, message: String, metadata: HashMap<String, String>) -> Status {
        let details = ErrorDetails::with_error_info(reason.word, self.refusals.domain, metadata);
        Status::with_error_details(reason.code, message, details)
    }

    fn log(&self, peer: Option<&PeerInfo>, path: &str, why: &str) {
        if let Some(before) = self.log.ask() {
            let peer = peer.map_or_else(|| "unknown".into(), ToString::to_string);
            tracing::warn!(peer, path, unreported = before, "refused a caller: {why}");
        }
    }
}

/// What a caller is told: the method, the role for it, and those held.
fn lacking(path: &str, needed: Roles, held: Roles) -> String {
    let method = path.strip_prefix('/').unwrap_or(path);
    let (needed, held) = (needed.joined(" or "), held.joined(" and "));
    format!("{method} needs the role {needed}, the caller holds {held}")
}

/// The refusal in the protocol that the request speaks.
fn answer<B>(request: &Request<B>, status: Status) -> Response<Body> {
    let is_grpc = request
        .headers()
        .get(header::CONTENT_TYPE)
        .is_some_and(|kind| kind.as_bytes().starts_with(b"application/grpc"));
    if is_grpc {
        return status.into_http();
    }
    let mut response = Response::new(Body::new(format!("{}\n", status.message())));
    *response.status_mut() = StatusCode::FORBIDDEN;
    let text = http::HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, text);
    response
}

impl<S> Layer<S> for AccessLayer {
    type Service = Access<S>;

    fn layer(&self, inner: S) -> Access<S> {
        Access {
            inner,
            shared: Arc::clone(&self.shared),
        }
    }
}

/// [`AccessLayer`] around a service.
#[derive(Debug, Clone)]
pub struct Access<S> {
    inner: S,
    shared: Arc<Shared>,
}

impl<S, B> Service<Request<B>> for Access<S>
where
    S: Service<Request<B>, Response = Response<Body>>,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = AccessFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        match self.shared.check(&request) {
            Ok(()) => AccessFuture::Allowed(Box::pin(self.inner.call(request))),
            Err(status) => AccessFuture::Refused(Some(answer(&request, status))),
        }
    }
}

/// The answer of an [`Access`].
#[derive(Debug)]
pub enum AccessFuture<F> {
    /// The caller may.
    Allowed(Pin<Box<F>>),
    /// The caller may not.
    Refused(Option<Response<Body>>),
}

impl<F, E> Future for AccessFuture<F>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        match &mut *self {
            Self::Allowed(call) => Poll::Ready(ready!(call.as_mut().poll(cx))),
            Self::Refused(refusal) => match refusal.take() {
                Some(refusal) => Poll::Ready(Ok(refusal)),
                None => Poll::Pending,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tonic::Code;
    use tonic::transport::server::TcpConnectInfo;

    use super::*;

    mod words {
        crate::reasons! {
            NOT_ADMITTED: PermissionDenied, "", "nobody here", "ask";
            ROLE_NEEDED: PermissionDenied, "", "lacks a role", "ask";
        }
    }

    fn layer(tcp_roles: Roles) -> AccessLayer {
        let peers = Peers {
            tcp_roles,
            ..Peers::default()
        };
        let refusals = Refusals {
            not_admitted: words::NOT_ADMITTED,
            role_needed: words::ROLE_NEEDED,
            domain: "a.v1",
        };
        let rules = [("/a.v1.A/Do", Roles::HOST | Roles::GUEST)];
        AccessLayer::new(peers, Policy::new(&[&rules]), refusals)
    }

    async fn call(roles: Roles, kind: &str, known: bool) -> Response<Body> {
        let inner = tower::service_fn(|_: Request<()>| async {
            Ok::<_, Infallible>(Response::new(Body::empty()))
        });
        let mut request = Request::builder().method("POST").uri("/a.v1.A/Do");
        request = request.header("content-type", kind);
        if known {
            request = request.extension(PeerInfo::Tcp(TcpConnectInfo {
                local_addr: None,
                remote_addr: None,
            }));
        }
        let mut service = layer(roles).layer(inner);
        service.call(request.body(()).unwrap()).await.unwrap()
    }

    #[tokio::test]
    async fn a_refusal_names_the_role_needed_and_those_held() {
        let answer = call(Roles::OPERATOR | Roles::INJECTOR, "application/grpc", true).await;
        let status = Status::from_header_map(answer.headers()).unwrap();
        assert_eq!(status.code(), Code::PermissionDenied);
        assert_eq!(
            status.message(),
            "a.v1.A/Do needs the role guest or host, the caller holds operator and injector"
        );
        let details = status.get_error_details();
        let info = details.error_info().unwrap();
        assert_eq!((&*info.reason, &*info.domain), ("ROLE_NEEDED", "a.v1"));
        assert_eq!(info.metadata["needed"], "guest or host");
        assert_eq!(info.metadata["held"], "operator and injector");
    }

    #[tokio::test]
    async fn one_of_the_roles_is_enough_and_an_unknown_peer_never_is() {
        for (roles, known, reason) in [
            (Roles::GUEST, true, None),
            (Roles::all(), true, None),
            (Roles::empty(), true, Some("ROLE_NEEDED")),
            (Roles::all(), false, Some("NOT_ADMITTED")),
        ] {
            let answer = call(roles, "application/grpc", known).await;
            let status = Status::from_header_map(answer.headers());
            let given = status.map(|status| {
                let details = status.get_error_details();
                details.error_info().unwrap().reason.clone()
            });
            assert_eq!(given.as_deref(), reason, "{roles}");
        }
    }

    #[tokio::test]
    async fn a_browser_is_refused_in_its_own_protocol() {
        let answer = call(Roles::empty(), "application/json", true).await;
        assert_eq!(answer.status(), StatusCode::FORBIDDEN);
        assert!(Status::from_header_map(answer.headers()).is_none());
    }
}

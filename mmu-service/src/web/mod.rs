//! The page for browsers, its data, and `/metrics`: docs/page.md and docs/metrics.md.
//!
//! Invariants
//! - W1  A page of somebody else can neither read nor change anything here ([`guard`]).
//! - W2  Every answer has a bound that does not depend on the size of a VM, and so has the number
//!   of requests in work.
//! - W3  The page needs nothing from anywhere else: its policy forbids it.

mod actions;
mod answers;
mod error;
mod guard;
mod input;
mod looks;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_SECURITY_POLICY, CONTENT_TYPE, REFERRER_POLICY, X_CONTENT_TYPE_OPTIONS,
    X_FRAME_OPTIONS,
};
use axum::http::{HeaderMap, HeaderValue};
use axum::middleware::{from_fn_with_state, map_response};
use axum::response::Response;
use axum::routing::{get, post};
use tokio::sync::Semaphore;
use transport::AdmissionLayer;

use crate::config::{Page, size};
use crate::shell::Shell;

/// Largest request body, in bytes.
const MAX_BODY: usize = 4096;
/// Nothing but this service's own files and data, and in nobody's frame.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; \
                      connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; \
                      frame-ancestors 'none'";

/// What the handlers share.
#[derive(Clone)]
struct Web {
    shell: Arc<Shell>,
    page: Arc<Page>,
    /// Places for requests in work.
    places: Arc<Semaphore>,
}

/// Everything that is not gRPC.
pub(crate) fn routes(shell: Arc<Shell>, page: Page, admission: AdmissionLayer) -> Router {
    let web = Web {
        places: Arc::new(Semaphore::new(size(page.max_page_requests))),
        page: Arc::new(page),
        shell: Arc::clone(&shell),
    };
    let api = Router::new()
        .route("/api/overview", get(looks::overview))
        .route("/api/batches", get(looks::batches))
        .route("/api/vms/{vm}", get(looks::vm))
        .route("/api/vms/{vm}/map", get(looks::map))
        .route("/api/vms/{vm}/walk", get(looks::walk))
        .route("/api/vms/{vm}/fault", post(actions::fault))
        .route("/api/vms/{vm}/convert", post(actions::convert))
        .route("/api/vms/{vm}/audit", post(actions::audit))
        .method_not_allowed_fallback(error::method_not_allowed)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(from_fn_with_state(web.clone(), guard::admit));
    let page = Router::new()
        .route("/", asset("text/html", include_str!("assets/index.html")))
        .route(
            "/page.css",
            asset("text/css", include_str!("assets/page.css")),
        )
        .route(
            "/page.js",
            asset("text/javascript", include_str!("assets/page.js")),
        );
    let metrics = async move || {
        let text = shell.metrics.render(&shell, admission.refused());
        ([(CONTENT_TYPE, telemetry::metrics::CONTENT_TYPE)], text)
    };
    api.merge(page)
        .layer(from_fn_with_state(web.clone(), guard::check_host))
        .layer(map_response(harden))
        .with_state(web)
        .route("/metrics", get(metrics))
}

/// A file of the page.
fn asset(kind: &'static str, text: &'static str) -> axum::routing::MethodRouter<Web> {
    get(async move || {
        let mut headers = HeaderMap::new();
        let kind = HeaderValue::from_str(&format!("{kind}; charset=utf-8"));
        headers.insert(
            CONTENT_TYPE,
            kind.unwrap_or(HeaderValue::from_static("text/plain")),
        );
        (headers, text)
    })
}

async fn harden(mut response: Response) -> Response {
    let headers = response.headers_mut();
    for (name, value) in [
        (CONTENT_SECURITY_POLICY, POLICY),
        (X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (X_FRAME_OPTIONS, "DENY"),
        (REFERRER_POLICY, "no-referrer"),
        (CACHE_CONTROL, "no-store"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers.insert(
        "cross-origin-resource-policy",
        HeaderValue::from_static("same-origin"),
    );
    response
}

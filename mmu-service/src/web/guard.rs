//! Who may ask: only this service's own page, and tools that are no browser.
//!
//! A browser sends requests for any page that is open in it. Three things tell those of strangers:
//! - `Host` names the server as the browser knows it. A name of a stranger that was pointed at
//!   this address (DNS rebinding) is not among the known ones.
//! - `Origin` and `Sec-Fetch-Site` say which page asks.
//! - A change needs `Content-Type: application/json`, which no page may send elsewhere without
//!   asking first (CORS), and here nobody answers that question.

use std::net::IpAddr;

use axum::extract::{Request, State};
use axum::http::header::{CONTENT_TYPE, HOST, ORIGIN};
use axum::http::{HeaderMap, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};

use super::Web;
use super::error::ApiError;

/// Refuses requests that come for a host that is not this one.
pub(super) async fn check_host(State(web): State<Web>, request: Request, next: Next) -> Response {
    let host = host_of(&request);
    if host.is_some_and(|host| is_known(host, &web.page.page_host)) {
        return next.run(request).await;
    }
    let message = "the page is reached by localhost, by a plain address, or by a name that the \
                   setting page-host lists";
    ApiError::new(StatusCode::MISDIRECTED_REQUEST, "UNKNOWN_HOST", message).into_response()
}

/// Refuses requests of other pages, and those above the limit.
pub(super) async fn admit(State(web): State<Web>, request: Request, next: Next) -> Response {
    let is_change = request.method() != Method::GET && request.method() != Method::HEAD;
    let refusal = check_origin(host_of(&request), request.headers())
        .and_then(|()| check_type(is_change, request.headers()));
    if let Err(refusal) = refusal {
        return refusal.into_response();
    }
    let Ok(_place) = web.places.try_acquire() else {
        let limit = web.page.max_page_requests;
        let message = format!("{limit} requests are in work, the limit");
        let code = StatusCode::TOO_MANY_REQUESTS;
        return ApiError::new(code, crate::reasons::OVERLOADED.word, message)
            .retry()
            .into_response();
    };
    next.run(request).await
}

/// Host and port as the client wrote them.
fn host_of(request: &Request) -> Option<&str> {
    match request.headers().get(HOST) {
        Some(host) => host.to_str().ok(),
        // HTTP/2 has it in the request line.
        None => request
            .uri()
            .authority()
            .map(|authority| authority.as_str()),
    }
}

fn is_known(host: &str, names: &[String]) -> bool {
    let Ok(authority) = host.parse::<axum::http::uri::Authority>() else {
        return false;
    };
    let name = authority.host();
    let address = name
        .strip_prefix('[')
        .and_then(|name| name.strip_suffix(']'));
    address.unwrap_or(name).parse::<IpAddr>().is_ok()
        || name.eq_ignore_ascii_case("localhost")
        || names.iter().any(|known| known.eq_ignore_ascii_case(name))
}

fn check_origin(host: Option<&str>, headers: &HeaderMap) -> Result<(), ApiError> {
    let text = |name| {
        headers
            .get(name)
            .map(|value: &axum::http::HeaderValue| value.to_str())
    };
    let same_origin = match text(ORIGIN.as_str()) {
        None => true,
        // A proxy in front may have taken the encryption off, so both schemes count.
        Some(Ok(origin)) => origin
            .strip_prefix("http://")
            .or_else(|| origin.strip_prefix("https://"))
            .is_some_and(|origin| Some(origin) == host),
        Some(Err(_)) => false,
    };
    let same_site = match text("sec-fetch-site") {
        None | Some(Ok("same-origin" | "none")) => true,
        Some(_) => false,
    };
    if same_origin && same_site {
        return Ok(());
    }
    let message = "another page asks; only the page of this service may";
    Err(ApiError::new(
        StatusCode::FORBIDDEN,
        "FOREIGN_ORIGIN",
        message,
    ))
}

fn check_type(is_change: bool, headers: &HeaderMap) -> Result<(), ApiError> {
    let is_json = headers.get(CONTENT_TYPE).is_some_and(|kind| {
        let kind = kind.to_str().unwrap_or_default();
        kind.split(';')
            .next()
            .is_some_and(|kind| kind.trim() == "application/json")
    });
    if !is_change || is_json {
        return Ok(());
    }
    let message = "changes are sent as application/json";
    let code = StatusCode::UNSUPPORTED_MEDIA_TYPE;
    Err(ApiError::new(code, "NOT_JSON", message))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_nobody_else_can_own_are_known() {
        let names = ["mmu".to_owned()];
        for (host, known) in [
            ("localhost:50051", true),
            ("LOCALHOST", true),
            ("127.0.0.1:1", true),
            ("[::1]:50051", true),
            ("10.0.0.7", true),
            ("mmu:50051", true),
            ("mmu.evil.example:50051", false),
            ("localhost.evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("", false),
            ("a b", false),
        ] {
            assert_eq!(is_known(host, &names), known, "{host}");
        }
    }

    #[test]
    fn requests_of_other_pages_are_told_by_their_headers() {
        let host = Some("localhost:50051");
        for (case, headers, allowed) in [
            ("no browser", &[][..], true),
            ("own page", &[("origin", "http://localhost:50051")], true),
            (
                "own page, and says so",
                &[
                    ("origin", "http://localhost:50051"),
                    ("sec-fetch-site", "same-origin"),
                ],
                true,
            ),
            ("typed in", &[("sec-fetch-site", "none")], true),
            ("stranger", &[("origin", "http://evil.example")], false),
            ("other port", &[("origin", "http://localhost:8080")], false),
            ("sandboxed frame", &[("origin", "null")], false),
            ("subdomain", &[("sec-fetch-site", "same-site")], false),
            (
                "image elsewhere",
                &[("sec-fetch-site", "cross-site")],
                false,
            ),
        ] {
            let headers: HeaderMap = headers
                .iter()
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .collect::<Vec<(axum::http::HeaderName, axum::http::HeaderValue)>>()
                .into_iter()
                .collect();
            assert_eq!(check_origin(host, &headers).is_ok(), allowed, "{case}");
        }
    }
}

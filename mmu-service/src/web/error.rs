//! Refusals as JSON: `{"error": {"reason", "message", "field"}}`, with the HTTP status of the gRPC
//! one that the same request would get.

use axum::Json;
use axum::http::StatusCode;
use axum::http::header::RETRY_AFTER;
use axum::response::{IntoResponse, Response};
use mirror_proto::InvalidField;
use serde::Serialize;
use tonic::{Code, Status};
use tonic_types::StatusExt as _;

use crate::status;

/// Why a request gets no answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ApiError {
    code: StatusCode,
    reason: String,
    message: String,
    field: Option<String>,
    retry: bool,
}

#[derive(Serialize)]
struct Body<'a> {
    error: Said<'a>,
}

#[derive(Serialize)]
struct Said<'a> {
    reason: &'a str,
    message: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<&'a str>,
}

impl ApiError {
    pub(super) fn new(code: StatusCode, reason: &str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason: reason.to_owned(),
            message: message.into(),
            field: None,
            retry: false,
        }
    }

    /// Asks the caller to come back.
    pub(super) fn retry(self) -> Self {
        Self {
            retry: true,
            ..self
        }
    }
}

/// The method is not one of the path's.
pub(super) async fn method_not_allowed() -> ApiError {
    ApiError::new(
        StatusCode::METHOD_NOT_ALLOWED,
        "METHOD_NOT_ALLOWED",
        "looks are GET, changes are POST",
    )
}

impl From<InvalidField> for ApiError {
    fn from(error: InvalidField) -> Self {
        status::of_field(error).into()
    }
}

impl From<Status> for ApiError {
    fn from(status: Status) -> Self {
        let code = match status.code() {
            Code::InvalidArgument | Code::OutOfRange => StatusCode::BAD_REQUEST,
            Code::NotFound => StatusCode::NOT_FOUND,
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => StatusCode::CONFLICT,
            Code::ResourceExhausted => StatusCode::TOO_MANY_REQUESTS,
            Code::Unavailable => StatusCode::SERVICE_UNAVAILABLE,
            Code::DeadlineExceeded => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        };
        let details = status.get_error_details();
        Self {
            code,
            reason: details.error_info().map_or_else(
                || crate::reasons::INTERNAL.word.to_owned(),
                |info| info.reason.clone(),
            ),
            message: status.message().to_owned(),
            field: details
                .bad_request()
                .and_then(|bad| Some(bad.field_violations.first()?.field.clone())),
            retry: details.retry_info().is_some(),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let said = Said {
            reason: &self.reason,
            message: &self.message,
            field: self.field.as_deref(),
        };
        let mut response = (self.code, Json(Body { error: said })).into_response();
        if self.retry {
            let value = axum::http::HeaderValue::from_static("1");
            response.headers_mut().insert(RETRY_AFTER, value);
        }
        response
    }
}

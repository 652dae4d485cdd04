//! Jaeger's query API v3, as far as it is needed: service names, and one trace by its id.

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use opentelemetry_proto::tonic::trace::v1::TracesData;
use serde_json::{Value, json};

use crate::store::Store;

pub(crate) fn router(store: Store) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/api/v3/services", get(services))
        .route("/api/v3/traces/{trace_id}", get(trace))
        .with_state(store)
}

async fn page() -> &'static str {
    "stands in for Jaeger: spans arrive here and can be asked for, there is no page to look at\n"
}

async fn services(State(store): State<Store>) -> Json<Value> {
    Json(json!({ "services": store.services() }))
}

async fn trace(
    State(store): State<Store>,
    Path(trace_id): Path<String>,
) -> (StatusCode, Json<Value>) {
    let resource_spans = store.resource_spans(&trace_id);
    if resource_spans.is_empty() {
        let message = "no trace has this id";
        let error = json!({ "error": { "httpCode": 404, "message": message } });
        return (StatusCode::NOT_FOUND, Json(error));
    }
    (
        StatusCode::OK,
        Json(json!({ "result": TracesData { resource_spans } })),
    )
}

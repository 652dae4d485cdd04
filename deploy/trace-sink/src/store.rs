//! The spans that arrived.

use std::collections::{BTreeSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::TraceService;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::resource::v1::Resource;
use opentelemetry_proto::tonic::trace::v1::{ResourceSpans, ScopeSpans, Span};
use tonic::{Request, Response, Status};

/// Spans that are kept at most; the oldest ones go first.
pub const MAX_SPANS: usize = 100_000;

/// One span, with what sent it.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// What describes the process.
    pub resource: Resource,
    /// The span.
    pub span: Span,
}

impl Received {
    /// `service.name` of the process; empty without one.
    pub fn service(&self) -> &str {
        let name = self
            .resource
            .attributes
            .iter()
            .find(|attribute| attribute.key == "service.name")
            .and_then(|attribute| attribute.value.as_ref()?.value.as_ref());
        match name {
            Some(Value::StringValue(name)) => name,
            _ => "",
        }
    }
}

impl Received {
    /// 32 hex digits.
    pub fn trace_id(&self) -> String {
        hex(&self.span.trace_id)
    }

    /// An attribute of the span, as text.
    pub fn attribute(&self, key: &str) -> Option<String> {
        let found = self.span.attributes.iter().find(|one| one.key == key)?;
        Some(match found.value.as_ref()?.value.as_ref()? {
            Value::StringValue(text) => text.clone(),
            Value::IntValue(number) => number.to_string(),
            Value::BoolValue(fact) => fact.to_string(),
            Value::DoubleValue(number) => number.to_string(),
            other => format!("{other:?}"),
        })
    }
}

/// What has arrived so far. Clones share it.
#[derive(Debug, Clone, Default)]
pub struct Store(Arc<Mutex<VecDeque<Received>>>);

impl Store {
    fn spans(&self) -> MutexGuard<'_, VecDeque<Received>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The spans of one trace, in the order of their arrival. The id has 32 hex digits.
    pub fn trace(&self, trace_id: &str) -> Vec<Received> {
        self.spans()
            .iter()
            .filter(|received| hex(&received.span.trace_id) == trace_id)
            .cloned()
            .collect()
    }

    /// All spans, in the order of their arrival.
    pub fn all(&self) -> Vec<Received> {
        self.spans().iter().cloned().collect()
    }

    /// Names of the processes that sent spans, ascending.
    pub fn services(&self) -> BTreeSet<String> {
        self.spans()
            .iter()
            .map(|received| received.service().to_owned())
            .collect()
    }

    /// The spans of one trace, as one entry for each process.
    pub(crate) fn resource_spans(&self, trace_id: &str) -> Vec<ResourceSpans> {
        let mut groups: Vec<ResourceSpans> = Vec::new();
        for Received { resource, span } in self.trace(trace_id) {
            let at = groups
                .iter()
                .position(|group| group.resource.as_ref() == Some(&resource));
            let group = match at {
                Some(at) => &mut groups[at],
                None => {
                    groups.push(ResourceSpans {
                        resource: Some(resource),
                        scope_spans: vec![ScopeSpans::default()],
                        schema_url: String::new(),
                    });
                    let last = groups.len() - 1;
                    &mut groups[last]
                }
            };
            group.scope_spans[0].spans.push(span);
        }
        groups
    }
}

#[tonic::async_trait]
impl TraceService for Store {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let mut spans = self.spans();
        for sent in request.into_inner().resource_spans {
            let resource = sent.resource.unwrap_or_default();
            for span in sent.scope_spans.into_iter().flat_map(|scope| scope.spans) {
                if spans.len() == MAX_SPANS {
                    spans.pop_front();
                }
                let resource = resource.clone();
                spans.push_back(Received { resource, span });
            }
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

//! The spans of one command as a tree: what `--explain` prints.
//!
//! Spans come from up to three processes, by their own clocks. A span whose parent is not among
//! them hangs below the call that brought it: a service's own span of a call ends behind the answer
//! that the spans came in.

use std::collections::HashMap;

use mirror_proto::trace::{Attribute, Span};
use serde_json::{Map, Value, json};
use tdx_defs::CompletionStatus;

use crate::output::Table;

/// Attributes that are repeated in every span or say nothing to people.
const QUIET: [&str; 11] = [
    "rpc.system.name",
    "rpc.method",
    "rpc.response.status_code",
    "tdx.session",
    "tdx.sequence",
    "tdx.lp",
    "tdx.seamcall.leaf",
    "otel.status_code",
    "server.address",
    "server.port",
    "level",
];

/// The spans of one trace, parents before children, siblings by their start.
#[derive(Debug, Default)]
pub struct SpanTree {
    spans: Vec<Span>,
    children: Vec<Vec<usize>>,
    roots: Vec<usize>,
}

impl SpanTree {
    /// Orders the spans of one trace.
    pub fn new(mut spans: Vec<Span>) -> Self {
        // Among those that start together the longer one is outside.
        spans.sort_by_key(|span| (span.start_unix_ns, u64::MAX - span.end_unix_ns));
        let by_id: HashMap<&[u8], usize> = spans
            .iter()
            .enumerate()
            .map(|(at, span)| (span.span_id.as_slice(), at))
            .collect();
        let call = spans.iter().position(|span| span.kind == "client");
        let mut children = vec![Vec::new(); spans.len()];
        let mut roots = Vec::new();
        for (at, span) in spans.iter().enumerate() {
            let parent = match by_id.get(span.parent_span_id.as_slice()) {
                Some(&parent) => Some(parent),
                None if span.parent_span_id.is_empty() => None,
                None => call.filter(|&call| call != at),
            };
            match parent {
                // A span is not above itself, whatever it says.
                Some(parent) if parent != at => children[parent].push(at),
                _ => roots.push(at),
            }
        }
        Self {
            spans,
            children,
            roots,
        }
    }

    /// Spans in the tree.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// Spans with their depth, from the top down.
    fn walk(&self) -> Vec<(usize, String)> {
        let mut lines = Vec::with_capacity(self.spans.len());
        for &root in &self.roots {
            self.descend(root, "", "", &mut lines);
        }
        lines
    }

    fn descend(&self, at: usize, lead: &str, below: &str, lines: &mut Vec<(usize, String)>) {
        lines.push((at, lead.to_owned()));
        let children = &self.children[at];
        for (place, &child) in children.iter().enumerate() {
            let last = place + 1 == children.len();
            let (branch, rest) = if last {
                ("└─ ", "   ")
            } else {
                ("├─ ", "│  ")
            };
            let lead = format!("{below}{branch}");
            self.descend(child, &lead, &format!("{below}{rest}"), lines);
        }
    }

    /// A table for people.
    pub fn text(&self) -> String {
        let start = self.start();
        let mut table = Table::new(&["span", "process", ">at", ">took", "what"]);
        for (at, lead) in self.walk() {
            let span = &self.spans[at];
            table.row([
                format!("{lead}{}", short_name(&span.name)),
                span.service.clone(),
                microseconds(span.start_unix_ns.saturating_sub(start)),
                microseconds(took(span)),
                what(span),
            ]);
            for event in &span.events {
                let lead = lead.replace("├─ ", "│  ").replace("└─ ", "   ");
                table.row([
                    format!("{lead}· {}", event.name),
                    String::new(),
                    microseconds(event.unix_ns.saturating_sub(start)),
                    String::new(),
                    told(&event.attributes),
                ]);
            }
        }
        table.to_string()
    }

    /// The roots with their children. Times are nanoseconds, starts from the first span's.
    pub fn to_json(&self) -> Value {
        self.roots
            .iter()
            .map(|&root| self.node(root))
            .collect::<Vec<_>>()
            .into()
    }

    fn node(&self, at: usize) -> Value {
        let (span, start) = (&self.spans[at], self.start());
        let events: Vec<Value> = span
            .events
            .iter()
            .map(|event| {
                json!({
                    "name": event.name,
                    "at_ns": event.unix_ns.saturating_sub(start),
                    "attributes": members(&event.attributes),
                })
            })
            .collect();
        let children: Vec<Value> = self.children[at]
            .iter()
            .map(|&child| self.node(child))
            .collect();
        json!({
            "name": span.name,
            "service": span.service,
            "kind": span.kind,
            "start_ns": span.start_unix_ns.saturating_sub(start),
            "duration_ns": took(span),
            "error": span.error,
            "attributes": members(&span.attributes),
            "events": events,
            "children": children,
        })
    }

    fn start(&self) -> u64 {
        self.spans.first().map_or(0, |span| span.start_unix_ns)
    }
}

fn took(span: &Span) -> u64 {
    span.end_unix_ns.saturating_sub(span.start_unix_ns)
}

/// A method without its package.
fn short_name(name: &str) -> &str {
    match name.split_once('/') {
        Some((service, method)) if service.contains('.') => method,
        _ => name,
    }
}

fn microseconds(ns: u64) -> String {
    format!("{}.{} µs", ns / 1000, ns % 1000 / 100)
}

fn what(span: &Span) -> String {
    let told = told(&span.attributes);
    match (span.error, told.is_empty()) {
        (false, _) => told,
        (true, true) => "error".to_owned(),
        (true, false) => format!("error, {told}"),
    }
}

/// Attributes in a line, without the prefix that all of them share.
fn told(attributes: &[Attribute]) -> String {
    attributes
        .iter()
        .filter(|one| !QUIET.contains(&one.key.as_str()))
        .map(|one| match one.key.as_str() {
            "tdx.status" => status_name(&one.value),
            key => {
                let key = key.strip_prefix("kvm.").unwrap_or(key);
                let key = key.strip_prefix("tdx.").unwrap_or(key);
                format!("{key}={}", one.value)
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

fn status_name(hex: &str) -> String {
    u64::from_str_radix(hex.trim_start_matches("0x"), 16)
        .ok()
        .and_then(|status| CompletionStatus(status).name())
        .unwrap_or_else(|| hex.to_owned())
}

fn members(attributes: &[Attribute]) -> Map<String, Value> {
    attributes
        .iter()
        .map(|one| (one.key.clone(), Value::String(one.value.clone())))
        .collect()
}

/// The page of a trace in Jaeger, whose address may end in a slash.
pub fn jaeger_link(jaeger: &str, trace_id: &str) -> String {
    format!("{}/trace/{trace_id}", jaeger.trim_end_matches('/'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(id: u8, parent: u8, name: &str, kind: &str, times: (u64, u64)) -> Span {
        let bytes = |id: u8| if id == 0 { Vec::new() } else { vec![id; 8] };
        Span {
            span_id: bytes(id),
            parent_span_id: bytes(parent),
            service: "s".into(),
            name: name.into(),
            kind: kind.into(),
            start_unix_ns: times.0,
            end_unix_ns: times.1,
            ..Span::default()
        }
    }

    #[test]
    fn spans_hang_below_their_parents_in_the_order_of_their_start() {
        let tree = SpanTree::new(vec![
            span(4, 3, "late", "internal", (1_003_000, 1_004_000)),
            span(5, 3, "early", "internal", (1_002_000, 1_003_000)),
            // Its parent did not come along: below the call.
            span(3, 9, "handle_fault", "internal", (1_001_500, 1_008_000)),
            span(1, 0, "fault", "internal", (1_000_000, 1_010_000)),
            span(
                2,
                1,
                "kvm.mmu.v1.MmuService/HandleFault",
                "client",
                (1_001_000, 1_009_000),
            ),
        ]);
        let names: Vec<String> = tree
            .walk()
            .into_iter()
            .map(|(at, lead)| format!("{lead}{}", tree.spans[at].name))
            .collect();
        assert_eq!(
            names,
            [
                "fault",
                "└─ kvm.mmu.v1.MmuService/HandleFault",
                "   └─ handle_fault",
                "      ├─ early",
                "      └─ late",
            ]
        );
        let json = tree.to_json();
        let fault = &json[0]["children"][0]["children"][0];
        assert_eq!(fault["name"], "handle_fault");
        assert_eq!(
            (&fault["start_ns"], &fault["duration_ns"]),
            (&json!(1500), &json!(6500))
        );
        assert!(tree.text().contains("└─ HandleFault"), "{}", tree.text());
    }

    #[test]
    fn a_span_that_is_its_own_parent_is_a_root() {
        let tree = SpanTree::new(vec![span(1, 1, "odd", "internal", (1, 2))]);
        assert_eq!(tree.to_json().as_array().unwrap().len(), 1);
        assert_eq!((tree.len(), tree.is_empty()), (1, false));
    }

    #[test]
    fn attributes_are_told_without_prefix_and_statuses_by_name() {
        let attribute = |key: &str, value: &str| Attribute {
            key: key.into(),
            value: value.into(),
        };
        let attributes = [
            attribute("kvm.gfn", "0x40000"),
            attribute("tdx.sept.level", "0"),
            attribute("tdx.status", "0x0000000000000000"),
            attribute("rpc.system.name", "grpc"),
        ];
        assert_eq!(told(&attributes), "gfn=0x40000 sept.level=0 TDX_SUCCESS");
    }

    #[test]
    fn a_link_has_one_slash_between_its_parts() {
        for jaeger in ["http://localhost:16686", "http://localhost:16686/"] {
            assert_eq!(jaeger_link(jaeger, "ab"), "http://localhost:16686/trace/ab");
        }
    }
}

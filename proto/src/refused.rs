//! Spans of a refused call: a refusal has no message to put them into, so they are in a trailer.

use prost::Message as _;
use tonic::Status;
use tonic::metadata::MetadataValue;

use crate::trace::{Span, Spans};

/// The trailer: an encoded `mirror.trace.v1.Spans`.
const TRAILER: &str = "mirror-spans-bin";
/// Most bytes of it before its base64: what HTTP/2 peers accept as headers (16 KiB) has room for
/// it and for the details of the status.
const MAX_BYTES: usize = 6 << 10;

/// Puts spans into a refusal. Where there is no room for all, the ones that ended first are left
/// out: those around them ended behind them.
pub fn attach_spans(status: &mut Status, spans: Vec<Span>) {
    let mut bytes = 0;
    let mut kept: Vec<Span> = spans
        .into_iter()
        .rev()
        .take_while(|span| {
            // Tag and length of an element take up to four bytes at this size.
            bytes += span.encoded_len() + 4;
            bytes <= MAX_BYTES
        })
        .collect();
    if kept.is_empty() {
        return;
    }
    kept.reverse();
    let encoded = Spans { spans: kept }.encode_to_vec();
    status
        .metadata_mut()
        .insert_bin(TRAILER, MetadataValue::from_bytes(&encoded));
}

/// The spans in a refusal; none when there are none or they cannot be read.
pub fn spans_of(status: &Status) -> Vec<Span> {
    status
        .metadata()
        .get_bin(TRAILER)
        .and_then(|value| value.to_bytes().ok())
        .filter(|bytes| bytes.len() <= MAX_BYTES)
        .and_then(|bytes| Spans::decode(bytes).ok())
        .map(|spans| spans.spans)
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn span(name: &str) -> Span {
        Span {
            name: name.into(),
            span_id: vec![7; 8],
            ..Span::default()
        }
    }

    #[test]
    fn a_refusal_brings_spans_along() {
        let mut status = Status::not_found("no slot");
        let spans = vec![span("walk"), span("handle_fault")];
        attach_spans(&mut status, spans.clone());
        assert_eq!(spans_of(&status), spans);
        assert_eq!(spans_of(&Status::not_found("no slot")), []);
    }

    #[test]
    fn what_ended_first_is_left_out_where_room_is_short() {
        let mut status = Status::not_found("no slot");
        let mut spans = vec![span(&"leaf".repeat(MAX_BYTES / 4))];
        spans.extend((0..1000).map(|at| span(&format!("span {at}"))));
        attach_spans(&mut status, spans);
        let kept = spans_of(&status);
        assert_eq!(kept.last().unwrap().name, "span 999");
        assert!((100..1000).contains(&kept.len()), "{}", kept.len());
        let trailer = status.metadata().get_bin(TRAILER).unwrap();
        assert!(trailer.as_encoded_bytes().len() <= MAX_BYTES / 3 * 4 + 4);
    }

    #[test]
    fn a_trailer_that_is_no_list_of_spans_is_none() {
        let mut status = Status::not_found("no slot");
        let value = MetadataValue::from_bytes(&[0xFF; 9]);
        status.metadata_mut().insert_bin(TRAILER, value);
        assert_eq!(spans_of(&status), []);
    }
}

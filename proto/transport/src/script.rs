//! Calls read from bytes, on services without a connection: what a fuzzer plays.
//!
//! A script is calls one after the other: a byte for the method (its place among the [`Rule`]s), two
//! for the length of what follows (little-endian), and the request as the bytes of its message. With
//! the highest bit of the method's byte set, what follows is the whole body instead, as HTTP/2
//! carries it: several messages, broken frames.

use std::future::poll_fn;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use bytes::{BufMut as _, Bytes, BytesMut};
use http::HeaderMap;
use http_body::Body as _;
use http_body_util::Full;
use tonic::Status;
use tonic::body::Body;
use tonic::service::Routes;
use tower::ServiceExt as _;

use crate::Rule;

/// Marks a whole body.
const WHOLE: u8 = 0x80;
/// Length of a gRPC frame's head: whether it is compressed, and its length.
const HEAD: usize = 5;
/// Bytes of one answer that are read. The rest is left to the flow control of a real connection.
const MAX_ANSWER: usize = 16 << 20;

/// One call of a script.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScriptedCall {
    /// Path of the method.
    pub path: &'static str,
    /// The message alone; `None` where the script gives the whole body.
    pub message: Option<Bytes>,
    /// Body of the request.
    pub body: Bytes,
}

impl ScriptedCall {
    /// A request of one message.
    pub fn new(path: &'static str, message: Bytes) -> Self {
        let mut body = BytesMut::with_capacity(HEAD + message.len());
        body.put_u8(0);
        body.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
        body.put_slice(&message);
        Self {
            path,
            message: Some(message),
            body: body.freeze(),
        }
    }

    /// The calls of a script; those of methods that do not exist are left out.
    pub fn read(script: &[u8], rules: &'static [Rule]) -> Vec<Self> {
        let mut calls = Vec::new();
        let mut rest = script;
        while let [method, low, high, after @ ..] = rest {
            let length = usize::from(u16::from_le_bytes([*low, *high]));
            let (content, next) = after.split_at(length.min(after.len()));
            rest = next;
            let Some((path, _)) = rules.get(usize::from(method & !WHOLE)) else {
                continue;
            };
            let content = Bytes::copy_from_slice(content);
            calls.push(if method & WHOLE == 0 {
                Self::new(path, content)
            } else {
                Self {
                    path,
                    message: None,
                    body: content,
                }
            });
        }
        calls
    }

    /// The script that [`ScriptedCall::read`] reads.
    ///
    /// # Panics
    ///
    /// When a path is none of the rules', or a content is longer than a script can say.
    pub fn write(calls: &[Self], rules: &[Rule]) -> Vec<u8> {
        let mut script = Vec::new();
        for call in calls {
            let at = rules.iter().position(|(path, _)| *path == call.path);
            let method = at.and_then(|at| u8::try_from(at).ok());
            let method = method.expect("a method of the rules");
            let (mark, content) = match &call.message {
                Some(message) => (0, message),
                None => (WHOLE, &call.body),
            };
            let length = u16::try_from(content.len()).expect("at most 64 KiB");
            script.push(method | mark);
            script.extend_from_slice(&length.to_le_bytes());
            script.extend_from_slice(content);
        }
        script
    }

    /// Makes the call. `Ok` is the number of bytes that were answered; an answer that ends without
    /// a status is a refusal of [`tonic::Code::Unknown`].
    ///
    /// An `endless` answer is read as far as it is there.
    pub async fn make(self, routes: Routes, endless: bool) -> Result<usize, Status> {
        let request = http::Request::post(self.path)
            .header(http::header::CONTENT_TYPE, "application/grpc")
            .header(http::header::TE, "trailers")
            .body(Body::new(Full::new(self.body)))
            .map_err(|error| Status::unknown(error.to_string()))?;
        let Ok(response) = routes.oneshot(request).await;
        let (head, body) = response.into_parts();
        if let Some(status) = status_of(&head.headers) {
            return status.map(|()| 0);
        }
        let mut body = pin!(body);
        let mut read = 0;
        loop {
            let frame = if endless {
                let mut context = Context::from_waker(Waker::noop());
                match body.as_mut().poll_frame(&mut context) {
                    Poll::Ready(frame) => frame,
                    Poll::Pending => return Ok(read),
                }
            } else {
                poll_fn(|context| body.as_mut().poll_frame(context)).await
            };
            match frame {
                None => return Err(Status::unknown("the answer ends without a status")),
                Some(Err(status)) => return Err(status),
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => read += data.len(),
                    Err(frame) => {
                        let trailers = frame.into_trailers().unwrap_or_default();
                        let status = status_of(&trailers)
                            .unwrap_or_else(|| Err(Status::unknown("trailers without a status")));
                        return status.map(|()| read);
                    }
                },
            }
            if read > MAX_ANSWER {
                return Ok(read);
            }
        }
    }
}

fn status_of(headers: &HeaderMap) -> Option<Result<(), Status>> {
    let status = Status::from_header_map(headers)?;
    Some(match status.code() {
        tonic::Code::Ok => Ok(()),
        _ => Err(status),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Roles;

    const RULES: &[Rule] = &[("/a.A/One", Roles::HOST), ("/a.A/Two", Roles::HOST)];

    #[test]
    fn what_is_written_is_read_again() {
        let calls = [
            ScriptedCall::new("/a.A/Two", Bytes::from_static(b"two")),
            ScriptedCall::new("/a.A/One", Bytes::new()),
            ScriptedCall {
                path: "/a.A/One",
                message: None,
                body: Bytes::from_static(&[0, 0, 0, 0, 9, 1]),
            },
        ];
        let script = ScriptedCall::write(&calls, RULES);
        assert_eq!(ScriptedCall::read(&script, RULES), calls);
    }

    #[test]
    fn a_script_that_is_cut_or_names_nothing_is_read_as_far_as_it_goes() {
        let one = |content: &'static [u8]| {
            vec![ScriptedCall::new("/a.A/One", Bytes::from_static(content))]
        };
        for (script, calls) in [
            (&[][..], vec![]),
            (&[0, 1], vec![]),
            (&[0, 9, 0, 7], one(&[7])),
            (&[2, 1, 0, 7, 0, 1, 0, 8, 1], one(&[8])),
        ] {
            assert_eq!(ScriptedCall::read(script, RULES), calls, "{script:?}");
        }
    }
}

//! One request on one connection, as an old browser or a scraper makes it, and what came back.
//!
//! By hand, so that a test can send what no client library would.

use std::path::Path;

use serde_json::Value;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};
use tokio::time::timeout;

use crate::stack::PATIENCE;

/// An answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    /// Lines of the head, in lower case up to the colon.
    head: Vec<(String, String)>,
    pub(crate) body: String,
}

impl Answer {
    /// A header field.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut named = self.head.iter().filter(|(field, _)| field == name);
        named.next().map(|(_, value)| value.as_str())
    }

    /// The body as JSON.
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// Reason and field of a refusal.
    pub(crate) fn refusal(&self) -> (u16, String, Option<String>) {
        let error = &self.json()["error"];
        assert!(
            error["message"]
                .as_str()
                .is_some_and(|text| !text.is_empty()),
            "{self:?}"
        );
        let word = |name: &str| error[name].as_str().map(ToOwned::to_owned);
        (
            self.status,
            word("reason").expect("a reason"),
            word("field"),
        )
    }
}

/// A request to a TCP port.
pub(crate) async fn over_tcp(
    authority: &str,
    method: &str,
    path: &str,
    more: &Extra<'_>,
) -> Answer {
    let stream = TcpStream::connect(authority).await.unwrap();
    exchange(stream, authority, method, path, more).await
}

/// A request to a Unix socket.
pub(crate) async fn over_unix(socket: &Path, path: &str) -> Answer {
    let stream = UnixStream::connect(socket).await.unwrap();
    exchange(stream, "localhost", "GET", path, &Extra::default()).await
}

/// What a request has beside its line.
#[derive(Debug, Default)]
pub(crate) struct Extra<'a> {
    pub(crate) host: Option<&'a str>,
    pub(crate) headers: &'a [(&'a str, &'a str)],
    pub(crate) body: &'a str,
}

/// GET of a path.
pub(crate) async fn get(authority: &str, path: &str) -> Answer {
    over_tcp(authority, "GET", path, &Extra::default()).await
}

/// POST of JSON.
pub(crate) async fn post(authority: &str, path: &str, body: &Value) -> Answer {
    let more = Extra {
        headers: &[("Content-Type", "application/json")],
        body: &body.to_string(),
        ..Extra::default()
    };
    over_tcp(authority, "POST", path, &more).await
}

async fn exchange(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    authority: &str,
    method: &str,
    path: &str,
    more: &Extra<'_>,
) -> Answer {
    let host = more.host.unwrap_or(authority);
    let mut request = format!("{method} {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n");
    for (name, value) in more.headers {
        request += &format!("{name}: {value}\r\n");
    }
    request += &format!("Content-Length: {}\r\n\r\n{}", more.body.len(), more.body);
    let answered = async {
        stream.write_all(request.as_bytes()).await.unwrap();
        read(&mut stream).await
    };
    timeout(PATIENCE, answered).await.expect("in time")
}

/// Reads a head and as much body as it announces.
async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Answer {
    let mut bytes = Vec::new();
    let mut part = vec![0; 64 << 10];
    loop {
        let ends = bytes.windows(4).position(|four| four == b"\r\n\r\n");
        if let Some(end) = ends {
            let answer = parse(&bytes[..end], &bytes[end + 4..]);
            let length = answer
                .header("content-length")
                .map(|text| text.parse::<usize>().unwrap());
            if length.is_some_and(|length| bytes.len() - end - 4 >= length) {
                return answer;
            }
        }
        let read = stream.read(&mut part).await.unwrap();
        assert!(
            read != 0,
            "the answer ended early: {}",
            String::from_utf8_lossy(&bytes)
        );
        bytes.extend_from_slice(&part[..read]);
    }
}

fn parse(head: &[u8], body: &[u8]) -> Answer {
    let head = String::from_utf8_lossy(head);
    let mut lines = head.lines();
    let first = lines.next().unwrap_or_default();
    Answer {
        status: first
            .split(' ')
            .nth(1)
            .and_then(|code| code.parse().ok())
            .unwrap_or_else(|| panic!("no status in {first:?}")),
        head: lines
            .filter_map(|line| line.split_once(':'))
            .map(|(name, value)| (name.to_ascii_lowercase(), value.trim().to_owned()))
            .collect(),
        body: String::from_utf8_lossy(body).into_owned(),
    }
}

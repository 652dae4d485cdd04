//! `raw`: the floors by themselves.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use super::figure::{Figure, median, ns_per_op};
use super::{ModuleUrl, Plan, build, fault};
use crate::error::Error;
use crate::progress::Progress;

/// Round trips of one sample.
const ROUNDS: u64 = 1000;
/// Bytes each way.
const MESSAGE: usize = 64;
/// Bytes that are hashed.
const HASHED: u64 = 4 << 20;

pub(super) async fn run(
    module: ModuleUrl<'_>,
    plan: Plan,
    progress: &Progress,
) -> Result<Vec<Figure>, Error> {
    let samples = plan
        .repeat(progress, async || {
            tokio::task::block_in_place(|| {
                let stream = fault::ping_pong(module)?;
                let socket = socket_ping_pong()?;
                let hash = build::hash(HASHED);
                Ok((stream, socket, hash))
            })
        })
        .await?;
    let streams: Vec<_> = samples
        .iter()
        .map(|&(stream, socket, _)| (stream, socket))
        .collect();
    let hashes: Vec<_> = samples
        .iter()
        .map(|&(_, socket, hash)| (hash, socket))
        .collect();
    Ok(vec![
        Figure::new(
            ("ping-pong on an open stream", "ping-pong on a bare socket"),
            ROUNDS,
            &streams,
        ),
        Figure::new(
            (
                "SHA-384 over the records of a page",
                "ping-pong on a bare socket",
            ),
            HASHED / 4096,
            &hashes,
        ),
    ])
}

/// Two threads that send each other a few bytes.
fn socket_ping_pong() -> Result<f64, Error> {
    let (mut here, mut there) = UnixStream::pair().map_err(Error::Runtime)?;
    let echo = std::thread::spawn(move || {
        let mut message = [0; MESSAGE];
        while there.read_exact(&mut message).is_ok() && there.write_all(&message).is_ok() {}
    });
    let mut message = [0; MESSAGE];
    let mut times = Vec::new();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        here.write_all(&message).map_err(Error::Runtime)?;
        here.read_exact(&mut message).map_err(Error::Runtime)?;
        times.push(ns_per_op(start.elapsed(), 1));
    }
    drop(here);
    let _ = echo.join();
    Ok(median(times))
}

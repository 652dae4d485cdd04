//! `/metrics`, scraped over both kinds of sockets, held against what was asked.

use std::path::Path;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::{TcpStream, UnixStream};

use crate::support::{
    PAGE, Server, assert_success, aug, batch, build, create, execute, finalize, numbered, rdmd,
    repeated, statuses,
};

async fn get(mut stream: impl AsyncRead + AsyncWrite + Unpin) -> String {
    let request = "GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    answer
}

async fn scrape(server: &Server) -> String {
    let authority = server.tcp.trim_start_matches("http://");
    get(TcpStream::connect(authority).await.unwrap()).await
}

/// The value of a series; 0 for one that is not there.
fn value(scrape: &str, series: &str) -> u64 {
    let values = scrape.lines().filter_map(|line| line.rsplit_once(' '));
    let mut named = values.filter(|(name, _)| *name == series);
    named.next().map_or(0, |(_, value)| value.parse().unwrap())
}

#[tokio::test]
async fn calls_batches_and_pages_are_counted_as_they_ran() {
    let server = Server::start().await;
    let mut client = server.client().await;
    assert_success(&statuses(&mut client, vec![create()]).await);
    assert_success(&statuses(&mut client, build()).await);
    assert_success(&statuses(&mut client, finalize()).await);
    let before = scrape(&server).await;
    // The second run ends at its fourth call: the first one has the pages behind it.
    let calls = vec![
        repeated(aug(0x4000, PAGE), 4, 0x1000, 0x1000),
        repeated(aug(0x1000, PAGE + 0x8000), 9, 0x1000, 0x1000),
        rdmd(PAGE),
    ];
    let answer = execute(&mut client, batch(calls)).await.unwrap();
    let completed: Vec<u32> = answer
        .results
        .iter()
        .map(|result| result.completed)
        .collect();
    assert_eq!(&completed[..2], [4, 3]);

    let after = scrape(&server).await;
    let grown = |series: &str| value(&after, series) - value(&before, series);
    for (series, expected) in [
        (
            r#"tdx_module_seamcalls_total{leaf="TDH.MEM.PAGE.AUG",status="TDX_SUCCESS"}"#,
            7,
        ),
        (
            r#"tdx_module_seamcalls_total{leaf="TDH.PHYMEM.PAGE.RDMD",status="TDX_SUCCESS"}"#,
            1,
        ),
        (r#"tdx_module_batches_total{via="unary"}"#, 1),
        (r#"tdx_module_batches_total{via="stream"}"#, 0),
        ("tdx_module_batch_calls_count", 1),
        ("tdx_module_batch_calls_sum", 9),
        ("tdx_module_batch_seconds_count", 1),
        (r#"tdx_module_pamt_pages{type="PT_REG"}"#, 7),
    ] {
        assert_eq!(grown(series), expected, "{series}");
    }
    let failed: u64 = after
        .lines()
        .filter(|line| line.contains("TDH.MEM.PAGE.AUG") && !line.contains("TDX_SUCCESS"))
        .map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap())
        .sum();
    assert_eq!(failed, 1, "the call that ended the run");
    assert_eq!(value(&after, "tdx_module_hkids_in_use"), 1);
    assert_eq!(value(&after, r#"tdx_module_pamt_pages{type="PT_TDR"}"#), 1);
    assert_eq!(value(&after, "tdx_module_batches_in_flight"), 0);

    let socket = server.unix.trim_start_matches("unix://");
    let over_unix = get(UnixStream::connect(Path::new(socket)).await.unwrap()).await;
    assert_eq!(value(&over_unix, "tdx_module_hkids_in_use"), 1);
}

#[tokio::test]
async fn refusals_and_replays_are_counted_by_what_they_were() {
    let server = Server::start().await;
    let mut client = server.client().await;
    let first = || numbered("s", 1, vec![rdmd(PAGE)]);
    execute(&mut client, first()).await.unwrap();
    execute(&mut client, first()).await.unwrap();
    execute(&mut client, numbered("s", 1, vec![rdmd(PAGE + 0x1000)]))
        .await
        .unwrap_err();
    execute(&mut client, numbered("unheard of", 7, vec![]))
        .await
        .unwrap_err();
    execute(&mut client, numbered("s", 0, vec![]))
        .await
        .unwrap_err();
    let scrape = scrape(&server).await;
    for (series, expected) in [
        ("tdx_module_batches_replayed_total", 1),
        (r#"tdx_module_batches_total{via="unary"}"#, 1),
        (
            r#"tdx_module_requests_refused_total{reason="SEQUENCE_REUSED"}"#,
            1,
        ),
        (
            r#"tdx_module_requests_refused_total{reason="UNKNOWN_SESSION"}"#,
            1,
        ),
        (
            r#"tdx_module_requests_refused_total{reason="INVALID_FIELD"}"#,
            1,
        ),
        (r#"tdx_module_requests_refused_total{reason="DRAINING"}"#, 0),
    ] {
        assert_eq!(value(&scrape, series), expected, "{series}");
    }
}

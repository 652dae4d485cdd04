//! What Prometheus itself thinks: its `promtool` reads `/metrics` of both services and the
//! configuration of the compose file.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use mirror_proto::mmu::Mode;

use crate::http;
use crate::stack::{MIB, Stack};

/// Whether `promtool` can be called; if not, loud words about it.
fn installed() -> bool {
    if Command::new("promtool").arg("--version").output().is_ok() {
        return true;
    }
    let line = "!".repeat(78);
    let _ = writeln!(
        std::io::stderr(),
        "\n{line}\nSKIPPED: promtool is not installed, Prometheus is not asked about the metrics.\n         \
         On Debian: apt-get install prometheus\n{line}"
    );
    false
}

/// Gives `input` to promtool, which has to find nothing in it.
fn check(arguments: &[&str], input: &str) {
    let mut promtool = Command::new("promtool")
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = promtool.stdin.take().unwrap();
    stdin.write_all(input.as_bytes()).unwrap();
    drop(stdin);
    let output = promtool.wait_with_output().unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    // What its linter minds is on stderr, some of it with exit status 0.
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "promtool {arguments:?}: {}{}",
        text(&output.stdout),
        text(&output.stderr)
    );
}

#[tokio::test]
async fn promtool_minds_nothing_about_the_metrics() {
    if !installed() {
        return;
    }
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.fault(vm, 0, 0x1000).await.unwrap();
    stack.fault(vm, 0, 0x1000).await.unwrap();
    stack.convert(vm, 0, MIB, 0).await.unwrap();
    let module = &stack.module.as_ref().unwrap().authority;
    for authority in [stack.authority(), module] {
        let scraped = http::get(authority, "/metrics").await;
        assert_eq!(scraped.status, 200);
        check(&["check", "metrics"], &scraped.body);
    }
}

#[test]
fn promtool_takes_the_configuration_of_the_compose_file() {
    if !installed() {
        return;
    }
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/metrics/prometheus.yml");
    check(&["check", "config", file.to_str().unwrap()], "");
}

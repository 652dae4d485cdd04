//! Puts the commit into `mmuctl --version`, when the sources are a git checkout.

use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for path in ["../.git/HEAD", "../.git/logs/HEAD"] {
        if std::path::Path::new(path).exists() {
            println!("cargo::rerun-if-changed={path}");
        }
    }
    let package = std::env::var("CARGO_PKG_VERSION").unwrap_or_default();
    let version = match commit() {
        Some(commit) => format!("{package} ({commit})"),
        None => package,
    };
    println!("cargo::rustc-env=MMUCTL_VERSION={version}");
}

/// The abbreviated commit; `None` without git, outside a checkout and before the first commit.
fn commit() -> Option<String> {
    let answer = Command::new("git")
        .args(["rev-parse", "--short=12", "HEAD"])
        .output()
        .ok()?;
    if !answer.status.success() {
        return None;
    }
    let commit = String::from_utf8(answer.stdout).ok()?.trim().to_owned();
    commit
        .bytes()
        .all(|byte| byte.is_ascii_hexdigit())
        .then_some(commit)
        .filter(|c| !c.is_empty())
}

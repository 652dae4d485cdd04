//! The Python lines of docs/wire.md, run as they stand there against both real services.
//!
//! `$WIRE_PYTHON`, or else `python3`, has to have the package grpcio-tools.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output};

use crate::stack::{Stack, socket};

const DOCUMENT: &str = include_str!("../../../docs/wire.md");

/// The contents of each block of code in `language`.
fn blocks(language: &str) -> Vec<String> {
    let mut blocks: Vec<String> = Vec::new();
    let mut inside = false;
    for line in DOCUMENT.lines() {
        if !inside && line == format!("```{language}") {
            inside = true;
            blocks.push(String::new());
        } else if line.starts_with("```") {
            inside = false;
        } else if let Some(block) = blocks.last_mut().filter(|_| inside) {
            block.push_str(line);
            block.push('\n');
        }
    }
    blocks
}

/// A Python that can make stubs, or loud words about why there is none.
fn python() -> Option<String> {
    let asked = std::env::var("WIRE_PYTHON").ok();
    let program = asked.clone().unwrap_or_else(|| "python3".to_owned());
    let probe = Command::new(&program)
        .args(["-c", "import grpc, grpc_tools"])
        .output();
    if matches!(&probe, Ok(output) if output.status.success()) {
        return Some(program);
    }
    assert!(asked.is_none(), "WIRE_PYTHON={program}: {probe:?}");
    let line = "!".repeat(78);
    let _ = writeln!(
        std::io::stderr(),
        "\n{line}\nSKIPPED: {program} has no grpcio-tools, the Python of docs/wire.md is not run.\n         \
         In a virtual environment: pip install grpcio-tools; WIRE_PYTHON names its python\n{line}"
    );
    None
}

fn must(what: &str, output: Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (out, error) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{what}\n{out}\n{error}");
    out
}

/// As the shell lines of the document do: `protoc` over every file below `proto`.
fn make_stubs(python: &str, into: &Path) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../proto");
    let making = blocks("sh")
        .into_iter()
        .find(|block| block.contains("grpc_tools.protoc"))
        .expect("the document says how to make the stubs");
    let (_, line) = making.split_once("-m grpc_tools.protoc").unwrap();
    assert!(
        line.contains("$(find . -name '*.proto')"),
        "all files: {line}"
    );
    let script = format!(
        "cd '{}' && '{python}' -m grpc_tools.protoc -I. --python_out='{into}' \
         --grpc_python_out='{into}' $(find . -name '*.proto')",
        root.display(),
        into = into.display(),
    );
    let output = Command::new("sh").args(["-c", &script]).output().unwrap();
    must("protoc", output);
}

#[tokio::test]
async fn the_python_of_the_document_works_as_it_stands() {
    let Some(python) = python() else { return };
    let stack = Stack::start().await;
    let stubs = tempfile::tempdir().unwrap();
    make_stubs(&python, stubs.path());
    let mut told = Vec::new();
    for block in blocks("python") {
        let run = tokio::process::Command::new(&python)
            .args(["-c", &block])
            .env("PYTHONPATH", stubs.path())
            .env("MMU", socket(stack.dir.path(), "mmu").to_string())
            .env("MODULE", stack.module_address().to_string())
            .output();
        told.push(must(&block, run.await.unwrap()));
    }
    let [vm, module] = &told[..] else {
        panic!("two blocks of Python: {told:#?}");
    };
    for line in [
        "RET_PF_FIXED ROOT_MIRROR 1 message(s)",
        "TDH.MEM.PAGE.AUG TDX_SUCCESS",
        " entries, 0 mismatches",
        "NOT_FOUND vm_id: there is no VM ",
    ] {
        assert!(vm.contains(line), "{line:?} in {vm}");
    }
    assert_eq!(
        vm.matches("TDH.MEM.SEPT.ADD TDX_SUCCESS").count(),
        3,
        "{vm}"
    );
    let lines: Vec<&str> = module.lines().collect();
    // Page type PT_NDA: the VM is gone.
    assert_eq!(lines[0], "rax=0x0 rcx=0x0 completed=1", "{module}");
    // TDX_OPERAND_ADDR_RANGE_ERROR or _INVALID of RCX: an answer, and no exception.
    assert!(lines[1].starts_with("rax=0xc0000"), "{module}");
    stack.assert_all_given_back().await;
}

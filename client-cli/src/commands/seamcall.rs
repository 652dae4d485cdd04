//! `seamcall`: one raw call.

use mirror_proto::module::{ExecuteRequest, Repeat, Seamcall, SeamcallResult};
use serde_json::json;
use tdx_defs::{CompletionStatus, Leaf};

use super::explain;
use crate::args::{Register, SeamcallArgs};
use crate::client::{wait, with_deadline};
use crate::error::Error;
use crate::output::{Answer, hex, merge, pairs};
use crate::session::Session;

const CALL: &str = "Execute";

/// `mmuctl seamcall`.
pub(super) async fn run(session: &Session, args: &SeamcallArgs) -> Result<Answer, Error> {
    let call = call(args)?;
    let mut module = session.module().await?;
    let limit = session.limits.short;
    let request = ExecuteRequest {
        calls: vec![call],
        lp: args.lp,
        ..Default::default()
    };
    let executed = module.execute(with_deadline(request, limit));
    let answer = wait(CALL, limit, &session.stop, executed).await?;
    let result = answer
        .results
        .first()
        .ok_or(Error::Truncated { call: CALL })?;
    let status = CompletionStatus(result.rax);
    let mut json = json!({
        "leaf": args.leaf.to_string(),
        "rax": hex(result.rax),
        "status": explain::symbol(status),
        "rcx": hex(result.rcx),
        "rdx": hex(result.rdx),
        "r8": hex(result.r8),
        "r9": hex(result.r9),
        "r10": hex(result.r10),
        "r11": hex(result.r11),
        "completed": result.completed,
        "instance": answer.instance,
    });
    merge(&mut json, explain::members(status, Some(args.leaf)));
    let verdict = status.is_error().then_some(Error::Seamcall {
        leaf: args.leaf,
        status,
    });
    Ok(Answer {
        verdict,
        ..Answer::new(json, text(args.leaf, result, status))
    })
}

fn call(args: &SeamcallArgs) -> Result<Seamcall, Error> {
    let mut call = Seamcall {
        leaf: args.leaf.0.into(),
        ..Default::default()
    };
    for given in &args.registers {
        let field = match given.register {
            Register::Version => {
                // Bounded by the argument parser.
                call.version = u32::try_from(given.value).unwrap_or(u32::MAX);
                continue;
            }
            Register::Rcx => &mut call.rcx,
            Register::Rdx => &mut call.rdx,
            Register::R8 => &mut call.r8,
            Register::R9 => &mut call.r9,
            Register::R10 => &mut call.r10,
            Register::R11 => &mut call.r11,
            Register::R12 => &mut call.r12,
            Register::R13 => &mut call.r13,
        };
        *field = given.value;
    }
    if let Some(path) = &args.data {
        let data = std::fs::read(path).map_err(|source| Error::File {
            path: path.clone(),
            source,
        })?;
        call.data = data.into();
    }
    if let Some(count) = args.repeat {
        let mut repeat = Repeat {
            count,
            ..Default::default()
        };
        for stride in &args.stride {
            match stride.register {
                Register::Rcx => repeat.rcx_stride = stride.bytes,
                Register::R8 => repeat.r8_stride = stride.bytes,
                Register::R9 => repeat.r9_stride = stride.bytes,
                // Refused by the argument parser.
                _ => {}
            }
        }
        call.repeat = Some(repeat);
    }
    Ok(call)
}

fn text(leaf: Leaf, result: &SeamcallResult, status: CompletionStatus) -> String {
    let registers = [
        ("rcx", result.rcx),
        ("rdx", result.rdx),
        ("r8", result.r8),
        ("r9", result.r9),
        ("r10", result.r10),
        ("r11", result.r11),
    ];
    let mut rows = vec![("status", status.to_string())];
    rows.extend(explain::rows(status, Some(leaf)));
    rows.extend(registers.map(|(name, value)| (name, hex(value))));
    rows.push(("completed", result.completed.to_string()));
    pairs(rows)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn registers_and_strides_reach_the_message() {
        let line = "mmuctl seamcall mem_page_aug rcx=0x1000 r13=7 version=1 --repeat 3 \
                    --stride rcx=4K --stride r8=-4K";
        let Command::Seamcall(args) = Cli::parse_from(line.split_whitespace()).command else {
            panic!("another command");
        };
        let call = call(&args).unwrap();
        assert_eq!(
            (call.leaf, call.version, call.rcx, call.r13),
            (6, 1, 0x1000, 7)
        );
        let repeat = Repeat {
            count: 3,
            rcx_stride: 4096,
            r8_stride: -4096,
            r9_stride: 0,
        };
        assert_eq!(call.repeat, Some(repeat));
    }
}

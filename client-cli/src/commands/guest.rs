//! `guest`: plays a guest, and the user space that answers its exits.

use mirror_proto::mmu::run_result::Result as Outcome;
use mirror_proto::mmu::run_vcpu_response::Exit;
use mirror_proto::mmu::{RunOp, RunResult, RunVcpuRequest, RunVcpuResponse};
use serde_json::{Value, json};
use tdx_defs::{CompletionStatus, PAGE_SIZE};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::ranges::set_attributes;
use crate::args::{GuestArgs, Visibility};
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, Table, hex, merge};
use crate::tally::Tally;

const CALL: &str = "RunVcpu";
/// Runs that one command makes at most: each answers an exit.
const MAX_RUNS: u32 = 1 << 20;

/// `mmuctl guest`.
pub(super) async fn run(client: &Client, args: &GuestArgs) -> Result<Answer, Error> {
    let (asks, requests) = mpsc::channel(1);
    let requests = ReceiverStream::new(requests);
    let mut answers = client
        .open(CALL, requests, async |mut mmu, requests| {
            mmu.run_vcpu(requests).await
        })
        .await?;
    let mut tally = Tally::default();
    let mut results: Vec<RunResult> = Vec::new();
    let mut exits: Vec<Value> = Vec::new();
    let mut entries = 0;
    for _ in 0..MAX_RUNS {
        let request = RunVcpuRequest {
            vm_id: args.vm,
            vcpu_id: args.vcpu,
            ops: args.ops[results.len().min(args.ops.len())..]
                .iter()
                .skip(usize::from(is_open(&exits)))
                .map(|word| RunOp {
                    op: Some(word.op.clone()),
                })
                .collect(),
            answer: 0,
        };
        // A stream that takes nothing has ended, and its last message says why.
        let _ = asks.send(request).await;
        let answer = client.next(CALL, &mut answers).await?;
        let answer = answer.ok_or(Error::Truncated { call: CALL })?;
        tally.add(answer.counts.as_ref());
        entries += answer.entries;
        results.extend(answer.results.iter().cloned());
        exits.push(exit_json(&answer));
        match answer.exit {
            Some(Exit::MapGpa(exit)) if !args.exits => {
                let to = if exit.private {
                    Visibility::Private
                } else {
                    Visibility::Shared
                };
                let size = exit.pages * PAGE_SIZE;
                tally.merge(set_attributes(client, args.vm, exit.gpa, size, to).await?);
            }
            Some(Exit::Interrupted(_)) => {}
            _ => break,
        }
    }
    Ok(answer(args, &results, exits, entries, &tally))
}

/// Whether the last run left a call of the guest open: its result comes first in the next.
fn is_open(exits: &[Value]) -> bool {
    exits
        .last()
        .is_some_and(|exit| exit["reason"] == "map_gpa" || exit["reason"] == "mmio")
}

fn answer(
    args: &GuestArgs,
    results: &[RunResult],
    exits: Vec<Value>,
    entries: u64,
    tally: &Tally,
) -> Answer {
    let mut table = Table::new(&["guest", "result"]);
    let mut done = Vec::new();
    for (word, result) in args.ops.iter().zip(results) {
        let told = tell(result);
        table.row([word.text.clone(), told.clone()]);
        done.push(json!({ "op": word.text, "result": told }));
    }
    let last = exits.last().cloned().unwrap_or_default();
    let verdict = (last["reason"] == "failed").then(|| Error::Guest {
        reason: last["error"].as_str().unwrap_or_default().to_owned(),
    });
    let mut json = json!({ "vm_id": args.vm, "results": done, "exits": exits, "entries": entries });
    merge(&mut json, tally.to_json());
    let reason = last["reason"].as_str().unwrap_or_default();
    let text = format!("{table}\nKVM_RUN returned: {reason}; entries into the guest: {entries}");
    Answer {
        verdict,
        ..Answer::new(json, text)
    }
}

fn tell(result: &RunResult) -> String {
    match &result.result {
        Some(Outcome::Resumed(resumed)) => {
            if let Some(vector) = resumed.injected_vector {
                return match vector {
                    20 => "#VE".to_owned(),
                    14 => "#PF".to_owned(),
                    8 => "#DF".to_owned(),
                    other => format!("exception {other}"),
                };
            }
            if let Some(regs) = &resumed.regs {
                let status = CompletionStatus(regs.regs.first().copied().unwrap_or_default());
                return status.name().unwrap_or_else(|| status.to_string());
            }
            if resumed.data.is_empty() {
                return "done".to_owned();
            }
            resumed
                .data
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect()
        }
        Some(Outcome::TdExit(_)) => "left".to_owned(),
        Some(Outcome::Violation(violation)) => violation.clone(),
        None => "nothing".to_owned(),
    }
}

fn exit_json(answer: &RunVcpuResponse) -> Value {
    match &answer.exit {
        Some(Exit::Done(_)) | None => json!({ "reason": "done" }),
        Some(Exit::Hlt(_)) => json!({ "reason": "hlt" }),
        Some(Exit::Interrupted(_)) => json!({ "reason": "interrupted" }),
        Some(Exit::Unknown(rax)) => json!({ "reason": "unknown", "rax": hex(*rax) }),
        Some(Exit::MapGpa(exit)) => json!({
            "reason": "map_gpa",
            "gpa": hex(exit.gpa),
            "pages": exit.pages,
            "private": exit.private,
        }),
        Some(Exit::Mmio(exit)) => json!({
            "reason": "mmio",
            "gpa": hex(exit.gpa),
            "length": exit.length,
            "write": exit.write.map(hex),
        }),
        Some(Exit::Failed(failure)) => json!({
            "reason": "failed",
            "errno": failure.errno,
            "error": failure.reason,
            "memory_fault": failure.memory_fault.map(|record| json!({
                "gpa": hex(record.gpa),
                "size": record.size,
                "flags": record.flags,
            })),
        }),
    }
}

//! `fault`: one guest access.

use mirror_proto::mmu::{Fault, HandleFaultRequest, HandleFaultResponse, Root};
use mirror_proto::spans_of;
use serde_json::{Value, json};
use tdx_defs::CompletionStatus;

use crate::args::FaultArgs;
use crate::client::Client;
use crate::error::Error;
use crate::output::{Answer, Table, hex, merge};
use crate::replay::ret_pf_name;
use crate::tally::Tally;

/// Exit qualification bits 2:0.
const READ: u64 = 1;
const WRITE: u64 = 2;
const FETCH: u64 = 4;
/// Type of the extended exit qualification: a page that the guest has not accepted.
const PENDING: u64 = 6;

/// `mmuctl fault`.
pub(super) async fn run(client: &Client, args: &FaultArgs) -> Result<Answer, Error> {
    let message = HandleFaultRequest {
        vm_id: args.vm,
        vcpu_id: args.vcpu,
        fault: Some(Fault {
            gpa: args.gpa,
            qualification: qualification(args),
            extended_qualification: if args.pending { PENDING } else { 0 },
        }),
        explain: args.explain,
    };
    let explained = |spans| {
        if let Some(traceparent) = telemetry::traceparent_of_current_span() {
            telemetry::watch::offer(&traceparent, spans);
        }
    };
    let mut answer = client
        .short("HandleFault", message, async |mut mmu, request| {
            let answer = mmu.handle_fault(request).await;
            answer.inspect_err(|refusal| explained(spans_of(refusal)))
        })
        .await?;
    explained(std::mem::take(&mut answer.spans));
    let calls: Vec<Value> = answer
        .seamcalls
        .iter()
        .map(|call| {
            json!({
                "leaf": call.name,
                "status": status_name(call.status, &call.status_name),
                "rax": hex(call.status),
            })
        })
        .collect();
    let mut json = json!({});
    // Counts first: `seamcalls` of this command is the list of calls, not their numbers.
    merge(&mut json, Tally::of(answer.counts.as_ref()).to_json());
    let own = json!({
        "ret_pf": ret_pf_name(answer.ret_pf()),
        "root": root_name(answer.root()),
        "level": answer.level,
        "gpa": hex(args.gpa),
        "hpa": hex(answer.hpa),
        "seamcalls": calls,
        "rpcs": answer.rpcs,
    });
    if let Value::Object(own) = own {
        merge(&mut json, own);
    }
    Ok(Answer::new(json, text(args, &answer)))
}

fn qualification(args: &FaultArgs) -> u64 {
    let mut bits = 0;
    if args.write {
        bits |= WRITE;
    }
    if args.exec {
        bits |= FETCH;
    }
    if bits == 0 { READ } else { bits }
}

fn text(args: &FaultArgs, answer: &HandleFaultResponse) -> String {
    let ret_pf = answer.ret_pf().as_str_name();
    let root = root_name(answer.root());
    let mut text = match answer.level {
        0 => format!("{ret_pf}: {:#x}, {root} root, not mapped", args.gpa),
        level => format!(
            "{ret_pf}: {:#x} at {:#x}, {root} root, level {level}, messages to the module: {}",
            args.gpa, answer.hpa, answer.rpcs
        ),
    };
    if !answer.seamcalls.is_empty() {
        let mut table = Table::new(&["SEAMCALL", "status"]);
        for call in &answer.seamcalls {
            table.row([
                call.name.clone(),
                status_name(call.status, &call.status_name),
            ]);
        }
        text = format!("{text}\n{table}");
    }
    text
}

fn status_name(status: u64, given: &str) -> String {
    match CompletionStatus(status).name() {
        Some(name) => name,
        None if given.is_empty() => hex(status),
        None => given.to_owned(),
    }
}

/// As in JSON and tables.
pub(super) fn root_name(root: Root) -> &'static str {
    match root {
        Root::Direct => "direct",
        Root::Mirror => "mirror",
        Root::Unspecified => "none",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_access_is_a_read_unless_said_otherwise() {
        for (write, exec, want) in [
            (false, false, READ),
            (true, false, WRITE),
            (false, true, FETCH),
            (true, true, 6),
        ] {
            let args = FaultArgs {
                vm: 1,
                vcpu: 0,
                gpa: 0,
                write,
                exec,
                pending: false,
                explain: false,
            };
            assert_eq!(qualification(&args), want);
        }
    }

    #[test]
    fn a_status_has_its_name_or_its_number() {
        assert_eq!(status_name(0, ""), "TDX_SUCCESS");
        assert_eq!(status_name(0x8000_0200_0000_0092, ""), "TDX_OPERAND_BUSY");
        assert_eq!(status_name(0x7777_0000_0000_0000, ""), "0x7777000000000000");
    }
}

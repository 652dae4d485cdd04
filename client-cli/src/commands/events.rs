//! `events`: the tracepoints of a VM as they come.

use std::io::Write as _;

use mirror_proto::mmu::{TraceRecord, WatchEventsRequest, WatchEventsResponse};
use serde_json::json;
use tonic::Streaming;

use crate::args::{EventsArgs, Format};
use crate::client::Client;
use crate::error::{Error, Refusal};
use crate::output::{self, Answer};
use crate::session::Session;
use crate::trace::ftrace;

const CALL: &str = "WatchEvents";

/// `mmuctl events`. Lines go out at once; a JSON object needs its end.
pub(super) async fn run(session: &Session, args: &EventsArgs) -> Result<Answer, Error> {
    let as_json = session.output == Format::Json;
    if as_json && args.count.is_none() {
        let usage = "events --output json is one object and needs --count to end";
        return Err(Error::Usage(usage.into()));
    }
    let client = session.client().await?;
    let message = WatchEventsRequest {
        vm_id: args.vm,
        buffer: args.buffer,
    };
    let mut stream = client
        .open(CALL, message, async |mut mmu, request| {
            mmu.watch_events(request).await
        })
        .await?;
    let mut left = args.count.unwrap_or(u64::MAX);
    let (mut lost, mut printed) = (0, 0);
    let mut kept = Vec::new();
    let mut begun = false;
    while left > 0
        && let Some(message) = next(&client, &mut stream).await?
    {
        let mut text = String::new();
        if !begun {
            // Whoever reads this knows that nothing is missed from here on.
            text.push_str(ftrace::HEADER);
            begun = true;
        }
        if message.lost > 0 {
            lost += message.lost;
            text.push_str(&ftrace::lost(message.lost));
        }
        let wanted = usize::try_from(left).unwrap_or(usize::MAX);
        for record in message.records.into_iter().take(wanted) {
            left -= 1;
            printed += 1;
            if as_json {
                kept.push(record);
            } else {
                text.push_str(&line(args.vm, &record));
            }
        }
        if !as_json {
            output::print(text.as_bytes())?;
        }
    }
    if as_json {
        let records: Vec<_> = kept.iter().map(record_json).collect();
        let json = json!({ "vm_id": args.vm, "events": printed, "lost": lost, "records": records });
        return Ok(Answer::new(json, ""));
    }
    let _ = writeln!(std::io::stderr(), "{printed} events, {lost} lost");
    Ok(Answer::bytes(Vec::new()))
}

/// The next message, however long it takes.
async fn next(
    client: &Client,
    stream: &mut Streaming<WatchEventsResponse>,
) -> Result<Option<WatchEventsResponse>, Error> {
    let message = tokio::select! {
        message = stream.message() => message,
        () = client.stop().asked() => return Err(Error::Interrupted),
    };
    message.map_err(|status| Error::Refused {
        call: CALL,
        source: Refusal::new(status),
    })
}

fn line(vm_id: u64, record: &TraceRecord) -> String {
    // A vCPU's own events are its thread's, as in QEMU.
    let vcpu = record
        .text
        .strip_prefix("vcpu ")
        .and_then(|rest| rest.split(' ').next());
    let task = match vcpu {
        Some(vcpu) => format!("CPU {vcpu}/KVM"),
        None => "vm".to_owned(),
    };
    ftrace::line(&task, vm_id, record.time_ns, &record.name, &record.text)
}

fn record_json(record: &TraceRecord) -> serde_json::Value {
    json!({
        "sequence": record.sequence,
        "time_ns": record.time_ns,
        "name": record.name,
        "text": record.text,
    })
}

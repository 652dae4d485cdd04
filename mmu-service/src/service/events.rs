//! WatchEvents.

use std::sync::Arc;
use std::time::Duration;

use mirror_proto::{InvalidField, mmu as wire};
use tdp_mmu::MAX_EVENTS;
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tracing::{Instrument as _, info_span};

use super::stream::Answers;
use crate::config::size;
use crate::events::{EventHub, Watch};
use crate::shell::Shell;
use crate::status;

/// Records that a reader may leave unread unless it says otherwise.
const BUFFER: usize = 1 << 16;
/// How often the events of operations that still run are taken out.
const COLLECT: Duration = Duration::from_millis(20);
/// Messages between the buffer and the transport.
const AHEAD: usize = 4;

type Sender = mpsc::Sender<Result<wire::WatchEventsResponse, Status>>;

pub(super) fn watch_events(
    shell: &Arc<Shell>,
    request: wire::WatchEventsRequest,
) -> Result<Answers<wire::WatchEventsResponse>, Status> {
    let buffer = match size(request.buffer) {
        0 => BUFFER,
        given if given <= MAX_EVENTS => given,
        given => {
            let reason = format!("{given} records, the limit is {MAX_EVENTS}");
            return Err(status::of_field(InvalidField::new("buffer", reason)));
        }
    };
    let entry = shell.live_vm(request.vm_id)?;
    let watch = EventHub::watch(&entry, buffer)?;
    let (out, answers) = mpsc::channel(AHEAD);
    // There is room for the first message.
    let _ = out.try_send(Ok(wire::WatchEventsResponse::default()));
    let span = info_span!("watch_events", kvm.vm = entry.id);
    let shell_there = Arc::clone(shell);
    shell.spawn(async move { hand_on(&shell_there, &watch, &out).await }.instrument(span));
    Ok(ReceiverStream::new(answers))
}

/// Until the reader, the VM or the service ends. A slow reader is waited for: it loses records, not
/// its stream.
async fn hand_on(shell: &Shell, watch: &Watch, out: &Sender) {
    let mut draining = shell.draining();
    let mut tick = interval(COLLECT);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let alive = watch.collect();
        while let Some(message) = watch.next() {
            tokio::select! {
                sent = out.send(Ok(message)) => if sent.is_err() { return },
                _ = draining.wait_for(|draining| *draining) => return,
            }
        }
        if !alive {
            return;
        }
        tokio::select! {
            () = out.closed() => return,
            _ = draining.wait_for(|draining| *draining) => {
                let _ = out.try_send(Err(status::draining()));
                return;
            }
            () = watch.changed() => {}
            _ = tick.tick() => {}
        }
    }
}

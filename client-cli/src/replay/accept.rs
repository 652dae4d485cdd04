//! The guest of `replay --accept`: it takes each private page with TDG.MEM.PAGE.ACCEPT once KVM has
//! mapped it, as a Linux guest that accepts memory when it first needs it.
//!
//! What the guest executes goes through `RunVcpu`, so the vCPU really enters and leaves the TD.

use mirror_proto::mmu::run_op::Op;
use mirror_proto::mmu::run_result::Result as Outcome;
use mirror_proto::mmu::run_vcpu_response::Exit;
use mirror_proto::mmu::{RunAccept, RunOp, RunResult, RunVcpuRequest, RunVcpuResponse};
use tdx_defs::CompletionStatus;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::client::Client;
use crate::error::Error;
use crate::tally::Tally;

const RUN_VCPU: &str = "RunVcpu";
/// How often a page that a host call holds is tried again, and a run that an event ended.
const MAX_ATTEMPTS: u32 = 64;

/// What came of the guest's calls.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Accepted {
    /// Pages that went from PENDING to MAPPED.
    pub pages: u64,
    /// Calls for a page that was accepted before: TDX_PAGE_ALREADY_ACCEPTED.
    pub again: u64,
    /// Calls made once more because the module was busy with the entry.
    pub busy: u64,
}

impl Accepted {
    pub(super) fn merge(&mut self, other: Self) {
        self.pages += other.pages;
        self.again += other.again;
        self.busy += other.busy;
    }
}

/// One `RunVcpu` stream, opened with its first message.
pub(super) struct Guest<'a> {
    client: &'a Client,
    vm_id: u64,
    stream: Option<(mpsc::Sender<RunVcpuRequest>, Streaming<RunVcpuResponse>)>,
    pub(super) accepted: Accepted,
    pub(super) tally: Tally,
}

impl<'a> Guest<'a> {
    pub(super) fn new(client: &'a Client, vm_id: u64) -> Self {
        Self {
            client,
            vm_id,
            stream: None,
            accepted: Accepted::default(),
            tally: Tally::default(),
        }
    }

    /// Accepts pages, first bytes of 4 KiB each, in order.
    pub(super) async fn accept(&mut self, vcpu_id: u32, mut pages: Vec<u64>) -> Result<(), Error> {
        for _ in 0..MAX_ATTEMPTS {
            if pages.is_empty() {
                return Ok(());
            }
            let answer = self.run(vcpu_id, &pages).await?;
            self.tally.add(answer.counts.as_ref());
            let mut left = pages.split_off(answer.results.len().min(pages.len()));
            for (page, result) in pages.into_iter().zip(&answer.results) {
                if self.count(page, result)? {
                    left.push(page);
                }
            }
            match answer.exit {
                Some(Exit::Done(_) | Exit::Interrupted(_)) => {}
                Some(Exit::Failed(failure)) => {
                    return Err(Error::Guest {
                        reason: failure.reason,
                    });
                }
                exit => {
                    return Err(Error::Guest {
                        reason: format!("the guest accepts pages, and the exit is {exit:?}"),
                    });
                }
            }
            pages = left;
        }
        Err(Error::Guest {
            reason: format!(
                "the page at {:#x} is not accepted after {MAX_ATTEMPTS} attempts",
                pages.first().copied().unwrap_or_default()
            ),
        })
    }

    /// Counts one result; whether the page has to be accepted once more.
    fn count(&mut self, page: u64, result: &RunResult) -> Result<bool, Error> {
        let regs = match &result.result {
            Some(Outcome::Resumed(resumed)) => resumed.regs.as_ref(),
            _ => None,
        };
        let status = regs.and_then(|regs| regs.regs.first().copied());
        let status = status.map(CompletionStatus).ok_or_else(|| Error::Guest {
            reason: format!("no status of TDG.MEM.PAGE.ACCEPT for {page:#x}: {result:?}"),
        })?;
        match status {
            status if status.is_success() => self.accepted.pages += 1,
            status if status.is(CompletionStatus::PAGE_ALREADY_ACCEPTED) => {
                self.accepted.again += 1;
            }
            status if status.is_busy() => {
                self.accepted.busy += 1;
                return Ok(true);
            }
            status => {
                return Err(Error::Guest {
                    reason: format!("TDG.MEM.PAGE.ACCEPT of {page:#x} answers {status}"),
                });
            }
        }
        Ok(false)
    }

    async fn run(&mut self, vcpu_id: u32, pages: &[u64]) -> Result<RunVcpuResponse, Error> {
        let accept = |&gpa: &u64| RunOp {
            op: Some(Op::Accept(RunAccept { gpa, level: 1 })),
        };
        let message = RunVcpuRequest {
            vm_id: self.vm_id,
            vcpu_id,
            ops: pages.iter().map(accept).collect(),
            answer: 0,
        };
        let answers = match &mut self.stream {
            Some((requests, answers)) => {
                // A closed stream has its reason among the answers.
                let _ = requests.send(message).await;
                answers
            }
            None => {
                let (requests, queue) = mpsc::channel(1);
                // Before the call, since a service may answer only once a message is there. Cannot
                // fail: the queue is empty and open.
                let _ = requests.send(message).await;
                let answers = self
                    .client
                    .open(
                        RUN_VCPU,
                        ReceiverStream::new(queue),
                        async |mut mmu, queue| mmu.run_vcpu(queue).await,
                    )
                    .await?;
                &mut self.stream.insert((requests, answers)).1
            }
        };
        let answer = self.client.next(RUN_VCPU, answers).await?;
        answer.ok_or(Error::Truncated { call: RUN_VCPU })
    }
}

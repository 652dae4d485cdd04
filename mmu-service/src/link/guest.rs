//! A vCPU's own line to the module: TDH.VP.ENTER and what the guest does.
//!
//! Unlike a batch, what a guest does cannot be sent again: a write that was lost may have happened.
//! So a line that breaks answers that the outcome is unknown, and the module makes the vCPU leave
//! by itself when its stream ends.

use std::sync::Arc;

use mirror_proto::module::enter_vcpu_request::Message as Ask;
use mirror_proto::module::enter_vcpu_response::Message as Answer;
use mirror_proto::module::guest_op::Op;
use mirror_proto::module::guest_result::Result as Outcome;
use mirror_proto::module::tdx_guest_service_client::TdxGuestServiceClient;
use mirror_proto::module::tdx_platform_service_client::TdxPlatformServiceClient;
use mirror_proto::module::{
    self as wire, EnterVcpuRequest, EnterVcpuResponse, ReadMemoryRequest, WriteMemoryRequest,
};
use mirror_proto::seamcall_to_wire;
use tdp_mmu::{Entry, GuestOp, GuestPort, GuestStep, Resumed, SeamError};
use tdx_defs::{Gprs, Seamcall, SeamcallResult};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Request, Status, Streaming};

use super::connection::dial;
use super::{Attachment, ModuleLink, restarted};

/// Vector of the interrupt that makes a vCPU leave.
const KICK_VECTOR: u32 = 0xF2;

/// The line of one caller that runs vCPUs.
pub(crate) struct GuestLine {
    link: Arc<ModuleLink>,
    attachment: Arc<Attachment>,
    open: Option<Open>,
}

struct Open {
    asks: mpsc::Sender<EnterVcpuRequest>,
    answers: Streaming<EnterVcpuResponse>,
    platform: TdxPlatformServiceClient<Channel>,
}

impl GuestLine {
    /// A line for VMs that are built on `attachment`. It connects when it is used.
    pub(crate) fn new(link: &Arc<ModuleLink>, attachment: &Arc<Attachment>) -> Self {
        Self {
            link: Arc::clone(link),
            attachment: Arc::clone(attachment),
            open: None,
        }
    }

    /// Whether it leads to this run of the module.
    pub(crate) fn leads_to(&self, attachment: &Arc<Attachment>) -> bool {
        Arc::ptr_eq(&self.attachment, attachment)
    }

    /// Runs `work` on the link's I/O, from a thread of the core, within the deadline of a batch.
    fn block_on<T>(
        &mut self,
        work: impl AsyncFnOnce(&mut Open) -> Result<T, Status>,
    ) -> Result<T, SeamError> {
        let io = Arc::clone(&self.link.io);
        let limit = self.link.shared.config.rpc_deadline;
        let outcome = io.drive(async {
            if self.open.is_none() {
                self.open = Some(self.connect().await?);
            }
            let Some(open) = &mut self.open else {
                let reason = "the line is closed".to_owned();
                return Err(SeamError::NotSent { reason });
            };
            let lost = |reason: String| SeamError::Unknown { reason };
            match tokio::time::timeout(limit, work(open)).await {
                Ok(Ok(answer)) => Ok(answer),
                Ok(Err(status)) => Err(lost(format!("{}: {}", status.code(), status.message()))),
                Err(_) => Err(lost(format!("no answer within {limit:?}"))),
            }
        });
        if outcome.is_err() {
            // Its end makes the vCPU leave.
            self.open = None;
        }
        outcome
    }

    async fn connect(&self) -> Result<Open, SeamError> {
        let not_sent = |reason: String| SeamError::NotSent { reason };
        let connection = dial(&self.link.shared)
            .await
            .map_err(|error| not_sent(error.chain()))?;
        if !Arc::ptr_eq(&connection.attachment, &self.attachment) {
            let now = connection.attachment.instance();
            return Err(restarted(&self.attachment, now));
        }
        let limit = self.link.shared.config.message_limit;
        let (asks, requests) = mpsc::channel(1);
        let answers = TdxGuestServiceClient::new(connection.channel.clone())
            .max_decoding_message_size(limit)
            .max_encoding_message_size(limit)
            .enter_vcpu(ReceiverStream::new(requests))
            .await
            .map_err(|status| not_sent(status.message().to_owned()))?
            .into_inner();
        Ok(Open {
            asks,
            answers,
            platform: TdxPlatformServiceClient::new(connection.channel),
        })
    }

    fn ask(&mut self, message: Ask) -> Result<Answer, SeamError> {
        self.block_on(async |open: &mut Open| {
            let message = Some(message);
            // A stream that takes nothing has ended, and its last message says why.
            let _ = open.asks.send(EnterVcpuRequest { message }).await;
            let answer = open.answers.message().await?;
            answer
                .and_then(|answer| answer.message)
                .ok_or_else(|| Status::unavailable("the module ended the stream"))
        })
    }
}

fn unexpected(answer: &Answer) -> SeamError {
    SeamError::Unknown {
        reason: format!("the module answered out of turn: {answer:?}"),
    }
}

fn op_to_wire(op: &GuestOp) -> wire::GuestOp {
    let op = match op {
        GuestOp::Read { gpa, len } => Op::Read(wire::GuestRead {
            gpa: gpa.get(),
            // At most 4096, as the core has checked.
            length: u32::try_from(*len).unwrap_or(u32::MAX),
        }),
        GuestOp::Write { gpa, data } => Op::Write(wire::GuestWrite {
            gpa: gpa.get(),
            data: data.clone(),
        }),
        GuestOp::Execute { gpa } => Op::Execute(wire::GuestExecute { gpa: gpa.get() }),
        GuestOp::Accept { gpa, level } => Op::Accept(wire::GuestAccept {
            gpa: gpa.get(),
            level: level.get().into(),
        }),
        GuestOp::Tdcall {
            leaf,
            version,
            regs,
        } => Op::Tdcall(wire::Tdcall {
            leaf: (*leaf).into(),
            version: (*version).into(),
            regs: Some((*regs).into()),
        }),
        GuestOp::Interrupt => Op::ExternalInterrupt(wire::ExternalInterrupt {
            vector: KICK_VECTOR,
        }),
    };
    wire::GuestOp { op: Some(op) }
}

fn step_from_wire(result: wire::GuestResult) -> Option<GuestStep> {
    Some(match result.result? {
        Outcome::Resumed(resumed) => GuestStep::Resumed(Resumed {
            regs: resumed.regs.map(Gprs::from),
            injected: resumed
                .injected_vector
                .map(|vector| u8::try_from(vector).unwrap_or(u8::MAX)),
            data: resumed.data,
        }),
        Outcome::TdExit(exit) => GuestStep::Exited(exit.regs.map(Gprs::from).unwrap_or_default()),
        Outcome::Violated(violation) => GuestStep::Violated(violation.message),
    })
}

impl GuestPort for GuestLine {
    fn enter(&mut self, lp: u32, call: Seamcall) -> Result<Entry, SeamError> {
        let call = Some(seamcall_to_wire(call));
        let session = self.link.guest_session();
        match self.ask(Ask::Enter(wire::VpEnter { lp, call, session }))? {
            Answer::Entered(entered) => Ok(Entry::Entered {
                vmcall: entered.vmcall.map(Gprs::from),
            }),
            Answer::Refused(result) => Ok(Entry::Refused(SeamcallResult::from(result))),
            other => Err(unexpected(&other)),
        }
    }

    fn play(&mut self, ops: &[GuestOp]) -> Result<Vec<GuestStep>, SeamError> {
        let ops = ops.iter().map(op_to_wire).collect();
        match self.ask(Ask::Ops(wire::GuestOps { ops }))? {
            Answer::Results(results) => Ok(results
                .results
                .into_iter()
                .filter_map(step_from_wire)
                .collect()),
            other => Err(unexpected(&other)),
        }
    }

    fn read_shared(&mut self, hpa: u64, len: usize) -> Result<Vec<u8>, SeamError> {
        let length = u32::try_from(len).unwrap_or(u32::MAX);
        self.block_on(async |open: &mut Open| {
            let request = Request::new(ReadMemoryRequest { hpa, length });
            let read = open.platform.read_memory(request).await?;
            Ok(read.into_inner().data)
        })
    }

    fn write_shared(&mut self, hpa: u64, data: &[u8]) -> Result<(), SeamError> {
        let data = data.to_vec();
        self.block_on(async |open: &mut Open| {
            let request = Request::new(WriteMemoryRequest { hpa, data });
            open.platform.write_memory(request).await?;
            Ok(())
        })
    }
}

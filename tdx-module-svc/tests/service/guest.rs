//! The inside of a TD over a stream, and the platform around it.

use mirror_proto::module::enter_vcpu_request::Message as Ask;
use mirror_proto::module::enter_vcpu_response::Message as Answer;
use mirror_proto::module::guest_op::Op;
use mirror_proto::module::guest_result::Result as Outcome;
use mirror_proto::module::tdx_guest_service_client::TdxGuestServiceClient;
use mirror_proto::module::tdx_platform_service_client::TdxPlatformServiceClient;
use mirror_proto::module::{
    EnterVcpuRequest, EnterVcpuResponse, GuestAccept, GuestOp, GuestOps, GuestRead, GuestResult,
    GuestWrite, Hlt, HoldLockRequest, Lock, ReadMemoryRequest, ResetRequest, Seamcall,
    SetConditionsRequest, VpEnter, WriteMemoryRequest, lock,
};
use tdx_defs::CompletionStatus;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use crate::support::*;

/// EPT violation, in RAX of a TD exit.
const EPT_VIOLATION: u64 = 48;

struct Guest {
    asks: mpsc::Sender<EnterVcpuRequest>,
    answers: Streaming<EnterVcpuResponse>,
}

impl Guest {
    async fn open(server: &Server) -> Self {
        let channel = transport::connect(&server.unix).await.unwrap();
        let (asks, requests) = mpsc::channel(4);
        let answers = TdxGuestServiceClient::new(channel)
            .enter_vcpu(ReceiverStream::new(requests))
            .await
            .unwrap()
            .into_inner();
        Self { asks, answers }
    }

    async fn ask(&mut self, message: Ask) -> Result<Answer, Status> {
        let message = Some(message);
        self.asks.send(EnterVcpuRequest { message }).await.unwrap();
        let answer = self.answers.message().await?;
        Ok(answer.unwrap().message.unwrap())
    }

    async fn enter(&mut self) -> Result<Answer, Status> {
        let call = Seamcall {
            rcx: TDVPR,
            ..Seamcall::default()
        };
        let call = Some(call);
        self.ask(Ask::Enter(VpEnter {
            lp: 0,
            call,
            ..Default::default()
        }))
        .await
    }

    async fn play(&mut self, ops: Vec<Op>) -> Result<Vec<GuestResult>, Status> {
        let ops = ops.into_iter().map(|op| GuestOp { op: Some(op) }).collect();
        match self.ask(Ask::Ops(GuestOps { ops })).await? {
            Answer::Results(results) => Ok(results.results),
            other => panic!("{other:?}"),
        }
    }
}

fn outcomes(results: Vec<GuestResult>) -> Vec<Outcome> {
    results
        .into_iter()
        .map(|result| result.result.unwrap())
        .collect()
}

fn accept(gpa: u64) -> Op {
    Op::Accept(GuestAccept { gpa, level: 0 })
}

/// A TD with one vCPU, and a page that waits for the guest.
async fn td(server: &Server) -> Client {
    let mut client = server.client().await;
    for calls in [vec![create()], build(), finalize()] {
        assert_success(&statuses(&mut client, calls).await);
    }
    assert_success(&statuses(&mut client, vec![aug(0x1000, PAGE)]).await);
    client
}

async fn host(server: &Server) -> TdxPlatformServiceClient<Channel> {
    TdxPlatformServiceClient::new(transport::connect(&server.unix).await.unwrap())
}

#[tokio::test]
async fn a_guest_accepts_its_page_and_the_host_does_not_see_what_is_in_it() {
    let server = Server::start().await;
    let _client = td(&server).await;
    let mut guest = Guest::open(&server).await;
    assert!(matches!(guest.enter().await.unwrap(), Answer::Entered(_)));
    let secret = vec![0x5E; 16];
    let write = GuestWrite {
        gpa: 0x1008,
        data: secret.clone(),
    };
    let read = GuestRead {
        gpa: 0x1000,
        length: 32,
    };
    let results = guest
        .play(vec![accept(0x1000), Op::Write(write), Op::Read(read)])
        .await
        .unwrap();
    let outcomes = outcomes(results);
    let Outcome::Resumed(accepted) = &outcomes[0] else {
        panic!("{outcomes:?}");
    };
    assert_eq!(accepted.regs.unwrap().rax, 0);
    let Outcome::Resumed(seen) = &outcomes[2] else {
        panic!("{outcomes:?}");
    };
    assert_eq!(seen.data, [vec![0; 8], secret.clone(), vec![0; 8]].concat());

    let request = ReadMemoryRequest {
        hpa: PAGE,
        length: 32,
    };
    let seen = host(&server).await.read_memory(request).await.unwrap();
    let seen = seen.into_inner();
    assert_eq!(seen.private_bytes, 32);
    assert!(seen.data.windows(16).all(|part| part != secret));
}

#[tokio::test]
async fn events_behind_a_td_exit_do_not_happen_and_the_vcpu_can_come_back() {
    let server = Server::start().await;
    let _client = td(&server).await;
    let mut guest = Guest::open(&server).await;
    guest.enter().await.unwrap();
    let nowhere = GuestRead {
        gpa: 0x9000,
        length: 8,
    };
    let results = guest
        .play(vec![Op::Read(nowhere), accept(0x1000)])
        .await
        .unwrap();
    let outcomes = outcomes(results);
    let [Outcome::TdExit(exit)] = &outcomes[..] else {
        panic!("{outcomes:?}");
    };
    let regs = exit.regs.unwrap();
    assert_eq!((regs.rax & 0xFFFF, regs.r8), (EPT_VIOLATION, 0x9000));
    assert!(matches!(guest.enter().await.unwrap(), Answer::Entered(_)));
    let results = guest.play(vec![accept(0x1000)]).await.unwrap();
    assert_eq!(results.len(), 1);
}

#[tokio::test]
async fn a_vcpu_is_inside_until_its_player_hangs_up() {
    let server = Server::start().await;
    let mut client = td(&server).await;
    let mut guest = Guest::open(&server).await;
    guest.enter().await.unwrap();
    // It holds its TD shared: a call that needs the TD alone finds it busy.
    let done = statuses(&mut client, vec![vp_flush(), vpflushdone()]).await;
    assert!(done[1].is_busy(), "{done:?}");
    let mut second = Guest::open(&server).await;
    let Answer::Refused(refused) = second.enter().await.unwrap() else {
        panic!("two vCPUs on one processor");
    };
    assert!(CompletionStatus(refused.rax).is_busy());

    drop(guest.asks);
    // The end of the stream follows the exit that it brought about.
    while let Ok(Some(_)) = guest.answers.message().await {}
    let done = statuses(&mut client, vec![vp_flush(), vpflushdone()]).await;
    assert!(done.iter().all(|status| status.is_success()), "{done:?}");
}

#[tokio::test]
async fn what_a_stream_cannot_ask_for_is_refused() {
    let server = Server::start().await;
    let _client = td(&server).await;
    for (enter, ask, field) in [
        (false, Ask::Ops(GuestOps { ops: vec![] }), "ops"),
        (
            false,
            Ask::Enter(VpEnter {
                lp: 4,
                ..Default::default()
            }),
            "enter.lp",
        ),
        (
            false,
            Ask::Enter(VpEnter {
                lp: 0,
                ..Default::default()
            }),
            "enter.call",
        ),
        (
            true,
            Ask::Enter(VpEnter {
                lp: 0,
                ..Default::default()
            }),
            "enter",
        ),
        (
            true,
            Ask::Ops(GuestOps {
                ops: vec![GuestOp { op: None }],
            }),
            "ops.ops[0].op",
        ),
        (
            true,
            Ask::Ops(GuestOps {
                ops: vec![
                    GuestOp {
                        op: Some(Op::Hlt(Hlt {}))
                    };
                    4097
                ],
            }),
            "ops.ops",
        ),
    ] {
        let mut guest = Guest::open(&server).await;
        if enter {
            assert!(matches!(guest.enter().await.unwrap(), Answer::Entered(_)));
        }
        let refused = guest.ask(ask).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{field}");
        assert!(
            refused.message().starts_with(&format!("{field}: ")),
            "{refused}"
        );
        // The refusal ends the stream, and with it the stay inside.
        assert!(matches!(guest.answers.message().await, Ok(None) | Err(_)));
    }
}

#[tokio::test]
async fn conditions_are_changed_only_where_that_is_allowed() {
    let server = Server::start().await;
    let mut host = host(&server).await;
    let kot = Some(Lock {
        object: Some(lock::Object::Kot(true)),
    });
    let hold = HoldLockRequest {
        lock: kot,
        ..Default::default()
    };
    let refused = [
        host.reset(ResetRequest {}).await.err().unwrap(),
        host.set_conditions(SetConditionsRequest::default())
            .await
            .err()
            .unwrap(),
        host.hold_lock(hold).await.err().unwrap(),
    ];
    for status in refused {
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(status.message().contains("--allow-injection"), "{status}");
    }
}

#[tokio::test]
async fn memory_outside_of_the_platform_is_refused() {
    let server = Server::start().await;
    let mut host = host(&server).await;
    for (hpa, length, field) in [
        (0, 0, "length"),
        (0, (2 << 20) + 1, "length"),
        (1 << 46, 1, "hpa"),
        ((1 << 46) - 1, 2, "hpa"),
        (u64::MAX, 1, "hpa"),
    ] {
        let request = ReadMemoryRequest { hpa, length };
        let refused = host.read_memory(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().starts_with(field), "{refused}");
    }
    let request = WriteMemoryRequest {
        hpa: 0x10_0000,
        data: vec![7; 3],
    };
    host.write_memory(request).await.unwrap();
    let request = ReadMemoryRequest {
        hpa: 0x10_0000,
        length: 4,
    };
    let seen = host.read_memory(request).await.unwrap().into_inner();
    assert_eq!((seen.data, seen.private_bytes), (vec![7, 7, 7, 0], 0));
}

#[tokio::test]
async fn a_reset_is_a_new_instance_with_nothing_in_it() {
    let server = Server::with_injection().await;
    let mut client = td(&server).await;
    let before = platform(&mut client).await;
    let reset = host(&server).await.reset(ResetRequest {}).await.unwrap();
    let after = platform(&mut client).await;
    assert_ne!(after.instance, before.instance);
    assert_eq!(after.instance, reset.into_inner().instance);
    assert!(after.pages.iter().all(|count| count.pages_4k == 0));
    // A session of the run before is not known any more.
    let request = numbered("s", 2, vec![rdmd(PAGE)]);
    let refused = execute(&mut client, request).await.unwrap_err();
    assert_eq!(refused.code(), Code::NotFound);
}

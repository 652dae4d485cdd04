//! The Execute request as a fuzzer sees it: raw bytes in, nothing but an answer or a refusal out.
//!
//! [`fuzz_execute`] takes the same way as a call from the wire: decode, check, session, dispatch,
//! answer. It needs no fuzzer of a certain make; `fuzz/` drives it with libFuzzer, and the tests
//! of this file with requests that were valid before they were damaged. [`fuzz_requests`] does the
//! same for all RPCs, [`fuzz_platform`] for the platform file.
//!
//! What holds for every input
//! - Z1  Nothing panics, and the module never fails in the middle of a batch.
//! - Z2  A request that is refused leaves what is in use as it was (S1).
//! - Z3  Each call has one result, unless a batch stops at an error; a run completes at most its
//!   count.
//! - Z4  A batch of a session that is sent again gets the same answer and runs nothing (S3).

mod platform;
mod requests;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use mirror_proto::module::{
    ExecuteRequest, ExecuteResponse, GetPlatformResponse, Repeat, Seamcall,
};
use mirror_proto::seamcall_to_wire;
use prost::Message as _;
use tdx_defs::{Hpa, Leaf, TdParams};
use tdx_module::{PlatformConfig, Tdmr};
use tokio_util::sync::CancellationToken;
use tonic::Code;

use crate::config::Limits;
use crate::faults::Faults;
use crate::running::Running;
use crate::service::ModuleService;

pub use platform::fuzz_platform;
pub use requests::{fuzz_requests, request_seeds};

/// Bounds of one input, small so that each takes microseconds. A batch stays below the weight that
/// gets a thread of its own, whatever its leaves: a fuzzer is to run in one thread.
const LIMITS: Limits = Limits {
    max_calls: 64,
    max_repeat: 128,
    max_message_bytes: 1 << 20,
    replay_window: 2,
    max_sessions: 2,
    ..Limits::DEFAULT
};

/// The machine: one region of 1 GiB with a hole, two processors.
fn platform() -> PlatformConfig {
    PlatformConfig {
        tdmrs: vec![Tdmr {
            base: Hpa::new(TDR),
            size: 1 << 30,
            reserved: std::iter::once(0x7000_0000..0x7100_0000).collect(),
            initialized: true,
        }],
        logical_processors: 2,
        ..PlatformConfig::conformance()
    }
}

/// Runs one request, given as the bytes of its message, on a module of its own.
///
/// Bytes above the limit of a message are left alone, as the transport would refuse them.
///
/// # Panics
///
/// When the service does something that it must not do, see the module.
pub fn fuzz_execute(bytes: &[u8]) {
    if bytes.len() as u64 > LIMITS.max_message_bytes {
        return;
    }
    let Ok(request) = ExecuteRequest::decode(bytes) else {
        return;
    };
    let Ok(running) = Running::start(platform(), &LIMITS) else {
        unreachable!("the platform above is possible");
    };
    let service = ModuleService::new(
        Arc::new(running),
        &LIMITS,
        Faults::default(),
        CancellationToken::new(),
    );
    let before = in_use(&service);
    let first = match ready(service.answer(request.clone())) {
        Ok(answer) => answer,
        Err(status) => {
            assert_ne!(status.code(), Code::Internal, "Z1: {status}");
            assert_eq!(in_use(&service), before, "Z2: {status}");
            return;
        }
    };
    check_results(&request, &first);
    let after = in_use(&service);
    if !request.session.is_empty() {
        match ready(service.answer(request)) {
            Ok(again) => assert_eq!(again, first, "Z4"),
            Err(status) => panic!("Z4: {status}"),
        }
        assert_eq!(in_use(&service), after, "Z4");
    }
}

fn check_results(request: &ExecuteRequest, answer: &ExecuteResponse) {
    let (calls, results) = (&request.calls, &answer.results);
    assert!(results.len() <= calls.len(), "Z3");
    assert!(request.stop_on_error || results.len() == calls.len(), "Z3");
    assert_eq!(answer.sequence, request.sequence, "Z3");
    for (call, result) in calls.iter().zip(results) {
        let count = call.repeat.map_or(1, |repeat| repeat.count);
        assert!(result.completed <= count, "Z3: {call:?} {result:?}");
    }
    // What was answered can be sent.
    assert_eq!(answer.encode_to_vec().len(), answer.encoded_len());
}

fn in_use(service: &ModuleService) -> (u32, Vec<(u32, u64)>) {
    let GetPlatformResponse {
        hkids_in_use,
        pages,
        ..
    } = service.describe();
    let pages = pages.iter().map(|count| (count.page_type, count.pages_4k));
    (hkids_in_use, pages.collect())
}

/// A short batch never waits: the lock of a new session is free, and it runs in its caller.
fn ready<T>(future: impl Future<Output = T>) -> T {
    match pin!(future).poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(value) => value,
        Poll::Pending => unreachable!("a short batch waits for nobody"),
    }
}

/// Root page of the TD of the requests below.
const TDR: u64 = 0x4000_0000;
const TDCX: u64 = 0x4000_1000;
const TDVPR: u64 = 0x4000_7000;
const SEPT: u64 = 0x4001_0000;
const PAGE: u64 = 0x4002_0000;
/// Host memory outside of the region.
const SHARED: u64 = 0x10_0000;
const HKID: u64 = 33;

/// Valid requests that reach deep into the module, for a fuzzer to begin with: a TD is built,
/// measured, finalised, used and torn down, each request going further than the one before.
pub fn seeds() -> Vec<(&'static str, ExecuteRequest)> {
    let create = vec![
        call(Leaf::MNG_CREATE, TDR, HKID),
        call(Leaf::MNG_KEY_CONFIG, TDR, 0),
    ];
    let params = TdParams::default()
        .with_xfam(3)
        .with_max_vcpus(4)
        .with_eptp_controls(0x1E)
        .with_tsc_frequency(100);
    let init = vec![
        run(call(Leaf::MNG_ADDCX, TDCX, TDR), 6, 0x1000, 0),
        Seamcall {
            data: params.as_bytes().to_vec().into(),
            ..call(Leaf::MNG_INIT, TDR, SHARED)
        },
    ];
    let tables = (0..3).map(|at| Seamcall {
        r8: SEPT + 0x1000 * at,
        ..call(Leaf::MEM_SEPT_ADD, 3 - at, TDR)
    });
    let image = vec![
        Seamcall {
            r8: PAGE,
            r9: SHARED,
            data: vec![0xA5; 64].into(),
            ..call(Leaf::MEM_PAGE_ADD, 0, TDR)
        },
        run(call(Leaf::MR_EXTEND, 0, TDR), 16, 256, 0),
    ];
    let vcpu = vec![
        call(Leaf::VP_CREATE, TDVPR, TDR),
        run(call(Leaf::VP_ADDCX, TDVPR + 0x1000, TDVPR), 5, 0x1000, 0),
        call(Leaf::VP_INIT, TDVPR, 0),
    ];
    let finalize = vec![call(Leaf::MR_FINALIZE, TDR, 0)];
    let aug = Seamcall {
        r8: PAGE + 0x1000,
        ..call(Leaf::MEM_PAGE_AUG, 0x1000, TDR)
    };
    let memory = vec![
        run(aug, 8, 0x1000, 0x1000),
        call(Leaf::MEM_SEPT_RD, 0x1000, TDR),
        call(Leaf::MEM_RANGE_BLOCK, 0x1000, TDR),
        call(Leaf::MEM_RANGE_UNBLOCK, 0x1000, TDR),
        call(Leaf::MEM_RANGE_BLOCK, 0x2000, TDR),
        call(Leaf::MEM_TRACK, TDR, 0),
        call(Leaf::MEM_PAGE_REMOVE, 0x2000, TDR),
        Seamcall {
            r8: PAGE + 0x8_0000,
            ..call(Leaf::MEM_PAGE_RELOCATE, 0, TDR)
        },
        call(Leaf::MEM_RD, 0, TDR),
        call(Leaf::MEM_WR, 0, TDR),
        call(Leaf::MNG_RD, TDR, 0x1100_0000_0000_000A),
        call(Leaf::MNG_WR, TDR, 0x1100_0000_0000_000A),
        call(Leaf::VP_RD, TDVPR, 0x203C),
        call(Leaf::VP_WR, TDVPR, 0x2016),
        call(Leaf::PHYMEM_PAGE_RDMD, PAGE, 0),
        call(Leaf::SYS_RD, 0, 0),
        call(Leaf::SYS_INFO, SHARED, 0),
        // A 2 MiB page from an aligned place on, made small and whole again.
        Seamcall {
            r8: 0x4020_0000,
            ..call(Leaf::MEM_PAGE_AUG, 0x20_0001, TDR)
        },
        Seamcall {
            r8: SEPT + 0x8000,
            ..call(Leaf::MEM_PAGE_DEMOTE, 0x20_0001, TDR)
        },
        call(Leaf::MEM_PAGE_PROMOTE, 0x20_0001, TDR),
        call(Leaf::MEM_SEPT_REMOVE, 1, TDR),
    ];
    let teardown = vec![
        call(Leaf::VP_FLUSH, TDVPR, 0),
        call(Leaf::MNG_VPFLUSHDONE, TDR, 0),
        call(Leaf::PHYMEM_CACHE_WB, 0, 0),
        call(Leaf::MNG_KEY_FREEID, TDR, 0),
        run(call(Leaf::PHYMEM_PAGE_RECLAIM, TDCX, 0), 12, 0x1000, 0),
        run(call(Leaf::PHYMEM_PAGE_RECLAIM, SEPT, 0), 3, 0x1000, 0),
        call(Leaf::PHYMEM_PAGE_RECLAIM, PAGE, 0),
        call(Leaf::PHYMEM_PAGE_RECLAIM, TDR, 0),
        call(Leaf::PHYMEM_PAGE_WBINVD, TDR, 0),
    ];
    let stages = [
        ("create", create),
        ("init", init),
        ("tables", tables.collect()),
        ("image", image),
        ("vcpu", vcpu),
        ("finalize", finalize),
        ("memory", memory),
        ("teardown", teardown),
    ];
    let mut seeds = Vec::new();
    let mut calls = Vec::new();
    for (name, more) in stages {
        calls.extend(more);
        let request = ExecuteRequest {
            calls: calls.clone(),
            ..ExecuteRequest::default()
        };
        seeds.push((name, request));
    }
    for (name, request) in &mut seeds {
        // One of them stops at errors and one belongs to a session.
        request.stop_on_error = *name == "vcpu";
        if *name == "memory" {
            request.session = "s".to_owned();
            request.sequence = 1;
            request.lp = 1;
        }
    }
    seeds
}

fn call(leaf: Leaf, rcx: u64, rdx: u64) -> Seamcall {
    seamcall_to_wire(tdx_defs::Seamcall::new(leaf).rcx(rcx).rdx(rdx))
}

fn run(call: Seamcall, count: u32, rcx_stride: i64, r8_stride: i64) -> Seamcall {
    Seamcall {
        repeat: Some(Repeat {
            count,
            rcx_stride,
            r8_stride,
            r9_stride: 0,
        }),
        ..call
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tdx_defs::CompletionStatus;

    use super::*;

    /// Runs what is kept for a target.
    pub(super) fn each_kept(target: &str, run: impl Fn(&[u8])) {
        let folder = format!("{}/../fuzz/corpus/{target}", env!("CARGO_MANIFEST_DIR"));
        let mut inputs = 0;
        for entry in std::fs::read_dir(&folder).unwrap() {
            run(&std::fs::read(entry.unwrap().path()).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{folder} is empty");
    }

    /// Statuses of a request on the machine above.
    fn statuses(request: ExecuteRequest) -> Vec<CompletionStatus> {
        let running = Running::start(platform(), &LIMITS).unwrap();
        let service = ModuleService::new(
            Arc::new(running),
            &LIMITS,
            Faults::default(),
            CancellationToken::new(),
        );
        let answer = ready(service.answer(request)).unwrap();
        answer
            .results
            .iter()
            .map(|result| CompletionStatus(result.rax))
            .collect()
    }

    #[test]
    fn seeds_reach_the_end_of_a_tds_life() {
        for (name, request) in seeds() {
            let calls = request.calls.clone();
            let answers = statuses(request);
            assert_eq!(answers.len(), calls.len(), "{name}");
            // From "memory" on there are calls whose refusals are of interest too.
            let successes = answers.iter().filter(|status| status.is_success()).count();
            if name != "memory" && name != "teardown" {
                assert_eq!(successes, calls.len(), "{name}: {answers:?}");
            }
            assert!(successes * 2 > calls.len(), "{name}: {answers:?}");
        }
    }

    #[test]
    fn kept_inputs_pass() {
        each_kept("execute", fuzz_execute);
    }

    #[test]
    fn seeds_and_their_beginnings_pass() {
        for (_, request) in seeds() {
            let bytes = request.encode_to_vec();
            fuzz_execute(&bytes);
            for end in (0..bytes.len()).step_by(7) {
                fuzz_execute(&bytes[..end]);
            }
        }
    }

    /// One number of a call, replaced by a bad one.
    #[derive(Debug, Clone)]
    struct Damage {
        call: prop::sample::Index,
        register: u8,
        value: u64,
    }

    fn value() -> impl Strategy<Value = u64> {
        let near = prop::sample::select(vec![
            0,
            TDR,
            TDCX,
            TDVPR,
            SEPT,
            PAGE,
            SHARED,
            0x7000_0000,
            0x8000_0000,
            HKID << 46,
            1 << 47,
            1 << 51,
            1 << 52,
            u64::MAX,
        ]);
        let offset = prop::sample::select(vec![0, 1, 2, 3, 4, 7, 0x100, 0xFFF, 0x1000, 0x20_0000]);
        prop_oneof![
            4 => (near, offset, any::<bool>()).prop_map(|(base, by, down): (u64, u64, bool)| {
                if down { base.wrapping_sub(by) } else { base.wrapping_add(by) }
            }),
            1 => any::<u64>(),
            1 => (0..64u32).prop_map(|bit| 1 << bit),
        ]
    }

    fn damage() -> impl Strategy<Value = Damage> {
        (any::<prop::sample::Index>(), 0..16u8, value()).prop_map(|(call, register, value)| {
            Damage {
                call,
                register,
                value,
            }
        })
    }

    impl Damage {
        fn apply(&self, request: &mut ExecuteRequest) {
            let at = self.call.index(request.calls.len());
            let call = &mut request.calls[at];
            let word = (self.value & 0xFFFF_FFFF) as u32;
            match self.register {
                0 => call.leaf = word % 64,
                1 => call.version = word % 8,
                2 => call.rcx = self.value,
                3 => call.rdx = self.value,
                4 => call.r8 = self.value,
                5 => call.r9 = self.value,
                6 => call.r10 = self.value,
                7 => call.r11 = self.value,
                8 => call.r12 = self.value,
                9 => call.r13 = self.value,
                10 => call.data = vec![0xFF; (word % 8192) as usize].into(),
                11 => {
                    call.repeat = Some(Repeat {
                        count: word % 1100,
                        rcx_stride: self.value.cast_signed(),
                        r8_stride: self.value.rotate_left(7).cast_signed(),
                        r9_stride: -1,
                    })
                }
                12 => {
                    request.calls.remove(at);
                }
                13 => {
                    let call = request.calls[at].clone();
                    request.calls.push(call);
                }
                14 => request.lp = word % 4,
                _ => {
                    request.session = "t".repeat((word % 66) as usize);
                    request.sequence = self.value % 3;
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1024))]

        #[test]
        fn damaged_requests_get_an_answer_or_a_refusal(
            seed in 0..seeds().len(),
            damages in prop::collection::vec(damage(), 1..8),
        ) {
            let (_, mut request) = seeds().swap_remove(seed);
            for damage in &damages {
                damage.apply(&mut request);
                if request.calls.is_empty() {
                    break;
                }
            }
            fuzz_execute(&request.encode_to_vec());
        }

        #[test]
        fn damaged_bytes_get_an_answer_or_a_refusal(
            seed in 0..seeds().len(),
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12),
            cut in prop::option::weighted(0.2, any::<prop::sample::Index>()),
        ) {
            let mut bytes = seeds().swap_remove(seed).1.encode_to_vec();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            if let Some(cut) = cut {
                bytes.truncate(cut.index(bytes.len()));
            }
            fuzz_execute(&bytes);
        }
    }
}

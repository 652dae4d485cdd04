//! A batch that may run: every field of an `ExecuteRequest` checked before the first call (S1).

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use mirror_proto::InvalidField;
use mirror_proto::module::ExecuteRequest;
use tdx_defs::Seamcall;
use tdx_module::LpId;

/// Longest session name, in bytes.
pub(crate) const MAX_SESSION_BYTES: usize = 64;
/// Most host memory that one call may bring along, in bytes: one 2 MiB page.
pub(crate) const MAX_DATA_BYTES: usize = 2 << 20;
/// 8-byte words of a call's host memory that go into the fingerprint.
const FINGERPRINT_WORDS: usize = 64;

/// What a request may ask for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    /// Calls in a batch.
    pub(crate) calls: u32,
    /// Runs of a call, and of a batch.
    pub(crate) runs: u32,
    /// Logical processors of the platform.
    pub(crate) logical_processors: u32,
}

/// A checked batch.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Replay window and number, unless every request is to run.
    pub(crate) ticket: Option<Ticket>,
    /// As the caller numbered it; echoed.
    pub(crate) sequence: u64,
    /// The processor that executes.
    pub(crate) lp: LpId,
    /// Leave out what is behind an error.
    pub(crate) stop_on_error: bool,
    /// In order.
    pub(crate) calls: Vec<Seamcall>,
    /// How many times a leaf runs, all calls and repeats taken together.
    pub(crate) runs: u64,
    /// Trace context of the sender, or empty.
    pub(crate) traceparent: String,
}

/// A batch's place in a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Ticket {
    /// Name of the session.
    pub(crate) session: String,
    /// Number in the session, from 1.
    pub(crate) sequence: u64,
    /// Tells two batches apart that claim the same number.
    pub(crate) fingerprint: u64,
    /// Answers up to this number have arrived.
    pub(crate) acknowledged: u64,
}

impl Batch {
    /// Checks a request against `bounds`.
    pub(crate) fn check(request: ExecuteRequest, bounds: Bounds) -> Result<Self, InvalidField> {
        let ExecuteRequest {
            session,
            sequence,
            stop_on_error,
            calls,
            lp,
            traceparent,
            acknowledged,
            return_spans: _,
        } = request;
        if session.len() > MAX_SESSION_BYTES {
            let reason = format!("{} bytes, the limit is {MAX_SESSION_BYTES}", session.len());
            return Err(InvalidField::new("session", reason));
        }
        if !session.is_empty() && sequence == 0 {
            return Err(InvalidField::new(
                "sequence",
                "0, numbers of a session start at 1",
            ));
        }
        if acknowledged > 0 && acknowledged >= sequence {
            let reason = format!("{acknowledged} is not below sequence {sequence}");
            return Err(InvalidField::new("acknowledged", reason));
        }
        if lp >= bounds.logical_processors {
            let reason = format!("{lp}, the platform has {}", bounds.logical_processors);
            return Err(InvalidField::new("lp", reason));
        }
        if calls.len() > usize::try_from(bounds.calls).unwrap_or(usize::MAX) {
            let reason = format!("{} calls, the limit is {}", calls.len(), bounds.calls);
            return Err(InvalidField::new("calls", reason));
        }
        let calls = calls
            .into_iter()
            .enumerate()
            .map(|(at, call)| {
                check_call(call, bounds.runs).map_err(|error| error.within(&format!("calls[{at}]")))
            })
            .collect::<Result<Vec<_>, _>>()?;
        let runs = calls.iter().map(|call| u64::from(call.count())).sum();
        if runs > u64::from(bounds.runs) {
            let reason = format!("{runs} runs with repeats, the limit is {}", bounds.runs);
            return Err(InvalidField::new("calls", reason));
        }
        let ticket = (!session.is_empty()).then(|| {
            let fingerprint = fingerprint(stop_on_error, lp, &calls);
            Ticket {
                session,
                sequence,
                fingerprint,
                acknowledged,
            }
        });
        Ok(Self {
            ticket,
            sequence,
            lp: LpId(lp),
            stop_on_error,
            calls,
            runs,
            traceparent,
        })
    }
}

fn check_call(
    call: mirror_proto::module::Seamcall,
    max_runs: u32,
) -> Result<Seamcall, InvalidField> {
    if call.data.len() > MAX_DATA_BYTES {
        let reason = format!("{} bytes, the limit is {MAX_DATA_BYTES}", call.data.len());
        return Err(InvalidField::new("data", reason));
    }
    if let Some(repeat) = &call.repeat
        && !(1..=max_runs).contains(&repeat.count)
    {
        let reason = format!("{}, allowed are 1 to {max_runs}", repeat.count);
        return Err(InvalidField::new("repeat.count", reason));
    }
    Seamcall::try_from(call)
}

/// A number that differs for batches that differ. It guards against a caller that confuses its
/// numbers, not against one that forges: of long data it reads a sample, so that a measured build
/// is not hashed twice. The trace context is left out, a batch sent again may have another.
fn fingerprint(stop_on_error: bool, lp: u32, calls: &[Seamcall]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (stop_on_error, lp, calls.len()).hash(&mut hasher);
    for call in calls {
        (
            call.leaf,
            call.version,
            call.rcx,
            call.rdx,
            call.r8,
            call.r9,
        )
            .hash(&mut hasher);
        (call.r10, call.r11, call.r12, call.r13, call.data.len()).hash(&mut hasher);
        if let Some(repeat) = call.repeat {
            (
                repeat.count,
                repeat.rcx_stride,
                repeat.r8_stride,
                repeat.r9_stride,
            )
                .hash(&mut hasher);
        }
        let stride = (call.data.len() / 8 / FINGERPRINT_WORDS).max(1);
        for word in call.data.chunks(8).step_by(stride) {
            word.hash(&mut hasher);
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mirror_proto::module::{Repeat, Seamcall as WireCall};

    const BOUNDS: Bounds = Bounds {
        calls: 3,
        runs: 100,
        logical_processors: 4,
    };

    fn repeated(count: u32) -> WireCall {
        WireCall {
            repeat: Some(Repeat {
                count,
                ..Repeat::default()
            }),
            ..WireCall::default()
        }
    }

    #[test]
    fn each_field_out_of_range_is_named_with_its_limit() {
        let with_call = |call| ExecuteRequest {
            calls: vec![call],
            ..Default::default()
        };
        for (request, field, limit) in [
            (
                ExecuteRequest {
                    session: "s".repeat(65),
                    ..Default::default()
                },
                "session",
                "64",
            ),
            (
                ExecuteRequest {
                    session: "s".into(),
                    ..Default::default()
                },
                "sequence",
                "1",
            ),
            (
                ExecuteRequest {
                    lp: 4,
                    ..Default::default()
                },
                "lp",
                "4",
            ),
            (
                ExecuteRequest {
                    calls: vec![WireCall::default(); 4],
                    ..Default::default()
                },
                "calls",
                "3",
            ),
            (
                ExecuteRequest {
                    calls: vec![repeated(60), repeated(41)],
                    ..Default::default()
                },
                "calls",
                "100",
            ),
            (with_call(repeated(0)), "calls[0].repeat.count", "100"),
            (with_call(repeated(101)), "calls[0].repeat.count", "100"),
            (
                with_call(WireCall {
                    leaf: 1 << 16,
                    ..Default::default()
                }),
                "calls[0].leaf",
                "65535",
            ),
            (
                with_call(WireCall {
                    version: 256,
                    ..Default::default()
                }),
                "calls[0].version",
                "255",
            ),
            (
                with_call(WireCall {
                    data: vec![0; (2 << 20) + 1].into(),
                    ..Default::default()
                }),
                "calls[0].data",
                "2097152",
            ),
        ] {
            let error = Batch::check(request, BOUNDS).unwrap_err();
            assert_eq!(error.field, field);
            assert!(error.reason.contains(limit), "{error}");
        }
    }

    #[test]
    fn requests_at_the_limits_pass() {
        let request = ExecuteRequest {
            session: "s".repeat(64),
            sequence: 1,
            calls: vec![repeated(98), WireCall::default(), WireCall::default()],
            lp: 3,
            ..Default::default()
        };
        let batch = Batch::check(request, BOUNDS).unwrap();
        assert_eq!((batch.runs, batch.calls.len()), (100, 3));
        let empty = Batch::check(ExecuteRequest::default(), BOUNDS).unwrap();
        assert_eq!((empty.runs, empty.ticket), (0, None));
    }

    #[test]
    fn the_fingerprint_tells_batches_apart_and_not_their_traces() {
        let fingerprint = |request| {
            Batch::check(request, BOUNDS)
                .unwrap()
                .ticket
                .unwrap()
                .fingerprint
        };
        let base = ExecuteRequest {
            session: "s".into(),
            sequence: 1,
            calls: vec![WireCall {
                rcx: 7,
                data: vec![1; 4096].into(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let traced = ExecuteRequest {
            traceparent: "00-1-2-01".into(),
            ..base.clone()
        };
        assert_eq!(fingerprint(base.clone()), fingerprint(traced));

        let mut longer = base.clone();
        longer.calls.push(WireCall::default());
        let mut register = base.clone();
        register.calls[0].r13 = 1;
        let mut data = base.clone();
        data.calls[0].data = vec![2; 4096].into();
        let mut repeat = base.clone();
        repeat.calls[0].repeat = Some(Repeat {
            count: 1,
            ..Default::default()
        });
        for (case, other) in [
            ("one call more", longer),
            ("another register", register),
            ("other data", data),
            ("a repeat", repeat),
            (
                "another processor",
                ExecuteRequest {
                    lp: 1,
                    ..base.clone()
                },
            ),
            (
                "stopping",
                ExecuteRequest {
                    stop_on_error: true,
                    ..base.clone()
                },
            ),
        ] {
            assert_ne!(fingerprint(other), fingerprint(base.clone()), "{case}");
        }
    }
}

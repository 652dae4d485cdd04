//! A batch that may run: every field of an `ExecuteRequest` checked before the first call (S1).

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use mirror_proto::InvalidField;
use mirror_proto::module::{Chain, ExecuteRequest};
use tdx_defs::{Leaf, Seamcall, SeamcallResult};
use tdx_module::LpId;

/// Longest session name, in bytes.
pub(crate) const MAX_SESSION_BYTES: usize = 64;
/// Most host memory that one call may bring along, in bytes: one 2 MiB page.
pub(crate) const MAX_DATA_BYTES: usize = 2 << 20;
/// 8-byte words of a call's host memory that go into the fingerprint.
const FINGERPRINT_WORDS: usize = 16;

/// Weight above which a batch is long. Those below keep a worker busy for about as long as a
/// message takes to decode.
const LONG_BATCH: u64 = 2048;

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
    /// Its place in a chain of batches.
    pub(crate) chain: Option<Chain>,
    /// Trace context of the sender, or empty.
    pub(crate) traceparent: String,
    /// Whether the answer brings the spans along.
    pub(crate) return_spans: bool,
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
            chain,
            acknowledged,
            return_spans,
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
        if chain.is_some() && session.is_empty() {
            return Err(InvalidField::new("chain", "given without a session"));
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
            let fingerprint = fingerprint(stop_on_error, lp, chain, &calls);
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
            chain,
            traceparent,
            return_spans,
        })
    }

    /// Whether it keeps a thread busy for longer than others may wait.
    pub(crate) fn is_long(&self) -> bool {
        let weights = self
            .calls
            .iter()
            .map(|call| u64::from(call.count()) * weight(call.leaf));
        weights.sum::<u64>() > LONG_BATCH
    }

    /// Whether `results` say that every run of every call completed.
    pub(crate) fn ran_whole(&self, results: &[SeamcallResult]) -> bool {
        let mut each = self.calls.iter().zip(results);
        self.calls.len() == results.len()
            && each.all(|(call, result)| result.completed == call.count())
    }
}

/// What a run takes, in runs of TDH.MEM.PAGE.AUG.
fn weight(leaf: Leaf) -> u64 {
    match leaf {
        // 384 bytes to hash.
        Leaf::MR_EXTEND => 16,
        // A page to copy, and 128 bytes to hash.
        Leaf::MEM_PAGE_ADD => 8,
        _ => 1,
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
fn fingerprint(stop_on_error: bool, lp: u32, chain: Option<Chain>, calls: &[Seamcall]) -> u64 {
    let mut hasher = DefaultHasher::new();
    let chain = chain.map(|chain| (chain.id, chain.link));
    (stop_on_error, lp, chain, calls.len()).hash(&mut hasher);
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
        let (words, rest) = call.data.as_chunks::<8>();
        let stride = (words.len() / FINGERPRINT_WORDS).max(1);
        for word in words.iter().step_by(stride) {
            hasher.write_u64(u64::from_le_bytes(*word));
        }
        rest.hash(&mut hasher);
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
                    chain: Some(Chain::default()),
                    ..Default::default()
                },
                "chain",
                "session",
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
    fn a_batch_is_long_by_what_its_leaves_take() {
        let bounds = Bounds {
            runs: 4096,
            ..BOUNDS
        };
        for (leaf, count, long) in [
            (Leaf::MEM_PAGE_AUG, 2048, false),
            (Leaf::MEM_PAGE_AUG, 2049, true),
            (Leaf::MR_EXTEND, 128, false),
            (Leaf::MR_EXTEND, 129, true),
            (Leaf::MEM_PAGE_ADD, 257, true),
        ] {
            let call = WireCall {
                leaf: leaf.0.into(),
                ..repeated(count)
            };
            let request = ExecuteRequest {
                calls: vec![call],
                ..Default::default()
            };
            let batch = Batch::check(request, bounds).unwrap();
            assert_eq!(batch.is_long(), long, "{leaf} {count}");
        }
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
        let mut chained = base.clone();
        chained.chain = Some(Chain { id: 1, link: 0 });
        for (case, other) in [
            ("a place in a chain", chained),
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

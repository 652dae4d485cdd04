//! What stands in front of an event's payload.
//!
//! Source: `print_trace_line()`, kernel/trace/trace_output.c (the `trace` file and `trace-cmd
//! report`): `TASK-PID [CPU] FLAGS TIME: EVENT: `, with four or five flags or none, and with
//! `(TGID)` before the CPU under the record-tgid option; tools/perf/builtin-script.c:
//! `COMM PID [CPU] TIME: SYSTEM:EVENT: `.

use super::reader::LineError;

/// A line cut at its columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Prefixed<'a> {
    /// Task name; may hold spaces, slashes and dashes.
    pub(super) task: &'a str,
    /// Thread id.
    pub(super) thread: u32,
    /// Time stamp; the raw number for clocks that count something else than time.
    pub(super) time_ns: u64,
    /// Event name without its system; empty for lines of other tracers.
    pub(super) event: &'a str,
    /// The rest.
    pub(super) payload: &'a str,
}

/// Cuts a line. [`LineError::Prefix`] when it does not start like an event; another error when
/// it does and then ends too early.
pub(super) fn parse(line: &str) -> Result<Prefixed<'_>, LineError> {
    let (task, thread, right) = split_at_cpu(line).ok_or(LineError::Prefix)?;
    let (time_ns, rest) = time(right)?;
    if rest.is_empty() {
        return Err(LineError::Missing { field: "event" });
    }
    let (word, payload) = cut_word(rest);
    // The function tracer's lines have no event name.
    let event = word.strip_suffix(':').unwrap_or("");
    let event = event.rsplit(':').next().unwrap_or(event);
    Ok(Prefixed {
        task,
        thread,
        time_ns,
        event,
        payload: payload.trim_ascii(),
    })
}

/// Task, thread and what is behind the first `[CPU]` column that has both in front: a task name
/// may hold brackets as well.
fn split_at_cpu(line: &str) -> Option<(&str, u32, &str)> {
    for (open, _) in line.match_indices('[') {
        let (left, column) = line.split_at(open);
        let Some((cpu, right)) = column[1..].split_once(']') else {
            continue;
        };
        let is_column = left.ends_with(is_space)
            && (right.is_empty() || right.starts_with(is_space))
            && is_number(cpu);
        if is_column && let Some((task, thread)) = task_and_thread(left) {
            return Some((task, thread, right.trim_ascii()));
        }
    }
    None
}

/// `TASK-PID`, split at the last dash, or perf's `COMM PID` and `COMM PID/TID`.
fn task_and_thread(left: &str) -> Option<(&str, u32)> {
    let left = without_thread_group(left.trim_ascii());
    if let Some((task, thread)) = left.rsplit_once('-')
        && is_number(thread)
    {
        return Some((task.trim_ascii(), thread.parse().ok()?));
    }
    let (task, thread) = left.rsplit_once(is_space)?;
    let thread = match thread.split_once('/') {
        Some((process, thread)) if is_number(process) => thread,
        _ => thread,
    };
    is_number(thread).then(|| Some((task.trim_ascii(), thread.parse().ok()?)))?
}

/// Drops `(TGID)` or `(-------)` from the end.
fn without_thread_group(left: &str) -> &str {
    let Some((front, group)) = left.rsplit_once('(') else {
        return left;
    };
    match group.strip_suffix(')') {
        Some(id) if is_number(id.trim_ascii()) || id.bytes().all(|byte| byte == b'-') => {
            front.trim_ascii_end()
        }
        _ => left,
    }
}

/// Skips the flags, if there are any, and reads `SECONDS.FRACTION:` or a bare count.
fn time(right: &str) -> Result<(u64, &str), LineError> {
    let (mut word, mut rest) = first_word(right)?;
    if is_flags(word) {
        (word, rest) = first_word(rest)?;
    }
    let stamp = word.strip_suffix(':').ok_or(LineError::Prefix)?;
    let bad = || LineError::number("time stamp", stamp);
    let Some((seconds, fraction)) = stamp.split_once('.') else {
        return Ok((stamp.parse().map_err(|_| LineError::Prefix)?, rest));
    };
    if !is_number(seconds) || !is_number(fraction) || fraction.len() > 9 {
        return Err(LineError::Prefix);
    }
    let seconds: u64 = seconds.parse().map_err(|_| bad())?;
    // Of nine digits at most, which stand for nanoseconds when there are as many.
    let digits = fraction.bytes().chain(std::iter::repeat(b'0')).take(9);
    let fraction = digits.fold(0, |value, digit| value * 10 + u64::from(digit - b'0'));
    let time_ns = seconds
        .checked_mul(1_000_000_000)
        .and_then(|ns| ns.checked_add(fraction))
        .ok_or_else(bad)?;
    Ok((time_ns, rest))
}

/// Four flag characters on old kernels, five since the migrate-disable column came.
fn is_flags(word: &str) -> bool {
    matches!(word.len(), 4..=6)
        && word
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'.' || byte == b'#')
}

fn first_word(text: &str) -> Result<(&str, &str), LineError> {
    let text = text.trim_ascii_start();
    if text.is_empty() {
        return Err(LineError::Missing {
            field: "time stamp",
        });
    }
    let (word, rest) = cut_word(text);
    Ok((word, rest.trim_ascii_start()))
}

/// The first word, and what is behind it.
fn cut_word(text: &str) -> (&str, &str) {
    text.split_once(is_space).unwrap_or((text, ""))
}

fn is_space(c: char) -> bool {
    c.is_ascii_whitespace()
}

fn is_number(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_form_is_cut_at_its_columns() {
        for (case, line, task, thread, time_ns, event) in [
            (
                "trace file, five flags",
                "       CPU 2/KVM-4151    [006] .....    86.601928: kvm_page_fault: x",
                "CPU 2/KVM",
                4151,
                86_601_928_000,
                "kvm_page_fault",
            ),
            (
                "trace file, four flags",
                " qemu-system-x86-8397  [002] d..1  1404.389384: kvm_page_fault: x",
                "qemu-system-x86",
                8397,
                1_404_389_384_000,
                "kvm_page_fault",
            ),
            (
                "flags with a migrate-disable digit",
                " a-1  [002] dNh11 0.000001: kvm_exit: x",
                "a",
                1,
                1_000,
                "kvm_exit",
            ),
            (
                "trace-cmd report without flags",
                "       CPU 0/KVM-2201  [010] 275859.349038: kvm_page_fault:       x",
                "CPU 0/KVM",
                2201,
                275_859_349_038_000,
                "kvm_page_fault",
            ),
            (
                "trace-cmd report -t",
                "  <...>-1946   [226] ...1. 32479.313982123: kvm_page_fault: x",
                "<...>",
                1946,
                32_479_313_982_123,
                "kvm_page_fault",
            ),
            (
                "perf script",
                "CPU 1/KVM  2203 [003]   501.224817: kvm:kvm_page_fault: x",
                "CPU 1/KVM",
                2203,
                501_224_817_000,
                "kvm_page_fault",
            ),
            (
                "perf script with process and thread",
                "CPU 1/KVM  2200/2203 [003]   501.224817:          kvm:kvm_page_fault: x",
                "CPU 1/KVM",
                2203,
                501_224_817_000,
                "kvm_page_fault",
            ),
            (
                "dashes in the task name",
                "  VCPU-0-61883  [001] ..... 1.000000: kvm_page_fault: x",
                "VCPU-0",
                61883,
                1_000_000_000,
                "kvm_page_fault",
            ),
            (
                "brackets in the task name",
                "  a [1] b-7  [001] ..... 1.000000: kvm_page_fault: x",
                "a [1] b",
                7,
                1_000_000_000,
                "kvm_page_fault",
            ),
            (
                "thread groups recorded",
                "  q-7  (   7) [001] ..... 1.000000: kvm_page_fault: x",
                "q",
                7,
                1_000_000_000,
                "kvm_page_fault",
            ),
            (
                "unknown thread group",
                "  q-7  (-------) [001] ..... 1.000000: kvm_page_fault: x",
                "q",
                7,
                1_000_000_000,
                "kvm_page_fault",
            ),
            (
                "a counting clock",
                "  q-7 [001] ..... 42: kvm_page_fault: x",
                "q",
                7,
                42,
                "kvm_page_fault",
            ),
            (
                "function tracer",
                "  q-7 [001] ..... 1.000000: do_thing <-caller",
                "q",
                7,
                1_000_000_000,
                "",
            ),
        ] {
            let prefixed = parse(line).unwrap_or_else(|error| panic!("{case}: {error}"));
            assert_eq!(
                (
                    prefixed.task,
                    prefixed.thread,
                    prefixed.time_ns,
                    prefixed.event
                ),
                (task, thread, time_ns, event),
                "{case}"
            );
        }
    }

    #[test]
    fn other_text_is_no_event() {
        for line in [
            "",
            "hello",
            "[001]",
            "q-7 [001",
            "q-7 [x] ..... 1.0: a: b",
            "q [001] ..... 1.0: a: b",
            "q-99999999999 [001] ..... 1.000000: a: b",
            "q-7 [001] ..... 1.0000000000: a: b",
            "q-7 [001] ..... one: a: b",
            "q-7 [001] ..... 1.0 a: b",
        ] {
            assert_eq!(parse(line), Err(LineError::Prefix), "{line}");
        }
    }

    #[test]
    fn a_line_that_ends_too_early_is_told_from_other_text() {
        for line in ["q-7 [001]", "q-7 [001] .....", "q-7 [001] ..... 1.000000:"] {
            assert!(
                matches!(parse(line), Err(LineError::Missing { .. })),
                "{line}"
            );
        }
    }
}

//! Writing what [`read`](super::read) reads: the text of tracefs' `trace` file.
//!
//! Source: `print_trace_header()`, `trace_print_context()`, kernel/trace/trace.c and
//! trace_output.c.

/// What stands above the events.
pub const HEADER: &str = "\
# tracer: nop
#
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
#              | |         |   |||||     |         |
";

/// One event. All come from one processor: a VM has one order.
pub fn line(task: &str, thread: u64, time_ns: u64, event: &str, text: &str) -> String {
    let (seconds, micros) = (time_ns / 1_000_000_000, time_ns / 1_000 % 1_000_000);
    format!("{task:>16}-{thread:<7} [000] ..... {seconds:>5}.{micros:06}: {event}: {text}\n")
}

/// What stands where events are missing.
pub fn lost(events: u64) -> String {
    format!("CPU:0 [LOST {events} EVENTS]\n")
}

#[cfg(test)]
mod tests {
    use super::super::{Event, read};
    use super::*;

    #[test]
    fn what_is_written_is_read_again() {
        let text = "vcpu 3 rip 0x0 address 0x0000000000001234 error_code 0x2";
        let text = [
            HEADER.to_owned(),
            line("CPU 3/KVM", 7, 1_234_567_890, "kvm_page_fault", text),
            lost(9),
            line("vm", 7, 2_000_000_000, "kvm_mmu_get_page", "sp gen 0"),
        ];
        let trace = read(text.concat().as_bytes(), |line| panic!("{line}")).unwrap();
        let [Event::Fault(fault)] = trace.events[..] else {
            panic!("{trace:?}");
        };
        assert_eq!(
            (fault.vcpu, fault.address, fault.time_ns),
            (3, 0x1234, 1_234_567_000)
        );
        assert_eq!((trace.summary.lost, trace.summary.ignored), (9, 1));
    }
}

//! The payload of `kvm_unmap_hva_range`.
//!
//! Source: `TRACE_EVENT(kvm_unmap_hva_range)`, include/trace/events/kvm.h. Host virtual
//! addresses, the end exclusive.

use super::fault::hex;
use super::reader::LineError;

/// `mmu notifier unmap range: START -- END`.
pub(super) fn parse(payload: &str) -> Result<(u64, u64), LineError> {
    let mut words = payload.split_ascii_whitespace();
    for expected in ["mmu", "notifier", "unmap", "range:"] {
        match words.next() {
            Some(word) if word == expected => {}
            Some(word) => {
                return Err(LineError::Word {
                    word: super::reader::excerpt(word),
                });
            }
            None => return Err(LineError::Missing { field: "start" }),
        }
    }
    let start = hex(
        "start",
        words.next().ok_or(LineError::Missing { field: "start" })?,
    )?;
    match words.next() {
        Some("--") => {}
        Some(word) => {
            return Err(LineError::Word {
                word: super::reader::excerpt(word),
            });
        }
        None => return Err(LineError::Missing { field: "end" }),
    }
    let end = hex(
        "end",
        words.next().ok_or(LineError::Missing { field: "end" })?,
    )?;
    if end <= start {
        return Err(LineError::Range { start, end });
    }
    Ok((start, end))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_and_checked() {
        let text = "mmu notifier unmap range: 0x007f3a4e19e000 -- 0x007f3a4e19f000";
        assert_eq!(parse(text), Ok((0x7f3a_4e19_e000, 0x7f3a_4e19_f000)));
        for (payload, want) in [
            (
                "mmu notifier unmap range: 0x2000 -- 0x1000",
                "0x2000 is not below 0x1000",
            ),
            (
                "mmu notifier unmap range: 0x2000 -- 0x2000",
                "0x2000 is not below 0x2000",
            ),
            ("mmu notifier unmap range: 0x2000 --", "end is missing"),
            ("mmu notifier unmap range: 0x2000", "end is missing"),
            ("mmu notifier unmap range:", "start is missing"),
            ("mmu notifier range: 0x1 -- 0x2", "unexpected \"range:\""),
            (
                "mmu notifier unmap range: zz -- 0x2",
                "start \"zz\" is not a number",
            ),
        ] {
            let error = parse(payload).unwrap_err().to_string();
            assert!(error.contains(want), "{payload}: {error}");
        }
    }
}

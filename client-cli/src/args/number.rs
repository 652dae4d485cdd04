//! Numbers on the command line: `0x` hexadecimal, decimal, and sizes such as 4K, 2M and 1G.

use std::time::Duration;

/// Text that is no number.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NumberError {
    /// Neither digits nor digits with a known unit.
    #[error("{text:?} is not a number: use decimal, 0x hexadecimal or a size such as 4K, 2M or 1G")]
    Malformed {
        /// As given.
        text: String,
    },
    /// More than 64 bits.
    #[error("{text:?} is above the limit of 64 bits")]
    TooLarge {
        /// As given.
        text: String,
    },
    /// No duration.
    #[error("{text:?} is not a time: use seconds, or a number with ms, s or m")]
    Duration {
        /// As given.
        text: String,
    },
    /// A duration of zero, or above a day.
    #[error("{text:?} is outside the limits of 1ms and 24 hours")]
    DurationRange {
        /// As given.
        text: String,
    },
}

/// Decimal, `0x` hexadecimal, or a size in binary units: `4K`, `2M`, `1G`, `1T`, also `2MiB`.
/// Underscores may separate digits.
pub(super) fn number(text: &str) -> Result<u64, NumberError> {
    let given = || text.to_owned();
    let digits = text.replace('_', "");
    let lower = digits.to_ascii_lowercase();
    let (digits, radix, shift) = match lower.strip_prefix("0x") {
        Some(hex) => (hex, 16, 0),
        None => {
            let (digits, shift) = without_unit(&lower);
            (digits, 10, shift)
        }
    };
    if digits.is_empty() || !digits.chars().all(|digit| digit.is_digit(radix)) {
        return Err(NumberError::Malformed { text: given() });
    }
    u64::from_str_radix(digits, radix)
        .ok()
        .and_then(|value| value.checked_mul(1 << shift))
        .ok_or_else(|| NumberError::TooLarge { text: given() })
}

fn without_unit(lower: &str) -> (&str, u32) {
    let bare = lower
        .strip_suffix("ib")
        .or_else(|| lower.strip_suffix('b'))
        .unwrap_or(lower);
    for (unit, shift) in [('k', 10), ('m', 20), ('g', 30), ('t', 40)] {
        if let Some(digits) = bare.strip_suffix(unit) {
            return (digits, shift);
        }
    }
    (lower, 0)
}

/// Hexadecimal with or without `0x`; what is none of it is read as [`number`] reads it.
pub(super) fn hex_number(text: &str) -> Result<u64, NumberError> {
    let digits = text.replace('_', "");
    let digits = digits.strip_prefix("0x").unwrap_or(&digits);
    if !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return u64::from_str_radix(digits, 16).map_err(|_| NumberError::TooLarge {
            text: text.to_owned(),
        });
    }
    number(text)
}

/// A number of 32 bits.
pub(super) fn number32(text: &str) -> Result<u32, String> {
    let value = number(text).map_err(|error| error.to_string())?;
    u32::try_from(value).map_err(|_| format!("{text:?} is above the limit of 32 bits"))
}

/// Seconds, or a number with `ms`, `s` or `m`.
pub(super) fn duration(text: &str) -> Result<Duration, NumberError> {
    let malformed = || NumberError::Duration {
        text: text.to_owned(),
    };
    let (digits, unit_s) = match text {
        _ if text.ends_with("ms") => (&text[..text.len() - 2], 0.001),
        _ if text.ends_with('s') => (&text[..text.len() - 1], 1.0),
        _ if text.ends_with('m') => (&text[..text.len() - 1], 60.0),
        _ => (text, 1.0),
    };
    if digits.is_empty()
        || !digits
            .bytes()
            .all(|byte| byte.is_ascii_digit() || byte == b'.')
    {
        return Err(malformed());
    }
    let seconds: f64 = digits.parse::<f64>().map_err(|_| malformed())? * unit_s;
    if !(0.001..=86_400.0).contains(&seconds) {
        return Err(NumberError::DurationRange {
            text: text.to_owned(),
        });
    }
    Ok(Duration::from_secs_f64(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_hexadecimal_or_sizes() {
        for (text, want) in [
            ("0", 0),
            ("4096", 4096),
            ("0x1000", 0x1000),
            ("0XfF", 255),
            ("0x7fff_ffff_ffff", 0x7fff_ffff_ffff),
            ("4K", 4096),
            ("4k", 4096),
            ("2M", 2 << 20),
            ("2MiB", 2 << 20),
            ("1G", 1 << 30),
            ("1GB", 1 << 30),
            ("1T", 1 << 40),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(number(text), Ok(want), "{text}");
        }
    }

    #[test]
    fn other_text_is_refused() {
        for text in [
            "", "x", "0x", "-1", "+1", "1.5G", "K", "0x4K", "1KK", "4 K", "1e3", "b",
        ] {
            assert!(
                matches!(number(text), Err(NumberError::Malformed { .. })),
                "{text}"
            );
        }
        for text in ["18446744073709551616", "0x10000000000000000", "16777216T"] {
            assert!(
                matches!(number(text), Err(NumberError::TooLarge { .. })),
                "{text}"
            );
        }
        assert!(number32("4G").unwrap_err().contains("32 bits"));
    }

    #[test]
    fn hexadecimal_needs_no_prefix_where_only_that_is_expected() {
        for (text, want) in [("7f00", 0x7f00), ("0x10", 16), ("10", 16), ("1G", 1 << 30)] {
            assert_eq!(hex_number(text), Ok(want), "{text}");
        }
        assert!(hex_number("g").is_err());
        assert!(hex_number("").is_err());
    }

    #[test]
    fn times_are_bounded() {
        for (text, want_ms) in [
            ("5", 5_000),
            ("1.5", 1_500),
            ("250ms", 250),
            ("2s", 2_000),
            ("1m", 60_000),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(want_ms)), "{text}");
        }
        for text in ["", "s", "x", "-1", "1h", "inf", "nan", "1..2"] {
            assert!(
                matches!(duration(text), Err(NumberError::Duration { .. })),
                "{text}"
            );
        }
        for text in ["0", "0ms", "86401"] {
            assert!(
                matches!(duration(text), Err(NumberError::DurationRange { .. })),
                "{text}"
            );
        }
    }
}

//! Numbers of 64 bits as text.

/// Reads decimal or `0x` digits with underscores between them, or a size such as `1G`.
pub(super) fn parse_word(text: &str) -> Result<u64, String> {
    let digits = text.replace('_', "");
    let (digits, radix, shift) = match digits.strip_prefix("0x") {
        Some(hex) => (hex.to_owned(), 16, 0),
        None => {
            let units = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
            let unit = units
                .into_iter()
                .find_map(|(unit, shift)| Some((digits.strip_suffix(unit)?.to_owned(), shift)));
            let (digits, shift) = unit.unwrap_or((digits, 0));
            (digits, 10, shift)
        }
    };
    // A sign would pass the library's parser.
    let is_number = !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix));
    is_number
        .then(|| u64::from_str_radix(&digits, radix).ok())
        .flatten()
        .and_then(|word| word.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?} is no 64-bit number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_have_two_radixes_and_four_units() {
        for (text, word) in [
            ("0", 0),
            ("1_000", 1000),
            ("0x8000_0000_0000_0001", 1 << 63 | 1),
            ("4K", 4096),
            ("1G", 1 << 30),
            ("2T", 2 << 40),
        ] {
            assert_eq!(parse_word(text), Ok(word), "{text}");
        }
        for text in [
            "",
            "0x",
            "G",
            "+1",
            "-1",
            "1g",
            "0x1G",
            "16777216T",
            "18446744073709551616",
        ] {
            let error = parse_word(text).unwrap_err();
            assert!(error.contains("no 64-bit number"), "{text}: {error}");
        }
    }
}

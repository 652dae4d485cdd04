//! Arguments of a step and words of a note, as various programs print them.
//!
//! `key=value`, `key:value` or `key value`, in any case; numbers decimal or hexadecimal, with the
//! units of sizes. What can be read in two ways is not guessed: it is an error that says so.

use crate::trace::hex;

/// Names that may stand in front of a value with nothing but a blank between.
const KEYS: [&str; 46] = [
    "ADDR",
    "ARG",
    "ARG0",
    "ARGS0",
    "BITMAP",
    "CAP",
    "COUNT",
    "ERRNO",
    "FIRST",
    "FIRST_PAGE",
    "FLAGS",
    "GPA",
    "GUEST_PHYS_ADDR",
    "HVA",
    "ID",
    "LEFT_SIZE",
    "LEN",
    "LENGTH",
    "MASK",
    "MEMORY_SIZE",
    "MODE",
    "N",
    "NAME",
    "NPAGES",
    "NUM",
    "NUM_PAGES",
    "OFFSET",
    "OP",
    "PAGES",
    "PARAM",
    "PARAMETER",
    "PATH",
    "PROT",
    "RC",
    "SIZE",
    "SLOT",
    "SLOT_ID",
    "START",
    "STRIDE",
    "USERSPACE_ADDR",
    "VAL",
    "VALUE",
    "VCPU",
    "VCPUS",
    "VCPU_ID",
    "ADVICE",
];
/// Names of addresses, which some programs print in hexadecimal without `0x`.
const ADDRESSES: [&str; 5] = ["ADDR", "GPA", "GUEST_PHYS_ADDR", "HVA", "USERSPACE_ADDR"];

fn is_one_of(word: &str, names: &[&str]) -> bool {
    names.iter().any(|name| name.eq_ignore_ascii_case(word))
}

/// A word of a text: an argument, or one that stands alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Word<'a> {
    Argument(&'a str, &'a str),
    Alone(&'a str),
}

fn words(text: &str) -> impl Iterator<Item = Word<'_>> {
    let mut rest = text.split_whitespace().peekable();
    std::iter::from_fn(move || {
        let word = rest.next()?.trim_end_matches([',', ';']);
        let pair = word.split_once('=');
        let pair = pair.or_else(|| {
            word.split_once(':')
                .filter(|(key, _)| is_one_of(key, &KEYS))
        });
        if let Some((key, value)) = pair {
            return Some(Word::Argument(key, value));
        }
        if is_one_of(word, &KEYS)
            && let Some(value) = rest.next_if(|next| !next.contains('=') && !is_one_of(next, &KEYS))
        {
            return Some(Word::Argument(word, value.trim_end_matches([',', ';'])));
        }
        Some(Word::Alone(word))
    })
}

/// The text of an argument.
pub(super) fn argument<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    words(text).find_map(|word| match word {
        Word::Argument(name, value) if name.eq_ignore_ascii_case(key) => Some(value),
        _ => None,
    })
}

/// The words that are no arguments, as one.
pub(super) fn alone(text: &str) -> String {
    let alone = words(text).filter_map(|word| match word {
        Word::Alone(word) => Some(word),
        Word::Argument(..) => None,
    });
    alone.collect::<Vec<_>>().join(" ")
}

/// `key=value`, and `key value` where the value is a number.
pub(super) fn counts(text: &str) -> impl Iterator<Item = (&str, u64)> {
    let mut rest = text.split_whitespace().peekable();
    std::iter::from_fn(move || {
        loop {
            let word = rest.next()?.trim_end_matches(',');
            let (key, value) = match word.split_once('=') {
                Some(pair) => pair,
                None => (word, rest.peek()?.trim_end_matches(',')),
            };
            if let Some(value) = number(value) {
                if !word.contains('=') {
                    rest.next();
                }
                return Some((key, value));
            }
        }
    })
}

/// A number: decimal, `0x` hexadecimal, or a size such as 4K.
pub(super) fn number(text: &str) -> Option<u64> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    if digits.is_some_and(|digits| !digits.is_empty()) {
        return hex("number", &text.to_ascii_lowercase()).ok();
    }
    let end = text.find(|letter: char| !letter.is_ascii_digit());
    let (digits, unit) = text.split_at(end.unwrap_or(text.len()));
    let shift = match unit {
        "" => 0,
        "K" | "k" | "KB" | "KiB" => 10,
        "M" | "MB" | "MiB" => 20,
        "G" | "GB" | "GiB" => 30,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The value of an argument. An address without `0x` is decimal or hexadecimal, whichever is the
/// beginning of a page; when both are, or neither, nobody can tell.
pub(super) fn value(key: &str, text: &str) -> Result<u64, String> {
    let wrong = || format!("{key}: {text:?} is no number");
    let bare = !text.is_empty() && text.bytes().all(|letter| letter.is_ascii_hexdigit());
    if !bare || !is_one_of(key, &ADDRESSES) {
        return number(text).ok_or_else(wrong);
    }
    let hexadecimal = u64::from_str_radix(text, 16).map_err(|_| wrong())?;
    let Ok(decimal) = text.parse::<u64>() else {
        return Ok(hexadecimal);
    };
    let is_page = |address: u64| address.is_multiple_of(tdx_defs::PAGE_SIZE);
    match (is_page(decimal), is_page(hexadecimal)) {
        _ if decimal == hexadecimal => Ok(decimal),
        (true, false) => Ok(decimal),
        (false, true) => Ok(hexadecimal),
        _ => Err(format!("{key}: {text:?} may be decimal or hexadecimal")),
    }
}

/// Words of flags, `A|B`, as bits; `None` when one is not known.
pub(super) fn flags(text: &str, known: &[(&str, u64)]) -> Option<u64> {
    if let Some(bits) = number(text) {
        return Some(bits);
    }
    let mut bits = 0;
    for word in text.split(['|', '+', ',']).filter(|word| !word.is_empty()) {
        let found = known.iter().find(|(name, _)| {
            let word = word.to_ascii_uppercase();
            word == *name || word.strip_prefix("KVM_MEM_") == Some(name)
        });
        bits |= found?.1;
    }
    Some(bits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_may_be_written_in_several_ways() {
        for text in [
            "ACCESS op=read gpa=0x1000 count=3",
            "ACCESS OP=read GPA=0x1000 COUNT=3",
            "access op read gpa 0x1000 count 3",
            "ACCESS op:read, gpa:0x1000, count:3",
            "ACCESS op=read, gpa 0X1000; count=3",
        ] {
            let found = ["op", "gpa", "count"].map(|key| argument(text, key));
            assert_eq!(found[0], Some("read"), "{text}");
            assert_eq!(found[1].and_then(number), Some(0x1000), "{text}");
            assert_eq!(found[2], Some("3"), "{text}");
            assert!(alone(text).eq_ignore_ascii_case("access"), "{text}");
        }
        // A name without a value is a word, and what stands behind it has its own name.
        assert_eq!(argument("ACCESS count gpa=1", "count"), None);
        assert_eq!(argument("ACCESS count gpa 1", "count"), None);
        assert_eq!(argument("ACCESS count gpa 1", "gpa"), Some("1"));
        assert_eq!(argument("SET note=a:b,gpa:3", "gpa"), None);
        assert_eq!(
            alone("MADVISE DONTNEED hva 0x1 len=2 twice"),
            "MADVISE DONTNEED twice"
        );
    }

    #[test]
    fn numbers_have_units_and_no_two_meanings() {
        for (text, expected) in [
            ("16", Some(16)),
            ("0x10", Some(16)),
            ("0XAbC", Some(0xABC)),
            ("4K", Some(4096)),
            ("2MiB", Some(2 << 20)),
            ("1G", Some(1 << 30)),
            ("", None),
            ("0x", None),
            ("-1", None),
            ("zz", None),
            ("1T", None),
            ("18446744073709551615K", None),
        ] {
            assert_eq!(number(text), expected, "{text}");
        }
        for (key, text, expected) in [
            ("gpa", "10000000", Some(0x1000_0000)),
            ("gpa", "268435456", Some(0x1000_0000)),
            ("hva", "7fa1ce002000", Some(0x7FA1_CE00_2000)),
            ("HVA", "7FA1CE002000", Some(0x7FA1_CE00_2000)),
            ("gpa", "0", Some(0)),
            // Beginnings of pages in both, in neither.
            ("gpa", "4096000", None),
            ("gpa", "1234", None),
            ("gpa", "7fa1ce00200g", None),
            ("size", "10000000", Some(10_000_000)),
            ("size", "1a", None),
        ] {
            assert_eq!(value(key, text).ok(), expected, "{key} {text}");
        }
    }

    #[test]
    fn flags_are_numbers_or_words() {
        let known = [("LOG_DIRTY_PAGES", 1), ("READONLY", 2)];
        for (text, expected) in [
            ("0x3", Some(3)),
            ("KVM_MEM_LOG_DIRTY_PAGES|readonly", Some(3)),
            ("LOG_DIRTY_PAGES", Some(1)),
            ("SOMETHING", None),
        ] {
            assert_eq!(flags(text, &known), expected, "{text}");
        }
    }

    #[test]
    fn counts_stand_beside_their_names() {
        let found: Vec<_> = counts("pages_4k=7 pf_taken 3, odd=x last").collect();
        assert_eq!(found, [("pages_4k", 7), ("pf_taken", 3)]);
    }
}

//! A recorded sequence: one JSON object a line.
//!
//! Numbers that may exceed 32 bits are hex strings. Registers that a step does not name are zero on
//! the way in and not compared on the way out.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

/// Bytes that a step may have written to memory.
const MAX_WRITE: u64 = 2 << 20;
/// Calls of one run.
const MAX_REPEAT: u64 = 1 << 20;

/// Why a line is no sequence.
#[derive(Debug, thiserror::Error)]
pub enum SequenceError {
    /// Not JSON, or a member is missing or of the wrong kind.
    #[error("not a recorded sequence")]
    Json(#[from] serde_json::Error),
    /// A number cannot be what it stands for.
    #[error("step {step}: {field}: {reason}")]
    Field {
        /// Which step.
        step: usize,
        /// Name of the member.
        field: String,
        /// What is wrong, with the limit.
        reason: String,
    },
}

/// A number as a recording writes it: a JSON number or a hex string.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(try_from = "Value")]
pub struct Number(pub u64);

impl TryFrom<Value> for Number {
    type Error = String;

    fn try_from(value: Value) -> Result<Self, String> {
        let number = match &value {
            Value::String(text) => {
                let digits = text.strip_prefix("0x").unwrap_or(text);
                u64::from_str_radix(digits, 16).ok()
            }
            other => other.as_u64(),
        };
        number
            .map(Self)
            .ok_or_else(|| format!("{value} is no 64-bit number"))
    }
}

/// A sequence.
#[derive(Debug, Clone, Deserialize)]
pub struct Sequence {
    /// Its name.
    pub id: String,
    /// What happens.
    pub steps: Vec<Step>,
    /// The state afterwards.
    #[serde(rename = "final")]
    pub end: End,
}

/// One step: a host call, a guest event or a condition from outside.
#[derive(Debug, Clone, Deserialize)]
pub struct Step {
    /// Name of the leaf, for a host call.
    pub leaf: Option<String>,
    /// Its number.
    pub leaf_number: Option<u32>,
    /// RAX bits 23:16.
    #[serde(default)]
    pub version: u32,
    /// Logical processor.
    #[serde(default)]
    pub lp: u32,
    /// Name of the event, for a guest event.
    pub guest: Option<String>,
    /// Name of the condition, for a hook.
    pub hook: Option<String>,
    /// Registers, or the operands of an event or hook.
    #[serde(default, rename = "in")]
    pub input: BTreeMap<String, Value>,
    /// Memory that the host writes just before.
    #[serde(default)]
    pub data: Vec<Write>,
    /// How often the call is made.
    pub repeat: Option<Number>,
    /// What registers grow by after each.
    #[serde(default)]
    pub stride: BTreeMap<String, Number>,
    /// What came back.
    #[serde(default)]
    pub out: BTreeMap<String, Value>,
    /// Registers in `out` that carry no information.
    #[serde(default)]
    pub not_meaningful: Vec<String>,
}

/// Memory that the host writes.
#[derive(Debug, Clone, Deserialize)]
pub struct Write {
    /// Where.
    pub hpa: Number,
    /// Bytes.
    pub length: Number,
    /// Contents in hex, shorter than `length` when zeroes follow.
    pub bytes: Option<String>,
    /// Contents as a counter pattern.
    pub pattern_seed: Option<Number>,
}

/// The state at the end.
#[derive(Debug, Clone, Deserialize)]
pub struct End {
    /// TDs whose root page is not reclaimed.
    pub tds: Vec<BTreeMap<String, Value>>,
    /// Secure EPT entries that are not free.
    pub sept: Vec<SeptLine>,
    /// Pages that are neither free nor reserved.
    pub pamt: Vec<PageLine>,
    /// Of the last TD that was finalised.
    pub mrtd: Option<String>,
}

/// A run of Secure EPT entries.
#[derive(Debug, Clone, Deserialize)]
pub struct SeptLine {
    /// The TD.
    pub tdr: Number,
    /// First address.
    pub gpa: Number,
    /// TDX level.
    pub level: u32,
    /// Its state.
    pub state: String,
    /// The page behind it.
    pub hpa: Number,
    /// As TDH.MEM.SEPT.RD shows it.
    pub raw_rcx: Number,
    /// As TDH.MEM.SEPT.RD shows it.
    pub raw_rdx: Number,
    /// Entries of the run.
    pub count: Option<Number>,
}

/// A run of pages.
#[derive(Debug, Clone, Deserialize)]
pub struct PageLine {
    /// First page.
    pub hpa: Number,
    /// Its type, without `PT_`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The TD.
    pub owner: Number,
    /// `4K`, `2M` or `1G`.
    pub size: String,
    /// TLB epoch of its last block.
    pub bepoch: Option<Number>,
    /// Pages of the run.
    pub count: Option<Number>,
}

impl Sequence {
    /// Reads one line.
    pub fn parse(line: &str) -> Result<Self, SequenceError> {
        let sequence: Self = serde_json::from_str(line)?;
        for (at, step) in sequence.steps.iter().enumerate() {
            step.check()
                .map_err(|(field, reason)| SequenceError::Field {
                    step: at,
                    field,
                    reason,
                })?;
        }
        Ok(sequence)
    }
}

impl Step {
    /// What the step is called in a report.
    pub fn name(&self) -> &str {
        [&self.leaf, &self.guest, &self.hook]
            .into_iter()
            .find_map(Option::as_deref)
            .unwrap_or("?")
    }

    /// A number among the inputs; zero when it is not there.
    pub fn input(&self, name: &str) -> u64 {
        self.input
            .get(name)
            .and_then(|value| Number::try_from(value.clone()).ok())
            .unwrap_or_default()
            .0
    }

    fn check(&self) -> Result<(), (String, String)> {
        let kinds = [
            self.leaf.is_some(),
            self.guest.is_some(),
            self.hook.is_some(),
        ];
        if kinds.into_iter().filter(|given| *given).count() != 1 {
            let reason = "a step is one of leaf, guest and hook".to_owned();
            return Err(("leaf".to_owned(), reason));
        }
        if self.leaf.is_some() && self.leaf_number.is_none() {
            return Err(("leaf_number".to_owned(), "missing".to_owned()));
        }
        if let Some(Number(repeat)) = self.repeat
            && !(1..=MAX_REPEAT).contains(&repeat)
        {
            let reason = format!("{repeat} is outside 1..={MAX_REPEAT}");
            return Err(("repeat".to_owned(), reason));
        }
        for write in &self.data {
            write.check()?;
        }
        Ok(())
    }
}

impl Write {
    fn check(&self) -> Result<(), (String, String)> {
        if self.length.0 > MAX_WRITE {
            let reason = format!("{} bytes, the limit is {MAX_WRITE}", self.length.0);
            return Err(("data.length".to_owned(), reason));
        }
        let digits = self.bytes.as_deref().unwrap_or_default();
        let is_hex = digits.bytes().all(|digit| digit.is_ascii_hexdigit());
        if !is_hex || !digits.len().is_multiple_of(2) || digits.len() as u64 / 2 > self.length.0 {
            let reason = "not pairs of hex digits, or more than length".to_owned();
            return Err(("data.bytes".to_owned(), reason));
        }
        Ok(())
    }

    /// What is written.
    pub fn contents(&self) -> Vec<u8> {
        // Bounded by check().
        let length = usize::try_from(self.length.0).unwrap_or(0);
        let mut contents: Vec<u8> = match (&self.bytes, self.pattern_seed) {
            (Some(digits), _) => digits
                .as_bytes()
                .chunks_exact(2)
                .map(|pair| nibble(pair[0]) << 4 | nibble(pair[1]))
                .collect(),
            (None, Some(Number(seed))) => pattern(seed, length),
            (None, None) => Vec::new(),
        };
        contents.resize(length, 0);
        contents
    }
}

fn nibble(digit: u8) -> u8 {
    match digit {
        b'0'..=b'9' => digit - b'0',
        b'a'..=b'f' => digit - b'a' + 10,
        _ => digit - b'A' + 10,
    }
}

/// Little-endian words, each the one before plus a constant.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    const STEP: u64 = 0x9E37_79B9_7F4A_7C15;
    let words = std::iter::successors(Some(seed), |word| Some(word.wrapping_add(STEP)));
    words.flat_map(u64::to_le_bytes).take(length).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const END: &str = r#""final":{"tds":[],"sept":[],"pamt":[]}"#;

    #[test]
    fn a_call_is_read_with_its_memory() {
        let line = format!(
            r#"{{"id":"x","steps":[{{"leaf":"TDH.MNG.INIT","leaf_number":21,"in":{{"rcx":"0x40000000","rdx":8}},
            "data":[{{"hpa":"0x8","length":4,"bytes":"0aF0"}},{{"hpa":"0x8","length":9,"pattern_seed":"0x1"}}],
            "out":{{"rax":"0x0"}}}}],{END}}}"#
        );
        let sequence = Sequence::parse(&line).unwrap();
        let step = &sequence.steps[0];
        assert_eq!(
            (step.input("rcx"), step.input("rdx"), step.input("r8")),
            (0x4000_0000, 8, 0)
        );
        assert_eq!(step.data[0].contents(), [0x0A, 0xF0, 0, 0]);
        assert_eq!(step.data[1].contents()[..9], [1, 0, 0, 0, 0, 0, 0, 0, 0x16]);
    }

    #[test]
    fn what_is_no_sequence_is_refused() {
        for (steps, what) in [
            (r#"{"leaf":"X"}"#, "leaf_number"),
            (r#"{"hook":"A","guest":"B"}"#, "leaf"),
            (r#"{"leaf":"X","leaf_number":1,"repeat":0}"#, "repeat"),
            (
                r#"{"hook":"A","data":[{"hpa":0,"length":"0x200001"}]}"#,
                "data.length",
            ),
            (
                r#"{"hook":"A","data":[{"hpa":0,"length":4,"bytes":"abc"}]}"#,
                "data.bytes",
            ),
            (
                r#"{"hook":"A","data":[{"hpa":0,"length":1,"bytes":"abcd"}]}"#,
                "data.bytes",
            ),
            (
                r#"{"hook":"A","data":[{"hpa":"zz","length":1}]}"#,
                "not a recorded",
            ),
        ] {
            let line = format!(r#"{{"id":"x","steps":[{steps}],{END}}}"#);
            let error = Sequence::parse(&line).unwrap_err().to_string();
            assert!(error.contains(what), "{error}");
        }
        assert!(Sequence::parse("{}").is_err());
    }
}

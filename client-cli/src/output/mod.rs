//! The only place that writes to stdout: one JSON object, or text for people.

mod json;
mod table;

use std::io::{self, Write};

use serde_json::Value;

use crate::args::Format;
use crate::error::Error;

pub use json::{hex, merge};
pub use table::{Table, pairs};

/// What a command found out.
#[derive(Debug)]
pub struct Answer {
    /// For `--output json`: an object.
    pub json: Value,
    /// For `--output table`.
    pub text: String,
    /// The result itself says that something is not as it should be: printed, then told.
    pub verdict: Option<Error>,
}

impl Answer {
    /// A result that is fine.
    pub fn new(json: Value, text: impl Into<String>) -> Self {
        Self {
            json,
            text: text.into(),
            verdict: None,
        }
    }

    /// Generated text, the same in every format.
    pub fn bytes(text: Vec<u8>) -> Self {
        Self::new(Value::Null, String::from_utf8_lossy(&text))
    }

    /// Writes the result to stdout, then tells what is not as it should be.
    pub fn finish(self, format: Format) -> Result<(), Error> {
        self.print(format)?;
        self.verdict.map_or(Ok(()), Err)
    }

    /// Writes the result to stdout.
    pub fn print(&self, format: Format) -> Result<(), Error> {
        let mut text = match format {
            Format::Json if self.json.is_null() => self.text.clone(),
            Format::Json => self.json.to_string(),
            Format::Table => self.text.clone(),
        };
        if !text.is_empty() && !text.ends_with('\n') {
            text.push('\n');
        }
        print(text.as_bytes())
    }
}

/// Writes bytes to stdout. A reader that closed its end has seen enough.
pub fn print(bytes: &[u8]) -> Result<(), Error> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Output(error)),
        _ => Ok(()),
    }
}

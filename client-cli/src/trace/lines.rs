//! Lines of bounded length.

use std::io::{self, BufRead, Read};

/// Longer lines are skipped and reported.
pub const MAX_LINE_BYTES: usize = 64 * 1024;

/// One line without its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Line<'a> {
    /// Its bytes.
    Text(&'a [u8]),
    /// It was longer than [`MAX_LINE_BYTES`] and is gone.
    TooLong,
}

/// Cuts input into lines.
#[derive(Debug)]
pub(super) struct Lines<R> {
    input: R,
    buffer: Vec<u8>,
}

impl<R: BufRead> Lines<R> {
    pub(super) fn new(input: R) -> Self {
        Self {
            input,
            buffer: Vec::new(),
        }
    }

    /// The next line; `None` at the end of the input.
    pub(super) fn next_line(&mut self) -> io::Result<Option<Line<'_>>> {
        self.buffer.clear();
        let limit = MAX_LINE_BYTES as u64 + 1;
        if (&mut self.input)
            .take(limit)
            .read_until(b'\n', &mut self.buffer)?
            == 0
        {
            return Ok(None);
        }
        if self.buffer.last() == Some(&b'\n') {
            self.buffer.pop();
        } else if self.buffer.len() > MAX_LINE_BYTES {
            self.skip_rest_of_line()?;
            return Ok(Some(Line::TooLong));
        }
        if self.buffer.last() == Some(&b'\r') {
            self.buffer.pop();
        }
        Ok(Some(Line::Text(&self.buffer)))
    }

    fn skip_rest_of_line(&mut self) -> io::Result<()> {
        loop {
            let available = self.input.fill_buf()?;
            if available.is_empty() {
                return Ok(());
            }
            match available.iter().position(|byte| *byte == b'\n') {
                Some(at) => {
                    self.input.consume(at + 1);
                    return Ok(());
                }
                None => {
                    let all = available.len();
                    self.input.consume(all);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_end_at_newlines_and_at_the_end_of_input() {
        let mut lines = Lines::new(&b"one\r\n\ntwo"[..]);
        for want in [&b"one"[..], b"", b"two"] {
            assert_eq!(lines.next_line().unwrap(), Some(Line::Text(want)));
        }
        assert_eq!(lines.next_line().unwrap(), None);
    }

    #[test]
    fn a_long_line_is_skipped_and_the_next_one_read() {
        for (length, fits) in [
            (MAX_LINE_BYTES, true),
            (MAX_LINE_BYTES + 1, false),
            (1 << 20, false),
        ] {
            let mut text = vec![b'x'; length];
            text.extend_from_slice(b"\nafter\n");
            let mut lines = Lines::new(&text[..]);
            let first = lines.next_line().unwrap().unwrap();
            assert_eq!(matches!(first, Line::Text(_)), fits, "{length}");
            assert_eq!(
                lines.next_line().unwrap(),
                Some(Line::Text(b"after")),
                "{length}"
            );
        }
    }
}

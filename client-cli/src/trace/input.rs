//! Where the text comes from: a file or standard input, plain or compressed with zstd.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::Path;

use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};

const ZSTD_MAGIC: [u8; 4] = [0x28, 0xB5, 0x2F, 0xFD];
/// Magic numbers of skippable frames end in these bytes.
const ZSTD_SKIPPABLE_TAIL: [u8; 3] = [0x2A, 0x4D, 0x18];

/// Text of a recording.
pub type Input = Box<dyn BufRead + Send>;

/// The recording cannot be opened.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the trace {path}")]
pub struct InputError {
    /// As given.
    pub path: String,
    /// What happened.
    #[source]
    pub source: io::Error,
}

/// Opens a file, or standard input for `-`, and unpacks it when it starts like zstd.
pub fn open(path: &Path) -> Result<Input, InputError> {
    let failed = |source| InputError {
        path: path.display().to_string(),
        source,
    };
    let raw: Input = if path.as_os_str() == "-" {
        Box::new(BufReader::new(io::stdin()))
    } else {
        Box::new(BufReader::new(File::open(path).map_err(failed)?))
    };
    unpack(raw).map_err(failed)
}

/// Puts a decoder before compressed input.
pub(crate) fn unpack(raw: impl BufRead + Send + 'static) -> io::Result<Input> {
    let mut raw = raw;
    let start = peek_magic(&mut raw)?;
    let raw = io::Cursor::new(start.clone()).chain(raw);
    if is_zstd(&start) {
        Ok(Box::new(BufReader::with_capacity(
            1 << 16,
            Zstd::new(Box::new(raw)),
        )))
    } else {
        Ok(Box::new(raw))
    }
}

/// Takes the first four bytes, or fewer at the end: a pipe may deliver them one by one.
fn peek_magic(raw: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut start = Vec::with_capacity(4);
    raw.take(4).read_to_end(&mut start)?;
    Ok(start)
}

fn is_zstd(start: &[u8]) -> bool {
    start == ZSTD_MAGIC
        || (start.len() == 4 && start[0] & 0xF0 == 0x50 && start[1..] == ZSTD_SKIPPABLE_TAIL)
}

type Raw = Box<dyn BufRead + Send>;

/// Frames one behind the other: the library's own reader ends after the first.
struct Zstd {
    raw: Raw,
    decoder: FrameDecoder,
    in_frame: bool,
}

impl Zstd {
    fn new(raw: Raw) -> Self {
        Self {
            raw,
            decoder: FrameDecoder::new(),
            in_frame: false,
        }
    }

    /// Begins the next frame; `false` at the end of the input.
    fn next_frame(&mut self) -> io::Result<bool> {
        while !self.raw.fill_buf()?.is_empty() {
            match self.decoder.reset(&mut self.raw) {
                Ok(()) => {
                    self.in_frame = true;
                    return Ok(true);
                }
                Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame {
                    length,
                    ..
                })) => {
                    let length = u64::from(length);
                    let skipped = io::copy(&mut (&mut self.raw).take(length), &mut io::sink())?;
                    if skipped < length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                }
                Err(error) => return Err(invalid(error)),
            }
        }
        Ok(false)
    }

    fn check_sum(&self) -> io::Result<()> {
        match self.decoder.get_checksum_from_data() {
            Some(stored) if Some(stored) != self.decoder.get_calculated_checksum() => {
                Err(invalid("the zstd checksum does not match"))
            }
            _ => Ok(()),
        }
    }
}

impl Read for Zstd {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !buffer.is_empty() {
            if !self.in_frame && !self.next_frame()? {
                return Ok(0);
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(buffer);
            }
            if self.decoder.is_finished() {
                self.check_sum()?;
                self.in_frame = false;
            } else {
                let one = BlockDecodingStrategy::UptoBlocks(1);
                self.decoder
                    .decode_blocks(&mut self.raw, one)
                    .map_err(invalid)?;
            }
        }
        Ok(0)
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    const COMPRESSED: &[u8] = include_bytes!("../../tests/data/boot-1g-2vcpu.trace.zst");

    fn text(raw: Vec<u8>) -> io::Result<String> {
        let mut text = String::new();
        unpack(io::Cursor::new(raw))?.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn plain_text_stays_as_it_is() {
        for plain in ["", "a", "abc", "abcd", "# tracer: nop\nline\n"] {
            assert_eq!(text(plain.into()).unwrap(), plain);
        }
    }

    #[test]
    fn compressed_text_is_unpacked_over_all_its_frames() {
        let once = text(COMPRESSED.to_vec()).unwrap();
        assert_eq!(once.lines().count(), 180_141);
        let skippable = [0x50, 0x2A, 0x4D, 0x18, 3, 0, 0, 0, 1, 2, 3];
        let several = [&skippable[..], COMPRESSED, &skippable, COMPRESSED].concat();
        assert_eq!(text(several).unwrap(), once.repeat(2));
    }

    #[test]
    fn damaged_input_is_an_error() {
        let mut flipped = COMPRESSED.to_vec();
        flipped[100_000] ^= 0x10;
        let cut = COMPRESSED[..COMPRESSED.len() / 2].to_vec();
        let skip_cut = vec![0x50, 0x2A, 0x4D, 0x18, 9, 0, 0, 0, 1];
        for (case, raw) in [
            ("flipped", flipped),
            ("cut", cut),
            ("cut skippable", skip_cut),
        ] {
            assert!(text(raw).is_err(), "{case}");
        }
    }
}

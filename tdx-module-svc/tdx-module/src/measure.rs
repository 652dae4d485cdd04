//! MRTD: the measurement of a TD's initial contents; RTMR: those that the guest makes.
//!
//! Source: TDX module source, tdh_mem_page_add.c, tdh_mr_extend.c, tdh_mr_finalize.c, sha384.h.
//! The order of the calls matters: each appends its record to one SHA-384.
//!
//! TDH.MEM.PAGE.ADD appends 128 bytes: its name at 0, the GPA at 16 (little-endian), zeros.
//! TDH.MR.EXTEND appends such a block and then the 256 bytes of the chunk.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use ring::digest::{Context, SHA384, SHA384_OUTPUT_LEN};
use tdx_defs::Gpa;

use crate::locks::Lock;

/// Bytes of a SHA-384 digest.
pub const DIGEST_SIZE: usize = SHA384_OUTPUT_LEN;
/// Bytes that one TDH.MR.EXTEND measures.
pub const CHUNK_SIZE: usize = 256;

/// Number of run-time measurements.
pub(crate) const RTMRS: usize = 4;

const RECORD_SIZE: usize = 128;
const GPA_AT: usize = 16;

/// A digest.
type DigestBytes = [u8; DIGEST_SIZE];

/// A running SHA-384.
struct Sha384(Context);

impl Default for Sha384 {
    fn default() -> Self {
        Self(Context::new(&SHA384))
    }
}

impl fmt::Debug for Sha384 {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Sha384").finish_non_exhaustive()
    }
}

impl Sha384 {
    fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    fn finish(self) -> DigestBytes {
        let mut digest = [0; DIGEST_SIZE];
        digest.copy_from_slice(self.0.finish().as_ref());
        digest
    }
}

/// A running or finished MRTD.
#[derive(Debug, Default)]
pub(crate) struct Measurement {
    hash: Sha384,
    mrtd: Option<DigestBytes>,
}

impl Measurement {
    /// A page was added.
    pub(crate) fn page_added(&mut self, gpa: Gpa) {
        self.hash.update(&record(b"MEM.PAGE.ADD", gpa));
    }

    /// A chunk was extended.
    pub(crate) fn chunk_extended(&mut self, gpa: Gpa, chunk: &[u8]) {
        self.hash.update(&record(b"MR.EXTEND", gpa));
        self.hash.update(chunk);
    }

    /// Ends the measurement.
    pub(crate) fn finalize(&mut self) {
        self.mrtd = Some(std::mem::take(&mut self.hash).finish());
    }

    /// MRTD, once it is final.
    pub(crate) fn mrtd(&self) -> Option<DigestBytes> {
        self.mrtd
    }

    /// An 8-byte word of MRTD; zero before it is final.
    pub(crate) fn mrtd_word(&self, word: usize) -> u64 {
        let mrtd = self.mrtd.unwrap_or([0; DIGEST_SIZE]);
        let bytes = mrtd.as_chunks::<8>().0;
        bytes
            .get(word)
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }
}

/// The run-time measurements, zero at first.
#[derive(Debug)]
pub(crate) struct Rtmrs {
    /// RTMR: held by the guest call that extends one.
    pub(crate) lock: Lock,
    values: Mutex<[DigestBytes; RTMRS]>,
}

impl Default for Rtmrs {
    fn default() -> Self {
        Self {
            lock: Lock::default(),
            values: Mutex::new([[0; DIGEST_SIZE]; RTMRS]),
        }
    }
}

impl Rtmrs {
    /// Replaces a measurement by the digest of itself and `data`.
    pub(crate) fn extend(&self, index: usize, data: &DigestBytes) {
        let mut values = self.values.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(value) = values.get_mut(index) {
            let mut hash = Sha384::default();
            hash.update(value);
            hash.update(data);
            *value = hash.finish();
        }
    }

    /// An 8-byte word of one.
    pub(crate) fn word(&self, index: usize, word: usize) -> u64 {
        let value = self
            .values()
            .get(index)
            .copied()
            .unwrap_or([0; DIGEST_SIZE]);
        let words = value.as_chunks::<8>().0;
        words
            .get(word)
            .map_or(0, |bytes| u64::from_le_bytes(*bytes))
    }

    /// All of them.
    pub(crate) fn values(&self) -> [DigestBytes; RTMRS] {
        *self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn record(name: &[u8], gpa: Gpa) -> [u8; RECORD_SIZE] {
    let mut record = [0; RECORD_SIZE];
    record[..name.len()].copy_from_slice(name);
    record[GPA_AT..GPA_AT + 8].copy_from_slice(&gpa.get().to_le_bytes());
    record
}

#[cfg(test)]
mod tests {
    use super::*;

    enum Step {
        Add(u64),
        Extend(u64, Vec<u8>),
    }

    fn page(gpa: u64, chunk: [u8; 256]) -> Vec<Step> {
        let mut steps = vec![Step::Add(gpa)];
        steps.extend((0..16).map(|at| Step::Extend(gpa + at * CHUNK_SIZE as u64, chunk.to_vec())));
        steps
    }

    #[test]
    fn known_sequences_have_their_known_mrtd() {
        let counting: [u8; 256] = std::array::from_fn(|at| u8::try_from(at).unwrap());
        let zero = [0; 256];
        for (case, steps, expected) in [
            (
                "nothing",
                vec![],
                "38b060a751ac96384cd9327eb1b1e36a21fdb71114be07434c0cc7bf63f6e1da274edebfe76f65fbd51ad2f14898b95b",
            ),
            (
                "page 0",
                vec![Step::Add(0)],
                "8f3e9a8aca6784eab874f7aa4dda5d49104a88047f1f86695ef2a88f5691a90e34aac48ce45ffa1f5a23c7d62980d570",
            ),
            (
                "page 1",
                vec![Step::Add(0x1000)],
                "fcdabf6fdf38b87d2e3a89b1ab68c242abb261dffa70ef6f1dc2220c2752d2729cdf1be92afc2e0e4297f04e2b629552",
            ),
            (
                "pages 0, 1",
                vec![Step::Add(0), Step::Add(0x1000)],
                "d88b05f52648c041e7f0321f3905ec848a2d2654cf8c2158f67bc25ecd8a1a999f5f65f5350db0f732b59cfc66d6da3b",
            ),
            (
                "pages 1, 0",
                vec![Step::Add(0x1000), Step::Add(0)],
                "ccd5746e64f677a4135861ab4ea44fff8f1976b9a78eee76351e1339c6878ffb14e378c43d523aea8ea2f961bb4a4643",
            ),
            (
                "a zero page",
                page(0, zero),
                "236f0efa607ff8843f1855d7ef80dc3dda8fb455787a186b8787212951eab0096e3193bb26f817c2b63c21f5e10f9938",
            ),
            (
                "a counting page",
                page(0, counting),
                "b8f496520bb48e5284695ec1605cf17a5f9495329ba0b381d7c1966410e6de61a9cf0dc98de4fb52c7a47b0bcb56ea72",
            ),
            (
                "one chunk",
                vec![Step::Add(0), Step::Extend(0x100, zero.to_vec())],
                "ae71a151590d46af65391ab8f670eea5682c8a2924380491a69917b63129f87ec271c9ade5a98e0b4967e79b1fdf665b",
            ),
        ] {
            let mut measurement = Measurement::default();
            for step in &steps {
                match step {
                    Step::Add(gpa) => measurement.page_added(Gpa::new(*gpa)),
                    Step::Extend(gpa, chunk) => measurement.chunk_extended(Gpa::new(*gpa), chunk),
                }
            }
            assert_eq!(measurement.mrtd(), None);
            measurement.finalize();
            let hex: String = measurement
                .mrtd()
                .unwrap()
                .iter()
                .map(|b| format!("{b:02x}"))
                .collect();
            assert_eq!(hex, expected, "{case}");
        }
    }

    #[test]
    fn run_time_measurements_have_their_known_values() {
        let rtmrs = Rtmrs::default();
        let hex = |index: usize| -> String {
            let value = rtmrs.values()[index];
            value.iter().map(|b| format!("{b:02x}")).collect()
        };
        rtmrs.extend(1, &[0; DIGEST_SIZE]);
        let once = "f57bb7ed82c6ae4a29e6c9879338c592c7d42a39135583e8ccbe3940f2344b0eb6eb8503db0ffd6a39ddd00cd07d8317";
        assert_eq!(hex(1), once);
        rtmrs.extend(1, &[0; DIGEST_SIZE]);
        let twice = "11143121beb365e63826e7de89f9c76ae1100411fb9643d198e730b7603a83a4977c76eee6ddf74fa0b43fbf49897978";
        assert_eq!(hex(1), twice);
        rtmrs.extend(3, &[0xFF; DIGEST_SIZE]);
        let ones = "7d4fd80ec2887e82b1a453745c5cbd24e2be56273d311fd7ab567c50c7a3a37065b7328375dc9045fb0fe02e12d34d75";
        assert_eq!(hex(3), ones);
        assert_eq!(hex(0), "0".repeat(96));
    }

    #[test]
    fn words_are_little_endian() {
        let mut measurement = Measurement::default();
        assert_eq!(measurement.mrtd_word(0), 0);
        measurement.finalize();
        assert_eq!(measurement.mrtd_word(0), 0x3896_ac51_a760_b038);
        assert_eq!(measurement.mrtd_word(6), 0);
    }
}

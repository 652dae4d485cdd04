//! `guest`: what a guest does, one word for each thing.

use std::str::FromStr;

use clap::Args;
use mirror_proto::mmu::run_op::Op;
use mirror_proto::mmu::{RunAccept, RunMapGpa, RunRead, RunWrite};

use super::number::{NumberError, number, number32};

/// `mmuctl guest`.
#[derive(Debug, Args)]
pub struct GuestArgs {
    /// The VM
    #[arg(long, value_name = "ID", value_parser = number)]
    pub vm: u64,
    /// The vCPU
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub vcpu: u32,
    /// Leave exits that user space must answer to the caller, instead of converting as asked
    #[arg(long)]
    pub exits: bool,
    /// In order: accept:ADDR, accept2m:ADDR, read:ADDR+LEN, write:ADDR=HEX, exec:ADDR,
    /// map-gpa:ADDR+SIZE. Addresses carry the SHARED bit where memory is shared
    #[arg(required = true, value_name = "OP")]
    pub ops: Vec<GuestWord>,
}

/// One thing that the guest does.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestWord {
    /// As given.
    pub text: String,
    /// What it means.
    pub op: Op,
}

/// A word that says nothing that a guest does.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestWordError {
    /// No such word, or a part is missing.
    #[error(
        "{text:?} is not accept:ADDR, accept2m:ADDR, read:ADDR+LEN, write:ADDR=HEX, exec:ADDR or \
         map-gpa:ADDR+SIZE"
    )]
    Form {
        /// As given.
        text: String,
    },
    /// A number that is none.
    #[error(transparent)]
    Number(#[from] NumberError),
    /// A length above 32 bits.
    #[error("{text:?} is above the limit of 32 bits")]
    Length {
        /// As given.
        text: String,
    },
    /// Contents that are not pairs of hex digits.
    #[error("{text:?} is not pairs of hexadecimal digits")]
    Hex {
        /// As given.
        text: String,
    },
}

impl FromStr for GuestWord {
    type Err = GuestWordError;

    fn from_str(text: &str) -> Result<Self, GuestWordError> {
        let form = || GuestWordError::Form {
            text: text.to_owned(),
        };
        let (verb, rest) = text.split_once(':').ok_or_else(form)?;
        let pair = |separator| rest.split_once(separator).ok_or_else(form);
        let op = match verb {
            "accept" => Op::Accept(RunAccept {
                gpa: number(rest)?,
                level: 1,
            }),
            "accept2m" => Op::Accept(RunAccept {
                gpa: number(rest)?,
                level: 2,
            }),
            "exec" => Op::Execute(number(rest)?),
            "read" => {
                let (gpa, length) = pair('+')?;
                let too_long = |_| GuestWordError::Length {
                    text: length.to_owned(),
                };
                Op::Read(RunRead {
                    gpa: number(gpa)?,
                    length: u32::try_from(number(length)?).map_err(too_long)?,
                })
            }
            "write" => {
                let (gpa, data) = pair('=')?;
                Op::Write(RunWrite {
                    gpa: number(gpa)?,
                    data: bytes(data)?,
                })
            }
            "map-gpa" => {
                let (gpa, size) = pair('+')?;
                Op::MapGpa(RunMapGpa {
                    gpa: number(gpa)?,
                    size: number(size)?,
                })
            }
            _ => return Err(form()),
        };
        Ok(Self {
            text: text.to_owned(),
            op,
        })
    }
}

fn bytes(text: &str) -> Result<Vec<u8>, GuestWordError> {
    let bad = || GuestWordError::Hex {
        text: text.to_owned(),
    };
    if text.is_empty() || !text.is_ascii() || !text.len().is_multiple_of(2) {
        return Err(bad());
    }
    (0..text.len())
        .step_by(2)
        .map(|at| u8::from_str_radix(&text[at..at + 2], 16).map_err(|_| bad()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_what_the_guest_does() {
        for (text, op) in [
            (
                "accept:0x1000",
                Op::Accept(RunAccept {
                    gpa: 0x1000,
                    level: 1,
                }),
            ),
            (
                "accept2m:2M",
                Op::Accept(RunAccept {
                    gpa: 2 << 20,
                    level: 2,
                }),
            ),
            (
                "read:0x1000+8",
                Op::Read(RunRead {
                    gpa: 0x1000,
                    length: 8,
                }),
            ),
            (
                "write:4096=0aFF",
                Op::Write(RunWrite {
                    gpa: 4096,
                    data: vec![0x0A, 0xFF],
                }),
            ),
            ("exec:0x2000", Op::Execute(0x2000)),
            (
                "map-gpa:2M+4M",
                Op::MapGpa(RunMapGpa {
                    gpa: 2 << 20,
                    size: 4 << 20,
                }),
            ),
        ] {
            assert_eq!(text.parse::<GuestWord>().unwrap().op, op);
        }
        for text in [
            "",
            "accept",
            "jump:0",
            "read:0x1000",
            "write:0=0",
            "write:0=zz",
            "exec:x",
        ] {
            assert!(text.parse::<GuestWord>().is_err(), "{text}");
        }
    }
}

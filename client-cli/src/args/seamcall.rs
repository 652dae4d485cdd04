//! `seamcall`: one leaf with its registers.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use tdx_defs::{CompletionStatus, Leaf};

use super::number::{number, number32};

/// `mmuctl seamcall`.
#[derive(Debug, Args)]
pub struct SeamcallArgs {
    /// The leaf: a name such as TDH.MEM.PAGE.AUG or mem_page_aug, or its number
    pub leaf: Leaf,
    /// Input registers: rcx, rdx, r8 to r13, and version
    #[arg(value_name = "REG=VALUE")]
    pub registers: Vec<RegisterValue>,
    /// Host memory behind the leaf's memory operand
    #[arg(long, value_name = "FILE")]
    pub data: Option<PathBuf>,
    /// Logical processor that executes the call
    #[arg(long, value_name = "N", default_value = "0", value_parser = number32)]
    pub lp: u32,
    /// How many times to run it; stops at the first run that does not succeed
    #[arg(long, value_name = "N", value_parser = number32)]
    pub repeat: Option<u32>,
    /// Bytes to add to rcx, r8 or r9 after each run
    #[arg(
        long,
        value_name = "REG=BYTES",
        requires = "repeat",
        allow_hyphen_values = true
    )]
    pub stride: Vec<Stride>,
}

/// `mmuctl explain`.
#[derive(Debug, Args)]
pub struct ExplainArgs {
    /// The status: RAX as a number, or a name such as TDX_OPERAND_BUSY
    #[arg(value_name = "STATUS")]
    pub status: StatusArg,
    /// The leaf that answered it; what a host does next can depend on it
    #[arg(long, value_name = "LEAF")]
    pub leaf: Option<Leaf>,
}

/// A completion status by number or by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusArg(pub CompletionStatus);

impl FromStr for StatusArg {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if text.starts_with(|first: char| first.is_ascii_digit()) {
            let raw = number(text).map_err(|error| error.to_string())?;
            return Ok(Self(CompletionStatus(raw)));
        }
        let wanted = text.to_ascii_uppercase();
        CompletionStatus::known()
            .find(|(_, name)| *name == wanted || name.strip_prefix("TDX_") == Some(&*wanted))
            .map(|(status, _)| Self(status))
            .ok_or_else(|| format!("{text:?} is neither a number nor the name of a status"))
    }
}

/// An input of a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Register {
    /// RAX bits 23:16.
    Version,
    /// RCX.
    Rcx,
    /// RDX.
    Rdx,
    /// R8.
    R8,
    /// R9.
    R9,
    /// R10.
    R10,
    /// R11.
    R11,
    /// R12.
    R12,
    /// R13.
    R13,
}

impl FromStr for Register {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Ok(match name.to_ascii_lowercase().as_str() {
            "version" => Self::Version,
            "rcx" => Self::Rcx,
            "rdx" => Self::Rdx,
            "r8" => Self::R8,
            "r9" => Self::R9,
            "r10" => Self::R10,
            "r11" => Self::R11,
            "r12" => Self::R12,
            "r13" => Self::R13,
            _ => {
                return Err(format!(
                    "{name:?} is none of rcx, rdx, r8 to r13 and version"
                ));
            }
        })
    }
}

/// `rcx=0x1000`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegisterValue {
    /// Which one.
    pub register: Register,
    /// What it holds.
    pub value: u64,
}

impl FromStr for RegisterValue {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("not of the form REG=VALUE")?;
        let register = name.parse()?;
        let value = number(value).map_err(|error| error.to_string())?;
        if register == Register::Version && value > u64::from(u8::MAX) {
            return Err(format!("version {value} is above the limit of 255"));
        }
        Ok(Self { register, value })
    }
}

/// `rcx=4K`, with a minus sign to go down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stride {
    /// RCX, R8 or R9.
    pub register: Register,
    /// Bytes.
    pub bytes: i64,
}

impl FromStr for Stride {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) = text.split_once('=').ok_or("not of the form REG=BYTES")?;
        let register = name.parse()?;
        if !matches!(register, Register::Rcx | Register::R8 | Register::R9) {
            return Err(format!(
                "{name:?} is none of rcx, r8 and r9, which can have a stride"
            ));
        }
        let (digits, negative) = match value.strip_prefix('-') {
            Some(digits) => (digits, true),
            None => (value, false),
        };
        let bytes = number(digits).map_err(|error| error.to_string())?;
        let bytes = i64::try_from(bytes)
            .map_err(|_| format!("stride {value:?} is above the limit of 63 bits"))?;
        Ok(Self {
            register,
            bytes: if negative { -bytes } else { bytes },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_have_names_and_limits() {
        let value = "rcx=0x1000".parse::<RegisterValue>().unwrap();
        assert_eq!(
            value,
            RegisterValue {
                register: Register::Rcx,
                value: 0x1000
            }
        );
        assert_eq!("R13=2M".parse::<RegisterValue>().unwrap().value, 2 << 20);
        for (text, want) in [
            ("rcx", "REG=VALUE"),
            ("rbx=1", "none of rcx"),
            ("rcx=", "not a number"),
            ("version=256", "limit of 255"),
        ] {
            let error = text.parse::<RegisterValue>().unwrap_err();
            assert!(error.contains(want), "{text}: {error}");
        }
    }

    #[test]
    fn a_status_is_a_number_or_a_name() {
        for (text, raw) in [
            ("0x8000020000000092", 0x8000_0200_0000_0092),
            ("9223374235878031506", 0x8000_0200_0000_0092),
            ("0", 0),
            ("TDX_OPERAND_BUSY", 0x8000_0200_0000_0000),
            ("operand_busy", 0x8000_0200_0000_0000),
            ("TD_VMCS_FIELD_ERROR", 0xC000_0731_0000_0000),
        ] {
            assert_eq!(text.parse(), Ok(StatusArg(CompletionStatus(raw))), "{text}");
        }
        for text in [
            "",
            "TDX_",
            "TDX_TDX_SUCCESS",
            "0x",
            "0x10000000000000000",
            "-1",
        ] {
            assert!(text.parse::<StatusArg>().is_err(), "{text}");
        }
    }

    #[test]
    fn strides_go_up_and_down() {
        for (text, register, bytes) in [
            ("rcx=4K", Register::Rcx, 4096),
            ("r8=-0x1000", Register::R8, -4096),
            ("r9=0", Register::R9, 0),
        ] {
            assert_eq!(text.parse(), Ok(Stride { register, bytes }), "{text}");
        }
        for text in ["rdx=1", "rcx=x", "rcx", "rcx=0x8000000000000000"] {
            assert!(text.parse::<Stride>().is_err(), "{text}");
        }
    }
}

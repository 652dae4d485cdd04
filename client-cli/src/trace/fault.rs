//! The payload of `kvm_page_fault`.
//!
//! Source: `TRACE_EVENT(kvm_page_fault)`, arch/x86/kvm/trace.h, in its forms of 5.10 (neither
//! `0x` nor vcpu nor rip), since 6.0 (all of them), and without rip.

use super::reader::LineError;
use super::vcpus::MAX_VCPU_ID;

/// The fields that are used; rip is checked and dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FaultPayload {
    pub(crate) vcpu: Option<u32>,
    pub(crate) address: u64,
    pub(crate) error_code: u64,
}

/// `[vcpu N] [rip X] address X error_code X`, then anything behind a comma or a space.
pub(crate) fn parse(payload: &str) -> Result<FaultPayload, LineError> {
    let mut words = payload.split_ascii_whitespace();
    let mut vcpu = None;
    let mut address = None;
    loop {
        let key = match words.next() {
            Some(key) => key,
            None if address.is_some() => {
                return Err(LineError::Missing {
                    field: "error_code",
                });
            }
            None => return Err(LineError::Missing { field: "address" }),
        };
        match key {
            "vcpu" => {
                let number = value(&mut words, "vcpu")?;
                let id = number
                    .parse()
                    .map_err(|_| LineError::number("vcpu", number))?;
                if id >= MAX_VCPU_ID {
                    return Err(LineError::Vcpu {
                        id,
                        limit: MAX_VCPU_ID,
                    });
                }
                vcpu = Some(id);
            }
            "rip" => {
                hex("rip", value(&mut words, "rip")?)?;
            }
            "address" => address = Some(hex("address", value(&mut words, "address")?)?),
            "error_code" => {
                let number = value(&mut words, "error_code")?;
                let error_code = hex("error_code", number.trim_end_matches(','))?;
                let address = address.ok_or(LineError::Missing { field: "address" })?;
                return Ok(FaultPayload {
                    vcpu,
                    address,
                    error_code,
                });
            }
            other => {
                return Err(LineError::Word {
                    word: super::reader::excerpt(other),
                });
            }
        }
    }
}

fn value<'a>(
    words: &mut impl Iterator<Item = &'a str>,
    field: &'static str,
) -> Result<&'a str, LineError> {
    words.next().ok_or(LineError::Missing { field })
}

/// A hexadecimal number, whether or not `0x` stands in front.
pub(crate) fn hex(field: &'static str, number: &str) -> Result<u64, LineError> {
    let digits = number.strip_prefix("0x").unwrap_or(number);
    let mut value = 0u64;
    for byte in digits.bytes() {
        let digit = match byte {
            b'0'..=b'9' => byte - b'0',
            b'a'..=b'f' => byte - b'a' + 10,
            b'A'..=b'F' => byte - b'A' + 10,
            _ => return Err(LineError::number(field, number)),
        };
        // A bit that the shift would push out: more than 64.
        if value >> 60 != 0 {
            return Err(LineError::number(field, number));
        }
        value = value << 4 | u64::from(digit);
    }
    if digits.is_empty() {
        return Err(LineError::number(field, number));
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_known_form_is_read() {
        for (case, payload, vcpu, address, error_code) in [
            (
                "5.10",
                "address 7f3c5000 error_code 182",
                None,
                0x7f3c_5000,
                0x182,
            ),
            (
                "6.x",
                "vcpu 3 rip 0xffffffff8151a3c7 address 0x000000011a674000 error_code 0x182",
                Some(3),
                0x1_1a67_4000,
                0x182,
            ),
            (
                "error code without 0x",
                "vcpu 1 rip 0x10 address 0xfff error_code 784",
                Some(1),
                0xfff,
                0x784,
            ),
            (
                "without rip",
                "vcpu 2 address 0x1000 error_code 0x181",
                Some(2),
                0x1000,
                0x181,
            ),
            (
                "with a debugging tail",
                "vcpu 0 rip 0x1 address 0x2 error_code 0x100000006, seq = 0x1, root = fresh",
                Some(0),
                0x2,
                0x1_0000_0006,
            ),
            (
                "padded",
                "      address fffffff0   error_code 784",
                None,
                0xffff_fff0,
                0x784,
            ),
        ] {
            assert_eq!(
                parse(payload),
                Ok(FaultPayload {
                    vcpu,
                    address,
                    error_code
                }),
                "{case}"
            );
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (payload, want) in [
            ("vcpu 3 rip 0x1 address 0x2", "error_code is missing"),
            ("vcpu 3 rip 0x1 address", "address is missing"),
            ("", "address is missing"),
            ("error_code 0x182", "address is missing"),
            (
                "vcpu 4096 address 0x1 error_code 0x2",
                "vcpu 4096 is not below the limit of 4096",
            ),
            (
                "vcpu -1 address 0x1 error_code 0x2",
                "vcpu \"-1\" is not a number",
            ),
            (
                "vcpu 1 address 0xg error_code 0x2",
                "address \"0xg\" is not a number",
            ),
            (
                "vcpu 1 address +1 error_code 0x2",
                "address \"+1\" is not a number",
            ),
            (
                "address 0x11112222333344445 error_code 2",
                "address \"0x11112222333344445\" is not",
            ),
            ("gva 0x1 error_code 0x2", "unexpected \"gva\""),
        ] {
            let error = parse(payload).unwrap_err().to_string();
            assert!(error.contains(want), "{payload}: {error}");
        }
    }
}

//! Metadata fields of TDR and TDCS: what TDH.MNG.RD shows and TDH.MNG.WR changes.
//!
//! Source: TDX module source, tdr_tdcs_fields_lookup.c; TDX module ABI, metadata field identifiers:
//! bit 63 non-architectural, 61:56 class, 54:52 context, 33:32 element size (log2 of bytes), 31:0
//! field code. The host may leave context and size zero, as KVM does; bit 63 does not count.
//!
//! Fields that nothing here would ever change (CPUID values, virtual MSRs, migration) are left
//! out; docs/module-fields.md lists those that exist.

use std::ops::RangeInclusive;

use tdx_defs::{TdAttributes, field};

use super::{Td, TdConfig};

const IDENTITY: u64 = 0x3F << 56 | 0xFFFF_FFFF;
/// 8-byte words of a measurement.
const MEASUREMENT_WORDS: u64 = 6;

/// Why a metadata field was not accessed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum FieldError {
    /// No such field.
    Unknown,
    /// The host may not read it.
    NotReadable,
    /// The mask leaves nothing that the host may write.
    NotWritable,
    /// The value is not one that the field can have.
    NotValid,
}

/// The part of a field id that says which field it is.
pub(crate) fn field_identity(id: u64) -> u64 {
    id & IDENTITY
}

/// Whether the element size of an id, when it has one, is that of the field.
pub(crate) fn size_agrees(id: u64, bits: u32) -> bool {
    let size = id >> 32 & 0b11;
    size == 0 || 8 << size == u64::from(bits)
}

/// Who may read a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Readers {
    Host,
    /// The host, of a TD that can be debugged.
    HostOfDebugTd,
}

/// A field, or an array of them with consecutive codes.
struct Row {
    id: u64,
    count: u64,
    readers: Readers,
    value: fn(&Td, &TdConfig, u64) -> u64,
}

const fn row(id: u64, value: fn(&Td, &TdConfig, u64) -> u64) -> Row {
    Row {
        id,
        count: 1,
        readers: Readers::Host,
        value,
    }
}

/// KVM names these two without context and size.
const TSC_OFFSET: u64 = field::TD_TSC_OFFSET | CONTEXT_AND_SIZE;
const TSC_MULTIPLIER: u64 = field::TD_TSC_MULTIPLIER | CONTEXT_AND_SIZE;
/// TD context, 8 bytes.
const CONTEXT_AND_SIZE: u64 = 1 << 52 | 0b11 << 32;

/// The fields, in the order of the module's table.
const FIELDS: [Row; 28] = [
    row(field::TDR_FATAL, |td, _, _| td.is_fatal().into()),
    row(field::TDR_NUM_TDCX, |td, _, _| td.num_tdcx().into()),
    row(field::TDR_CHLDCNT, |td, _, _| td.children()),
    row(field::TDR_LIFECYCLE_STATE, |td, _, _| {
        td.lifecycle().number().into()
    }),
    row(field::TDR_HKID, |td, _, _| td.hkid().into()),
    row(field::TDR_PKG_CONFIG_BITMAP, |td, _, _| {
        td.configured_packages().into()
    }),
    row(field::TDCS_NUM_VCPUS, |td, _, _| td.num_vcpus().into()),
    row(field::TDCS_NUM_ASSOC_VCPUS, |td, _, _| {
        td.num_assoc_vcpus().into()
    }),
    row(field::TDCS_OP_STATE, |td, _, _| {
        td.op_state().number().into()
    }),
    row(field::TDCS_NUM_L2_VMS, |_, config, _| {
        config.num_l2_vms.into()
    }),
    row(field::TDCS_ATTRIBUTES, |_, config, _| {
        config.attributes.bits()
    }),
    row(field::TDCS_XFAM, |_, config, _| config.xfam),
    row(field::TDCS_MAX_VCPUS, |_, config, _| {
        config.max_vcpus.into()
    }),
    row(field::TDCS_GPAW, |_, config, _| config.wide_gpa.into()),
    row(field::TDCS_EPTP, |_, config, _| config.eptp),
    // Model: guest time is not simulated; the offset is zero and the multiplier is one (48
    // fractional bits).
    row(TSC_OFFSET, |_, _, _| 0),
    row(TSC_MULTIPLIER, |_, _, _| 1 << 48),
    row(field::TDCS_TSC_FREQUENCY, |_, config, _| {
        config.tsc_frequency.into()
    }),
    row(field::TDCS_HP_LOCK_TIMEOUT, |td, _, _| td.hp_lock_timeout()),
    row(field::TDCS_CONFIG_FLAGS, |_, config, _| config.config_flags),
    Row {
        readers: Readers::HostOfDebugTd,
        ..row(field::TDCS_TD_CTLS, |_, config, _| {
            config.pending_ve_disable().into()
        })
    },
    row(field::TDCS_TD_EPOCH, |td, _, _| td.epochs().current()),
    Row {
        count: 2,
        ..row(field::TDCS_REFCOUNT, |td, _, parity| {
            let [even, odd] = td.epochs().refcount();
            if parity == 0 { even.into() } else { odd.into() }
        })
    },
    Row {
        count: MEASUREMENT_WORDS,
        ..row(field::TDCS_MRTD, |td, _, word| {
            td.measurement().mrtd_word(index(word))
        })
    },
    rtmr(field::TDCS_RTMR, |td, _, word| {
        td.rtmrs().word(0, index(word))
    }),
    rtmr(field::TDCS_RTMR + 8, |td, _, word| {
        td.rtmrs().word(1, index(word))
    }),
    rtmr(field::TDCS_RTMR + 16, |td, _, word| {
        td.rtmrs().word(2, index(word))
    }),
    rtmr(field::TDCS_RTMR + 24, |td, _, word| {
        td.rtmrs().word(3, index(word))
    }),
];

/// A run-time measurement.
const fn rtmr(id: u64, value: fn(&Td, &TdConfig, u64) -> u64) -> Row {
    Row {
        count: MEASUREMENT_WORDS,
        readers: Readers::HostOfDebugTd,
        ..row(id, value)
    }
}

/// Position of a word that is known to be small.
fn index(word: u64) -> usize {
    usize::try_from(word).unwrap_or(usize::MAX)
}

/// Microseconds for which a guest is kept out by host priority before it exits.
const HP_LOCK_TIMEOUTS: RangeInclusive<u64> = 10_000..=100_000_000;
/// The initial one.
pub(super) const HP_LOCK_TIMEOUT: u64 = 1_000_000;

/// The row and element that an id names.
fn find(id: u64) -> Option<(usize, u64)> {
    FIELDS.iter().enumerate().find_map(|(at, row)| {
        let element = field_identity(id).checked_sub(field_identity(row.id))?;
        let bits = 8 << (row.id >> 32 & 0b11);
        (element < row.count && size_agrees(id, bits)).then_some((at, element))
    })
}

impl Td {
    /// The value of a field.
    pub(crate) fn read_field(&self, config: &TdConfig, id: u64) -> Result<u64, FieldError> {
        let (at, element) = find(id).ok_or(FieldError::Unknown)?;
        let row = &FIELDS[at];
        let debug = config.attributes.contains(TdAttributes::DEBUG);
        if row.readers == Readers::HostOfDebugTd && !debug {
            return Err(FieldError::NotReadable);
        }
        Ok((row.value)(self, config, element))
    }

    /// Writes the bits of `mask`; answers the value before.
    pub(crate) fn write_field(&self, id: u64, value: u64, mask: u64) -> Result<u64, FieldError> {
        let (at, _) = find(id).ok_or(FieldError::Unknown)?;
        let writable = FIELDS[at].id == field::TDCS_HP_LOCK_TIMEOUT;
        if !writable || mask == 0 {
            return Err(FieldError::NotWritable);
        }
        let old = self.hp_lock_timeout();
        let new = old & !mask | value & mask;
        if !HP_LOCK_TIMEOUTS.contains(&new) {
            return Err(FieldError::NotValid);
        }
        self.set_hp_lock_timeout(new);
        Ok(old)
    }
}

/// The id that follows `id` in the table; the first one when `id` is none.
pub(crate) fn next_field(id: Option<u64>) -> Option<u64> {
    let Some(id) = id else {
        return Some(FIELDS[0].id);
    };
    let (at, element) = find(id)?;
    let row = &FIELDS[at];
    if element + 1 < row.count {
        return Some(row.id + element + 1);
    }
    FIELDS.get(at + 1).map(|row| row.id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn going_through_the_table_visits_every_field_once() {
        let mut seen = std::collections::BTreeSet::new();
        let mut next = next_field(None);
        while let Some(id) = next {
            assert!(seen.insert(id), "{id:#x} twice");
            next = next_field(Some(id));
        }
        let count: u64 = FIELDS.iter().map(|row| row.count).sum();
        assert_eq!(seen.len() as u64, count);
        assert_eq!(next_field(Some(0x1234)), None);
    }

    #[test]
    fn ids_may_leave_out_size_context_and_the_non_architectural_bit() {
        for id in [
            0x9010_0002_0000_0004,
            0x1010_0002_0000_0004,
            0x1000_0000_0000_0004,
        ] {
            let (at, element) = find(id).unwrap();
            assert_eq!(
                (FIELDS[at].id, element),
                (field::TDCS_OP_STATE, 0),
                "{id:#x}"
            );
        }
        assert!(find(0x9010_0003_0000_0004).is_none(), "another size");
    }

    #[test]
    fn the_documented_list_is_the_table() {
        let documented = include_str!("../../../../docs/module-fields.md");
        for row in &FIELDS {
            let id = format!("`{:#018x}`", row.id);
            assert!(documented.contains(&id), "{id} is missing");
        }
    }
}

//! Metadata fields of TDR and TDCS: what TDH.MNG.RD shows.
//!
//! Source: TDX module ABI, metadata field identifiers: bit 63 non-architectural, 61:56 class,
//! 54:52 context, 33:32 element size (log2 of bytes), 31:0 field code. The host may leave context
//! and size zero, as KVM does.

use tdx_defs::field;

use super::Td;

const IDENTITY: u64 = 1 << 63 | 0x3F << 56 | 0xFFFF_FFFF;
/// 8-byte words of a measurement.
const MEASUREMENT_WORDS: u64 = 6;

/// The part of a field id that says which field it is.
pub(crate) fn identity(id: u64) -> u64 {
    id & IDENTITY
}

/// Whether the element size of an id, when it has one, is that of the field.
pub(crate) fn size_agrees(id: u64, bits: u32) -> bool {
    let size = id >> 32 & 0b11;
    size == 0 || 8 << size == u64::from(bits)
}

impl Td {
    /// The value of a TDR or TDCS field; `None` for an id without one.
    pub(crate) fn read_field(&self, id: u64) -> Option<u64> {
        let is = |known: u64| identity(id) == identity(known);
        let config = self.config()?;
        if let Some(word) = word_of(id, field::TDCS_MRTD) {
            return Some(self.measurement().mrtd_word(word));
        }
        Some(match () {
            () if is(field::TDR_CHLDCNT) => self.children(),
            () if is(field::TDR_LIFECYCLE_STATE) => u64::from(self.lifecycle().number()),
            () if is(field::TDR_NUM_TDCX) => u64::from(self.num_tdcx()),
            () if is(field::TDCS_OP_STATE) => u64::from(self.op_state().number()),
            () if is(field::TDCS_NUM_VCPUS) => u64::from(self.num_vcpus()),
            () if is(field::TDCS_NUM_ASSOC_VCPUS) => u64::from(self.num_assoc_vcpus()),
            () if is(field::TDCS_GPAW) => u64::from(config.wide_gpa),
            () if is(field::TDCS_EPTP) => config.eptp,
            () if is(field::TDCS_ATTRIBUTES) => config.attributes.bits(),
            () if is(field::TDCS_XFAM) => config.xfam,
            () if is(field::TDCS_MAX_VCPUS) => config.max_vcpus.into(),
            () if is(field::TDCS_CONFIG_FLAGS) => config.config_flags,
            () if is(field::TDCS_TSC_FREQUENCY) => config.tsc_frequency.into(),
            () if is(field::TDCS_TD_CTLS) => config.pending_ve_disable().into(),
            () if is(field::TDCS_TD_EPOCH) => self.epochs().current(),
            // Model: guest time is not simulated; the offset is zero and the multiplier is one
            // (48 fractional bits).
            () if is(field::TD_TSC_OFFSET) => 0,
            () if is(field::TD_TSC_MULTIPLIER) => 1 << 48,
            () => return None,
        })
    }
}

/// The word of a measurement that starts at field `first`.
fn word_of(id: u64, first: u64) -> Option<usize> {
    let word = identity(id).checked_sub(identity(first))?;
    (word < MEASUREMENT_WORDS).then(|| usize::try_from(word).ok())?
}

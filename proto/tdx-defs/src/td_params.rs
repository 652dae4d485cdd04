//! TD_PARAMS: the 1024 bytes behind RDX of TDH.MNG.INIT.
//!
//! Source: TDX module ABI, TD_PARAMS. Offsets in bytes: 0 ATTRIBUTES, 8 XFAM, 16 MAX_VCPUS (u16),
//! 18 NUM_L2_VMS, 19 MSR_CONFIG_CTLS, 24 EPTP_CONTROLS, 32 CONFIG_FLAGS, 40 TSC_FREQUENCY (u16,
//! 25 MHz units), 80 MRCONFIGID, 128 MROWNER, 176 MROWNERCONFIG (48 each),
//! 224 IA32_ARCH_CAPABILITIES_CONFIG, 256 CPUID values (16 each). The rest is reserved.
//!
//! The codec keeps reserved bytes: judging them is the module's work.

/// Size of the structure in bytes; also its alignment.
pub const TD_PARAMS_SIZE: usize = 1024;

const CPUID_AT: usize = 256;

bitflags::bitflags! {
    /// TD attributes (`TD_PARAMS.ATTRIBUTES`).
    #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
    pub struct TdAttributes: u64 {
        /// Off-TD debug: the host may read and write private memory.
        const DEBUG = 1 << 0;
        /// A touch of a pending page exits to the host instead of raising #VE.
        const SEPT_VE_DISABLE = 1 << 28;
        /// The TD may be migrated.
        const MIGRATABLE = 1 << 29;
        /// Supervisor protection keys.
        const PKS = 1 << 30;
        /// Performance monitoring.
        const PERFMON = 1 << 63;
        const _ = !0;
    }
}

/// Bytes that are not a TD_PARAMS.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("TD_PARAMS has {given} bytes, it takes {TD_PARAMS_SIZE}")]
pub struct TdParamsError {
    given: usize,
}

/// Four CPUID registers, in the module's order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CpuidValue {
    /// EAX, EBX, ECX, EDX.
    pub regs: [u32; 4],
}

/// TD_PARAMS with named fields over its raw bytes.
#[derive(Clone, PartialEq, Eq)]
pub struct TdParams {
    bytes: Box<[u8; TD_PARAMS_SIZE]>,
}

macro_rules! int_fields {
    ($($(#[$doc:meta])* $get:ident, $set:ident: $t:ty = $at:literal;)*) => {
        impl TdParams {
            $($(#[$doc])*
            pub fn $get(&self) -> $t {
                let mut raw = [0; size_of::<$t>()];
                raw.copy_from_slice(&self.bytes[$at..$at + size_of::<$t>()]);
                <$t>::from_le_bytes(raw)
            }
            #[doc = concat!("Sets [`Self::", stringify!($get), "`].")]
            #[must_use]
            pub fn $set(mut self, value: $t) -> Self {
                self.bytes[$at..$at + size_of::<$t>()].copy_from_slice(&value.to_le_bytes());
                self
            })*
        }
    };
}

int_fields! {
    /// ATTRIBUTES, see [`TdAttributes`].
    attributes, with_attributes: u64 = 0;
    /// XFAM: extended features that the TD may use.
    xfam, with_xfam: u64 = 8;
    /// MAX_VCPUS, 1 to 576.
    max_vcpus, with_max_vcpus: u16 = 16;
    /// NUM_L2_VMS, 0 to 3.
    num_l2_vms, with_num_l2_vms: u8 = 18;
    /// MSR_CONFIG_CTLS.
    msr_config_ctls, with_msr_config_ctls: u8 = 19;
    /// EPTP_CONTROLS: 0x1E for 4-level, 0x26 for 5-level Secure EPT.
    eptp_controls, with_eptp_controls: u64 = 24;
    /// CONFIG_FLAGS: bit 0 is GPAW.
    config_flags, with_config_flags: u64 = 32;
    /// TSC_FREQUENCY in units of 25 MHz.
    tsc_frequency, with_tsc_frequency: u16 = 40;
    /// IA32_ARCH_CAPABILITIES_CONFIG.
    arch_capabilities, with_arch_capabilities: u64 = 224;
}

impl Default for TdParams {
    fn default() -> Self {
        Self {
            bytes: Box::new([0; TD_PARAMS_SIZE]),
        }
    }
}

impl TdParams {
    /// Reads the structure; shorter input is zero-extended, longer input is refused.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, TdParamsError> {
        if bytes.len() > TD_PARAMS_SIZE {
            return Err(TdParamsError { given: bytes.len() });
        }
        let mut params = Self::default();
        params.bytes[..bytes.len()].copy_from_slice(bytes);
        Ok(params)
    }

    /// The raw bytes.
    pub fn as_bytes(&self) -> &[u8; TD_PARAMS_SIZE] {
        &self.bytes
    }

    /// CPUID value number `index`, while it lies inside the structure.
    pub fn cpuid(&self, index: usize) -> Option<CpuidValue> {
        let raw = self
            .bytes
            .get(CPUID_AT + index * 16..CPUID_AT + index * 16 + 16)?;
        let mut value = CpuidValue::default();
        for (reg, word) in value.regs.iter_mut().zip(raw.chunks_exact(4)) {
            *reg = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
        }
        Some(value)
    }
}

impl std::fmt::Debug for TdParams {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TdParams")
            .field(
                "attributes",
                &TdAttributes::from_bits_retain(self.attributes()),
            )
            .field("xfam", &format_args!("{:#x}", self.xfam()))
            .field("max_vcpus", &self.max_vcpus())
            .field(
                "eptp_controls",
                &format_args!("{:#x}", self.eptp_controls()),
            )
            .field("config_flags", &format_args!("{:#x}", self.config_flags()))
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_at_their_offsets() {
        let params = TdParams::default()
            .with_attributes(TdAttributes::SEPT_VE_DISABLE.bits())
            .with_xfam(3)
            .with_max_vcpus(2)
            .with_eptp_controls(0x1E)
            .with_config_flags(1)
            .with_tsc_frequency(100);
        let bytes = params.as_bytes();
        for (at, byte) in [(3, 0x10), (8, 3), (16, 2), (24, 0x1E), (32, 1), (40, 100)] {
            assert_eq!(bytes[at], byte, "offset {at}");
        }
        assert_eq!(TdParams::from_bytes(bytes).unwrap(), params);
        assert!(TdParams::from_bytes(&[0; 1025]).is_err());
        assert!(params.cpuid(47).is_some() && params.cpuid(48).is_none());
    }
}

//! What TDH.MNG.INIT fixes for the life of a TD, and what follows from it for guest addresses.
//!
//! Source: TDX module source, TDCS execution controls; helpers.c `check_gpa_validity`.

use tdx_defs::{Gpa, TdAttributes};

/// Configuration of a TD.
#[derive(Debug, Clone)]
pub(crate) struct TdConfig {
    pub(crate) attributes: TdAttributes,
    pub(crate) xfam: u64,
    pub(crate) max_vcpus: u16,
    pub(crate) num_l2_vms: u8,
    /// CONFIG_FLAGS.GPAW: the SHARED bit is bit 51 instead of bit 47.
    pub(crate) wide_gpa: bool,
    /// CONFIG_FLAGS.NO_RBP_MOD: RBP is not passed between guest and host.
    pub(crate) keeps_rbp: bool,
    pub(crate) config_flags: u64,
    pub(crate) tsc_frequency: u16,
    pub(crate) eptp: u64,
    /// Level of the entries in the Secure EPT root: 3 or 4.
    pub(crate) root_level: u8,
}

impl TdConfig {
    /// Width of a guest address in bits: 48 or 52.
    pub(crate) fn gpa_width(&self) -> u32 {
        if self.wide_gpa { 52 } else { 48 }
    }

    /// Whether the SHARED bit is set.
    pub(crate) fn is_shared(&self, gpa: Gpa) -> bool {
        gpa.get() & self.shared_bit() != 0
    }

    /// Bits that a guest address cannot have: above the TD's address width, or above the bound
    /// that the platform sets. The SHARED bit is not one of them.
    pub(crate) fn missing_bits(&self, platform_maxpa: Option<u8>) -> u64 {
        let width = self.gpa_width();
        let limit = platform_maxpa.map_or(width, |maxpa| width.min(u32::from(maxpa)));
        (u64::MAX << limit) & !self.shared_bit()
    }

    /// Bits that no private address has.
    pub(crate) fn not_private(&self, platform_maxpa: Option<u8>) -> u64 {
        self.missing_bits(platform_maxpa) | self.shared_bit()
    }

    fn shared_bit(&self) -> u64 {
        1 << (self.gpa_width() - 1)
    }

    /// TD_CTLS.PENDING_VE_DISABLE: a touch of a pending page exits to the host.
    pub(crate) fn pending_ve_disable(&self) -> bool {
        self.attributes.contains(TdAttributes::SEPT_VE_DISABLE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_private_shared_or_too_wide() {
        let narrow = TdConfig {
            attributes: TdAttributes::empty(),
            xfam: 3,
            max_vcpus: 1,
            num_l2_vms: 0,
            wide_gpa: false,
            keeps_rbp: false,
            config_flags: 0,
            tsc_frequency: 100,
            eptp: 0x1E,
            root_level: 3,
        };
        let wide = TdConfig {
            wide_gpa: true,
            ..narrow.clone()
        };
        for (config, maxpa, gpa, private, shared, too_wide) in [
            (&narrow, None, 0x7FFF_FFFF_F000, true, false, false),
            (&narrow, None, 1 << 47, false, true, false),
            (&narrow, None, 1 << 48, false, false, true),
            (&wide, None, 1 << 47, true, false, false),
            (&wide, None, 1 << 51, false, true, false),
            (&wide, Some(46), 1 << 47, false, false, true),
            (&wide, Some(46), 1 << 51, false, true, false),
        ] {
            let gpa = Gpa::new(gpa);
            let is_private = gpa.get() & config.not_private(maxpa) == 0;
            let is_too_wide = gpa.get() & config.missing_bits(maxpa) != 0;
            assert_eq!(is_private, private, "{gpa}");
            assert_eq!(config.is_shared(gpa), shared, "{gpa}");
            assert_eq!(is_too_wide, too_wide, "{gpa}");
        }
    }
}

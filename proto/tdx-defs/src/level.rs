//! Paging levels: KVM counts from one, TDX from zero. The conversion is here and nowhere else.

use std::fmt;

/// A level number outside the range of its type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("level {value} is outside {min}..={max}")]
pub struct LevelError {
    /// The number given.
    pub value: u64,
    /// Lowest legal level.
    pub min: u8,
    /// Highest legal level.
    pub max: u8,
}

/// KVM's paging level: 1 = 4 KiB entries, 2 = 2 MiB, 3 = 1 GiB, 4 = 512 GiB, 5 = 256 TiB.
///
/// A table "of level L" holds entries of level L; the entry that points to it has level L + 1.
/// Source: `enum pg_level`, arch/x86/include/asm/pgtable_types.h.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Level(u8);

impl Level {
    /// 4 KiB, `PG_LEVEL_4K`.
    pub const L4K: Self = Self(1);
    /// 2 MiB, `PG_LEVEL_2M`.
    pub const L2M: Self = Self(2);
    /// 1 GiB, `PG_LEVEL_1G`.
    pub const L1G: Self = Self(3);
    /// 512 GiB, `PG_LEVEL_512G`: the root level of a 4-level tree.
    pub const L512G: Self = Self(4);
    /// 256 TiB, `PG_LEVEL_256T`: the root level of a 5-level tree.
    pub const L256T: Self = Self(5);

    /// A level from KVM's number, 1 to 5.
    pub fn new(level: u8) -> Result<Self, LevelError> {
        if (1..=5).contains(&level) {
            Ok(Self(level))
        } else {
            Err(LevelError {
                value: level.into(),
                min: 1,
                max: 5,
            })
        }
    }

    /// KVM's number, 1 to 5.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// 4 KiB frames that one entry of this level covers.
    pub const fn pages(self) -> u64 {
        1 << (9 * (self.0 - 1))
    }

    /// Bytes that one entry of this level covers.
    pub const fn bytes(self) -> u64 {
        self.pages() << crate::PAGE_SHIFT
    }

    /// The level of the tables that entries of this level point to.
    pub const fn child(self) -> Option<Self> {
        if self.0 > 1 {
            Some(Self(self.0 - 1))
        } else {
            None
        }
    }

    /// The level of the entry that points to a table of this level.
    pub const fn parent(self) -> Option<Self> {
        if self.0 < 5 {
            Some(Self(self.0 + 1))
        } else {
            None
        }
    }

    /// The same level as the TDX module counts.
    pub const fn to_tdx(self) -> TdxLevel {
        TdxLevel(self.0 - 1)
    }
}

impl fmt::Debug for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Level({})", self.0)
    }
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(["4K", "2M", "1G", "512G", "256T"][usize::from(self.0 - 1)])
    }
}

/// The TDX module's Secure EPT level: 0 = 4 KiB entries … 4 = 256 TiB entries.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TdxLevel(u8);

impl TdxLevel {
    /// A level from the module's number, 0 to 4.
    pub fn new(level: u8) -> Result<Self, LevelError> {
        if level <= 4 {
            Ok(Self(level))
        } else {
            Err(LevelError {
                value: level.into(),
                min: 0,
                max: 4,
            })
        }
    }

    /// The module's number, 0 to 4.
    pub const fn get(self) -> u8 {
        self.0
    }

    /// The same level as KVM counts.
    pub const fn to_kvm(self) -> Level {
        Level(self.0 + 1)
    }

    /// Bytes that one entry of this level covers.
    pub const fn bytes(self) -> u64 {
        self.to_kvm().bytes()
    }
}

impl fmt::Debug for TdxLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TdxLevel({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kvm_and_tdx_levels_name_the_same_entries() {
        for (kvm, tdx, bytes) in [
            (1, 0, 1 << 12),
            (2, 1, 1 << 21),
            (3, 2, 1 << 30),
            (4, 3, 1 << 39),
            (5, 4, 1 << 48),
        ] {
            let level = Level::new(kvm).unwrap();
            assert_eq!(level.to_tdx().get(), tdx);
            assert_eq!(level.to_tdx().to_kvm(), level);
            assert_eq!(level.bytes(), bytes);
        }
    }

    #[test]
    fn levels_outside_the_range_are_refused() {
        for bad in [0, 6, 255] {
            assert!(Level::new(bad).is_err(), "{bad}");
        }
        assert!(TdxLevel::new(5).is_err());
    }
}

//! Key ownership table: who has which private key id, and which packages still hold its lines.
//!
//! Source: TDX module source, key ownership table of the global data; TDH.PHYMEM.CACHE.WB.

use std::sync::atomic::{AtomicU8, AtomicU32, Ordering};

use crate::locks::Lock;
use crate::platform::PlatformConfig;

/// State of a key id.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum HkidState {
    /// Nobody's.
    Free = 0,
    /// A TD's, by TDH.MNG.CREATE.
    Assigned = 1,
    /// Its TD no longer runs; caches may hold lines.
    Flushed = 2,
    /// The module's own.
    Reserved = 3,
}

#[derive(Debug)]
struct KotEntry {
    state: AtomicU8,
    /// Packages whose caches still have to be written back.
    write_back: AtomicU32,
}

/// The table, by key id.
#[derive(Debug)]
pub(crate) struct Kot {
    /// KOT: exclusive to change entries, shared to write caches back.
    pub(crate) lock: Lock,
    first: u16,
    entries: Box<[KotEntry]>,
}

impl Kot {
    pub(crate) fn new(config: &PlatformConfig) -> Self {
        let entry = |hkid| {
            let own = hkid == config.global_hkid;
            let state = if own {
                HkidState::Reserved
            } else {
                HkidState::Free
            };
            KotEntry {
                state: AtomicU8::new(state as u8),
                write_back: AtomicU32::new(0),
            }
        };
        let hkids = (config.hkid_start..=u16::MAX).take(config.hkid_count.into());
        Self {
            lock: Lock::default(),
            first: config.hkid_start,
            entries: hkids.map(entry).collect(),
        }
    }

    fn entry(&self, hkid: u16) -> Option<&KotEntry> {
        self.entries.get(usize::from(hkid.checked_sub(self.first)?))
    }

    /// Whether a key id is in a state.
    pub(crate) fn is(&self, hkid: u16, state: HkidState) -> bool {
        self.entry(hkid)
            .is_some_and(|entry| entry.state.load(Ordering::Relaxed) == state as u8)
    }

    /// Changes the state of a key id. The caller holds the lock exclusively.
    pub(crate) fn set(&self, hkid: u16, state: HkidState) {
        if let Some(entry) = self.entry(hkid) {
            entry.state.store(state as u8, Ordering::Relaxed);
        }
    }

    /// Marks a key id flushed: `packages` are to be written back.
    pub(crate) fn flush(&self, hkid: u16, packages: u32) {
        if let Some(entry) = self.entry(hkid) {
            entry.write_back.store(packages, Ordering::Relaxed);
            entry
                .state
                .store(HkidState::Flushed as u8, Ordering::Relaxed);
        }
    }

    /// Packages that have not been written back for a key id.
    pub(crate) fn write_back_left(&self, hkid: u16) -> u32 {
        self.entry(hkid)
            .map_or(0, |entry| entry.write_back.load(Ordering::Relaxed))
    }

    /// The key ids that are flushed now.
    pub(crate) fn flushed(&self) -> Vec<u16> {
        let hkids = self.first..=u16::MAX;
        let flushed =
            |entry: &KotEntry| entry.state.load(Ordering::Relaxed) == HkidState::Flushed as u8;
        hkids
            .zip(&self.entries)
            .filter(|(_, entry)| flushed(entry))
            .map(|(hkid, _)| hkid)
            .collect()
    }

    /// A package's caches hold no line of `hkid` any more.
    pub(crate) fn written_back(&self, hkid: u16, package: u32) {
        if let Some(entry) = self.entry(hkid) {
            entry
                .write_back
                .fetch_and(!(1 << package), Ordering::Relaxed);
        }
    }

    /// Key ids of TDs: assigned or flushed.
    pub(crate) fn in_use(&self) -> u32 {
        let mut count = 0;
        for entry in &self.entries {
            let state = entry.state.load(Ordering::Relaxed);
            let in_use = [HkidState::Assigned as u8, HkidState::Flushed as u8].contains(&state);
            count += u32::from(in_use);
        }
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_id_is_written_back_package_by_package() {
        let kot = Kot::new(&PlatformConfig::conformance());
        assert!(kot.is(32, HkidState::Reserved));
        assert_eq!(kot.in_use(), 0);
        kot.set(33, HkidState::Assigned);
        kot.flush(33, 0b11);
        assert_eq!((kot.in_use(), kot.flushed()), (1, vec![33]));
        kot.written_back(33, 1);
        assert_eq!(kot.write_back_left(33), 0b01);
        assert!(!kot.is(31, HkidState::Free), "not private");
    }
}

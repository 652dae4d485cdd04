//! What the host can do to physical memory without the module: read and write it.
//!
//! Source: memory encryption and integrity of TDX: the TD-owner bit of each cache line, and what
//! software outside of a TD reads of a line that has it.
//!
//! Model: integrity is kept by the 4 KiB page, not by the cache line. A line that the module
//! writes as a whole, when a page is accepted or added, is good again; so is the page here.

use bytes::Bytes;
use tdx_defs::{Hpa, PageType};

use crate::Module;
use crate::locks::LockMode;
use crate::memory::{Contents, PAGE, offset_in_page};
use crate::pamt::{PageSize, PamtEntry};

/// What the host reads of a private page, byte by byte.
///
/// Model: hardware answers such a read with a constant, whatever the page holds, or with
/// ciphertext where a line lost its owner bit. A pattern that no guest of a test writes shows that
/// neither plaintext nor an old value came through.
pub const PRIVATE_PATTERN: u8 = 0xA5;

/// Attempts to catch a page between two calls of the module.
const ATTEMPTS: u32 = 64;

impl Module {
    /// The host writes to physical memory. At most [`crate::HOST_PAGES`] pages are kept.
    ///
    /// A write to a private page spoils it: the next access of the guest to it is a machine check,
    /// see [`crate::Violation::MachineCheck`]. A write to a control page or a Secure EPT page makes
    /// its TD fatal at once.
    pub fn write_host_memory(&self, hpa: Hpa, bytes: &[u8]) {
        let mut rest = bytes;
        let mut at = hpa;
        while !rest.is_empty() {
            let in_page = PAGE - offset_in_page(at.get());
            let (now, later) = rest.split_at(rest.len().min(in_page));
            match self.pamt.used_page(at) {
                Some((entry, size)) => self.spoil(at, entry, size),
                None => self.host.write(at, now),
            }
            rest = later;
            match at.checked_add(now.len() as u64) {
                Some(next) => at = next,
                None => break,
            }
        }
    }

    /// The host writes a page as a whole: the page at `hpa`, and [`PAGE`] bytes.
    pub(crate) fn write_host_page(&self, hpa: Hpa, page: Bytes) {
        match self.pamt.used_page(hpa) {
            Some((entry, size)) => self.spoil(hpa, entry, size),
            None => self.host.write_page(hpa.frame(), page),
        }
    }

    /// The host reads physical memory: what it wrote itself, zero where it wrote nothing, and
    /// [`PRIVATE_PATTERN`] from every page that belongs to a TD.
    pub fn read_host_memory(&self, hpa: Hpa, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut at = hpa;
        let mut rest = &mut bytes[..];
        while !rest.is_empty() {
            let in_page = PAGE - offset_in_page(at.get());
            let (now, later) = rest.split_at_mut(rest.len().min(in_page));
            self.read_host_page(at, now);
            match at.checked_add(now.len() as u64) {
                Some(next) => at = next,
                None => break,
            }
            rest = later;
        }
        bytes
    }

    /// Whether a page belongs to a TD, so that the host does not see what is in it.
    pub fn is_private(&self, hpa: Hpa) -> bool {
        self.pamt.used_page(hpa).is_some()
    }

    /// What a page holds for the host, or for the module on its behalf: `None` where all is zero.
    pub(crate) fn host_page(&self, page: Hpa) -> Option<Contents> {
        if self.pamt.used_page(page).is_some() {
            return Some(Contents::Own(Box::new([PRIVATE_PATTERN; PAGE])));
        }
        self.host.page(page.frame())
    }

    /// Reads bytes that lie in one page, as the host.
    pub(crate) fn read_host_page(&self, hpa: Hpa, bytes: &mut [u8]) {
        if self.pamt.used_page(hpa).is_some() {
            bytes.fill(PRIVATE_PATTERN);
        } else {
            self.host.read(hpa, bytes);
        }
    }

    /// A page that belongs to a TD is written from outside.
    fn spoil(&self, hpa: Hpa, entry: &PamtEntry, size: PageSize) {
        // While the entry is held, the page neither comes nor goes. If calls of the module keep it
        // busy all the time, the write is one that came before them.
        let held = (0..ATTEMPTS).find_map(|_| entry.try_lock(LockMode::Shared).ok());
        if held.is_none() || self.pamt.used_page(hpa).is_none_or(|(_, now)| now != size) {
            return;
        }
        match entry.page_type() {
            PageType::REG => {
                entry.set_content(true);
                self.private.poison(hpa.frame());
            }
            page_type => {
                let is_root = page_type == PageType::TDR;
                let tdr = if is_root {
                    hpa.frame().base()
                } else {
                    entry.owner()
                };
                if let Some(td) = self.tds.get(tdr) {
                    td.set_fatal();
                }
            }
        }
    }
}

//! What a populated TD costs in memory: resident bytes of both processes before, while and after it
//! is there.
//!
//! Only the first TD of a pair of processes says what a page costs. Later ones live in memory that
//! the processes have kept: the module keeps the PAMT of pages that were in use once.

use serde_json::{Value, json};

use crate::local::ProcessMemory;

/// Resident memory around the first TD.
#[derive(Debug, Clone, Copy)]
pub(super) struct Footprint {
    /// With the TD and none of its pages.
    pub(super) empty: ProcessMemory,
    /// With all of its pages.
    pub(super) full: ProcessMemory,
    /// When the TD is gone.
    pub(super) gone: ProcessMemory,
}

impl Footprint {
    /// Bytes for each of `pages`: MMU service and module.
    pub(super) fn per_page(&self, pages: u64) -> [f64; 2] {
        [
            per(grown(self.empty.mmu, self.full.mmu), pages),
            per(grown(self.empty.module, self.full.module), pages),
        ]
    }

    /// What part of that each has given back.
    pub(super) fn given_back(&self) -> [f64; 2] {
        let part = |empty, full, gone| per(grown(gone, full), grown(empty, full));
        [
            part(self.empty.mmu, self.full.mmu, self.gone.mmu),
            part(self.empty.module, self.full.module, self.gone.module),
        ]
    }

    /// As an object.
    pub(super) fn to_json(self, pages: u64) -> Value {
        let ([mmu, module], [mmu_back, module_back]) = (self.per_page(pages), self.given_back());
        json!({
            "bytes_per_page": { "mmu": mmu, "module": module },
            "given_back": { "mmu": mmu_back, "module": module_back },
        })
    }

    /// As a sentence.
    pub(super) fn to_text(self, pages: u64) -> String {
        let ([mmu, module], [mmu_back, module_back]) = (self.per_page(pages), self.given_back());
        format!(
            "memory of a page: {mmu:.2} bytes in the MMU service, {module:.2} in the module; \
             given back with the TD: {:.0} % and {:.0} %",
            mmu_back * 100.0,
            module_back * 100.0
        )
    }
}

fn grown(from: u64, to: u64) -> u64 {
    to.saturating_sub(from)
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of memory are far below 2^52"
)]
fn per(bytes: u64, count: u64) -> f64 {
    bytes as f64 / count.max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_share_what_came_with_them() {
        let at = |mmu, module| ProcessMemory { mmu, module };
        let footprint = Footprint {
            empty: at(1000, 2000),
            full: at(1800, 4400),
            gone: at(1200, 4400),
        };
        assert_eq!(footprint.per_page(100), [8.0, 24.0]);
        assert_eq!(footprint.given_back(), [0.75, 0.0]);
        assert!(
            footprint
                .to_text(100)
                .starts_with("memory of a page: 8.00 bytes in the MMU service, 24.00")
        );
    }
}

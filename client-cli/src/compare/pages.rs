//! Which page of the recording is which page of the model.
//!
//! Neither numbers mean anything to the other side; what counts is that the same page stays the
//! same page. A page gets its counterpart where it first appears, and a new one where an event says
//! that an entry leads to it from now on: both sides use freed memory again when they like.

use std::collections::BTreeMap;

use super::seen::Page;

/// Counterparts so far.
#[derive(Debug, Default)]
pub(super) struct Pages {
    to_model: BTreeMap<u64, u64>,
    to_recorded: BTreeMap<u64, u64>,
}

impl Pages {
    /// Takes a page of each side as the same. `false` when they are known to be others.
    pub(super) fn pair(&mut self, recorded: Page, model: Page) -> bool {
        let (r, m) = (recorded.frame, model.frame);
        let known = (self.to_model.get(&r), self.to_recorded.get(&m));
        match (known, recorded.defines) {
            ((Some(&model), Some(&recorded)), _) if model == m && recorded == r => true,
            (_, Some(span)) => {
                Self::forget(&mut self.to_model, &mut self.to_recorded, r, span);
                Self::forget(&mut self.to_recorded, &mut self.to_model, m, span);
                self.bind(r, m);
                true
            }
            ((None, None), None) => {
                self.bind(r, m);
                true
            }
            _ => false,
        }
    }

    fn bind(&mut self, recorded: u64, model: u64) {
        self.to_model.insert(recorded, model);
        self.to_recorded.insert(model, recorded);
    }

    fn forget(from: &mut BTreeMap<u64, u64>, back: &mut BTreeMap<u64, u64>, first: u64, span: u64) {
        let gone: Vec<(u64, u64)> = from
            .range(first..first.saturating_add(span))
            .map(|(&page, &other)| (page, other))
            .collect();
        for (page, other) in gone {
            from.remove(&page);
            back.remove(&other);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_keeps_its_counterpart_until_it_is_used_anew() {
        let mut pages = Pages::default();
        let new = |frame| Page {
            frame,
            defines: Some(1),
        };
        let huge = |frame| Page {
            frame,
            defines: Some(512),
        };
        let old = |frame| Page {
            frame,
            defines: None,
        };
        for (recorded, model, same) in [
            (new(1), new(100), true),
            (old(1), old(100), true),
            (old(1), old(101), false),
            (old(2), old(100), false),
            (old(3), old(103), true),
            // Freed and used again by one side.
            (new(1), new(200), true),
            (old(1), old(200), true),
            (old(1), old(100), false),
            // Children of a huge page have no event of their own.
            (huge(0), huge(0x400), true),
            (old(1), old(0x401), true),
            (old(1), old(0x402), false),
        ] {
            assert_eq!(pages.pair(recorded, model), same, "{recorded:?} {model:?}");
        }
    }
}

//! From the HPA of a TDR or TDVPR to the object that it stands for.
//!
//! Readers of one processor share a shard of the lock with few others and write nothing that
//! other processors read, so looking up scales. Entries come and go with the PAMT entry of the
//! page, whose lock the caller holds.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};

use crossbeam_utils::sync::ShardedLock;
use tdx_defs::Hpa;

/// Objects by the page that holds their root.
#[derive(Debug)]
pub(crate) struct Registry<T> {
    by_page: ShardedLock<HashMap<Hpa, Arc<T>>>,
}

impl<T> Default for Registry<T> {
    fn default() -> Self {
        Self {
            by_page: ShardedLock::new(HashMap::new()),
        }
    }
}

// Inserting and removing are single steps, so a map whose writer panicked is whole.
impl<T> Registry<T> {
    /// The object of a page.
    pub(crate) fn get(&self, page: Hpa) -> Option<Arc<T>> {
        self.by_page
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&page)
            .cloned()
    }

    /// The page holds `object` from now on.
    pub(crate) fn insert(&self, page: Hpa, object: T) {
        let mut map = self.by_page.write().unwrap_or_else(PoisonError::into_inner);
        map.insert(page, Arc::new(object));
    }

    /// The page holds nothing any more.
    pub(crate) fn remove(&self, page: Hpa) -> Option<Arc<T>> {
        self.by_page
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&page)
    }

    /// Every object, ascending by page.
    pub(crate) fn all(&self) -> Vec<Arc<T>> {
        let map = self.by_page.read().unwrap_or_else(PoisonError::into_inner);
        let mut all: Vec<_> = map
            .iter()
            .map(|(page, object)| (*page, object.clone()))
            .collect();
        all.sort_by_key(|(page, _)| *page);
        all.into_iter().map(|(_, object)| object).collect()
    }
}

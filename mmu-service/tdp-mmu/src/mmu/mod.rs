//! The TDP MMU: page tables in an arena, roots, walks, and the protocol by which entries change.
//!
//! Source: arch/x86/kvm/mmu/tdp_mmu.c. Nothing in here talks to the module: changes of a mirror
//! tree are values ([`mirror::Unit`], [`removal::ExternalOp`]) that the TDX layer carries out.

pub(crate) mod arena;
pub(crate) mod change;
pub(crate) mod direct;
pub(crate) mod fast;
pub(crate) mod huge;
pub(crate) mod iter;
pub(crate) mod layout;
pub(crate) mod lock;
pub(crate) mod mirror;
pub(crate) mod nx;
pub(crate) mod protect;
pub(crate) mod removal;
pub(crate) mod role;
pub(crate) mod roots;
pub(crate) mod spte;

use std::collections::VecDeque;

use crossbeam_utils::CachePadded;
use tdx_defs::{Level, Pfn};

use crate::bugs::Bugs;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Mutex, lock};
use crate::trace::{Event, Tracer};
use arena::{Arena, TableId};
use layout::Layout;
use lock::MmuLock;

/// `KVM_ARCH_NR_OBJS_PER_MEMORY_CACHE` and the refill threshold: a 5-level path needs 4 tables.
const CACHE_SIZE: usize = 40;
const CACHE_MIN: usize = 5;

/// Page tables of one VM.
pub(crate) struct Mmu {
    pub(crate) layout: Layout,
    /// `mmu_lock`.
    pub(crate) lock: MmuLock,
    pub(crate) arena: Arena,
    /// `tdp_mmu_roots` under `tdp_mmu_pages_lock`, newest first.
    roots: Mutex<Vec<TableId>>,
    /// Pages for the module's tables, topped up before a fault walks
    /// (`mmu_external_spt_cache`; one cache a VM here, a table is needed once in 512 pages).
    external: Mutex<Vec<Pfn>>,
    /// How many there are, to look at without the lock.
    external_left: AtomicUsize,
    /// Present leaves by level, both trees.
    pages: CachePadded<[AtomicU64; 3]>,
    /// `possible_nx_huge_pages` under `tdp_mmu_pages_lock`, oldest first.
    nx_pages: Mutex<VecDeque<TableId>>,
    pub(crate) bugs: Bugs,
    pub(crate) tracer: Tracer,
}

impl Mmu {
    pub(crate) fn new(layout: impl Into<Layout>) -> Self {
        Self {
            layout: layout.into(),
            lock: MmuLock::default(),
            arena: Arena::default(),
            roots: Mutex::new(Vec::new()),
            external: Mutex::new(Vec::new()),
            external_left: AtomicUsize::new(0),
            pages: CachePadded::new([const { AtomicU64::new(0) }; 3]),
            nx_pages: Mutex::default(),
            bugs: Bugs::default(),
            tracer: Tracer::default(),
        }
    }

    /// The tracepoint kvm_mmu_get_page, of a new table.
    pub(crate) fn trace_get_page(&self, table: TableId) {
        self.tracer.emit(|| Event::GetPage {
            page: self.page_text(table),
            created: true,
        });
    }

    /// kvm_update_page_stats.
    pub(crate) fn account_pages(&self, level: Level, delta: i64) {
        if let Some(counter) = self.pages.get(usize::from(level.get()) - 1) {
            if delta >= 0 {
                counter.fetch_add(delta.unsigned_abs(), Ordering::Relaxed);
            } else {
                counter.fetch_sub(delta.unsigned_abs(), Ordering::Relaxed);
            }
        }
    }

    /// pages_4k, pages_2m, pages_1g.
    pub(crate) fn pages(&self) -> [u64; 3] {
        [0, 1, 2].map(|level: usize| self.pages[level].load(Ordering::Relaxed))
    }

    pub(crate) fn take_external(&self) -> Option<Pfn> {
        let mut cache = lock(&self.external);
        let page = cache.pop();
        self.external_left.store(cache.len(), Ordering::Relaxed);
        page
    }

    pub(crate) fn give_external(&self, page: Pfn) {
        let mut cache = lock(&self.external);
        cache.push(page);
        self.external_left.store(cache.len(), Ordering::Relaxed);
    }

    /// mmu_topup_memory_caches: below 5 pages, fills up to 40 from `alloc`.
    pub(crate) fn top_up_external(&self, mut alloc: impl FnMut() -> Option<Pfn>) -> bool {
        // Every fault asks, and one in 512 takes a page: what it reads here hardly ever changes.
        if self.external_left.load(Ordering::Relaxed) >= CACHE_MIN {
            return true;
        }
        let mut cache = lock(&self.external);
        let mut filled = true;
        if cache.len() < CACHE_MIN {
            while cache.len() < CACHE_SIZE {
                match alloc() {
                    Some(page) => cache.push(page),
                    None => {
                        filled = cache.len() >= CACHE_MIN;
                        break;
                    }
                }
            }
        }
        self.external_left.store(cache.len(), Ordering::Relaxed);
        filled
    }

    /// Empties the cache at the end of the VM.
    pub(crate) fn drain_external(&self) -> Vec<Pfn> {
        let mut cache = lock(&self.external);
        self.external_left.store(0, Ordering::Relaxed);
        std::mem::take(&mut *cache)
    }
}

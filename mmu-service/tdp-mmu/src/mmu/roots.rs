//! Root tables: kinds, matching, reference counts, life.
//!
//! Source: arch/x86/kvm/mmu/tdp_mmu.h, `enum kvm_tdp_mmu_root_types`,
//! `kvm_gfn_range_filter_to_root_types()`, `tdp_mmu_get_root_for_fault()`; tdp_mmu.c,
//! `tdp_mmu_root_match()`, `kvm_tdp_mmu_alloc_root()`, `kvm_tdp_mmu_put_root()`,
//! `kvm_tdp_mmu_invalidate_roots()`.
//!
//! Invariants
//! - R1  A root's count is 1 for the TDP MMU, until it is invalidated and zapped, plus one for
//!   each vCPU that has it loaded.
//! - R2  A mirror root is never invalidated before the VM ends: the module's tables behind it
//!   cannot be rebuilt from memory slots.

use tdx_defs::Gfn;

use super::Mmu;
use super::arena::TableId;
use super::role::{Role, RootKind};
use crate::bugs::Check;
use crate::sync::atomic::Ordering;
use crate::sync::lock;

/// `enum kvm_tdp_mmu_root_types`, a bit set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RootTypes(u8);

impl RootTypes {
    pub(crate) const NONE: Self = Self(0);
    pub(crate) const INVALID: Self = Self(1);
    pub(crate) const DIRECT: Self = Self(2);
    pub(crate) const MIRROR: Self = Self(4);
    /// Both kinds, valid ones only.
    pub(crate) const VALID: Self = Self(6);
    #[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
    pub(crate) const ALL: Self = Self(7);

    pub(crate) const fn with(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }

    const fn without(self, other: Self) -> Self {
        Self(self.0 & !other.0)
    }

    const fn has(self, other: Self) -> bool {
        self.0 & other.0 != 0
    }
}

/// `enum kvm_gfn_range_filter`: which kind of mappings an operation is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Filter(pub(crate) u8);

impl Filter {
    pub(crate) const SHARED: Self = Self(1);
    pub(crate) const PRIVATE: Self = Self(2);
    pub(crate) const BOTH: Self = Self(3);
}

impl Mmu {
    /// kvm_gfn_range_filter_to_root_types. Without mirrored TDP everything is direct.
    pub(crate) fn filter_to_root_types(&self, filter: Filter) -> RootTypes {
        if !self.layout.is_td() {
            return RootTypes::DIRECT;
        }
        let mut types = RootTypes::NONE;
        if filter.0 & Filter::SHARED.0 != 0 {
            types = types.with(RootTypes::DIRECT);
        }
        if filter.0 & Filter::PRIVATE.0 != 0 {
            types = types.with(RootTypes::MIRROR);
        }
        if types == RootTypes::NONE {
            self.bugs
                .warn(Check::B3, || "empty attribute filter".into());
        }
        types
    }

    /// tdp_mmu_root_match.
    pub(crate) fn root_match(&self, root: TableId, types: RootTypes) -> bool {
        if !types.has(RootTypes::VALID) {
            self.bugs
                .warn(Check::B2, || format!("{types:?} names no kind of root"));
            return false;
        }
        let role = self.arena.header(root).role();
        if role.is_invalid() && !types.has(RootTypes::INVALID) {
            return false;
        }
        match role.kind() {
            RootKind::Direct => types.has(RootTypes::DIRECT),
            RootKind::Mirror => types.has(RootTypes::MIRROR),
        }
    }

    /// The roots that match, newest first. The caller holds mmu_lock, so none goes away.
    pub(crate) fn roots(&self, types: RootTypes) -> Vec<TableId> {
        let roots = lock(&self.roots).clone();
        roots
            .into_iter()
            .filter(|&root| self.root_match(root, types))
            .collect()
    }

    /// The valid root of a kind, if one was made.
    pub(crate) fn root_of(&self, kind: RootKind) -> Option<TableId> {
        let types = match kind {
            RootKind::Direct => RootTypes::DIRECT,
            RootKind::Mirror => RootTypes::MIRROR,
        };
        self.roots(types).first().copied()
    }

    /// kvm_tdp_mmu_alloc_root: a reference on the valid root of this kind, made when there is none.
    pub(crate) fn alloc_root(&self, kind: RootKind) -> Option<TableId> {
        let role = Role::root(self.layout.root_level(), kind);
        let mut roots = lock(&self.roots);
        let same = roots.iter().copied().find(|&root| {
            // The wanted word has invalid = 0, so an equal word means a valid root.
            self.arena.header(root).role() == role && self.get_root(root)
        });
        if same.is_some() {
            return same;
        }
        let root = self.arena.alloc(role, Gfn::new(0), None)?;
        // Before its count is set, as the kernel does.
        self.trace_get_page(root);
        // One for the caller, one for the TDP MMU itself.
        self.arena
            .header(root)
            .root_count
            .store(2, Ordering::SeqCst);
        roots.insert(0, root);
        Some(root)
    }

    /// Takes a reference unless the count is zero already.
    pub(crate) fn get_root(&self, root: TableId) -> bool {
        self.arena
            .header(root)
            .root_count
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |count| {
                (count != 0).then(|| count.saturating_add(1))
            })
            .is_ok()
    }

    /// kvm_tdp_mmu_put_root. The last reference must not be of a valid root (B1).
    pub(crate) fn put_root(&self, root: TableId) {
        let header = self.arena.header(root);
        if header.root_count.fetch_sub(1, Ordering::SeqCst) != 1 {
            return;
        }
        if !header.role().is_invalid() {
            self.bugs.bug(Check::B1, || {
                format!("last reference of valid root {root:?}")
            });
            header.root_count.store(1, Ordering::SeqCst);
            return;
        }
        lock(&self.roots).retain(|&listed| listed != root);
        self.arena.free_deferred(root);
    }

    /// kvm_tdp_mmu_invalidate_roots: marks the roots; the caller zaps and puts them.
    pub(crate) fn invalidate_roots(&self, types: RootTypes) -> Vec<TableId> {
        if types.has(RootTypes::INVALID) {
            self.bugs
                .warn(Check::B4, || format!("{types:?} names invalid roots"));
        }
        let types = types.without(RootTypes::INVALID);
        let roots = self.roots(types);
        for &root in &roots {
            let header = self.arena.header(root);
            header.set_role(header.role().invalidated());
        }
        roots
    }

    /// kvm_tdp_mmu_zap_invalidated_roots: a root that is zapped for good was invalidated (B5).
    pub(crate) fn check_scheduled(&self, root: TableId) {
        if !self.arena.header(root).role().is_invalid() {
            self.bugs
                .bug(Check::B5, || format!("valid root {root:?} is to be zapped"));
        }
    }

    /// Whether a walk that installs may start at `root`, which it does in any case (B17).
    pub(crate) fn check_mappable(&self, root: TableId) {
        if self.arena.header(root).role().is_invalid() {
            self.bugs
                .warn(Check::B17, || format!("fault on the invalid root {root:?}"));
        }
    }

    /// The roots whose leaves are aged: never those of an invalid one (B23).
    pub(crate) fn roots_to_age(&self, types: RootTypes) -> Vec<TableId> {
        if types.has(RootTypes::INVALID) {
            self.bugs
                .warn(Check::B23, || format!("{types:?} names invalid roots"));
        }
        self.roots(types)
    }

    /// is_obsolete_root: invalidated since it was loaded.
    pub(crate) fn is_obsolete(&self, root: TableId) -> bool {
        self.arena.header(root).role().is_invalid()
    }

    /// Roots that are still listed, newest first: none after the VM's end.
    pub(crate) fn listed_roots(&self) -> Vec<TableId> {
        lock(&self.roots).clone()
    }
}

#[cfg(all(any(test, feature = "scenarios"), not(feature = "shuttle")))]
pub(crate) mod tests;

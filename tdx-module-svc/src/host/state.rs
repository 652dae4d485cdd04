//! The state of the module as a stream of items: TDs, Secure EPT entries, pages in use.

use mirror_proto::module::get_state_response::Item;
use mirror_proto::module::{PageState, SeptState, TdState};
use tdx_defs::{PAGE_SIZE, PageType};
use tdx_module::{Lifecycle, Module, PageInfo, PageSize, SeptInfo, TdInfo};

/// Tells everything that is not free, until `tell` does not want to hear more.
pub(super) fn tell(module: &Module, tell: &mut dyn FnMut(Item) -> bool) {
    let tds = module.inspect_tds();
    for td in &tds {
        if !tell(Item::Td(td_to_wire(td))) {
            return;
        }
    }
    // Contents of Secure EPT pages can be read while the TD's keys are configured.
    for td in tds
        .iter()
        .filter(|td| td.lifecycle == Lifecycle::KeysConfigured)
    {
        let mut runs = Runs::default();
        for entry in module.inspect_sept(td.tdr) {
            if !runs.add(sept_to_wire(td, &entry), joins_entry, Item::Sept, tell) {
                return;
            }
        }
        if !runs.end(Item::Sept, tell) {
            return;
        }
    }
    let mut runs = Runs::default();
    let mut wanted = true;
    module.inspect_pamt(|page| {
        wanted = wanted && runs.add(page_to_wire(&page), joins_page, Item::Page, tell);
    });
    if wanted {
        runs.end(Item::Page, tell);
    }
}

/// Neighbours that are alike become one item.
struct Runs<T>(Option<T>);

impl<T> Default for Runs<T> {
    fn default() -> Self {
        Self(None)
    }
}

impl<T> Runs<T> {
    fn add(
        &mut self,
        next: T,
        joins: impl Fn(&mut T, &T) -> bool,
        item: impl Fn(T) -> Item,
        tell: &mut dyn FnMut(Item) -> bool,
    ) -> bool {
        let joined = self.0.as_mut().is_some_and(|run| joins(run, &next));
        joined || self.0.replace(next).is_none_or(|done| tell(item(done)))
    }

    fn end(self, item: impl Fn(T) -> Item, tell: &mut dyn FnMut(Item) -> bool) -> bool {
        self.0.is_none_or(|last| tell(item(last)))
    }
}

fn joins_entry(run: &mut SeptState, next: &SeptState) -> bool {
    let offset = run.count * (PAGE_SIZE << (9 * run.level));
    let follows = run.level == next.level
        && run.level <= 2
        && run.state == next.state
        && run.rdx == next.rdx
        && run.gpa + offset == next.gpa
        && run.hpa + offset == next.hpa
        && run.rcx.wrapping_add(offset) == next.rcx;
    run.count += u64::from(follows);
    follows
}

fn joins_page(run: &mut PageState, next: &PageState) -> bool {
    let follows = run.r#type == next.r#type
        && run.owner == next.owner
        && run.size == next.size
        && run.bepoch == next.bepoch
        && run.hpa + run.count * (PAGE_SIZE << (9 * run.size)) == next.hpa;
    run.count += u64::from(follows);
    follows
}

fn td_to_wire(td: &TdInfo) -> TdState {
    TdState {
        tdr: td.tdr.get(),
        lifecycle_state: td.lifecycle.name().to_owned(),
        fatal: td.is_fatal,
        hkid: td.hkid.into(),
        num_tdcx: td.num_tdcx.into(),
        child_count: td.children,
        op_state: td.op_state.name().to_owned(),
        td_epoch: td.td_epoch,
        epoch_refcount_even: td.epoch_refcount[0].into(),
        epoch_refcount_odd: td.epoch_refcount[1].into(),
        num_vcpus: td.num_vcpus,
        num_assoc_vcpus: td.num_assoc_vcpus,
        mrtd: td.mrtd.map(|mrtd| mrtd.to_vec()).unwrap_or_default(),
        rtmrs: td.rtmrs.iter().map(|rtmr| rtmr.to_vec()).collect(),
    }
}

fn sept_to_wire(td: &TdInfo, entry: &SeptInfo) -> SeptState {
    SeptState {
        tdr: td.tdr.get(),
        gpa: entry.gpa.get(),
        level: entry.level.into(),
        state: entry.state.name().to_owned(),
        hpa: entry.page.get(),
        rcx: entry.rcx,
        rdx: entry.rdx,
        count: 1,
    }
}

fn page_to_wire(page: &PageInfo) -> PageState {
    let has_epoch = [PageType::REG, PageType::EPT].contains(&page.page_type);
    PageState {
        hpa: page.hpa.get(),
        r#type: page.page_type.to_string(),
        owner: page.owner.get(),
        size: match page.size {
            PageSize::Small => 0,
            PageSize::Large => 1,
            PageSize::Giant => 2,
        },
        bepoch: has_epoch.then_some(page.bepoch),
        count: 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_that_are_alike_are_one_item() {
        let page = |hpa, owner| PageState {
            hpa,
            owner,
            r#type: "PT_REG".into(),
            size: 0,
            bepoch: Some(3),
            count: 1,
        };
        let mut told = Vec::new();
        let mut tell = |item| {
            told.push(item);
            true
        };
        let mut runs = Runs::default();
        for next in [
            page(0x1000, 7),
            page(0x2000, 7),
            page(0x3000, 8),
            page(0x5000, 8),
        ] {
            assert!(runs.add(next, joins_page, Item::Page, &mut tell));
        }
        assert!(runs.end(Item::Page, &mut tell));
        let counts: Vec<_> = told
            .iter()
            .map(|item| match item {
                Item::Page(page) => (page.hpa, page.count),
                _ => panic!("{item:?}"),
            })
            .collect();
        assert_eq!(counts, [(0x1000, 2), (0x3000, 1), (0x5000, 1)]);
    }
}

//! The notes of one VM and of one host, as transactions.

use std::ops::Range;
use std::sync::Arc;

use redb::{ReadableTable as _, WriteTransaction};
use tdp_mmu::{Ledger, LedgerError, Note, PoolLedger};
use tdx_defs::Pfn;

use super::rows::{SlotRow, TdRow, VcpuRow, frames};
use super::{PRIVATE, SLOTS, SPLIT, Store, VCPUS};

struct OfVm {
    store: Arc<Store>,
    id: u64,
}

struct OfHost {
    store: Arc<Store>,
    instance: String,
}

impl Store {
    /// Where the notes of a VM go.
    pub(crate) fn ledger(self: &Arc<Self>, id: u64) -> Arc<dyn Ledger> {
        Arc::new(OfVm {
            store: Arc::clone(self),
            id,
        })
    }

    /// Where the host of one run of the module writes which blocks it splits.
    pub(crate) fn pool(self: &Arc<Self>, instance: &str) -> Arc<dyn PoolLedger> {
        Arc::new(OfHost {
            store: Arc::clone(self),
            instance: instance.to_owned(),
        })
    }
}

impl PoolLedger for OfHost {
    fn split(&self, first: Pfn) -> Result<(), LedgerError> {
        self.store.write(|txn| {
            let key = (&*self.instance, first.get());
            txn.open_table(SPLIT)?.insert(key, ())?;
            Ok(())
        })
    }
}

impl Ledger for OfVm {
    fn note(&self, note: Note) -> Result<(), LedgerError> {
        let id = self.id;
        match note {
            Note::VcpuPages { vcpu_id, pages } => self.change_vcpu(vcpu_id, |row| {
                let mut row = row.unwrap_or_default();
                row.pages = frames(&pages);
                Some(row)
            }),
            Note::Vcpu { vcpu_id } => self.change_vcpu(vcpu_id, |row| {
                let mut row = row.unwrap_or_default();
                row.created = true;
                Some(row)
            }),
            Note::NoVcpuPages { vcpu_id } => self.change_vcpu(vcpu_id, |row| {
                let mut row = row.filter(|row| row.created)?;
                row.pages.clear();
                Some(row)
            }),
            Note::Slot(spec) => self.store.write(|txn| {
                let key = (id, spec.slot_id);
                txn.open_table(SLOTS)?
                    .insert(key, &*SlotRow::bytes(&spec))?;
                Ok(())
            }),
            Note::NoSlot(slot_id) => self.store.write(|txn| {
                txn.open_table(SLOTS)?.remove((id, slot_id))?;
                Ok(())
            }),
            Note::Attributes { gfns, private } => {
                self.store.write(|txn| set_private(txn, id, gfns, private))
            }
            Note::Td(td) => self
                .store
                .change_row(id, |row| row.td = Some(TdRow::from(&td))),
            Note::NoTd => self.store.change_row(id, |row| row.td = None),
            Note::Measuring(measuring) => {
                self.store.change_row(id, |row| row.measuring = measuring)
            }
            Note::Settings {
                nx_huge_pages,
                exit_hypercall,
            } => self.store.change_row(id, |row| {
                row.nx_huge_pages = nx_huge_pages;
                row.exit_hypercall = exit_hypercall;
            }),
            Note::Kept(page) => self.store.change_row(id, |row| {
                if !row.kept.contains(&page.get()) {
                    row.kept.push(page.get());
                }
            }),
            Note::Going => self.store.change_row(id, |row| row.going = true),
            Note::Dead(reason) => self.store.change_row(id, |row| {
                // The first reason is the cause of the others.
                row.dead.get_or_insert(reason);
            }),
        }
    }
}

impl OfVm {
    fn change_vcpu(
        &self,
        vcpu_id: u32,
        change: impl FnOnce(Option<VcpuRow>) -> Option<VcpuRow>,
    ) -> Result<(), LedgerError> {
        self.store.write(|txn| {
            let mut vcpus = txn.open_table(VCPUS)?;
            let key = (self.id, vcpu_id);
            let row = vcpus.get(key)?.and_then(|row| VcpuRow::of(row.value()));
            match change(row) {
                Some(row) => drop(vcpus.insert(key, &*row.bytes())?),
                None => drop(vcpus.remove(key)?),
            }
            Ok(())
        })
    }
}

/// Gives every frame of a range the attribute: what the range cuts keeps its ends, and private
/// ranges that touch become one.
fn set_private(
    txn: &WriteTransaction,
    id: u64,
    gfns: Range<u64>,
    private: bool,
) -> Result<(), redb::Error> {
    let mut table = txn.open_table(PRIVATE)?;
    let mut touching = Vec::new();
    for entry in table.range((id, u64::MIN)..=(id, gfns.end))?.rev() {
        let (key, end) = entry?;
        let (start, end) = (key.value().1, end.value());
        if end < gfns.start {
            break;
        }
        touching.push((start, end));
    }
    let Range { mut start, mut end } = gfns;
    for (from, to) in touching {
        table.remove((id, from))?;
        if private {
            (start, end) = (start.min(from), end.max(to));
            continue;
        }
        if from < start {
            table.insert((id, from), start)?;
        }
        if to > end {
            table.insert((id, end), to)?;
        }
    }
    if private {
        table.insert((id, start), end)?;
    }
    Ok(())
}

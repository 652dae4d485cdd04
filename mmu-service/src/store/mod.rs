//! The state directory: what must be known again after this process, in one crash-safe file.
//!
//! Everything in it is small and follows operations of an administrator's kind: VMs, slots,
//! attributes. A fault writes nothing. Each note is a transaction that is on disk when the call
//! returns.
//!
//! Invariants
//! - D1  One process at a time: the file is locked while it is open.
//! - D2  Only its owner can read it: the directory has mode 0700, the file 0600.

mod ledger;
mod raw;
mod rows;

use std::fs::{DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mirror_proto::mmu::CreateVmRequest;
use redb::backends::FileBackend;
use redb::{
    Database, ReadableDatabase as _, ReadableTable as _, StorageBackend, TableDefinition,
    WriteTransaction,
};
use tdp_mmu::{LedgerError, VmRecord};
use tdx_defs::Pfn;

use rows::{SlotRow, VcpuRow, VmRow};

/// VM id → what there is of it but the following.
const VMS: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("vms");
/// VM id, slot id → slot.
const SLOTS: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("slots");
/// VM id, vCPU id → its pages.
const VCPUS: TableDefinition<'_, (u64, u32), &[u8]> = TableDefinition::new("vcpus");
/// VM id, first private frame → end of the range.
const PRIVATE: TableDefinition<'_, (u64, u64), u64> = TableDefinition::new("private");
/// Instance of the module, first frame of a block that the host split.
const SPLIT: TableDefinition<'_, (&str, u64), ()> = TableDefinition::new("split");
/// Session prefixes under which batches were sent to the module.
const SESSIONS: TableDefinition<'_, &str, ()> = TableDefinition::new("sessions");
/// Numbers by name.
const NUMBERS: TableDefinition<'_, &str, u64> = TableDefinition::new("numbers");
/// The id that was given last.
const LAST_ID: &str = "last_id";
/// How the tables are laid out.
const FORMAT: &str = "format";
/// The layout that this program reads and writes.
const THIS_FORMAT: u64 = 1;

/// Name of the file in the directory.
const FILE: &str = "vms.redb";
/// Pages of the file kept in memory, bytes.
const CACHE_BYTES: usize = 4 << 20;

/// The state cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The directory or its file cannot be made or opened.
    #[error("state: {path} cannot be used")]
    Io {
        /// Which.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others may read or change it.
    #[error("state: {path} has mode {mode:03o}, others may enter; it needs 700")]
    Open {
        /// The directory.
        path: PathBuf,
        /// Its mode.
        mode: u32,
    },
    /// Another process has it, or it is damaged.
    #[error("state: {path} cannot be opened")]
    Database {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<redb::Error>,
    },
    /// It was written by another version.
    #[error("state: {path} has format {found}, this program knows {THIS_FORMAT}")]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u64,
    },
}

/// The open state.
pub(crate) struct Store {
    database: Database,
}

/// A VM as it was written down.
pub(crate) struct Kept {
    pub(crate) id: u64,
    /// How it was asked for.
    pub(crate) request: CreateVmRequest,
    /// The run of the module that it was built on.
    pub(crate) instance: String,
    pub(crate) record: VmRecord,
}

impl Store {
    /// Opens the state in `dir`, which is made when it is not there.
    pub(crate) fn open(dir: &Path) -> Result<Arc<Self>, StateError> {
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| StateError::Io { path, source }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(io(dir))?;
        let mode = std::fs::metadata(dir).map_err(io(dir))?.mode() & 0o777;
        if mode & 0o077 != 0 {
            let path = dir.to_owned();
            return Err(StateError::Open { path, mode });
        }
        let path = dir.join(FILE);
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(io(&path))?;
        let backend = FileBackend::new(file).map_err(|error| damaged(&path, error))?;
        Self::on(backend, &path)
    }

    /// Opens the state in a file; `path` says which in errors.
    pub(crate) fn on(backend: impl StorageBackend, path: &Path) -> Result<Arc<Self>, StateError> {
        let open = AssertUnwindSafe(|| Self::checked(backend));
        // redb panics where a file that says it was closed in order is damaged in some places.
        let opened = catch_unwind(open).unwrap_or_else(|_| {
            let reason = "its structure makes no sense".to_owned();
            Err(redb::Error::Corrupted(reason))
        });
        let (store, found) = opened.map_err(|error| damaged(path, error))?;
        if found != THIS_FORMAT {
            let path = path.to_owned();
            return Err(StateError::Format { path, found });
        }
        Ok(Arc::new(store))
    }

    /// A state that its checksums agree with, and its format. Whatever the file was when its process
    /// ended, redb has put in order when it was opened; what disagrees then was changed by something
    /// else.
    fn checked(backend: impl StorageBackend) -> Result<(Self, u64), redb::Error> {
        let mut database = redb::Builder::new()
            .set_cache_size(CACHE_BYTES)
            .create_with_backend(backend)?;
        if !database.check_integrity()? {
            let reason = "its checksums do not agree with it".to_owned();
            return Err(redb::Error::Corrupted(reason));
        }
        let store = Self { database };
        let format = store.prepare()?;
        Ok((store, format))
    }

    /// Makes the tables, so that every look finds them. Answers the format.
    fn prepare(&self) -> Result<u64, redb::Error> {
        let txn = self.database.begin_write()?;
        let format = {
            txn.open_table(VMS)?;
            txn.open_table(SLOTS)?;
            txn.open_table(VCPUS)?;
            txn.open_table(PRIVATE)?;
            txn.open_table(SPLIT)?;
            txn.open_table(SESSIONS)?;
            let mut numbers = txn.open_table(NUMBERS)?;
            let found = numbers.get(FORMAT)?.map(|format| format.value());
            if found.is_none() {
                numbers.insert(FORMAT, THIS_FORMAT)?;
            }
            found.unwrap_or(THIS_FORMAT)
        };
        txn.commit()?;
        Ok(format)
    }

    /// One transaction. It is on disk when this returns.
    fn write<T>(
        &self,
        change: impl FnOnce(&WriteTransaction) -> Result<T, redb::Error>,
    ) -> Result<T, LedgerError> {
        let all = || {
            let txn = self.database.begin_write()?;
            let value = change(&txn)?;
            txn.commit()?;
            Ok(value)
        };
        all().map_err(not_kept)
    }

    /// Writes down a VM that is about to be created, under a new id. Until [`Store::created`] it
    /// is one to be taken down.
    pub(crate) fn create(
        &self,
        request: &CreateVmRequest,
        record: &VmRecord,
        instance: &str,
    ) -> Result<u64, LedgerError> {
        self.write(|txn| {
            let mut numbers = txn.open_table(NUMBERS)?;
            let last = numbers.get(LAST_ID)?.map_or(0, |last| last.value());
            let id = last + 1;
            numbers.insert(LAST_ID, id)?;
            let mut row = VmRow::new(request, record, instance);
            row.going = true;
            txn.open_table(VMS)?.insert(id, &*row.bytes())?;
            Ok(id)
        })
    }

    /// The VM is there.
    pub(crate) fn created(&self, id: u64) -> Result<(), LedgerError> {
        self.change_row(id, |row| row.going = false)
    }

    /// The VM is gone.
    pub(crate) fn remove(&self, id: u64) -> Result<(), LedgerError> {
        self.write(|txn| {
            txn.open_table(VMS)?.remove(id)?;
            let ids = (id, u32::MIN)..=(id, u32::MAX);
            txn.open_table(SLOTS)?
                .retain_in(ids.clone(), |_, _| false)?;
            txn.open_table(VCPUS)?.retain_in(ids, |_, _| false)?;
            let frames = (id, u64::MIN)..=(id, u64::MAX);
            txn.open_table(PRIVATE)?.retain_in(frames, |_, _| false)?;
            Ok(())
        })
    }

    fn change_row(&self, id: u64, change: impl FnOnce(&mut VmRow)) -> Result<(), LedgerError> {
        self.write(|txn| {
            let mut vms = txn.open_table(VMS)?;
            let row = vms.get(id)?.and_then(|row| VmRow::of(row.value()));
            if let Some(mut row) = row {
                change(&mut row);
                vms.insert(id, &*row.bytes())?;
            }
            Ok(())
        })
    }

    /// Every VM, ascending by id. A row that cannot be read is an error: its pages would be handed
    /// out again.
    pub(crate) fn all(&self) -> Result<Vec<Kept>, LedgerError> {
        let read = || {
            let txn = self.database.begin_read()?;
            let (vms, slots) = (txn.open_table(VMS)?, txn.open_table(SLOTS)?);
            let (vcpus, private) = (txn.open_table(VCPUS)?, txn.open_table(PRIVATE)?);
            let mut all = Vec::new();
            for entry in vms.iter()? {
                let (id, row) = entry?;
                let (id, row) = (id.value(), VmRow::of(row.value()));
                let mut kept = row
                    .and_then(|row| row.kept_as(id))
                    .ok_or_else(|| unreadable(format!("VM {id}")))?;
                let ids = (id, u32::MIN)..=(id, u32::MAX);
                for entry in slots.range(ids.clone())? {
                    let spec = SlotRow::spec_of(entry?.1.value());
                    let spec = spec.ok_or_else(|| unreadable(format!("a slot of VM {id}")))?;
                    kept.record.slots.insert(spec.slot_id, spec);
                }
                for entry in vcpus.range(ids)? {
                    let (key, row) = entry?;
                    let vcpu = VcpuRow::record_of(row.value());
                    let vcpu = vcpu.ok_or_else(|| unreadable(format!("a vCPU of VM {id}")))?;
                    kept.record.vcpus.insert(key.value().1, vcpu);
                }
                for entry in private.range((id, u64::MIN)..=(id, u64::MAX))? {
                    let (key, end) = entry?;
                    let (first, end) = (key.value().1, end.value());
                    if first >= end {
                        return Err(unreadable(format!("a private range of VM {id}")));
                    }
                    kept.record.private.insert(first, end);
                }
                all.push(kept);
            }
            Ok(all)
        };
        read().map_err(not_kept)
    }

    /// The id that was given last.
    pub(crate) fn last_id(&self) -> Result<u64, LedgerError> {
        let read = || {
            let numbers = self.database.begin_read()?.open_table(NUMBERS)?;
            Ok(numbers.get(LAST_ID)?.map_or(0, |last| last.value()))
        };
        read().map_err(not_kept)
    }

    /// The blocks that the host split in this run of the module; those of other runs are forgotten.
    pub(crate) fn split(&self, instance: &str) -> Result<Vec<Pfn>, LedgerError> {
        self.write(|txn| {
            let mut split = txn.open_table(SPLIT)?;
            split.retain(|(of, _), ()| of == instance)?;
            let mut blocks = Vec::new();
            for entry in split.iter()? {
                blocks.push(Pfn::new(entry?.0.value().1));
            }
            Ok(blocks)
        })
    }

    /// Adds the prefix of this process's sessions; answers those of earlier ones.
    pub(crate) fn begin_sessions(&self, prefix: &str) -> Result<Vec<String>, LedgerError> {
        self.write(|txn| {
            let mut sessions = txn.open_table(SESSIONS)?;
            let mut earlier = Vec::new();
            for entry in sessions.iter()? {
                earlier.push(entry?.0.value().to_owned());
            }
            earlier.retain(|name| name != prefix);
            sessions.insert(prefix, ())?;
            Ok(earlier)
        })
    }

    /// The module runs nothing more of these sessions.
    pub(crate) fn end_sessions(&self, prefixes: &[String]) -> Result<(), LedgerError> {
        self.write(|txn| {
            let mut sessions = txn.open_table(SESSIONS)?;
            for prefix in prefixes {
                sessions.remove(&**prefix)?;
            }
            Ok(())
        })
    }
}

fn damaged(path: &Path, source: impl Into<redb::Error>) -> StateError {
    StateError::Database {
        path: path.to_owned(),
        source: Box::new(source.into()),
    }
}

fn not_kept(error: redb::Error) -> LedgerError {
    LedgerError {
        reason: crate::cli::chain(&error),
    }
}

fn unreadable(what: String) -> redb::Error {
    redb::Error::Corrupted(format!("the record of {what} cannot be read"))
}

#[cfg(test)]
mod tests;

//! Records as they are stored, past every check: what a fuzzer needs of the store.

use mirror_proto::mmu::CreateVmRequest;
use tdp_mmu::VmRecord;

use super::rows::VmRow;
use super::{PRIVATE, SLOTS, Store, VCPUS, VMS};

/// The VM whose records are replaced.
const VM: u64 = 1;

impl Store {
    /// The record of a VM as it is stored.
    pub(crate) fn row_of(request: &CreateVmRequest, record: &VmRecord, instance: &str) -> Vec<u8> {
        VmRow::new(request, record, instance).bytes()
    }

    /// Puts a record in place of one of VM 1: of the VM (0), a slot (1), a vCPU (2), a private range
    /// (3). Whether it was put.
    pub(crate) fn put_raw(&self, kind: u8, bytes: &[u8]) -> bool {
        let put = self.write(|txn| {
            match kind {
                0 => drop(txn.open_table(VMS)?.insert(VM, bytes)?),
                1 => drop(txn.open_table(SLOTS)?.insert((VM, 0), bytes)?),
                2 => drop(txn.open_table(VCPUS)?.insert((VM, 0), bytes)?),
                _ => {
                    let words: Vec<u64> = bytes
                        .as_chunks()
                        .0
                        .iter()
                        .map(|word| u64::from_le_bytes(*word))
                        .collect();
                    if let [first, end, ..] = words[..] {
                        txn.open_table(PRIVATE)?.insert((VM, first), end)?;
                    }
                }
            }
            Ok(())
        });
        put.is_ok()
    }

    /// Whether the record of a VM that was read is stored in the same way again.
    pub(crate) fn reads_again(&self, id: u64) -> bool {
        let Ok(all) = self.all() else { return false };
        all.iter().filter(|kept| kept.id == id).all(|kept| {
            let bytes = Self::row_of(&kept.request, &kept.record, &kept.instance);
            let again = VmRow::of(&bytes).and_then(|row| row.kept_as(id));
            again.is_some_and(|again| again.request == kept.request)
        })
    }
}

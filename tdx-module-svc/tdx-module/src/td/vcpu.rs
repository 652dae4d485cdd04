//! A vCPU's control structure (TDVPR and the pages that extend it).
//!
//! Source: TDX module source, td_vcpu state and TDVPS definitions; metadata fields that KVM uses.

use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use tdx_defs::field;

use super::fields::FieldError;
use crate::guest::GuestState;

/// Nobody: value of ASSOC_LPID while the vCPU belongs to no logical processor.
const NO_LP: u32 = u32::MAX;

/// VCPU_STATE in TDVPS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum VcpuState {
    /// After TDH.VP.CREATE.
    Uninitialized = 0,
    /// After TDH.VP.INIT, outside the guest.
    Ready = 2,
    /// Inside the guest.
    Active = 4,
    /// For good.
    Disabled = 8,
}

/// Outcome of associating a vCPU with a logical processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Association {
    /// It was there already.
    Here,
    /// It is there now.
    New,
    /// It belongs to another one.
    Elsewhere,
    /// Its state, as a number, does not allow an entry.
    NotReady(u32),
}

/// A TDVPS field that the host may write: its id, its size in bits, and the bits it may change.
struct WritableField {
    id: u64,
    bits: u32,
    mask: u64,
}

/// VMCS fields in TDVPS that KVM sets, with the write masks of the production metadata table.
const FIELDS: [WritableField; 4] = [
    WritableField {
        id: field::SHARED_EPT_POINTER,
        bits: 64,
        mask: 0x000F_FFFF_FFFF_F000,
    },
    WritableField {
        id: field::POSTED_INTR_NV,
        bits: 16,
        mask: 0xFF,
    },
    WritableField {
        id: field::POSTED_INTR_DESC_ADDR,
        bits: 64,
        mask: 0x000F_FFFF_FFFF_FFC0,
    },
    // Bit 7: process posted interrupts.
    WritableField {
        id: field::PIN_BASED_VM_EXEC_CONTROL,
        bits: 32,
        mask: 1 << 7,
    },
];

/// A vCPU.
#[derive(Debug)]
pub(crate) struct Vcpu {
    state: AtomicU8,
    pages: AtomicU8,
    associated_lp: AtomicU32,
    index: AtomicU32,
    x2apic_id: AtomicU32,
    initial_rcx: AtomicU64,
    fields: [AtomicU64; FIELDS.len()],
    guest: Mutex<GuestState>,
}

impl Vcpu {
    pub(crate) fn new() -> Self {
        Self {
            state: AtomicU8::new(VcpuState::Uninitialized as u8),
            pages: AtomicU8::new(1),
            associated_lp: AtomicU32::new(NO_LP),
            index: AtomicU32::new(0),
            x2apic_id: AtomicU32::new(0),
            initial_rcx: AtomicU64::new(0),
            fields: Default::default(),
            guest: Mutex::default(),
        }
    }

    /// Whether TDH.VP.INIT has succeeded.
    pub(crate) fn is_initialized(&self) -> bool {
        self.state.load(Ordering::Relaxed) != VcpuState::Uninitialized as u8
    }

    /// Pages of the structure, the root included.
    pub(crate) fn pages(&self) -> u8 {
        self.pages.load(Ordering::Relaxed)
    }

    /// One more page. The caller holds TDVPR exclusively.
    pub(crate) fn add_page(&self) {
        self.pages.fetch_add(1, Ordering::Relaxed);
    }

    /// TDH.VP.INIT has succeeded on a logical processor. The caller holds TDVPR exclusively.
    pub(crate) fn initialize(&self, lp: u32, index: u32, x2apic_id: u32, initial_rcx: u64) {
        self.index.store(index, Ordering::Relaxed);
        self.x2apic_id.store(x2apic_id, Ordering::Relaxed);
        self.initial_rcx.store(initial_rcx, Ordering::Relaxed);
        self.associated_lp.store(lp, Ordering::Relaxed);
        self.state.store(VcpuState::Ready as u8, Ordering::Relaxed);
    }

    /// Moves the state on. The caller takes the vCPU inside or out of the guest.
    pub(crate) fn set_state(&self, state: VcpuState) {
        self.state.store(state as u8, Ordering::Relaxed);
    }

    /// The index that TDH.VP.INIT gave.
    pub(crate) fn index(&self) -> u32 {
        self.index.load(Ordering::Relaxed)
    }

    /// The guest side. Only the processor that enters the vCPU, or runs it, looks at it.
    pub(crate) fn guest(&self) -> MutexGuard<'_, GuestState> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Associates a ready vCPU with `lp`, unless it belongs to another one.
    pub(crate) fn associate(&self, lp: u32) -> Association {
        let state = self.state.load(Ordering::Relaxed);
        if state != VcpuState::Ready as u8 {
            return Association::NotReady(state.into());
        }
        match self
            .associated_lp
            .compare_exchange(NO_LP, lp, Ordering::AcqRel, Ordering::Relaxed)
        {
            Ok(_) => Association::New,
            Err(now) if now == lp => Association::Here,
            Err(_) => Association::Elsewhere,
        }
    }

    /// Ends the association with `lp`, if there is one.
    pub(crate) fn disassociate(&self, lp: u32) -> bool {
        lp != NO_LP
            && self
                .associated_lp
                .compare_exchange(lp, NO_LP, Ordering::Relaxed, Ordering::Relaxed)
                .is_ok()
    }

    /// The id of the field that follows `id`; of the first one when `id` is none.
    pub(crate) fn next_field(id: Option<u64>) -> Option<u64> {
        let next = match id {
            None => 0,
            Some(id) => find_field(id).ok()? + 1,
        };
        FIELDS.get(next).map(|field| field.id)
    }

    /// The value of a metadata field.
    pub(crate) fn read_field(&self, id: u64) -> Result<u64, FieldError> {
        let at = find_field(id)?;
        Ok(self.fields[at].load(Ordering::Relaxed))
    }

    /// Writes the bits of `mask` that the host may write; answers the value before.
    pub(crate) fn write_field(&self, id: u64, value: u64, mask: u64) -> Result<u64, FieldError> {
        let at = find_field(id)?;
        let mask = mask & FIELDS[at].mask;
        if mask == 0 {
            return Err(FieldError::NotWritable);
        }
        let old = self.fields[at].load(Ordering::Relaxed);
        self.fields[at].store(old & !mask | value & mask, Ordering::Relaxed);
        Ok(old)
    }
}

fn find_field(id: u64) -> Result<usize, FieldError> {
    let wanted = super::fields::field_identity(id);
    FIELDS
        .iter()
        .position(|field| {
            super::fields::field_identity(field.id) == wanted
                && super::fields::size_agrees(id, field.bits)
        })
        .ok_or(FieldError::Unknown)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_bits_change() {
        let vcpu = Vcpu::new();
        let id = field::PIN_BASED_VM_EXEC_CONTROL;
        assert_eq!(vcpu.write_field(id, u64::MAX, u64::MAX), Ok(0));
        assert_eq!(vcpu.read_field(id), Ok(1 << 7));
        assert_eq!(vcpu.write_field(id, 0, 1), Err(FieldError::NotWritable));
        assert_eq!(vcpu.read_field(0x4002), Err(FieldError::Unknown));
        let ids = std::iter::successors(Vcpu::next_field(None), |id| Vcpu::next_field(Some(*id)));
        assert_eq!(ids.count(), FIELDS.len());
    }

    #[test]
    fn a_vcpu_leaves_only_the_processor_it_is_on() {
        let vcpu = Vcpu::new();
        assert!(!vcpu.disassociate(u32::MAX));
        vcpu.initialize(2, 0, 0, 0);
        assert!(!vcpu.disassociate(1));
        assert!(vcpu.disassociate(2));
        assert!(!vcpu.disassociate(2));
    }
}

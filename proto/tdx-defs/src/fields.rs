//! Metadata field ids that KVM's TDX layer reads or writes.
//!
//! Source: Linux, arch/x86/kvm/vmx/tdx_arch.h and tdx.c; TDX module ABI, metadata fields.

/// Field ids for TDH.MNG.RD, TDH.VP.RD and TDH.VP.WR.
pub mod field {
    /// TDCS: TSC offset.
    pub const TD_TSC_OFFSET: u64 = 0x1100_0000_0000_000A;
    /// TDCS: TSC multiplier.
    pub const TD_TSC_MULTIPLIER: u64 = 0x1100_0000_0000_000B;
    /// TDR: whether the TD is lost.
    pub const TDR_FATAL: u64 = 0x8010_0000_0000_0001;
    /// TDR: key id.
    pub const TDR_HKID: u64 = 0x8110_0001_0000_0001;
    /// TDR: packages on which the key is programmed.
    pub const TDR_PKG_CONFIG_BITMAP: u64 = 0x8110_0003_0000_0002;
    /// TDCS: number of L2 VMs.
    pub const TDCS_NUM_L2_VMS: u64 = 0x9010_0001_0000_0005;
    /// TDCS: microseconds for which host priority keeps the guest from a lock.
    pub const TDCS_HP_LOCK_TIMEOUT: u64 = 0x9110_0003_0000_0011;
    /// TDR: children of the TD, in 4 KiB units.
    pub const TDR_CHLDCNT: u64 = 0x8010_0003_0000_0004;
    /// TDR: life-cycle state.
    pub const TDR_LIFECYCLE_STATE: u64 = 0x8010_0002_0000_0005;
    /// TDR: TDCX pages added.
    pub const TDR_NUM_TDCX: u64 = 0x8010_0002_0000_0002;
    /// TDCS: OP_STATE.
    pub const TDCS_OP_STATE: u64 = 0x9010_0002_0000_0004;
    /// TDCS: initialised vCPUs.
    pub const TDCS_NUM_VCPUS: u64 = 0x9010_0002_0000_0001;
    /// TDCS: vCPUs associated with a logical processor.
    pub const TDCS_NUM_ASSOC_VCPUS: u64 = 0x9010_0002_0000_0002;
    /// TDCS: guest physical address width.
    pub const TDCS_GPAW: u64 = 0x1110_0000_0000_0003;
    /// TDCS: pointer to the Secure EPT root.
    pub const TDCS_EPTP: u64 = 0x1110_0003_0000_0004;
    /// TDCS: TD attributes.
    pub const TDCS_ATTRIBUTES: u64 = 0x1110_0003_0000_0000;
    /// TDCS: extended features.
    pub const TDCS_XFAM: u64 = 0x1110_0003_0000_0001;
    /// TDCS: most vCPUs that the TD may have.
    pub const TDCS_MAX_VCPUS: u64 = 0x1110_0002_0000_0002;
    /// TDCS: TSC frequency in units of 25 MHz.
    pub const TDCS_TSC_FREQUENCY: u64 = 0x1110_0001_0000_000C;
    /// TDCS: CONFIG_FLAGS.
    pub const TDCS_CONFIG_FLAGS: u64 = 0x9110_0003_0000_0016;
    /// TDCS: controls that the guest may change; bit 0 PENDING_VE_DISABLE.
    pub const TDCS_TD_CTLS: u64 = 0x9110_0003_0000_0017;
    /// TDCS: TLB tracking epoch.
    pub const TDCS_TD_EPOCH: u64 = 0x9210_0003_0000_0000;
    /// TDCS: vCPUs inside since an even epoch; the next code is that of odd ones.
    pub const TDCS_REFCOUNT: u64 = 0x9210_0001_0000_0001;
    /// TDCS: first of the 24 8-byte words of the four RTMRs.
    pub const TDCS_RTMR: u64 = 0x1310_0003_0000_0040;
    /// TDCS: first of the six 8-byte words of MRTD.
    pub const TDCS_MRTD: u64 = 0x1310_0003_0000_0000;
    /// TDVPS: VMCS pointer to the shared EPT.
    pub const SHARED_EPT_POINTER: u64 = 0x203C;
    /// TDVPS: VMCS posted-interrupt notification vector.
    pub const POSTED_INTR_NV: u64 = 0x0002;
    /// TDVPS: VMCS posted-interrupt descriptor address.
    pub const POSTED_INTR_DESC_ADDR: u64 = 0x2016;
    /// TDVPS: VMCS pin-based controls.
    pub const PIN_BASED_VM_EXEC_CONTROL: u64 = 0x4000;
}

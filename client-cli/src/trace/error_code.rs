//! What kind of access an `error_code` means. The text of the event does not say which of three
//! encodings it prints, so the bits decide.
//!
//! Source: `handle_ept_violation()`, arch/x86/kvm/vmx/common.h (exit qualification);
//! `npf_interception()`, arch/x86/kvm/svm/svm.c (nested page fault code); `PFERR_*`,
//! arch/x86/include/asm/kvm_host.h.

const READ: u64 = 1 << 0;
const WRITE: u64 = 1 << 1;
const FETCH: u64 = 1 << 2;
const ALLOWED_READ: u64 = 1 << 3;
const ALLOWED_WRITE: u64 = 1 << 4;
const ALLOWED_FETCH: u64 = 1 << 5;
const ACCESS: u64 = READ | WRITE | FETCH;
const ALLOWED: u64 = ALLOWED_READ | ALLOWED_WRITE | ALLOWED_FETCH;

const PFERR_PRESENT: u64 = 1 << 0;
const PFERR_WRITE: u64 = 1 << 1;
const PFERR_FETCH: u64 = 1 << 4;
const PFERR_GUEST_FINAL: u64 = 1 << 32;
const PFERR_GUEST_PAGE: u64 = 1 << 33;

/// The linear address is valid.
const LINEAR_VALID: u64 = 1 << 7;
/// The access was to its translation, not to the guest's tables.
const LINEAR_ACCESS: u64 = 1 << 8;

/// Exit qualification bits 5:0 of an access with this `error_code`: bits 2:0 say what was tried,
/// bits 5:3 what the entry allowed.
pub fn qualification(error_code: u64) -> u64 {
    // An exit qualification of an EPT violation has no bit above 31; AMD's code always has bit 32
    // (final access) or 33 (access to a guest page table).
    if error_code >> 32 != 0 {
        return from_page_fault_code(error_code);
    }
    // A violation always names at least one kind of access. Without one this is the #PF code of
    // a guest under shadow paging.
    if error_code & ACCESS == 0 {
        return from_page_fault_code(error_code);
    }
    error_code & (ACCESS | ALLOWED)
}

/// The whole exit qualification of the same access: that the entry was present where the code does
/// not say what it allowed (bit 3), and which part of the guest's walk it was (bits 8:7).
pub fn exit_qualification(error_code: u64) -> u64 {
    if error_code >> 32 == 0 && error_code & ACCESS != 0 {
        return error_code & 0x1FF;
    }
    let present = match error_code & PFERR_PRESENT {
        0 => 0,
        _ => ALLOWED_READ,
    };
    let walk = match error_code {
        code if code & PFERR_GUEST_FINAL != 0 => LINEAR_VALID | LINEAR_ACCESS,
        code if code & PFERR_GUEST_PAGE != 0 => LINEAR_VALID,
        _ => 0,
    };
    from_page_fault_code(error_code) & ACCESS | present | walk
}

/// The same access to memory that is shared with the host.
///
/// Model: a recording of an ordinary guest fetches instructions from any page. A TD cannot fetch
/// from shared memory, and KVM ends one that does, so such a fetch is played as a read.
pub fn as_shared(qualification: u64) -> u64 {
    match qualification & FETCH {
        0 => qualification,
        _ => (qualification & !FETCH) | READ,
    }
}

fn from_page_fault_code(code: u64) -> u64 {
    let access = match code {
        _ if code & PFERR_FETCH != 0 => FETCH,
        _ if code & PFERR_WRITE != 0 => WRITE,
        _ => READ,
    };
    // The code says that a translation was present, not what it allowed: everything but what was
    // refused.
    let allowed = match (code & PFERR_PRESENT != 0, access) {
        (false, _) | (true, READ) => 0,
        (true, access) => ALLOWED & !(access << 3),
    };
    access | allowed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shared_memory_is_read_where_it_was_executed() {
        for (case, qualification, want) in [
            ("fetch", FETCH, READ),
            ("write", WRITE | ALLOWED_READ, WRITE | ALLOWED_READ),
        ] {
            assert_eq!(as_shared(qualification), want, "{case}");
        }
    }

    #[test]
    fn an_exit_qualification_keeps_presence_and_walk() {
        for (error_code, want) in [
            (0x1_0000_0006, WRITE | LINEAR_VALID | LINEAR_ACCESS),
            (0x2_0000_0006, WRITE | LINEAR_VALID),
            (0x1_0000_0007, WRITE | ALLOWED_READ | 0x180),
            (0x1_0000_000D, READ | ALLOWED_READ | 0x180),
            (0x1_0000_0014, FETCH | 0x180),
            (0xf9a, 0x19a),
            (0x2, WRITE),
        ] {
            assert_eq!(exit_qualification(error_code), want, "{error_code:#x}");
        }
    }

    #[test]
    fn each_encoding_names_the_same_access() {
        for (case, error_code, want) in [
            ("EPT read", 0x181, READ),
            ("EPT write", 0x182, WRITE),
            ("EPT fetch", 0x184, FETCH),
            ("EPT read-modify-write", 0x183, READ | WRITE),
            (
                "EPT write to a page mapped R and X",
                0x1aa,
                WRITE | ALLOWED_READ | ALLOWED_FETCH,
            ),
            ("EPT with advanced information", 0xf82, WRITE),
            ("TDX private page", 0x2, WRITE),
            ("NPF write", 0x1_0000_0006, WRITE),
            ("NPF read", 0x1_0000_0004, READ),
            ("NPF fetch", 0x1_0000_0014, FETCH),
            ("NPF of a guest page table", 0x2_0000_0006, WRITE),
            ("NPF with the supervisor bit", 0x5_0000_0004, READ),
            (
                "NPF write to a read-only page",
                0x1_0000_0007,
                WRITE | ALLOWED_READ | ALLOWED_FETCH,
            ),
            ("shadow paging fetch", 0x10, FETCH),
            ("nothing set", 0, READ),
        ] {
            assert_eq!(qualification(error_code), want, "{case}");
        }
    }
}

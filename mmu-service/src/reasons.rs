//! Why this service refuses a request; `docs/errors.md` shows the same table.

transport::reasons! {
    NOT_ADMITTED: PermissionDenied, "",
        "the caller is nobody here: its user is not the service's own, root, or in `--allow-uid`",
        "call as that user, or list this one; nothing has run";
    ROLE_NEEDED: PermissionDenied, "`needed`, `held`",
        "the caller does not hold the role that the method needs",
        "use a certificate or a user with that role: [security.md](security.md); nothing has run";
    INVALID_FIELD: InvalidArgument, "`BadRequest` names the field, `errno` EINVAL",
        "a field has a value that cannot be: unaligned, out of range, or not possible on this platform",
        "correct the field; its limit is in the message";
    NOT_FOUND: NotFound, "`BadRequest` with `vm_id`, `vcpu_id`, `slot_id` or `gpa`, `errno` ENOENT",
        "there is no such VM, vCPU or slot, or no slot covers the address",
        "look with ListVms; create it first";
    ALREADY_EXISTS: AlreadyExists, "`BadRequest` with `slot` or `gpa`, `errno` EEXIST or EIO",
        "a slot overlaps another, or a page of the initial image was added before",
        "choose another range, or delete the slot";
    WRONG_STATE: FailedPrecondition, "`errno` EINVAL or EOPNOTSUPP",
        "the TD is not in the state that the operation needs, such as finalised or not yet",
        "bring it there; the message names both states";
    VM_DEAD: FailedPrecondition, "`errno` EIO",
        "the VM is bugged, or the module that held it has started anew",
        "look at it with GetWalk, DumpTree and Audit, then destroy it; a new VM works";
    MEMORY_FAULT: FailedPrecondition, "`gpa`, `size`, `flags`, `errno` EFAULT or EHWPOISON",
        "the access leaves KVM_RUN with KVM_EXIT_MEMORY_FAULT: it does not match the memory attributes, or no page can be had",
        "convert the range (SetMemoryAttributes), then let the guest access it again";
    EXHAUSTED: ResourceExhausted, "`errno` ENOMEM",
        "simulated memory, key ids or VM places are spent",
        "destroy a VM, or give the platform more";
    OVERLOADED: ResourceExhausted, "`RetryInfo`, `errno` EAGAIN for operations",
        "too many requests or operations are in work, of all VMs or of this one; nothing has run",
        "send it again after the delay";
    BUSY: Aborted, "`RetryInfo`, `errno` EBUSY or EAGAIN",
        "the module stayed busy for the whole retry budget, the slot is about to go, or a prefault lost its root or met changes all the time",
        "send it again after the delay";
    MODULE_UNREACHABLE: Unavailable, "`RetryInfo`, `errno` EIO",
        "the module does not answer",
        "see whether it runs, then send it again";
    RECOVERING: Unavailable, "`RetryInfo`, `errno` EAGAIN",
        "the service has restarted and makes the VMs of its earlier run again",
        "send it again after the delay, or wait until the health is SERVING";
    STATE_NOT_WRITTEN: Unavailable, "`errno` EIO",
        "what the operation is about to do could not be written to `--state`; it was not done",
        "make room on the disk or mend it, then send it again";
    DRAINING: Unavailable, "`errno` ESHUTDOWN",
        "the service is stopping",
        "wait for the next one";
    READER_STALLED: DeadlineExceeded, "",
        "the reader of a stream took nothing for `--stall-s`: the stream ends, and the reason stands in the log of the service only",
        "read faster, or ask for less";
    INTERNAL: Internal, "`errno` EIO",
        "an invariant is broken, or the module refused a call that KVM does not expect to fail",
        "read the log of the service; the VM is bugged as a rule";
}

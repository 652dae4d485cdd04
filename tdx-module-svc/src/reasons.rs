//! Why this service refuses a request; `docs/errors.md` shows the same table.

transport::reasons! {
    NOT_ADMITTED: PermissionDenied, "",
        "the caller is nobody here: its user is not the service's own, root, or in `--allow-uid`",
        "call as that user, or list this one; nothing has run";
    ROLE_NEEDED: PermissionDenied, "`needed`, `held`",
        "the caller does not hold the role that the method needs",
        "use a certificate or a user with that role: [security.md](security.md); nothing has run";
    INVALID_FIELD: InvalidArgument, "`BadRequest` names the field",
        "a field is out of its range; no call has run",
        "correct the field; its limit is in the message and in GetPlatform";
    UNKNOWN_SESSION: NotFound, "`session`, `instance`",
        "the session has no replay window here, and the batch is not its first: it was forgotten or ended, or the module started anew",
        "compare `instance` with that of earlier answers: another one means that the TDs are gone. Begin a new session with sequence 1";
    BELOW_REPLAY_WINDOW: FailedPrecondition, "`lowest`",
        "the number is so old that its answer is gone, so that it cannot be told whether it ran",
        "treat its outcome as unknown and read the state back (TDH.MEM.SEPT.RD); keep fewer batches in flight than the window holds";
    SEQUENCE_REUSED: AlreadyExists, "",
        "the number belongs to a batch with other content",
        "number batches one after the other, and use a session in one place only";
    SESSIONS_IN_USE: ResourceExhausted, "`RetryInfo`",
        "every session that may be remembered is in use",
        "send it again after the delay, close streams, or raise `--max-sessions`";
    REPLAY_FULL: ResourceExhausted, "`RetryInfo`",
        "the answers that are kept for batches sent again take all the memory that they may; nothing has run",
        "acknowledge the answers that have arrived (`ExecuteRequest.acknowledged`) and send it again after the delay, or raise `--max-replay-bytes` and `--max-session-replay-bytes`";
    OVERLOADED: ResourceExhausted, "`RetryInfo`",
        "more requests are in work than `--max-concurrent-requests`; nothing has run",
        "send it again after the delay";
    DRAINING: Unavailable, "",
        "the service is stopping; batches that were started have run to their end",
        "send the same sequence again once it is back; another `instance` means that the TDs are gone";
    INJECTION_OFF: FailedPrecondition, "",
        "conditions may not be changed: the service was started without `--allow-injection`",
        "start a module of your own with it; never one that others use";
    LOCK_NOT_FREE: FailedPrecondition, "",
        "the lock to hold is not there or not free, or the one to release was not held by a request",
        "look at the state with GetState, and release locks with the mode they were held in";
    INJECTED_FAULT: Unavailable, "",
        "a fault rule ended the stream; whether the batch ran is for the caller to find out",
        "send the same sequence again; `mmuctl inject list` shows the rules";
    MODULE_FAILED: Internal, "",
        "a call ended in a panic: the state of the module is not known",
        "start the module anew and report the log";
}

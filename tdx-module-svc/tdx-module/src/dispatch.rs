//! From the registers of a SEAMCALL to a leaf function, and runs of one leaf.
//!
//! Source: TDX module source, tdx_vmm_dispatcher.c.

use std::cell::OnceCell;
use std::sync::Arc;

use bytes::Bytes;
use tdx_defs::{CompletionStatus, Gpr, Gprs, Leaf, OperandId, PAGE_SIZE, Seamcall, SeamcallResult};

use crate::guest::Entry;
use crate::leaves;
use crate::memory::PAGE;
use crate::td::Td;
use crate::{LpId, Module};

/// What one call, or one run of calls, works with.
pub(crate) struct Cx<'m> {
    pub(crate) module: &'m Module,
    /// The logical processor that executes.
    pub(crate) lp: u32,
    /// The TD of the first call of a run; the others mostly name the same.
    pub(super) td: OnceCell<Arc<Td>>,
}

/// The registers of a call: operands before a leaf runs, outputs after. What a leaf does not
/// define as output keeps its value, as on the processor.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Regs {
    pub(crate) version: u8,
    pub(crate) rcx: u64,
    pub(crate) rdx: u64,
    pub(crate) r8: u64,
    pub(crate) r9: u64,
    pub(crate) r10: u64,
    pub(crate) r11: u64,
}

/// A call that does not end with TDX_SUCCESS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Fail {
    pub(crate) status: CompletionStatus,
    /// RCX and RDX, when the status comes with a description of a Secure EPT entry.
    pub(crate) details: Option<[u64; 2]>,
}

impl From<CompletionStatus> for Fail {
    fn from(status: CompletionStatus) -> Self {
        Self {
            status,
            details: None,
        }
    }
}

/// How a leaf ends.
pub(crate) type Outcome = Result<(), Fail>;

/// The code of a leaf.
enum Code {
    /// Makes one call.
    One(fn(&Cx<'_>, &mut Regs) -> Outcome),
    /// Makes calls of a run under one set of locks, see [`Run`].
    Many(fn(&Cx<'_>, &mut Run<'_>) -> Outcome),
}

/// Calls that are made under one set of locks. Other processors meet these locks as if a call were
/// in flight all the time, so they are given up now and then.
const CALLS_PER_HOLD: u32 = 512;

/// Calls of one leaf that follow each other: those of a run, and of the runs behind it that name
/// the same TD.
///
/// A leaf whose TD is named by RDX may lock it and check its state once for several calls: RDX has
/// no stride, and what was checked cannot change while the locks are held. Each call is answered
/// as if it had come alone.
pub(crate) struct Run<'c> {
    call: &'c Seamcall,
    /// The runs behind this one.
    behind: &'c [Seamcall],
    /// Operands of the next call.
    next: Regs,
    /// Outputs of the last one.
    regs: Regs,
    left: u32,
    completed: u32,
    results: &'c mut Vec<SeamcallResult>,
}

impl<'c> Run<'c> {
    /// `calls` agree on leaf, version and RDX, and none of them is empty.
    fn new(
        call: &'c Seamcall,
        behind: &'c [Seamcall],
        results: &'c mut Vec<SeamcallResult>,
    ) -> Self {
        let regs = Regs::of(call);
        Self {
            call,
            behind,
            next: regs,
            regs,
            left: call.count(),
            completed: 0,
            results,
        }
    }

    /// Clears the outputs RCX and RDX of the next call and answers the TDR that its RDX names.
    pub(crate) fn take_tdr(&mut self) -> u64 {
        self.regs = Regs {
            rcx: 0,
            rdx: 0,
            ..self.next
        };
        self.next.rdx
    }

    /// Makes the next calls, with RDX cleared, until one fails or the locks should be given up.
    pub(crate) fn each(&mut self, mut one: impl FnMut(&mut Regs) -> Outcome) -> Outcome {
        self.each_as_it_is(|regs| {
            regs.rdx = 0;
            one(regs)
        })
    }

    /// The same for a leaf that leaves RDX alone.
    pub(crate) fn each_as_it_is(&mut self, mut one: impl FnMut(&mut Regs) -> Outcome) -> Outcome {
        for _ in 0..CALLS_PER_HOLD {
            if self.left == 0 {
                break;
            }
            self.regs = self.next;
            one(&mut self.regs)?;
            self.advance();
        }
        Ok(())
    }

    /// One call succeeded.
    fn advance(&mut self) {
        self.completed += 1;
        self.left -= 1;
        if self.left == 0 {
            self.end(CompletionStatus::SUCCESS);
        } else {
            self.next.step(self.call);
        }
    }

    /// The run is answered; the one behind it is next.
    fn end(&mut self, status: CompletionStatus) {
        self.results.push(self.regs.result(status, self.completed));
        self.left = 0;
        if let Some((call, behind)) = self.behind.split_first() {
            let regs = Regs::of(call);
            (self.call, self.behind) = (call, behind);
            (self.next, self.regs) = (regs, regs);
            (self.left, self.completed) = (call.count(), 0);
        }
    }

    /// The next call did not succeed, which ends its run.
    fn fail(&mut self, fail: Fail) {
        if let Some([rcx, rdx]) = fail.details {
            (self.regs.rcx, self.regs.rdx) = (rcx, rdx);
        }
        // TDH.VP.ENTER succeeds with an exit reason in the low half.
        self.completed += u32::from(fail.status.is_success());
        self.end(fail.status);
    }
}

/// Leaves that have a version above 0.
const VERSIONED: [Leaf; 8] = [
    Leaf::MEM_PAGE_PROMOTE,
    Leaf::MEM_SEPT_ADD,
    Leaf::MEM_SEPT_REMOVE,
    Leaf::MNG_RD,
    Leaf::VP_RD,
    Leaf::VP_INIT,
    Leaf::SYS_INIT,
    Leaf::SYS_CONFIG,
];

/// Finds the code of a leaf.
///
/// Model: leaves that this model does not carry out (migration, service TDs, dynamic PAMT) are answered like numbers without a leaf.
fn code_of(leaf: Leaf) -> Option<Code> {
    use Code::{Many, One};
    Some(match leaf {
        Leaf::MNG_CREATE => One(leaves::mng_create),
        Leaf::MNG_KEY_CONFIG => One(leaves::mng_key_config),
        Leaf::MNG_ADDCX => One(leaves::mng_addcx),
        Leaf::MNG_INIT => One(leaves::mng_init),
        Leaf::MNG_VPFLUSHDONE => One(leaves::mng_vpflushdone),
        Leaf::MNG_KEY_FREEID => One(leaves::mng_key_freeid),
        Leaf::MNG_KEY_RECLAIMID => One(leaves::mng_key_reclaimid),
        Leaf::MNG_RD => One(leaves::mng_rd),
        Leaf::VP_ENTER => One(leaves::vp_enter),
        Leaf::VP_CREATE => One(leaves::vp_create),
        Leaf::VP_ADDCX => One(leaves::vp_addcx),
        Leaf::VP_INIT => One(leaves::vp_init),
        Leaf::VP_FLUSH => One(leaves::vp_flush),
        Leaf::VP_RD => One(leaves::vp_rd),
        Leaf::VP_WR => One(leaves::vp_wr),
        Leaf::MEM_SEPT_ADD => One(leaves::mem_sept_add),
        Leaf::MEM_SEPT_RD => Many(leaves::mem_sept_rd),
        Leaf::MEM_SEPT_REMOVE => One(leaves::mem_sept_remove),
        Leaf::MEM_PAGE_ADD => One(leaves::mem_page_add),
        Leaf::MEM_PAGE_AUG => Many(leaves::mem_page_aug),
        Leaf::MEM_PAGE_REMOVE => Many(leaves::mem_page_remove),
        Leaf::MEM_PAGE_PROMOTE => One(leaves::mem_page_promote),
        Leaf::MEM_PAGE_DEMOTE => One(leaves::mem_page_demote),
        Leaf::MEM_PAGE_RELOCATE => One(leaves::mem_page_relocate),
        Leaf::MEM_RANGE_BLOCK => Many(leaves::mem_range_block),
        Leaf::MEM_RANGE_UNBLOCK => Many(leaves::mem_range_unblock),
        Leaf::MEM_TRACK => One(leaves::mem_track),
        Leaf::MEM_RD => One(leaves::mem_rd),
        Leaf::MEM_WR => One(leaves::mem_wr),
        Leaf::MR_EXTEND => Many(leaves::mr_extend),
        Leaf::MR_FINALIZE => One(leaves::mr_finalize),
        Leaf::PHYMEM_PAGE_RECLAIM => One(leaves::phymem_page_reclaim),
        Leaf::PHYMEM_PAGE_RDMD => One(leaves::phymem_page_rdmd),
        Leaf::PHYMEM_PAGE_WBINVD => Many(leaves::phymem_page_wbinvd),
        Leaf::PHYMEM_CACHE_WB => One(leaves::phymem_cache_wb),
        Leaf::SYS_TDMR_INIT => One(leaves::sys_tdmr_init),
        Leaf::SYS_INIT => One(leaves::sys_init),
        Leaf::SYS_LP_INIT => One(leaves::sys_lp_init),
        Leaf::SYS_CONFIG => One(leaves::sys_config),
        Leaf::SYS_KEY_CONFIG => One(leaves::sys_key_config),
        Leaf::SYS_INFO => One(leaves::sys_info),
        Leaf::SYS_RD => One(leaves::sys_rd),
        Leaf::SYS_RDALL => One(leaves::sys_rdall),
        Leaf::SYS_LP_SHUTDOWN => One(leaves::sys_lp_shutdown),
        Leaf::MNG_WR => One(leaves::mng_wr),
        _ => return None,
    })
}

/// One call or a run.
pub(crate) fn seamcall(module: &Module, lp: LpId, call: &Seamcall) -> SeamcallResult {
    let mut results = Vec::with_capacity(1);
    perform(module, lp, call, &[], false, &mut results);
    results.pop().unwrap_or_default()
}

/// Calls and runs in order; the answers of those that were made. With `stop_on_error` nothing is
/// made behind a call that ends with the error bit.
pub(crate) fn seamcalls(
    module: &Module,
    lp: LpId,
    calls: &[Seamcall],
    stop_on_error: bool,
) -> Vec<SeamcallResult> {
    let mut results = Vec::with_capacity(calls.len());
    while let Some((call, behind)) = calls[results.len()..].split_first() {
        let alike = match code_of(call.leaf) {
            Some(Code::Many(_)) => behind.iter().take_while(|next| goes_on(call, next)).count(),
            _ => 0,
        };
        let made = results.len();
        perform(
            module,
            lp,
            call,
            &behind[..alike],
            stop_on_error,
            &mut results,
        );
        let failed = |result: &SeamcallResult| result.status().is_error();
        if stop_on_error && results[made..].iter().any(failed) {
            break;
        }
    }
    results
}

/// Whether a call may share the locks of the one in front of it.
fn goes_on(call: &Seamcall, next: &Seamcall) -> bool {
    let same = call.leaf == next.leaf && call.version == next.version && call.rdx == next.rdx;
    same && call.count() != 0 && next.count() != 0
}

/// A run and those behind it that are like it.
fn perform(
    module: &Module,
    lp: LpId,
    call: &Seamcall,
    behind: &[Seamcall],
    stop_on_error: bool,
    results: &mut Vec<SeamcallResult>,
) {
    if call.count() == 0 {
        results.push(SeamcallResult::default());
        return;
    }
    let code = match check_call(module, call) {
        Ok(code) => code,
        Err(fail) => {
            results.push(Regs::of(call).result(fail.status, 0));
            return;
        }
    };
    let cx = Cx {
        module,
        lp: lp.0,
        td: OnceCell::new(),
    };
    let mut run = Run::new(call, behind, results);
    while run.left > 0 {
        if let Err(fail) = step(&cx, &code, &mut run) {
            let stops = stop_on_error && fail.status.is_error();
            run.fail(fail);
            if stops {
                break;
            }
        }
    }
}

/// The checks before any leaf runs.
fn check_call(module: &Module, call: &Seamcall) -> Result<Code, Fail> {
    let unknown = CompletionStatus::OPERAND_INVALID.with(OperandId::RAX);
    if call.version > 0 && !VERSIONED.contains(&call.leaf) {
        return Err(unknown.into());
    }
    module.system.check(call.leaf)?;
    code_of(call.leaf).ok_or(unknown.into())
}

/// TDH.VP.ENTER for a host that plays the guest.
pub(crate) fn enter_vcpu(module: &Module, lp: LpId, call: &Seamcall) -> Entry {
    let call = Seamcall {
        leaf: Leaf::VP_ENTER,
        repeat: None,
        ..call.clone()
    };
    let mut regs = Regs::of(&call);
    let cx = Cx {
        module,
        lp: lp.0,
        td: OnceCell::new(),
    };
    let entered = check_call(module, &call)
        .and_then(|_| leaves::enter(&cx, &mut regs, &host_registers(&call)));
    match entered {
        Ok(vmcall) => Entry::Entered { vmcall },
        Err(fail) => Entry::Refused(regs.result(fail.status, 0)),
    }
}

/// The registers that the host may pass to the guest.
fn host_registers(call: &Seamcall) -> Gprs {
    Gprs::default()
        .with(Gpr::Rcx, call.rcx)
        .with(Gpr::Rdx, call.rdx)
        .with(Gpr::R8, call.r8)
        .with(Gpr::R9, call.r9)
        .with(Gpr::R10, call.r10)
        .with(Gpr::R11, call.r11)
        .with(Gpr::R12, call.r12)
        .with(Gpr::R13, call.r13)
}

/// The next call of a run, or the next few.
fn step(cx: &Cx<'_>, code: &Code, run: &mut Run<'_>) -> Outcome {
    match code {
        Code::Many(leaf) => leaf(cx, run),
        Code::One(leaf) => {
            write_operand(cx.module, run.call, &run.next, run.completed);
            run.regs = run.next;
            leaf(cx, &mut run.regs)?;
            run.advance();
            Ok(())
        }
    }
}

/// Writes the host memory that travels with a call, before the leaf reads it. A run of
/// TDH.MEM.PAGE.ADD may bring a page for each of its calls.
fn write_operand(module: &Module, call: &Seamcall, regs: &Regs, run: u32) {
    if call.data.is_empty() {
        return;
    }
    let (at, unit) = match call.leaf {
        Leaf::MNG_INIT => (regs.rdx, tdx_defs::TD_PARAMS_SIZE),
        Leaf::MEM_PAGE_ADD => (regs.r9, PAGE),
        _ => return,
    };
    let Some(hpa) = module.host_address(at) else {
        return;
    };
    let a_page_each = call.data.len() as u64 == u64::from(call.count()) * PAGE_SIZE;
    if call.leaf == Leaf::MEM_PAGE_ADD && a_page_each {
        let page = match call.data.len() {
            PAGE => Some(call.data.clone()),
            // A copy, so that no page keeps all of them.
            _ => {
                let mut pages = call.data.chunks_exact(PAGE);
                let page = usize::try_from(run).ok().and_then(|run| pages.nth(run));
                page.map(Bytes::copy_from_slice)
            }
        };
        match page {
            Some(page) if hpa.get().is_multiple_of(PAGE_SIZE) => module.write_host_page(hpa, page),
            Some(page) => module.write_host_memory(hpa, &page),
            None => {}
        }
    } else if run == 0 {
        module.write_host_memory(hpa, &call.data);
        // Shorter data stands for a whole operand: the rest of its last unit is zero.
        let rest = call.data.len().next_multiple_of(unit) - call.data.len();
        if let Some(end) = hpa.checked_add(call.data.len() as u64) {
            module.write_host_memory(end, &vec![0; rest]);
        }
    }
}

impl Regs {
    fn of(call: &Seamcall) -> Self {
        let &Seamcall {
            version,
            rcx,
            rdx,
            r8,
            r9,
            r10,
            r11,
            ..
        } = call;
        Self {
            version,
            rcx,
            rdx,
            r8,
            r9,
            r10,
            r11,
        }
    }

    /// Sets every output register to what a TD exit leaves in it.
    pub(crate) fn set_outputs(&mut self, gprs: &Gprs) {
        let &mut Self {
            ref mut rcx,
            ref mut rdx,
            ref mut r8,
            ref mut r9,
            ref mut r10,
            ref mut r11,
            ..
        } = self;
        let targets = [
            (rcx, Gpr::Rcx),
            (rdx, Gpr::Rdx),
            (r8, Gpr::R8),
            (r9, Gpr::R9),
            (r10, Gpr::R10),
            (r11, Gpr::R11),
        ];
        for (target, register) in targets {
            *target = gprs[register];
        }
    }

    /// The operands of the next call of a run.
    fn step(&mut self, call: &Seamcall) {
        if let Some(repeat) = call.repeat {
            self.rcx = self.rcx.wrapping_add_signed(repeat.rcx_stride);
            self.r8 = self.r8.wrapping_add_signed(repeat.r8_stride);
            self.r9 = self.r9.wrapping_add_signed(repeat.r9_stride);
        }
    }

    fn result(&self, status: CompletionStatus, completed: u32) -> SeamcallResult {
        let &Self {
            rcx,
            rdx,
            r8,
            r9,
            r10,
            r11,
            ..
        } = self;
        SeamcallResult {
            rax: status.0,
            rcx,
            rdx,
            r8,
            r9,
            r10,
            r11,
            completed,
        }
    }
}

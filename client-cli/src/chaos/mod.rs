//! `mmuctl chaos`: several VMs at work while calls are busy or late, replies get lost, connections
//! break and processes are killed; then everything has to be right.
//!
//! `plan` says what happens, from a seed; `worker` is the user of one VM; `strike` brings a
//! round's one strike about; `stack` is the two processes. Kills hang on the calls that the
//! module counts and not on the clock, so that a seed repeats as far as VMs that work side by side
//! can be repeated.

mod plan;
mod report;
pub(crate) mod stack;
mod strike;
mod tally;
mod worker;

use std::sync::Arc;
use std::time::{Duration, Instant};

use mirror_proto::mmu::{GetStatsRequest, ListVmsRequest, VmInfo};
use mirror_proto::module::tdx_fault_service_client::TdxFaultServiceClient;
use mirror_proto::module::{
    ClearFaultRulesRequest, GetPlatformRequest, ListFaultRulesRequest, SetFaultRulesRequest,
};
use telemetry::propagate::TracedChannel;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};

use crate::client::{Client, Limits, connect_module_channel, wait, with_deadline};
use crate::error::Error;
use crate::local::ProcessMemory;
use crate::replay;
use crate::stop::Stop;
use plan::{OPS_A_ROUND, Round};
use stack::{READY_LIMIT, Stack};
use tally::Tally;
use worker::Worker;

pub use report::Report;

/// A request without an answer for so long hangs. Longer than the MMU service gives a module that
/// is away, and the time that a batch may take on top.
const HANG: Duration = Duration::from_secs(60);

/// What to play.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Determines workload and faults.
    pub seed: u64,
    /// VMs at work at a time.
    pub vms: usize,
    /// When it is over.
    pub length: Length,
}

/// When a run is over; rounds are whole.
#[derive(Debug, Clone, Copy)]
pub enum Length {
    /// So many rounds.
    Rounds(u64),
    /// The first round that ends after so long.
    Time(Duration),
}

impl Length {
    /// As many rounds as it takes to ask `vms` VMs for so many operations.
    pub fn of_operations(operations: u64, vms: usize) -> Self {
        let round = (vms * OPS_A_ROUND) as u64;
        Self::Rounds(operations.div_ceil(round.max(1)).max(1))
    }
}

/// The connections of a run, for everything but the work of its VMs.
struct Control {
    client: Client,
    faults: TdxFaultServiceClient<TracedChannel>,
}

impl Control {
    async fn connect(stack: &Stack, stop: &Stop) -> Result<Self, Error> {
        let limits = Limits::new(Some(HANG));
        let (mmu, module) = (stack.mmu_url(), stack.module_url());
        let client = Client::connect(mmu, Some(module), None, limits, stop.clone()).await?;
        let channel = connect_module_channel(module, None, limits, stop).await?;
        Ok(Self {
            client,
            faults: TdxFaultServiceClient::new(channel),
        })
    }

    /// The rules of a round, in place of those that are there.
    async fn set_rules(
        &mut self,
        rules: Vec<mirror_proto::module::FaultRule>,
        replace: bool,
    ) -> Result<Vec<u64>, Error> {
        let request = with_deadline(SetFaultRulesRequest { rules, replace }, HANG);
        let answer = self.faults.set_fault_rules(request);
        let set = wait("SetFaultRules", HANG, self.client.stop(), answer).await?;
        Ok(set.rule_ids)
    }

    async fn clear_rules(&mut self) -> Result<(), Error> {
        let request = with_deadline(ClearFaultRulesRequest::default(), HANG);
        let answer = self.faults.clear_fault_rules(request);
        wait("ClearFaultRules", HANG, self.client.stop(), answer).await?;
        Ok(())
    }

    /// How often a rule has fired; brings the tally up to date.
    async fn fired(&mut self, rule_id: u64, tally: &Tally) -> Result<u64, Error> {
        let request = with_deadline(ListFaultRulesRequest {}, HANG);
        let answer = self.faults.list_fault_rules(request);
        let list = wait("ListFaultRules", HANG, self.client.stop(), answer).await?;
        tally.counts().saw_faults(&list.totals.unwrap_or_default());
        let rule = list.rules.iter().find(|rule| rule.rule_id == rule_id);
        Ok(rule.map_or(0, |rule| rule.fired))
    }

    async fn vms(&self) -> Result<Vec<VmInfo>, Error> {
        let list = self
            .client
            .short("ListVms", ListVmsRequest {}, async |mut mmu, request| {
                mmu.list_vms(request).await
            });
        Ok(list.await?.vms)
    }

    /// 4 KiB pages that the module has given out, and the key ids.
    async fn in_use(&self) -> Result<u64, Error> {
        let Some(module) = &self.client.module else {
            return Ok(0);
        };
        let mut module = module.clone();
        let request = with_deadline(GetPlatformRequest {}, HANG);
        let answer = module.get_platform(request);
        let platform = wait("GetPlatform", HANG, self.client.stop(), answer).await?;
        let pages: u64 = platform.pages.iter().map(|count| count.pages_4k).sum();
        Ok(pages + u64::from(platform.hkids_in_use))
    }

    /// Waits until the MMU service serves, on the module that is there now.
    async fn recovered(&self, stack: &Stack) -> Result<(), Error> {
        let wanted = async {
            loop {
                if transport::healthcheck(stack.mmu_url()).await.is_ok()
                    && let Ok(true) = self.is_attached().await
                {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::select! {
            done = tokio::time::timeout(READY_LIMIT, wanted) => done.map_err(|_| Error::NoAnswer {
                call: "recovery",
                limit: READY_LIMIT,
            }),
            () = self.client.stop().asked() => Err(Error::Interrupted),
        }
    }

    async fn is_attached(&self) -> Result<bool, Error> {
        let Some(module) = &self.client.module else {
            return Ok(false);
        };
        let mut module = module.clone();
        let request = with_deadline(GetPlatformRequest {}, HANG);
        let answer = module.get_platform(request);
        let there = wait("GetPlatform", HANG, self.client.stop(), answer).await?;
        let stats = self
            .client
            .short(
                "GetStats",
                GetStatsRequest { vm_id: 0 },
                async |mut mmu, request| mmu.get_stats(request).await,
            )
            .await?;
        Ok(stats.module_instance == there.instance)
    }
}

/// Plays a plan on services of its own.
pub async fn run(plan: &Plan, stop: &Stop) -> Result<Report, Error> {
    let mut stack = Stack::start(stop).await.map_err(Error::Local)?;
    let tally = Arc::new(Tally::new(plan.vms));
    let result = rounds(plan, stop, &mut stack, &tally).await;
    let result = match result {
        Ok(report) => Ok(report),
        // A service that ended by itself is the better reason.
        Err(error) => match stack.obituary().await {
            Some(ended) => Err(Error::Local(ended)),
            None => Err(error),
        },
    };
    stack.stop().await;
    result
}

async fn rounds(
    plan: &Plan,
    stop: &Stop,
    stack: &mut Stack,
    tally: &Arc<Tally>,
) -> Result<Report, Error> {
    let begun = Instant::now();
    let mut control = Control::connect(stack, stop).await?;
    let mut workers = Vec::new();
    for index in 0..plan.vms {
        let client = Control::connect(stack, stop).await?.client;
        workers.push(Worker::new(index, client, Arc::clone(tally)));
    }
    let mut memory = Growth::default();
    let mut number = 0;
    loop {
        let round = Round::new(plan.seed, number, plan.vms);
        workers = one_round(&round, workers, stack, &mut control, tally).await?;
        quiet(&mut control, &mut workers, stack, tally).await?;
        let kills = {
            let counts = tally.counts();
            (counts.mmu_kills, counts.module_kills)
        };
        memory.sample(stack.memory(), kills);
        number += 1;
        let counts = tally.counts().clone();
        tracing::info!(
            round = number,
            operations = counts.operations,
            mismatches = counts.mismatches,
            hung = counts.hung,
            "chaos"
        );
        let is_over = match plan.length {
            Length::Rounds(rounds) => number >= rounds,
            Length::Time(time) => begun.elapsed() >= time,
        };
        if is_over {
            break;
        }
    }
    for worker in &mut workers {
        if let Some(vm_id) = worker.vm() {
            worker.destroy(vm_id).await;
        }
    }
    let leaked_pages = control.in_use().await?;
    let counts = tally.counts().clone();
    Ok(Report::new(
        plan,
        number,
        counts,
        leaked_pages,
        memory,
        begun.elapsed(),
    ))
}

/// All VMs at work, and the strike.
async fn one_round(
    round: &Round,
    workers: Vec<Worker>,
    stack: &mut Stack,
    control: &mut Control,
    tally: &Arc<Tally>,
) -> Result<Vec<Worker>, Error> {
    control.set_rules(round.noise.clone(), true).await?;
    let (arm, armed) = mpsc::channel(1);
    // On this thread: requests wait, they do not work.
    let here = LocalSet::new();
    let mut working = JoinSet::new();
    for (index, mut worker) in workers.into_iter().enumerate() {
        let ops = round.ops[index].clone();
        let strike = (index == round.strike.worker).then(|| (round.strike.at, arm.clone()));
        let play = async move {
            worker.play(&ops, strike).await;
            (index, worker)
        };
        working.spawn_local_on(play, &here);
    }
    drop(arm);
    let (over, is_over) = tokio::sync::watch::channel(false);
    let striking = strike::strike(&round.strike, armed, is_over, stack, control, tally);
    let work = async {
        let mut back = Vec::new();
        while let Some(done) = working.join_next().await {
            // A panic of a worker is one of this program.
            if let Ok(done) = done {
                back.push(done);
            }
        }
        let _ = over.send(true);
        back
    };
    let both = async { tokio::join!(striking, work) };
    let (struck, mut back) = here.run_until(both).await;
    struck?;
    if control.client.stop().is_asked() {
        return Err(Error::Interrupted);
    }
    back.sort_unstable_by_key(|(index, _)| *index);
    Ok(back.into_iter().map(|(_, worker)| worker).collect())
}

/// Nobody works: every VM is compared with the module, and those that nobody uses any more are
/// destroyed.
async fn quiet(
    control: &mut Control,
    workers: &mut [Worker],
    stack: &Stack,
    tally: &Tally,
) -> Result<(), Error> {
    control.recovered(stack).await?;
    control.fired(0, tally).await?;
    control.clear_rules().await?;
    let vms = control.vms().await?;
    for worker in workers.iter_mut() {
        let known = worker
            .vm()
            .is_some_and(|vm_id| vms.iter().any(|vm| vm.vm_id == vm_id));
        if !known {
            worker.forget();
        }
    }
    for vm in vms {
        let user = workers
            .iter()
            .position(|worker| worker.vm() == Some(vm.vm_id));
        let is_lost = vm.state == "dead" || vm.state == "bugged";
        if is_lost {
            let mut counts = tally.counts();
            if vm.state == "bugged" {
                counts.vms_bugged += 1;
                let reason = vm.reason.clone();
                if counts.bugged.len() < 8 && !counts.bugged.contains(&reason) {
                    counts.bugged.push(reason);
                }
            } else {
                counts.vms_lost += 1;
            }
        }
        if vm.state != "dead" {
            audit(control, vm.vm_id, tally).await?;
        }
        // What a request left behind whose answer was lost has no user.
        if is_lost || user.is_none() {
            let by = user.unwrap_or(0);
            workers[by].destroy(vm.vm_id).await;
        }
    }
    Ok(())
}

async fn audit(control: &Control, vm_id: u64, tally: &Tally) -> Result<(), Error> {
    let result = match replay::audit(&control.client, vm_id).await {
        Ok(result) => result,
        Err(Error::Interrupted) => return Err(Error::Interrupted),
        Err(error) => {
            let mut counts = tally.counts();
            counts.broken += 1;
            counts.fail(format!("vm {vm_id}: {}", error.chain()));
            return Ok(());
        }
    };
    let mut counts = tally.counts();
    counts.audits += 1;
    counts.entries += result.entries;
    counts.mismatches += result.mismatches + result.frozen;
    if result.frozen > 0 {
        counts.fail(format!("vm {vm_id}: {} frozen entries", result.frozen));
    }
    for one in &result.first {
        counts.fail(format!(
            "vm {vm_id}: gpa {:#x} level {}: {}",
            one.gpa, one.level, one.reason
        ));
    }
    Ok(())
}

/// How much the resident memory of each process grew since its first quiet moment: the most of all
/// processes that took the part, in bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Growth {
    first: Option<(ProcessMemory, (u64, u64))>,
    mmu: u64,
    module: u64,
    last: Option<ProcessMemory>,
}

impl Growth {
    fn sample(&mut self, now: Option<ProcessMemory>, kills: (u64, u64)) {
        let Some(now) = now else { return };
        self.last = Some(now);
        let Some((first, of)) = &mut self.first else {
            self.first = Some((now, kills));
            return;
        };
        if of.0 == kills.0 {
            self.mmu = self.mmu.max(now.mmu.saturating_sub(first.mmu));
        } else {
            first.mmu = now.mmu;
        }
        if of.1 == kills.1 {
            self.module = self.module.max(now.module.saturating_sub(first.module));
        } else {
            first.module = now.module;
        }
        *of = kills;
    }
}

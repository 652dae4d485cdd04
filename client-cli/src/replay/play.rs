//! Sends the accesses of a plan and counts the answers.
//!
//! Order: one `HandleFaults` stream is served in order, so the recorded order needs one stream,
//! with several messages under way, each with the runs of as many vCPUs as it has room for. `per-vcpu` has a stream for each vCPU. Unmaps wait for every
//! answer before them.
//!
//! A fault that ends with RET_PF_RETRY is sent again, as the guest's next attempt would be.
//!
//! A guest that accepts does so before its next access: each message waits for the answers of the
//! one before it and for what the guest made of them.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use mirror_proto::mmu::{
    Fault, FaultOutcome, FaultRun, HandleFaultsRequest, HandleFaultsResponse, PunchHoleRequest,
    RetPf, UnmapHvaRequest,
};
use tdx_defs::{PAGE_SIZE, Visibility};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::accept::{Accepted, Guest};
use super::meter::{Bin, Meter};
use super::plan::{Plan, PlannedFault, UnmapStep};
use super::vm::TdVm;
use crate::args::Order;
use crate::client::Client;
use crate::error::Error;
use crate::progress::Progress;
use crate::tally::Tally;

const HANDLE_FAULTS: &str = "HandleFaults";
/// Messages of one stream that are under way.
const IN_FLIGHT: usize = 8;
/// Streams that run side by side.
const MAX_STREAMS: usize = 64;
/// Faults in a message: the limit of the wire.
const MAX_BATCH: usize = 4096;
/// How often a fault that ends with RET_PF_RETRY is sent again.
const MAX_RETRIES: u32 = 64;

/// What came of the faults.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Played {
    /// Faults that were answered.
    pub faults: u64,
    /// By RET_PF name, without its prefix.
    pub ret_pf: BTreeMap<&'static str, u64>,
    /// Faults that left KVM_RUN, by errno name.
    pub errors: BTreeMap<String, u64>,
    /// Why, for the first of them.
    pub first_error: Option<String>,
    /// Faults that ended neither FIXED nor SPURIOUS and were not listed one by one.
    pub unlisted: u64,
    /// How often a fault was sent again.
    pub retries: u64,
    /// Unmaps that were applied.
    pub unmaps: u64,
    /// What a guest that accepts made of its pages; `None` of one that does not.
    pub accepted: Option<Accepted>,
    /// What all of it cost.
    pub tally: Tally,
    /// How long it took.
    pub elapsed: Duration,
}

impl Played {
    fn absorb(&mut self, other: Self) {
        self.faults += other.faults;
        for (name, count) in other.ret_pf {
            *self.ret_pf.entry(name).or_default() += count;
        }
        for (name, count) in other.errors {
            *self.errors.entry(name).or_default() += count;
        }
        self.first_error = self.first_error.take().or(other.first_error);
        self.unlisted += other.unlisted;
        self.retries += other.retries;
        self.unmaps += other.unmaps;
        if let Some(accepted) = other.accepted {
            self.accepted.get_or_insert_default().merge(accepted);
        }
        self.tally.merge(other.tally);
    }

    fn count(&mut self, name: &'static str, count: u32) {
        *self.ret_pf.entry(name).or_default() += u64::from(count);
        self.faults += u64::from(count);
    }
}

/// Plays a plan on a VM.
#[derive(Debug, Clone)]
pub struct Player {
    client: Client,
    vm: Arc<TdVm>,
    progress: Progress,
    accept: bool,
    /// Locked for a few additions a message.
    meter: Arc<Mutex<Meter>>,
    started: Instant,
}

impl Player {
    /// A player for a VM that was built for the plan.
    pub fn new(client: &Client, vm: Arc<TdVm>, progress: Progress) -> Self {
        Self {
            client: client.clone(),
            vm,
            progress,
            accept: false,
            meter: Arc::default(),
            started: Instant::now(),
        }
    }

    /// Whether the guest accepts each private page that KVM mapped for it.
    #[must_use]
    pub fn accepting(self, accept: bool) -> Self {
        Self { accept, ..self }
    }

    /// What was measured so far.
    pub fn meter(&self) -> Meter {
        self.lock_meter().clone()
    }

    fn lock_meter(&self) -> MutexGuard<'_, Meter> {
        self.meter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn measure(&self, sent: &Sent, answer: &HandleFaultsResponse) {
        let at = u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let what = Bin {
            faults: sent.faults.len() as u64,
            messages: answer.counts.as_ref().map_or(0, |counts| counts.rpcs),
        };
        let mut meter = self.lock_meter();
        meter.timeline.add(at, what);
        meter.messages.add(sent.at.elapsed());
    }

    /// Plays all segments.
    pub async fn play(&self, plan: &Plan, order: Order) -> Result<Played, Error> {
        let started = Instant::now();
        let mut played = Played::default();
        let mut lane = Lane::new(self);
        for segment in &plan.segments {
            match order {
                // One vCPU's run at a time: its guest accepts before the next access.
                Order::Recorded if self.accept => {
                    for run in runs(&segment.faults) {
                        lane.send(run).await?;
                    }
                    lane.drain().await?;
                }
                Order::Recorded => {
                    for message in messages(&segment.faults) {
                        lane.send(message).await?;
                    }
                    lane.drain().await?;
                }
                Order::PerVcpu => played.absorb(self.side_by_side(plan, &segment.faults).await?),
            }
            if let Some(unmap) = &segment.unmap {
                self.unmap(unmap, &mut played).await?;
            }
        }
        played.absorb(lane.finish().await?);
        for name in ["FIXED", "SPURIOUS"] {
            played.ret_pf.entry(name).or_default();
        }
        played.elapsed = started.elapsed();
        Ok(played)
    }

    async fn side_by_side(&self, plan: &Plan, faults: &[PlannedFault]) -> Result<Played, Error> {
        let mut by_vcpu = vec![Vec::new(); plan.vcpus.len()];
        for fault in faults {
            if let Some(own) = by_vcpu.get_mut(fault.vcpu) {
                own.push(*fault);
            }
        }
        let streams = Arc::new(Semaphore::new(MAX_STREAMS));
        let mut tasks = JoinSet::new();
        for own in by_vcpu.into_iter().filter(|own| !own.is_empty()) {
            let (player, streams) = (self.clone(), streams.clone());
            tasks.spawn(async move {
                // The semaphore is never closed.
                let _permit = streams.acquire_owned().await;
                let mut lane = Lane::new(&player);
                for batch in own.chunks(MAX_BATCH) {
                    lane.send(batch).await?;
                }
                lane.finish().await
            });
        }
        let mut played = Played::default();
        while let Some(lane) = tasks.join_next().await {
            match lane {
                Ok(lane) => played.absorb(lane?),
                // A bug in this program: let it surface.
                Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                Err(_) => return Err(Error::Interrupted),
            }
        }
        Ok(played)
    }

    /// The notifier for shared pages, then the hole for private ones: what a VMM that discards
    /// memory causes.
    async fn unmap(&self, unmap: &UnmapStep, played: &mut Played) -> Result<(), Error> {
        let vm_id = self.vm.vm_id;
        let message = UnmapHvaRequest {
            vm_id,
            start: unmap.range.start,
            end: unmap.range.end,
        };
        let answer = self
            .client
            .long("UnmapHva", message, async |mut mmu, request| {
                mmu.unmap_hva(request).await
            })
            .await?;
        played.tally.add(answer.counts.as_ref());
        for hole in &unmap.holes {
            let message = PunchHoleRequest {
                vm_id,
                slot_id: hole.slot,
                offset: hole.offset,
                size: hole.size,
            };
            let answer = self
                .client
                .long("PunchHole", message, async |mut mmu, request| {
                    mmu.punch_hole(request).await
                })
                .await?;
            played.tally.add(answer.counts.as_ref());
        }
        played.unmaps += 1;
        Ok(())
    }
}

/// Runs of one vCPU, each as long as a message may be.
fn runs(faults: &[PlannedFault]) -> impl Iterator<Item = &[PlannedFault]> {
    faults
        .chunk_by(|a, b| a.vcpu == b.vcpu)
        .flat_map(|run| run.chunks(MAX_BATCH))
}

/// Messages of whole runs. A run is not cut to fill a message up: what the service makes of it
/// would be another number of calls.
fn messages(faults: &[PlannedFault]) -> impl Iterator<Item = &[PlannedFault]> {
    let mut rest = faults;
    std::iter::from_fn(move || {
        let mut length = 0;
        for run in runs(rest) {
            if length + run.len() > MAX_BATCH {
                break;
            }
            length += run.len();
        }
        let message;
        (message, rest) = rest.split_at(length);
        (!message.is_empty()).then_some(message)
    })
}

/// One `HandleFaults` stream, opened with its first message.
struct Lane<'a> {
    player: &'a Player,
    stream: Option<(
        mpsc::Sender<HandleFaultsRequest>,
        Streaming<HandleFaultsResponse>,
    )>,
    waiting: VecDeque<Sent>,
    again: VecDeque<Sent>,
    /// Faults that left nothing mapped, of those since the guest last accepted.
    unmapped: HashSet<u64>,
    guest: Option<Guest<'a>>,
    next_tag: u64,
    played: Played,
}

/// A message under way.
#[derive(Debug, Clone)]
struct Sent {
    tag: u64,
    attempt: u32,
    /// With the service's number of the vCPU.
    faults: Vec<(u32, Fault)>,
    at: Instant,
}

impl<'a> Lane<'a> {
    fn new(player: &'a Player) -> Self {
        Self {
            player,
            stream: None,
            waiting: VecDeque::new(),
            again: VecDeque::new(),
            unmapped: HashSet::new(),
            guest: player
                .accept
                .then(|| Guest::new(&player.client, player.vm.vm_id)),
            next_tag: 1,
            played: Played::default(),
        }
    }

    /// Sends faults; waits while too many messages are under way.
    async fn send(&mut self, batch: &[PlannedFault]) -> Result<(), Error> {
        let vm = &self.player.vm;
        let fault = |planned: &PlannedFault| {
            let fault = Fault {
                gpa: planned.gpa,
                qualification: planned.qualification,
                ..Fault::default()
            };
            (vm.vcpu_id(planned.vcpu), fault)
        };
        self.post(Sent {
            tag: 0,
            attempt: 0,
            faults: batch.iter().map(fault).collect(),
            at: Instant::now(),
        })
        .await?;
        self.accept(batch).await
    }

    /// Lets the guest accept what a run of one vCPU mapped in the mirror root.
    async fn accept(&mut self, batch: &[PlannedFault]) -> Result<(), Error> {
        if self.guest.is_none() {
            return Ok(());
        }
        self.drain().await?;
        let Some(guest) = &mut self.guest else {
            return Ok(());
        };
        let unmapped = std::mem::take(&mut self.unmapped);
        let is_mapped = |fault: &&PlannedFault| {
            fault.visibility == Visibility::Private && !unmapped.contains(&fault.gpa)
        };
        let Some(first) = batch.first() else {
            return Ok(());
        };
        let pages = batch.iter().filter(is_mapped);
        let pages = pages.map(|fault| fault.gpa & !(PAGE_SIZE - 1)).collect();
        guest
            .accept(self.player.vm.vcpu_id(first.vcpu), pages)
            .await
    }

    /// Waits for all answers, those of repeated faults included.
    async fn drain(&mut self) -> Result<(), Error> {
        loop {
            while !self.waiting.is_empty() {
                self.receive().await?;
            }
            match self.again.pop_front() {
                Some(sent) => self.post(sent).await?,
                None => return Ok(()),
            }
        }
    }

    async fn finish(mut self) -> Result<Played, Error> {
        self.drain().await?;
        // Ends the stream in order: end of requests, then the end of answers.
        if let Some((requests, mut answers)) = self.stream.take() {
            drop(requests);
            self.player.client.next(HANDLE_FAULTS, &mut answers).await?;
        }
        if let Some(guest) = self.guest {
            self.played.accepted = Some(guest.accepted);
            self.played.tally.merge(guest.tally);
        }
        Ok(self.played)
    }

    async fn post(&mut self, mut sent: Sent) -> Result<(), Error> {
        while self.waiting.len() >= IN_FLIGHT {
            self.receive().await?;
        }
        sent.tag = self.next_tag;
        sent.at = Instant::now();
        self.next_tag += 1;
        let mut runs = sent
            .faults
            .chunk_by(|a, b| a.0 == b.0)
            .map(|run| (run[0].0, run.iter().map(|(_, fault)| *fault).collect()));
        let (vcpu_id, faults) = runs.next().unwrap_or_default();
        let message = HandleFaultsRequest {
            vm_id: self.player.vm.vm_id,
            vcpu_id,
            faults,
            more: runs
                .map(|(vcpu_id, faults)| FaultRun { vcpu_id, faults })
                .collect(),
            tag: sent.tag,
            ..Default::default()
        };
        self.waiting.push_back(sent);
        match &self.stream {
            // A closed stream has its reason among the answers: receive() finds it.
            Some((requests, _)) => {
                let _ = requests.send(message).await;
            }
            None => self.open(message).await?,
        }
        Ok(())
    }

    async fn open(&mut self, first: HandleFaultsRequest) -> Result<(), Error> {
        let (requests, queue) = mpsc::channel(IN_FLIGHT);
        // Before the call, since a service may answer only once a message is there. Cannot fail:
        // the queue is empty and open.
        let _ = requests.send(first).await;
        let client = &self.player.client;
        let answers = client
            .open(
                HANDLE_FAULTS,
                ReceiverStream::new(queue),
                async |mut mmu, queue| mmu.handle_faults(queue).await,
            )
            .await?;
        self.stream = Some((requests, answers));
        Ok(())
    }

    /// Takes one answer.
    async fn receive(&mut self) -> Result<(), Error> {
        let truncated = || Error::Truncated {
            call: HANDLE_FAULTS,
        };
        let (_, answers) = self.stream.as_mut().ok_or_else(truncated)?;
        let answer = self
            .player
            .client
            .next(HANDLE_FAULTS, answers)
            .await?
            .ok_or_else(truncated)?;
        let at = self.waiting.iter().position(|sent| sent.tag == answer.tag);
        let sent = at
            .and_then(|at| self.waiting.remove(at))
            .ok_or_else(truncated)?;
        self.player.measure(&sent, &answer);
        self.played.tally.add(answer.counts.as_ref());
        self.played.count("FIXED", answer.fixed);
        self.played.count("SPURIOUS", answer.spurious);
        let mut retry = Vec::new();
        for outcome in &answer.others {
            let fault = usize::try_from(outcome.index)
                .ok()
                .and_then(|at| sent.faults.get(at));
            match fault {
                Some(fault) if is_retry(outcome) && sent.attempt < MAX_RETRIES => {
                    retry.push(*fault)
                }
                fault => {
                    self.unmapped.extend(fault.map(|(_, fault)| fault.gpa));
                    self.outcome(outcome);
                }
            }
        }
        let listed = u32::try_from(answer.others.len()).unwrap_or(u32::MAX);
        let unlisted = u64::from(answer.others_count.saturating_sub(listed));
        self.played.unlisted += unlisted;
        self.played.faults += unlisted;
        let answered = (sent.faults.len() - retry.len()) as u64;
        self.player.progress.advance(answered);
        if !retry.is_empty() {
            self.played.retries += retry.len() as u64;
            self.again.push_back(Sent {
                faults: retry,
                attempt: sent.attempt + 1,
                ..sent
            });
        }
        Ok(())
    }

    fn outcome(&mut self, outcome: &FaultOutcome) {
        if outcome.errno == 0 {
            return self.played.count(ret_pf_name(outcome.ret_pf()), 1);
        }
        self.played.faults += 1;
        *self
            .played
            .errors
            .entry(errno_name(outcome.errno))
            .or_default() += 1;
        if self.played.first_error.is_none() {
            self.played.first_error = Some(outcome.reason.clone());
        }
    }
}

fn is_retry(outcome: &FaultOutcome) -> bool {
    outcome.errno == 0 && outcome.ret_pf() == RetPf::Retry
}

/// The kernel's name without `RET_PF_`.
pub(crate) fn ret_pf_name(ret_pf: RetPf) -> &'static str {
    let name = ret_pf.as_str_name();
    name.strip_prefix("RET_PF_").unwrap_or(name)
}

/// The names of the errors that KVM_RUN ends with; of other errors the number.
fn errno_name(errno: i32) -> String {
    let name = match errno.unsigned_abs() {
        2 => "ENOENT",
        4 => "EINTR",
        5 => "EIO",
        7 => "E2BIG",
        11 => "EAGAIN",
        12 => "ENOMEM",
        14 => "EFAULT",
        16 => "EBUSY",
        17 => "EEXIST",
        22 => "EINVAL",
        95 => "EOPNOTSUPP",
        133 => "EHWPOISON",
        number => return number.to_string(),
    };
    name.to_owned()
}

#[cfg(test)]
#[path = "play_tests.rs"]
mod tests;

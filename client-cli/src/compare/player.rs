//! Plays a recording against the services, step by step.

use mirror_proto::mmu::GetStatsResponse;

use super::matching::{Match, compare, without_lost_races};
use super::pages::Pages;
use super::recording::{Recording, Step};
use super::report::{Difference, Verdict};
use super::seen::{Seen, seen};
use super::service::{Happened, RecordedVm};
use super::settings::Settings;
use super::spte::Format;
use super::stimuli::{self, HostMemory};
use super::verbs::{self, Context, Done};
use crate::client::Client;
use crate::error::Error;

/// How long the clean-up behind an error may take.
const CLEANUP_LIMIT: std::time::Duration = std::time::Duration::from_secs(20);
const NO_VM: &str = "there is no VM";

/// Plays recordings, one VM at a time.
pub struct Player {
    client: Client,
    running: Option<Running>,
}

/// A VM in the middle of its recording.
struct Running {
    vm: RecordedVm,
    host: HostMemory,
    settings: Settings,
    pages: Pages,
    /// Where its steps begin.
    first: usize,
    /// The last statistics of the recording, and the model's of that moment.
    before: (std::collections::BTreeMap<String, u64>, GetStatsResponse),
}

impl Player {
    /// A player that asks these services.
    pub fn new(client: Client) -> Self {
        Self {
            client,
            running: None,
        }
    }

    /// Plays every step and tells what came of it. An error is the services', not the recording's;
    /// whatever was created is destroyed.
    pub async fn play(
        &mut self,
        recording: &Recording,
        mut tell: impl FnMut(&Step, Verdict),
    ) -> Result<(), Error> {
        let played = self.steps(&recording.steps, &mut tell).await;
        let Some(running) = self.running.take() else {
            return played;
        };
        let vm_id = running.vm.vm_id;
        let mut vm = running.vm;
        if played.is_err() {
            vm.client = self.client.for_cleanup(CLEANUP_LIMIT);
        }
        let destroyed = vm.destroy().await.map(drop);
        match (played, destroyed) {
            (Ok(()), destroyed) => destroyed,
            (played, Ok(())) => played,
            (played, Err(also)) => {
                tracing::warn!(vm = vm_id, "not destroyed: {}", also.chain());
                played
            }
        }
    }

    async fn steps(
        &mut self,
        steps: &[Step],
        tell: &mut impl FnMut(&Step, Verdict),
    ) -> Result<(), Error> {
        for (at, step) in steps.iter().enumerate() {
            let verdict = match step.verb().as_str() {
                "CREATE_VM" => self.create(steps, at).await?,
                "VM_DESTROY" | "DESTROY_VM" | "CLOSE_VM" => self.destroy(step).await?,
                _ => match &mut self.running {
                    Some(running) => running.step(at, step).await?,
                    None => Verdict::Skipped(NO_VM.into()),
                },
            };
            tell(step, verdict);
        }
        Ok(())
    }

    async fn create(&mut self, steps: &[Step], at: usize) -> Result<Verdict, Error> {
        if let Some(running) = self.running.take() {
            running.vm.destroy().await?;
        }
        let is_next = |step: &Step| step.verb() == "CREATE_VM";
        let more = steps[at + 1..].iter().position(is_next);
        let end = more.map_or(steps.len(), |more| at + 1 + more);
        let settings = Settings::of(&steps[at..end]);
        let vm = match RecordedVm::create(&self.client, &settings).await? {
            Ok(vm) => vm,
            Err(errno) => {
                let difference = Difference::new("errno", 0, errno);
                return Ok(Verdict::Different(difference));
            }
        };
        let mut running = Running {
            vm,
            host: HostMemory {
                nx_huge_pages: settings.nx_huge_pages,
                ..HostMemory::default()
            },
            settings,
            pages: Pages::default(),
            first: at,
            before: Default::default(),
        };
        let verdict = running.judge(&steps[at], Done::default()).await;
        self.running = Some(running);
        verdict
    }

    async fn destroy(&mut self, step: &Step) -> Result<Verdict, Error> {
        let Some(mut running) = self.running.take() else {
            return Ok(Verdict::Skipped(NO_VM.into()));
        };
        let effects = stimuli::play(&mut running.vm, &mut running.host, step, None).await;
        let effects = match effects {
            Ok(effects) => effects,
            Err(error) => {
                self.running = Some(running);
                return Err(error);
            }
        };
        let (errno, happened) = running.vm.destroy().await?;
        let done = Done {
            errno,
            skip: effects.skip,
            ..Done::default()
        };
        let format = running.settings.format;
        Ok(verdict(
            format,
            &mut running.pages,
            step,
            done,
            &happened,
            None,
        ))
    }
}

impl Running {
    async fn step(&mut self, at: usize, step: &Step) -> Result<Verdict, Error> {
        let context = Context {
            vm: &mut self.vm,
            host: &mut self.host,
            settings: &self.settings,
            at: at - self.first,
            step,
        };
        let done = verbs::play(context).await?;
        self.judge(step, done).await
    }

    async fn judge(&mut self, step: &Step, done: Done) -> Result<Verdict, Error> {
        let happened = self.vm.end_step().await?;
        let stats = happened.stats.clone().unwrap_or_default();
        let counted = (!step.stat.is_empty()).then(|| {
            let before = std::mem::replace(&mut self.before, (step.stat.clone(), stats.clone()));
            statistics(&before.0, &before.1, step, &stats)
        });
        let pages = &mut self.pages;
        let format = self.settings.format;
        Ok(verdict(
            format,
            pages,
            step,
            done,
            &happened,
            counted.flatten(),
        ))
    }
}

/// The first statistic that moved in another way than recorded since the last time.
fn statistics(
    recorded_before: &std::collections::BTreeMap<String, u64>,
    model_before: &GetStatsResponse,
    step: &Step,
    model: &GetStatsResponse,
) -> Option<Difference> {
    step.stat.iter().find_map(|(name, &value)| {
        let (now, then) = (statistic(model, name)?, statistic(model_before, name)?);
        let recorded = recorded_before.get(name).copied().unwrap_or(0);
        let moved = |now: u64, then: u64| i128::from(now) - i128::from(then);
        let (expected, got) = (moved(value, recorded), moved(now, then));
        let signed = |value: i128| format!("{value:+}");
        (expected != got).then(|| Difference::new(name, signed(expected), signed(got)))
    })
}

/// A statistic that the model keeps.
fn statistic(stats: &GetStatsResponse, name: &str) -> Option<u64> {
    let counts = stats.counts.clone().unwrap_or_default();
    Some(match name {
        "pages_4k" => stats.pages_4k,
        "pages_2m" => stats.pages_2m,
        "pages_1g" => stats.pages_1g,
        "pf_taken" => counts.pf_taken,
        "pf_fixed" => counts.pf_fixed,
        "pf_fast" => counts.pf_fast,
        "pf_spurious" => counts.pf_spurious,
        "pf_emulate" => counts.pf_emulate,
        "pf_mmio_spte_created" => counts.pf_mmio_spte_created,
        "remote_tlb_flush_requests" => stats.remote_tlb_flush_requests,
        "nx_lpage_splits" => stats.nx_lpage_splits,
        _ => return None,
    })
}

/// What a step comes to. Pages are learnt from every step, also from one that is not judged.
fn verdict(
    format: Format,
    pages: &mut Pages,
    step: &Step,
    done: Done,
    happened: &Happened,
    counted: Option<Difference>,
) -> Verdict {
    let lines = step.lines.iter().map(|line| (&*line.name, &*line.text));
    let recorded = read(format, lines);
    let records = &happened.records;
    let model = read(
        Format::Ept,
        records.iter().map(|record| (&*record.name, &*record.text)),
    );
    let (mut recorded, model) = match (recorded, model) {
        (Ok(recorded), Ok(model)) => (recorded, model),
        (Err(reason), _) | (_, Err(reason)) => return Verdict::Skipped(reason),
    };
    if done.vcpus > 1 {
        without_lost_races(&mut recorded, &model, done.vcpus);
    }
    let events = compare(pages, &recorded, &model);
    if step.lost > 0 {
        return Verdict::Skipped(format!("the recorder lost {} events here", step.lost));
    }
    if happened.lost > 0 {
        return Verdict::Skipped(format!(
            "the model's events did not fit, {} were lost",
            happened.lost
        ));
    }
    if let Some(reason) = done.skip {
        return Verdict::Skipped(reason);
    }
    let expected = step
        .outcome
        .map(|outcome| if outcome.rc < 0 { outcome.errno } else { 0 });
    if let Some(expected) = expected.filter(|errno| *errno != done.errno) {
        return Verdict::Different(Difference::new("errno", expected, done.errno));
    }
    match (done.difference.or(counted), events) {
        (
            _,
            Match::Different {
                what,
                expected,
                got,
            },
        ) => Verdict::Different(Difference {
            what,
            expected,
            got,
        }),
        (Some(difference), _) => Verdict::Different(difference),
        (None, Match::Same) => Verdict::Same,
        (None, Match::Reordered) => Verdict::Reordered,
    }
}

fn read<'a>(
    format: Format,
    events: impl Iterator<Item = (&'a str, &'a str)>,
) -> Result<Vec<Seen>, String> {
    events
        .filter_map(|(name, text)| seen(format, name, text))
        .collect()
}

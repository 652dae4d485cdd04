//! `mmuctl bench`: the cost of the system, each figure beside its floor from the same run.
//!
//! Absolute times belong to the machine. What is compared is measured side by side: in each repeat
//! first one, then the other, and the ratio is that of the medians. Counts are exact.
//!
//! | file | content |
//! |---|---|
//! | `in_process` | both libraries in this process: the floor of everything that crosses a wire |
//! | `remote` | VMs behind the two services |
//! | `memory` | what a page costs in both processes |
//! | `plot` | figures as a drawing |
//! | `figure` | medians, ratios, and how they are told |
//! | the others | one benchmark each |

mod build;
mod fault;
mod figure;
mod growth;
mod hit;
mod in_process;
mod life;
mod memory;
mod overload;
mod plot;
mod ranges;
mod raw;
mod remote;
mod restart;
mod scale;
mod scatter;
mod trace;

use std::time::{Duration, Instant};

pub use figure::Figure;
pub use in_process::platform_of;
pub use overload::OPTIONS as OVERLOAD_OPTIONS;
pub use plot::plot;

use crate::client::Client;
use crate::error::Error;
use crate::local::ProcessMemory;
use crate::progress::Progress;
use crate::session::Session;

/// Which benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Name {
    /// A private fault that the mirror answers, beside a bare walk of the same tables
    Hit,
    /// One cold private fault through the module link, beside a ping-pong on an open stream
    Fault,
    /// Prefault of a range, beside both libraries in one process, and beside mode kernel
    Populate,
    /// Faults in random order through the fault stream, beside both libraries in one process
    Scatter,
    /// One TD populated, audited, converted and destroyed: for sizes up to a terabyte
    Life,
    /// What a page costs in TDs from 2 MiB to --size, time and memory
    Growth,
    /// Conversion of a populated range to shared, beside its population
    Convert,
    /// A measured image, beside hashing the same bytes
    Build,
    /// Two vCPUs beside one: disjoint regions, one region, one page
    Scale,
    /// Calls with ten times the clients that are admitted, beside as many as are
    Overload,
    /// What tracing costs: faults through the closed gate, fault messages with one in a hundred traced,
    /// and populating with spans of every message
    Trace,
    /// Restart of mmu-service after kill -9 with a populated TD, beside one without VMs; a change that
    /// is written down, beside one that is not
    Restart,
    /// The floors by themselves
    Raw,
}

/// What to measure.
#[derive(Debug, Clone, Copy)]
pub struct Plan {
    /// Which benchmark.
    pub name: Name,
    /// Bytes of guest memory; each benchmark has its own default.
    pub size: Option<u64>,
    /// Repeats that count.
    pub repeats: u32,
    /// Repeats before them that do not.
    pub warm_up: u32,
}

impl Plan {
    fn size(&self, default: u64) -> u64 {
        self.size.unwrap_or(default)
    }

    /// Runs `repeat` as often as planned; only what it returns after the warm-up counts.
    async fn repeat<T>(
        &self,
        progress: &Progress,
        mut repeat: impl AsyncFnMut() -> Result<T, Error>,
    ) -> Result<Vec<T>, Error> {
        let mut samples = Vec::new();
        for at in 0..self.warm_up + self.repeats {
            let sample = repeat().await?;
            if at >= self.warm_up {
                samples.push(sample);
            }
            progress.advance(1);
        }
        Ok(samples)
    }
}

/// Where the module listens, for benchmarks that have a link of their own.
pub type ModuleUrl<'a> = &'a str;

/// Resident memory of both processes, if they belong to this command.
pub type Memory<'a> = &'a dyn Fn() -> Option<ProcessMemory>;

/// Runs one benchmark on the services of a session.
pub async fn run(
    session: &Session,
    client: &Client,
    memory: Memory<'_>,
    plan: Plan,
) -> Result<Vec<Figure>, Error> {
    let module = session.module_url();
    let progress = Progress::new("repeats", u64::from(plan.warm_up + plan.repeats));
    match plan.name {
        Name::Hit => hit::run(plan, &progress).await,
        Name::Fault => fault::run(module, plan, &progress).await,
        Name::Populate => ranges::populate(client, memory, plan, &progress).await,
        Name::Life => life::run(client, memory, plan, &progress).await,
        Name::Growth => growth::run(client, memory, plan, &progress).await,
        Name::Scatter => scatter::run(client, plan, &progress).await,
        Name::Convert => ranges::convert(client, plan, &progress).await,
        Name::Build => build::run(client, plan, &progress).await,
        Name::Scale => scale::run(plan, &progress).await,
        Name::Overload => overload::run(session, client, plan, &progress).await,
        Name::Trace => trace::run(client, plan, &progress).await,
        Name::Restart => restart::run(client, plan, &progress).await,
        Name::Raw => raw::run(module, plan, &progress).await,
    }
}

/// How long `work` takes.
fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let start = Instant::now();
    let done = work();
    (done, start.elapsed())
}

//! `mmuctl`: drives and inspects the TDX mirror MMU, and replays recorded page faults.
//!
//! The binary is [`cli_main`]. A command is parsed by [`args`], gets its services from a
//! [`session`] (given by URL, or started as children by [`local`]), asks them through [`client`],
//! and ends in an [`output::Answer`]. [`trace`] reads recordings and [`replay`] plays them;
//! [`compare`] holds a real KVM against the model; [`tdvf`] reads firmware images.
//!
//! Invariants
//! - M1  stdout holds the result and nothing else; with `--output json` exactly one object.
//! - M2  Whatever a command created for its own use is gone when it ends: VMs of `replay` and
//!   `demo`, processes and sockets of `--local`.

pub mod args;
pub mod bench;
pub mod certs;
pub mod chaos;
pub mod client;
mod commands;
pub mod compare;
pub mod conformance;
pub mod error;
pub mod fuzz;
pub mod local;
pub mod output;
mod progress;
pub mod replay;
pub mod session;
pub mod spans;
pub mod stop;
pub mod tally;
pub mod tdvf;
pub mod trace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;
use serde_json::Value;
use telemetry::TraceIds;
use telemetry::watch::Watch;
use tracing::Instrument as _;

use args::{Cli, Command, Format, Globals};
use error::Error;
use local::child::{self, Role};
use output::Answer;
use session::Session;
use spans::SpanTree;
use stop::Stop;

/// Name of the program in traces.
const SERVICE: &str = "mmuctl";
/// Threads of the runtime for commands that work side by side.
const WORKERS: usize = 2;

/// The program: parses `args`, the program's name first, and runs the command.
pub fn cli_main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let args: Vec<OsString> = args.into_iter().collect();
    if let [program, first, options @ ..] = &args[..]
        && let Some(role) = Role::from_argument(first)
    {
        return child::run(role, program.clone(), options.to_vec());
    }
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help goes to stdout, mistakes to stderr; nobody is left to tell when that fails.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failed {
            error,
            trace,
            spans,
        }) => {
            eprintln!("mmuctl: {}", error.chain());
            if let Some(spans) = spans {
                eprintln!("\n{}\n", spans.trim_end());
            }
            if let Some(trace) = trace {
                eprintln!("{trace}");
            }
            ExitCode::from(error.exit_code())
        }
    }
}

/// Why a command failed, and where its trace is.
struct Failed {
    error: Box<Error>,
    trace: Option<String>,
    /// What was asked to be explained, as a tree for people.
    spans: Option<String>,
}

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self {
            error: Box::new(error),
            trace: None,
            spans: None,
        }
    }
}

fn run(cli: &Cli) -> Result<(), Failed> {
    match &cli.command {
        Command::Completions { shell } => {
            return Ok(output::print(&commands::completions(*shell))?);
        }
        Command::Explain(args) => {
            return Ok(commands::explain(args).print(cli.globals.output)?);
        }
        Command::Scenario(command) => {
            return Ok(commands::scenario(command)?.finish(cli.globals.output)?);
        }
        Command::Certs(args) => {
            return Ok(commands::certs(args)?.finish(cli.globals.output)?);
        }
        Command::Man => return Ok(output::print(&commands::manual()?)?),
        _ => {}
    }
    let telemetry = telemetry::init_with(SERVICE, "warn", TraceIds::Always).map_err(Error::from)?;
    // One thread has an answer in half the time of several, where each hands it to the next.
    let mut runtime = match cli.command.works_side_by_side() {
        true => tokio::runtime::Builder::new_multi_thread(),
        false => tokio::runtime::Builder::new_current_thread(),
    };
    let runtime = runtime
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let result = runtime.block_on(answer(cli));
    // A thread that still reads a terminal must not hold the end up.
    runtime.shutdown_background();
    telemetry.shutdown();
    Ok(result?.finish(cli.globals.output)?)
}

/// Opens the services, runs the command in its span, and closes them again.
async fn answer(cli: &Cli) -> Result<Answer, Failed> {
    let session = Session::open(&cli.globals, &cli.command, Stop::on_signal()).await?;
    let work = async {
        let trace_id = cli
            .command
            .span_name()
            .and_then(|_| telemetry::current_trace_id());
        let watch = if cli.command.explains() {
            Watch::begin_current()
        } else {
            None
        };
        let answer = commands::run(&session, &cli.command).await;
        (answer, trace_id, watch)
    };
    let (result, trace_id, watch) = match cli.command.span_name() {
        Some(name) => {
            work.instrument(tracing::info_span!("mmuctl", otel.name = name))
                .await
        }
        None => work.await,
    };
    // Behind the end of the command's own span, so that it is among those that are shown.
    let tree = watch.map(|watch| SpanTree::new(watch.take()));
    let result = result.map(|answer| match &tree {
        Some(tree) => with_spans(answer, tree),
        None => answer,
    });
    let result = session.close(result).await;
    let result = match trace_id {
        Some(trace_id) => with_trace(result, &trace_id, &cli.globals),
        None => result.map_err(Failed::from),
    };
    result.map_err(|failed| Failed {
        spans: tree.as_ref().map(SpanTree::text),
        ..failed
    })
}

fn with_spans(mut answer: Answer, tree: &SpanTree) -> Answer {
    answer.text = format!("{}\n\n{}", answer.text.trim_end(), tree.text());
    if let Value::Object(object) = &mut answer.json {
        object.insert("spans".into(), tree.to_json());
    }
    answer
}

/// Names the trace of a command, whatever came of it.
fn with_trace(
    result: Result<Answer, Error>,
    trace_id: &str,
    globals: &Globals,
) -> Result<Answer, Failed> {
    let jaeger = globals.jaeger.as_deref().filter(|url| !url.is_empty());
    let link = jaeger.map(|jaeger| spans::jaeger_link(jaeger, trace_id));
    let line = match &link {
        Some(link) => format!("trace {trace_id} {link}"),
        None => format!("trace {trace_id}"),
    };
    let mut answer = result.map_err(|error| Failed {
        error: Box::new(error),
        trace: Some(line.clone()),
        spans: None,
    })?;
    if globals.output == Format::Table {
        eprintln!("{line}");
    }
    if let Value::Object(object) = &mut answer.json {
        object.insert("trace_id".into(), trace_id.into());
        if let Some(link) = link {
            object.insert("trace_url".into(), link.into());
        }
    }
    Ok(answer)
}

//! `mmuctl`: drives and inspects the TDX mirror MMU, and replays recorded page faults.
//!
//! The binary is [`cli_main`]. A command is parsed by [`args`], gets its services from a
//! [`session`] (given by URL, or started as children by [`local`]), asks them through [`client`],
//! and ends in an [`output::Answer`]. [`trace`] reads recordings and [`replay`] plays them;
//! [`tdvf`] reads firmware images.
//!
//! Invariants
//! - M1  stdout holds the result and nothing else; with `--output json` exactly one object.
//! - M2  Whatever a command created for its own use is gone when it ends: VMs of `replay` and
//!   `demo`, processes and sockets of `--local`.

pub mod args;
pub mod client;
mod commands;
pub mod conformance;
pub mod error;
pub mod fuzz;
pub mod local;
pub mod output;
mod progress;
pub mod replay;
pub mod session;
pub mod stop;
pub mod tally;
pub mod tdvf;
pub mod trace;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;
use serde_json::Value;
use telemetry::TraceIds;
use tracing::Instrument as _;

use args::{Cli, Command, Format};
use error::Error;
use local::child::{self, Role};
use output::Answer;
use session::Session;
use stop::Stop;

/// Name of the program in traces.
const SERVICE: &str = "mmuctl";
/// Threads of the runtime: encoding, and streams side by side.
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
        Err(error) => {
            eprintln!("mmuctl: {}", error.chain());
            ExitCode::from(error.exit_code())
        }
    }
}

fn run(cli: &Cli) -> Result<(), Error> {
    match &cli.command {
        Command::Completions { shell } => return output::print(&commands::completions(*shell)),
        Command::Explain(args) => return commands::explain(args).print(cli.globals.output),
        Command::Scenario(command) => {
            return commands::scenario(command)?.finish(cli.globals.output);
        }
        Command::Man => return output::print(&commands::manual()?),
        _ => {}
    }
    let telemetry = telemetry::init_with(SERVICE, "warn", TraceIds::Always)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let result = runtime.block_on(answer(cli));
    // A thread that still reads a terminal must not hold the end up.
    runtime.shutdown_background();
    telemetry.shutdown();
    result?.finish(cli.globals.output)
}

/// Opens the services, runs the command in its span, and closes them again.
async fn answer(cli: &Cli) -> Result<Answer, Error> {
    let session = Session::open(&cli.globals, &cli.command, Stop::on_signal()).await?;
    let work = async {
        let trace_id = cli
            .command
            .span_name()
            .and_then(|_| telemetry::current_trace_id());
        let answer = commands::run(&session, &cli.command).await;
        match (answer, trace_id) {
            (Ok(answer), Some(trace_id)) => Ok(with_trace_id(answer, trace_id, cli.globals.output)),
            (answer, _) => answer,
        }
    };
    let result = match cli.command.span_name() {
        Some(name) => {
            work.instrument(tracing::info_span!("mmuctl", otel.name = name))
                .await
        }
        None => work.await,
    };
    session.close(result).await
}

fn with_trace_id(mut answer: Answer, trace_id: String, format: Format) -> Answer {
    if format == Format::Table {
        eprintln!("trace {trace_id}");
    }
    if let Value::Object(object) = &mut answer.json {
        object.insert("trace_id".into(), Value::String(trace_id));
    }
    answer
}

//! The command line of the service.
//!
//! Exit status: 0 done, 1 the service failed or is not healthy, 2 usage.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser as _;
use transport::{Address, BindError, HealthError, TlsError, error_chain};

use crate::Config;
use crate::access::CallerTls;
use crate::config::DEFAULT_LISTEN;

/// Name of the service in traces.
const SERVICE: &str = "tdx-module-svc";

/// The TDX module as a service
#[derive(Debug, clap::Parser)]
#[command(name = SERVICE, version, args_conflicts_with_subcommands = true)]
struct Cli {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    config: Config,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Ask a running service whether it is serving
    Healthcheck {
        /// Where the service listens; of several addresses the first
        #[arg(long, value_name = "URL", env = "TDX_MODULE_LISTEN", value_delimiter = ',',
              default_value = DEFAULT_LISTEN)]
        endpoint: Vec<Address>,
        #[command(flatten)]
        tls: CallerTls,
    },
}

#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the runtime cannot be started")]
    Runtime(#[source] std::io::Error),
    #[error(transparent)]
    Telemetry(#[from] telemetry::TelemetryError),
    #[error(transparent)]
    Bind(#[from] BindError),
    #[error("the certificates cannot be used")]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Health(#[from] HealthError),
    #[error(transparent)]
    Run(#[from] crate::Error),
}

/// Runs the service, or a subcommand, as the arguments say. The first one is the program's name.
pub fn cli_main<I>(args: I) -> ExitCode
where
    I: IntoIterator,
    I::Item: Into<OsString> + Clone,
{
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to stdout with status 0, everything else to stderr with 2.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let done = match cli.command {
        None => serve(cli.config),
        Some(Command::Healthcheck { endpoint, tls }) => healthcheck(&endpoint, &tls),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprintln!("{SERVICE}: {}", error_chain(&failure));
            ExitCode::FAILURE
        }
    }
}

fn serve(config: Config) -> Result<(), Failure> {
    // With one thread a message wakes nobody on its way through the service.
    let mut runtime = match config.workers {
        1 => tokio::runtime::Builder::new_current_thread(),
        _ => tokio::runtime::Builder::new_multi_thread(),
    };
    let runtime = runtime
        .worker_threads(config.workers)
        .enable_all()
        .build()
        .map_err(Failure::Runtime)?;
    let telemetry = telemetry::init(SERVICE, "")?;
    let served = runtime.block_on(async {
        let listeners = config.access.exposure().bind(&config.listen).await?;
        let with_stdin = config.stop_with_stdin;
        let shutdown = async move {
            tokio::select! {
                () = transport::shutdown_signal() => {}
                () = transport::stdin_closed(), if with_stdin => {}
            }
        };
        Ok(crate::run(config, listeners, shutdown).await?)
    });
    // A batch that outlived the drain would hold up a plain drop of the runtime.
    runtime.shutdown_background();
    telemetry.shutdown();
    served
}

fn healthcheck(endpoint: &[Address], tls: &CallerTls) -> Result<(), Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Failure::Runtime)?;
    let tls = tls.load()?;
    for address in endpoint.iter().take(1) {
        runtime.block_on(transport::healthcheck_with(
            &address.to_string(),
            tls.as_ref(),
        ))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn a_health_check_takes_its_own_address() {
        let cli = Cli::parse_from([
            "tdx-module-svc",
            "healthcheck",
            "--endpoint",
            "http://module:1",
        ]);
        let Some(Command::Healthcheck { endpoint, .. }) = cli.command else {
            panic!("subcommand")
        };
        assert_eq!(endpoint, ["http://module:1".parse().unwrap()]);
    }
}

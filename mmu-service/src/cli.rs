//! The program: settings, telemetry, runtime, and what is left to say at the end.

use std::ffi::OsString;
use std::io;
use std::process::ExitCode;

use clap::Parser as _;
use transport::Address;

use crate::access::CallerTls;
use crate::config::{Command, Config, size};
use crate::server;

/// Threads beyond those of operations: name resolution and the like.
const SPARE_THREADS: usize = 16;

/// Why the service ended before it was told to.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Logs and traces could not be set up.
    #[error("telemetry cannot be set up")]
    Telemetry(#[source] telemetry::TelemetryError),
    /// No runtime.
    #[error("the runtime cannot be started")]
    Runtime(#[source] io::Error),
    /// A listener could not be bound.
    #[error("listen: nobody can listen there")]
    Bind(#[source] transport::BindError),
    /// The state directory cannot be used.
    #[error(transparent)]
    State(crate::store::StateError),
    /// The module is at https:// and there is no certificate for it.
    #[error("{module} needs --module-tls-ca, and --module-tls-cert with --module-tls-key")]
    NoModuleCertificate {
        /// Where the module is.
        module: Address,
    },
    /// Certificates cannot be used.
    #[error("the certificates cannot be used")]
    Tls(#[source] transport::TlsError),
    /// The thread of the module link could not be started.
    #[error("the module link cannot be started")]
    Link(#[source] io::Error),
    /// The descriptions of the services do not fit together.
    #[error("reflection cannot be set up")]
    Reflection(#[source] tonic_reflection::server::Error),
    /// The server came to an end.
    #[error("the server ended")]
    Serve(#[source] transport::ServeError),
    /// The service that was asked about is not well.
    #[error("{endpoint} is not healthy")]
    Unhealthy {
        /// Where it was asked.
        endpoint: Address,
        /// Why.
        #[source]
        source: transport::HealthError,
    },
}

/// The whole program: parses `args` (the first one is its name), serves until SIGTERM or Ctrl-C.
///
/// Exit status: 0 done, 1 the service or a health check failed, 2 usage.
pub fn cli_main<I: IntoIterator<Item = OsString>>(args: I) -> ExitCode {
    let config = match Config::try_parse_from(args) {
        Ok(config) => config,
        Err(usage) => {
            // A closed terminal is no reason for another exit status.
            let _ = usage.print();
            return if usage.use_stderr() {
                ExitCode::from(2)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    let ended = match config.command.clone() {
        Some(Command::Healthcheck { endpoint, tls }) => healthcheck(endpoint, &tls),
        None => serve(config),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("mmu-service: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn serve(config: Config) -> Result<(), Error> {
    let telemetry = telemetry::init("mmu-service", "").map_err(Error::Telemetry)?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(size(config.limits.max_operations) + SPARE_THREADS)
        .build()
        .map_err(Error::Runtime)?;
    let ended = runtime.block_on(async {
        let listeners = config.access.exposure().bind(&config.listen).await;
        let listeners = listeners.map_err(Error::Bind)?;
        server::run(config, listeners, transport::shutdown_signal()).await
    });
    // Operations that outlived the drain are blocked in the link; they end with the process.
    runtime.shutdown_background();
    telemetry.shutdown();
    ended
}

fn healthcheck(endpoint: Address, tls: &CallerTls) -> Result<(), Error> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::Runtime)?;
    let tls = tls.load().map_err(Error::Tls)?;
    runtime
        .block_on(transport::healthcheck_with(
            &endpoint.to_string(),
            tls.as_ref(),
        ))
        .map_err(|source| Error::Unhealthy { endpoint, source })
}

/// An error with its causes, in one line.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        // Some libraries repeat their cause in their own message.
        if !text.contains(&next) {
            text.push_str(": ");
            text.push_str(&next);
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cause_is_told_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("no service answers: {0}")]
        struct Repeats(#[source] std::io::Error);

        let cause = std::io::Error::other("connection refused");
        assert_eq!(
            chain(&Repeats(cause)),
            "no service answers: connection refused"
        );
    }
}

//! The services that a command talks to: those at the given URLs, or its own.

use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use telemetry::propagate::TracedChannel;
use transport::{ClientTls, ClientTlsFiles};

use crate::args::{Command, Format, Globals};
use crate::bench::{Name, OVERLOAD_OPTIONS};
use crate::client::{Client, Limits, connect_module, connect_module_channel};
use crate::error::Error;
use crate::local::{Local, LocalError, Options, ProcessMemory};
use crate::stop::Stop;

/// Where to find the services, for one command.
#[derive(Debug)]
pub struct Session {
    /// How long to wait.
    pub limits: Limits,
    /// Signals.
    pub stop: Stop,
    /// How the result is printed.
    pub output: Format,
    mmu: Option<String>,
    module: Option<String>,
    tls: Option<ClientTls>,
    local: Option<Local>,
}

impl Session {
    /// Starts the services when the command is to have its own.
    pub async fn open(globals: &Globals, command: &Command, stop: Stop) -> Result<Self, Error> {
        let given = |url: &Option<String>| url.clone().filter(|url| !url.is_empty());
        let limits = Limits::new(globals.timeout);
        let (mmu, module) = (given(&globals.mmu), given(&globals.module));
        let nothing_given = mmu.is_none() && module.is_none();
        if !(globals.local || command.is_local_by_default() && nothing_given) {
            return Ok(Self {
                limits,
                stop,
                output: globals.output,
                mmu,
                module,
                tls: certificates(globals)?,
                local: None,
            });
        }
        let more = match command {
            // The platform that the sequences were recorded on, with the conditions they set.
            Command::Conformance(_) => Options {
                module: &["--profile", "conformance", "--allow-injection"],
                ..Options::default()
            },
            Command::Bench(args) if args.name == Name::Overload => Options {
                mmu: OVERLOAD_OPTIONS,
                ..Options::default()
            },
            _ => Options::default(),
        };
        let local = Local::start(&stop, more)
            .await
            .map_err(|error| match error {
                LocalError::Interrupted => Error::Interrupted,
                error => Error::Local(error),
            })?;
        Ok(Self {
            mmu: Some(local.mmu_url().to_owned()),
            module: Some(local.module_url().to_owned()),
            limits,
            stop,
            output: globals.output,
            tls: None,
            local: Some(local),
        })
    }

    /// Resident memory of services that belong to this command.
    pub fn memory(&self) -> Option<ProcessMemory> {
        self.local.as_ref()?.memory()
    }

    /// Connects to the MMU service, and to the module if its URL is known.
    pub async fn client(&self) -> Result<Client, Error> {
        let mmu = self.mmu.as_deref().unwrap_or(mmu_service::DEFAULT_LISTEN);
        Client::connect(
            mmu,
            self.module.as_deref(),
            self.tls.as_ref(),
            self.limits,
            self.stop.clone(),
        )
        .await
    }

    /// Whether the command line names a service.
    pub fn is_given(&self) -> bool {
        self.local.is_none() && (self.mmu.is_some() || self.module.is_some())
    }

    /// Whether the services are the command's own.
    pub fn is_local(&self) -> bool {
        self.local.is_some()
    }

    /// Where the module listens.
    pub fn module_url(&self) -> &str {
        self.module
            .as_deref()
            .unwrap_or(mmu_service::DEFAULT_MODULE)
    }

    /// A connection to the module, for its other services.
    pub async fn module_channel(&self) -> Result<TracedChannel, Error> {
        let module = self
            .module
            .as_deref()
            .unwrap_or(mmu_service::DEFAULT_MODULE);
        connect_module_channel(module, self.tls.as_ref(), self.limits, &self.stop).await
    }

    /// Connects to the module.
    pub async fn module(&self) -> Result<TdxModuleServiceClient<TracedChannel>, Error> {
        let module = self
            .module
            .as_deref()
            .unwrap_or(mmu_service::DEFAULT_MODULE);
        connect_module(module, self.tls.as_ref(), self.limits, &self.stop).await
    }

    /// Stops what was started. `result` gets a better cause when a service of ours ended under it.
    pub async fn close<T>(self, result: Result<T, Error>) -> Result<T, Error> {
        let Some(mut local) = self.local else {
            return result;
        };
        let result = match result {
            Err(Error::Refused { .. } | Error::Truncated { .. } | Error::Connect { .. }) => {
                match local.obituary().await {
                    Some(ended) => Err(Error::Local(ended)),
                    None => result,
                }
            }
            result => result,
        };
        local.stop().await;
        result
    }
}

/// Reads the certificates, when there are any.
fn certificates(globals: &Globals) -> Result<Option<ClientTls>, Error> {
    let Some(ca) = globals.tls_ca.clone() else {
        return Ok(None);
    };
    let identity = globals.tls_cert.clone().zip(globals.tls_key.clone());
    let files = ClientTlsFiles { ca, identity };
    ClientTls::load(files).map(Some).map_err(Error::Tls)
}

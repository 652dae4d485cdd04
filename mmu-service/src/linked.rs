//! The module link on its own, for a program that brings VMs of its own: a benchmark, a test.

use std::sync::Arc;
use std::time::Duration;

use clap::Parser as _;
use tdp_mmu::{Host, SeamPort};

use crate::config::Config;
use crate::link::{Attachment, ModuleLink};
use crate::metrics::Metrics;

/// Why there is no link.
#[derive(Debug, thiserror::Error)]
pub enum LinkedError {
    /// The address is none.
    #[error("the module's address cannot be used")]
    Address(#[source] clap::Error),
    /// The certificates cannot be used.
    #[error("the certificates for the module cannot be used")]
    Tls(#[source] Box<crate::cli::Error>),
    /// The I/O thread cannot be started.
    #[error("the module link cannot be started")]
    Start(#[source] std::io::Error),
    /// Nobody answers in time.
    #[error("the module cannot be reached: {reason}")]
    Unreachable {
        /// The last error.
        reason: String,
    },
}

/// A link to one run of a module.
///
/// It comes with a host of its own, which believes that all of the module's memory and keys are
/// its to hand out: no other host may use the module at the same time.
pub struct Linked {
    link: Arc<ModuleLink>,
    attachment: Arc<Attachment>,
}

impl Linked {
    /// The host that VMs on this link are built on.
    pub fn host(&self) -> Arc<Host> {
        Arc::clone(self.attachment.host())
    }

    /// The way to the module.
    pub fn port(&self) -> Arc<dyn SeamPort> {
        self.link.port(&self.attachment)
    }
}

/// Links to the module at a URL, as the service does with its default settings.
pub async fn link_to(module: &str, patience: Duration) -> Result<Linked, LinkedError> {
    let args = ["mmu-service", "--module", module];
    let config = Config::try_parse_from(args).map_err(LinkedError::Address)?;
    let link_config = config
        .link_config()
        .map_err(|error| LinkedError::Tls(Box::new(error)))?;
    let link = ModuleLink::start(link_config, Arc::clone(&Metrics::new().link))
        .map_err(LinkedError::Start)?;
    let attachment = link
        .attach(patience)
        .await
        .map_err(|error| LinkedError::Unreachable {
            reason: error.chain(),
        })?;
    Ok(Linked { link, attachment })
}

//! One file for each group of commands: ask the services, make an [`Answer`].

mod bench;
mod certs;
mod chaos;
mod compare;
mod conformance;
mod demo;
mod events;
mod explain;
mod fault;
mod generate;
mod guest;
mod host;
mod inject;
mod look;
mod measure;
mod ranges;
mod replay;
mod scenario;
mod seamcall;
mod slot;
pub(crate) mod tables;
mod vm;

use crate::args::{Command, SlotCommand};
use crate::error::Error;
use crate::output::Answer;
use crate::session::Session;

pub(crate) use certs::run as certs;
pub(crate) use explain::run as explain;
pub(crate) use generate::{completions, manual};
pub(crate) use scenario::run as scenario;

/// Runs a command against the services of a session.
pub(crate) async fn run(session: &Session, command: &Command) -> Result<Answer, Error> {
    if let Command::Seamcall(args) = command {
        return seamcall::run(session, args).await;
    }
    if let Command::Conformance(args) = command {
        return conformance::run(session, args).await;
    }
    if let Command::Chaos(command) = command {
        return chaos::run(session, command).await;
    }
    if let Command::Inject(command) = command {
        return inject::run(session, command).await;
    }
    if let Command::Events(args) = command {
        return events::run(session, args).await;
    }
    let client = &session.client().await?;
    match command {
        Command::Demo(_) => demo::run(client).await,
        Command::Vm(command) => vm::run(client, command).await,
        Command::Vcpu(command) => vm::run_vcpu(client, command).await,
        Command::Slot(SlotCommand::Set(args)) => slot::set(client, args).await,
        Command::Slot(SlotCommand::Delete(args)) => slot::delete(client, args).await,
        Command::Fault(args) => fault::run(client, args).await,
        Command::Guest(args) => guest::run(client, args).await,
        Command::Prefault(args) => ranges::prefault(client, args).await,
        Command::Convert(args) => ranges::convert(client, args).await,
        Command::PunchHole(args) => ranges::punch_hole(client, args).await,
        Command::Replay(args) => replay::run(session, client, args).await,
        Command::DirtyLog(command) => tables::dirty_log(client, command).await,
        Command::Age(args) => tables::age(client, args).await,
        Command::Zap(args) => tables::zap(client, args).await,
        Command::ZapFast(args) => tables::zap_fast(client, args).await,
        Command::Host(command) => host::run(client, command).await,
        Command::WriteProtect(args) => host::write_protect(client, args).await,
        Command::Touch(args) => host::touch(client, args).await,
        Command::Nx(command) => host::nx(client, command).await,
        Command::Events(args) => events::run(session, args).await,
        Command::Compare(args) => compare::run(client, args).await,
        Command::Measure(args) => measure::run(client, args).await,
        Command::Bench(args) => bench::run(session, client, args).await,
        Command::Walk(args) => look::walk(client, args).await,
        Command::Tree(args) => look::tree(client, args).await,
        Command::Audit { vm } => look::audit(client, *vm).await,
        Command::Stats { vm } => look::stats(client, *vm).await,
        Command::Seamcall(args) => seamcall::run(session, args).await,
        Command::Conformance(args) => conformance::run(session, args).await,
        Command::Chaos(command) => chaos::run(session, command).await,
        Command::Inject(command) => inject::run(session, command).await,
        Command::Scenario(command) => scenario(command),
        Command::Certs(args) => certs(args),
        Command::Explain(args) => Ok(explain::run(args)),
        Command::Completions { shell } => Ok(Answer::bytes(completions(*shell))),
        Command::Man => Ok(Answer::bytes(manual()?)),
    }
}

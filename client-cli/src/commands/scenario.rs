//! `scenario`: rows of the scenario tables and races of the past, played in this process.

use serde_json::{Value, json};
use tdp_mmu_scenarios::{Mode, Run, fold, list, run as play};

use crate::args::{ModeArg, ScenarioCommand, ScenarioRunArgs};
use crate::error::Error;
use crate::output::{Answer, Table, pairs};

/// `mmuctl scenario`.
pub(crate) fn run(command: &ScenarioCommand) -> Result<Answer, Error> {
    match command {
        ScenarioCommand::List => Ok(all()),
        ScenarioCommand::Run(args) => run_some(args),
    }
}

fn all() -> Answer {
    let mut table = Table::new(&["id", "group", "title"]);
    let mut scenarios = Vec::new();
    for scenario in list() {
        scenarios.push(json!({
            "id": scenario.id,
            "title": scenario.title,
            "group": scenario.group,
        }));
        table.row([scenario.id, scenario.group.to_owned(), scenario.title]);
    }
    Answer::new(json!({ "scenarios": scenarios }), table.to_string())
}

fn run_some(args: &ScenarioRunArgs) -> Result<Answer, Error> {
    let mode = match args.mode {
        ModeArg::Kernel => Mode::Kernel,
        ModeArg::Batched => Mode::Batched,
    };
    // Nothing is run when one of the names is wrong.
    let known = list();
    if let Some(id) = args
        .ids
        .iter()
        .find(|id| known.iter().all(|scenario| scenario.id != **id))
    {
        let reason = format!("there is no scenario {id}; mmuctl scenario list names them all");
        return Err(Error::Usage(reason));
    }
    let (mut objects, mut texts, mut failed) = (Vec::new(), Vec::new(), 0);
    for id in &args.ids {
        let Some(done) = play(id, mode) else { continue };
        failed += u64::from(done.failure.is_some());
        objects.push(object(id, &done));
        texts.push(text(id, &done));
    }
    let scenarios = args.ids.len() as u64;
    // The first scenario's members are the object's own: one is what most ask for.
    let mut json = objects.first().cloned().unwrap_or_else(|| json!({}));
    json["mode"] = args.mode.name().into();
    json["scenarios"] = objects.into();
    Ok(Answer {
        verdict: (failed > 0).then_some(Error::Scenario { failed, scenarios }),
        ..Answer::new(json, texts.join("\n"))
    })
}

fn result(done: &Run) -> &'static str {
    match done.failure {
        None => "passed",
        Some(_) => "failed",
    }
}

fn object(id: &str, done: &Run) -> Value {
    let mut object = json!({ "id": id, "result": result(done), "calls": done.calls });
    if let Some(failure) = &done.failure {
        object["failure"] = failure.as_str().into();
    }
    if !done.policies.is_empty() {
        let policies = done.policies.iter().map(|policy| {
            json!({ "name": policy.name, "outcome": policy.outcome, "calls": policy.calls })
        });
        object["policies"] = policies.collect();
    }
    object
}

fn text(id: &str, done: &Run) -> String {
    let mut rows = vec![
        ("id".to_owned(), id.to_owned()),
        ("result".into(), result(done).into()),
    ];
    rows.extend(
        done.failure
            .iter()
            .map(|why| ("failure".into(), why.clone())),
    );
    if done.policies.is_empty() {
        rows.push(("calls".into(), calls(&done.calls)));
    }
    for policy in &done.policies {
        rows.push((policy.name.into(), policy.outcome.clone()));
        rows.push(("calls".into(), calls(&policy.calls)));
    }
    pairs(rows)
}

fn calls(calls: &[String]) -> String {
    if calls.is_empty() {
        return "none".into();
    }
    fold(calls)
}

//! `inject`: rules by which the module's calls meet faults.

use mirror_proto::module::fault_rule::{Action, When};
use mirror_proto::module::tdx_fault_service_client::TdxFaultServiceClient;
use mirror_proto::module::{
    ActiveFaultRule, ClearFaultRulesRequest, FaultRule, ListFaultRulesRequest, SetFaultRulesRequest,
};
use serde_json::{Value, json};
use tdx_defs::{CompletionStatus, Leaf};

use crate::args::InjectCommand;
use crate::client::{wait, with_deadline};
use crate::error::Error;
use crate::output::{Answer, Table, hex};
use crate::session::Session;

/// `mmuctl inject`.
pub(super) async fn run(session: &Session, command: &InjectCommand) -> Result<Answer, Error> {
    let mut client = TdxFaultServiceClient::new(session.module_channel().await?);
    let (limit, stop) = (session.limits.short, &session.stop);
    match command {
        InjectCommand::Set(args) => {
            let message = SetFaultRulesRequest {
                rules: vec![args.rule()],
                replace: false,
            };
            let request = with_deadline(message, limit);
            let answer = client.set_fault_rules(request);
            let set = wait("SetFaultRules", limit, stop, answer).await?;
            let id = set.rule_ids.first().copied();
            let text = id.map_or_else(String::new, |id| format!("rule {id}"));
            Ok(Answer::new(json!({ "rule_id": id }), text))
        }
        InjectCommand::List => {
            let request = with_deadline(ListFaultRulesRequest {}, limit);
            let answer = client.list_fault_rules(request);
            let list = wait("ListFaultRules", limit, stop, answer).await?;
            Ok(listed(&list.rules, &list.totals.unwrap_or_default()))
        }
        InjectCommand::Clear { ids } => {
            let message = ClearFaultRulesRequest {
                rule_ids: ids.clone(),
            };
            let request = with_deadline(message, limit);
            let answer = client.clear_fault_rules(request);
            let cleared = wait("ClearFaultRules", limit, stop, answer).await?.cleared;
            let text = format!("{cleared} rules taken away");
            Ok(Answer::new(json!({ "cleared": cleared }), text))
        }
    }
}

fn listed(rules: &[ActiveFaultRule], totals: &mirror_proto::module::FaultTotals) -> Answer {
    let mut table = Table::new(&[">id", "leaf", "when", "action", ">matched", ">fired"]);
    let mut objects = Vec::new();
    for active in rules {
        let rule = active.rule.unwrap_or_default();
        let (leaf, when, action) = (leaf(&rule), when(&rule), action(&rule));
        objects.push(json!({
            "rule_id": active.rule_id,
            "leaf": leaf,
            "gpa": (rule.gpa_end != 0).then(|| [hex(rule.gpa), hex(rule.gpa_end)]),
            "when": when,
            "action": action,
            "matched": active.matched,
            "fired": active.fired,
        }));
        table.row([
            active.rule_id.to_string(),
            leaf.unwrap_or_else(|| "any".into()),
            when,
            action,
            active.matched.to_string(),
            active.fired.to_string(),
        ]);
    }
    let totals = json!({
        "statuses": totals.statuses,
        "delays": totals.delays,
        "lost_replies": totals.lost_replies,
        "cuts": totals.cuts,
    });
    let json: Value = json!({ "rules": objects, "totals": totals });
    Answer::new(json, table.to_string())
}

fn leaf(rule: &FaultRule) -> Option<String> {
    rule.leaf.map(|leaf| match u16::try_from(leaf) {
        Ok(leaf) => Leaf(leaf).to_string(),
        Err(_) => leaf.to_string(),
    })
}

fn when(rule: &FaultRule) -> String {
    match rule.when {
        Some(When::Nth(nth)) => format!("nth {nth}"),
        Some(When::PerMillion(chance)) => format!("{chance} of 1000000"),
        None => String::new(),
    }
}

fn action(rule: &FaultRule) -> String {
    match rule.action {
        Some(Action::Status(status)) if status.rax == 0 => "busy".into(),
        Some(Action::Status(status)) => CompletionStatus(status.rax).to_string(),
        Some(Action::Delay(delay)) => format!("delay {} ms", delay.ms),
        Some(Action::LoseReply(_)) => "lose-reply".into(),
        Some(Action::Cut(_)) => "cut".into(),
        Some(Action::Abort(abort)) if abort.after => "abort after".into(),
        Some(Action::Abort(_)) => "abort before".into(),
        None => String::new(),
    }
}

//! `tdx.module.v1.TdxFaultService`: faults on purpose, by rules.
//!
//! [`engine`] decides what a batch meets, `execute` carries it out. The service is there only when
//! the module was started with `--fault-injection`.

mod engine;
mod rule;

use std::sync::{Arc, Mutex, PoisonError};

use mirror_proto::InvalidField;
use mirror_proto::module::tdx_fault_service_server::TdxFaultService;
use mirror_proto::module::{
    ActiveFaultRule, ClearFaultRulesRequest, ClearFaultRulesResponse, FaultRule, FaultTotals,
    ListFaultRulesRequest, ListFaultRulesResponse, SetFaultRulesRequest, SetFaultRulesResponse,
};
use tdx_defs::Seamcall;
use tonic::{Request, Response, Status};

use crate::status::Refusal;
use engine::{Engine, MAX_RULES};
use rule::Rule;

pub(crate) use engine::{Totals, Verdict};

/// The faults of one service; without a way to set rules when injection is off.
#[derive(Debug, Clone, Default)]
pub(crate) struct Faults(Option<Arc<Mutex<State>>>);

#[derive(Debug, Default)]
struct State {
    engine: Engine,
    /// As they came, by id.
    wire: Vec<(u64, FaultRule)>,
}

impl Faults {
    /// Faults that can be set.
    pub(crate) fn enabled() -> Self {
        Self(Some(Arc::default()))
    }

    /// What a batch meets that is about to run.
    pub(crate) fn decide(&self, calls: &[Seamcall]) -> Verdict {
        match &self.0 {
            Some(state) => lock(state).engine.decide(calls),
            None => Verdict::default(),
        }
    }

    /// What was carried out so far.
    pub(crate) fn totals(&self) -> Totals {
        match &self.0 {
            Some(state) => lock(state).engine.totals(),
            None => Totals::default(),
        }
    }

    /// The service that sets them, if they can be set.
    pub(crate) fn service(&self) -> Option<FaultService> {
        self.0.clone().map(FaultService)
    }
}

fn lock(state: &Mutex<State>) -> std::sync::MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The service.
#[derive(Debug, Clone)]
pub(crate) struct FaultService(Arc<Mutex<State>>);

#[tonic::async_trait]
impl TdxFaultService for FaultService {
    async fn set_fault_rules(
        &self,
        request: Request<SetFaultRulesRequest>,
    ) -> Result<Response<SetFaultRulesResponse>, Status> {
        let SetFaultRulesRequest { rules, replace } = request.into_inner();
        // Before the lock: a message of rules that cannot be must not hold up the calls.
        let checked = rules
            .iter()
            .take(MAX_RULES + 1)
            .enumerate()
            .map(|(at, rule)| {
                Rule::check(rule).map_err(|error| error.within(&format!("rules[{at}]")))
            })
            .collect::<Result<Vec<_>, _>>()
            .map_err(Refusal::from)?;
        let mut state = lock(&self.0);
        let kept = if replace { 0 } else { state.wire.len() };
        if kept + rules.len() > MAX_RULES {
            let reason = format!(
                "{} beside {kept} that are there, the limit is {MAX_RULES}",
                rules.len()
            );
            return Err(Refusal::from(InvalidField::new("rules", reason)).into());
        }
        if replace {
            state.engine.clear(&[]);
            state.wire.clear();
        }
        let mut rule_ids = Vec::with_capacity(checked.len());
        for (rule, wire) in checked.into_iter().zip(rules) {
            if let Some(id) = state.engine.add(rule) {
                state.wire.push((id, wire));
                rule_ids.push(id);
            }
        }
        tracing::info!(?rule_ids, replace, "fault rules set");
        Ok(Response::new(SetFaultRulesResponse { rule_ids }))
    }

    async fn list_fault_rules(
        &self,
        _: Request<ListFaultRulesRequest>,
    ) -> Result<Response<ListFaultRulesResponse>, Status> {
        let state = lock(&self.0);
        let armed = state.engine.rules().iter().zip(&state.wire);
        let rules = armed
            .map(|(armed, (_, rule))| ActiveFaultRule {
                rule_id: armed.id,
                rule: Some(*rule),
                matched: armed.matched,
                fired: armed.fired,
            })
            .collect();
        let totals = state.engine.totals();
        Ok(Response::new(ListFaultRulesResponse {
            rules,
            totals: Some(FaultTotals {
                statuses: totals.statuses,
                delays: totals.delays,
                lost_replies: totals.lost_replies,
                cuts: totals.cuts,
            }),
        }))
    }

    async fn clear_fault_rules(
        &self,
        request: Request<ClearFaultRulesRequest>,
    ) -> Result<Response<ClearFaultRulesResponse>, Status> {
        let ids = request.into_inner().rule_ids;
        let mut state = lock(&self.0);
        let cleared = state.engine.clear(&ids);
        let left: Vec<u64> = state.engine.rules().iter().map(|armed| armed.id).collect();
        state.wire.retain(|(id, _)| left.contains(id));
        Ok(Response::new(ClearFaultRulesResponse {
            cleared: u32::try_from(cleared).unwrap_or(u32::MAX),
        }))
    }
}

//! A round's strike: the rule is armed when the VM that it is meant for says so; when it fires,
//! the process is killed in the middle of that call, started again, and waited for.

use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};

use super::Control;
use super::plan::{Blow, Strike};
use super::stack::Stack;
use super::tally::Tally;
use crate::error::Error;
use crate::local::child::Role;

/// Pause between two looks at the rule.
const LOOK_EVERY: Duration = Duration::from_millis(2);

/// Waits for the moment and strikes. Ends without it when the round is over first.
pub(super) async fn strike(
    strike: &Strike,
    mut armed: mpsc::Receiver<oneshot::Sender<()>>,
    mut is_over: watch::Receiver<bool>,
    stack: &mut Stack,
    control: &mut Control,
    tally: &Tally,
) -> Result<(), Error> {
    let asked = tokio::select! {
        asked = armed.recv() => asked,
        _ = is_over.wait_for(|over| *over) => None,
    };
    let Some(is_armed) = asked else {
        tally.counts().missed += 1;
        return Ok(());
    };
    let rule_id = match control.set_rules(vec![strike.rule], false).await {
        Ok(ids) => ids.first().copied().unwrap_or(0),
        Err(Error::Interrupted) => return Err(Error::Interrupted),
        // Another VM's call met the rule before its answer was out, and the module aborted.
        Err(_) if stack.module_ends_soon().await => {
            drop(is_armed);
            return land(strike, stack, control, tally).await;
        }
        Err(error) => return Err(error),
    };
    let _ = is_armed.send(());
    loop {
        let over = *is_over.borrow_and_update();
        let fired = control.fired(rule_id, tally).await;
        match fired {
            Ok(0) if over => {
                tally.counts().missed += 1;
                return Ok(());
            }
            Ok(0) => {}
            Ok(_) => return land(strike, stack, control, tally).await,
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            // An abort takes the answer along.
            Err(_) if stack.module_ended().await => {
                return land(strike, stack, control, tally).await;
            }
            Err(_) => {}
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// The rule has fired: its call is under way.
async fn land(
    strike: &Strike,
    stack: &mut Stack,
    control: &mut Control,
    tally: &Tally,
) -> Result<(), Error> {
    {
        let phase = tally.under_way(strike.worker);
        let mut counts = tally.counts();
        *counts.during.entry(phase.name()).or_default() += 1;
    }
    let role = match strike.blow {
        Blow::Cut | Blow::LoseReply => {
            tally.counts().cuts += 1;
            return Ok(());
        }
        Blow::KillMmu => Role::Mmu,
        Blow::KillModule | Blow::Abort { .. } => Role::Module,
    };
    // Before the kill: whoever sees a broken connection finds the reason.
    tally.set_away(true);
    match role {
        Role::Module => tally.counts().module_gone(),
        Role::Mmu => tally.counts().mmu_kills += 1,
    }
    let back = async {
        stack.kill(role).await.map_err(Error::Local)?;
        control.recovered(stack).await
    };
    let back = back.await;
    tally.set_away(false);
    back?;
    tally.counts().recoveries += 1;
    Ok(())
}

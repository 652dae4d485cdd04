//! Watches whether the module is there and which run of it, with or without work to do.
//!
//! Health checks and not GetPlatform: they are cheap for the module and make no trace. The
//! connection is bound to one process, so its run need not be asked for again.

use std::sync::Arc;
use std::time::Duration;

use tokio::time::{sleep, timeout};
use tonic::{Code, Status};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use super::Shared;
use super::connection::{Connection, dial};

/// Time between two looks at a connection that is otherwise idle.
const PROBE_INTERVAL: Duration = Duration::from_secs(1);
/// Pause between attempts to reach a module that is away.
const REDIAL_PAUSE: Duration = Duration::from_millis(100);

/// Runs as long as the link.
pub(super) async fn watch(shared: Arc<Shared>) {
    let mut told = String::new();
    loop {
        let reason = match dial(&shared).await {
            Ok(connection) => {
                told.clear();
                watch_one(&shared, connection).await
            }
            Err(error) => error.chain(),
        };
        if reason != told {
            // Once, and not ten times a second.
            tracing::warn!(reason, "the module is not reachable");
            told.clone_from(&reason);
        }
        shared.instances.lost(&reason);
        sleep(REDIAL_PAUSE).await;
    }
}

/// Looks at one connection until it fails; returns how.
async fn watch_one(shared: &Shared, connection: Connection) -> String {
    let mut health = HealthClient::new(connection.channel);
    loop {
        tokio::select! {
            () = sleep(PROBE_INTERVAL) => {}
            () = shared.nudge.notified() => {}
        }
        let limit = shared.config.rpc_deadline;
        let check = health.check(HealthCheckRequest {
            service: String::new(),
        });
        match timeout(limit, check).await {
            Err(_) => return format!("the module does not answer within {limit:?}"),
            Ok(Ok(answer)) if answer.get_ref().status() == ServingStatus::NotServing => {
                return "the module is not serving".into();
            }
            Ok(Ok(_)) => {}
            Ok(Err(status)) if is_alive(&status) => {}
            Ok(Err(status)) => return format!("{}: {}", status.code(), status.message()),
        }
    }
}

/// Whether a refused check still came from a module that answers.
fn is_alive(status: &Status) -> bool {
    matches!(
        status.code(),
        Code::Unimplemented | Code::ResourceExhausted | Code::NotFound
    )
}

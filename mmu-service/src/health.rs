//! grpc.health.v1: serving while the module is there, the VMs of an earlier run are recovered, and
//! the service is not about to end.

use mirror_proto::mmu::mmu_service_server::SERVICE_NAME;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::link::LinkState;
use crate::shell::Shell;

/// Sets the health of the server and of its service, and has it kept up to date until the service
/// ends.
pub(crate) async fn report(reporter: HealthReporter, shell: &Shell) -> JoinHandle<()> {
    let (mut link, mut draining) = (shell.link.state(), shell.draining());
    let mut opening = shell.vms.opening();
    // Before anybody can ask: a service without a status would be unknown.
    publish(&reporter, &mut link, &mut draining, &mut opening).await;
    tokio::spawn(async move {
        loop {
            let changed = tokio::select! {
                changed = link.changed() => changed,
                changed = draining.changed() => changed,
                changed = opening.changed() => changed,
            };
            if changed.is_err() {
                return;
            }
            publish(&reporter, &mut link, &mut draining, &mut opening).await;
        }
    })
}

async fn publish(
    reporter: &HealthReporter,
    link: &mut watch::Receiver<LinkState>,
    draining: &mut watch::Receiver<bool>,
    opening: &mut watch::Receiver<bool>,
) {
    let is_up = matches!(&*link.borrow_and_update(), LinkState::Up(_));
    let is_draining = *draining.borrow_and_update();
    let is_open = *opening.borrow_and_update();
    let serving = match (is_up && is_open, is_draining) {
        (true, false) => ServingStatus::Serving,
        _ => ServingStatus::NotServing,
    };
    for service in ["", SERVICE_NAME] {
        reporter.set_service_status(service, serving).await;
    }
    tracing::debug!(%serving, is_up, is_open, is_draining, "health");
}

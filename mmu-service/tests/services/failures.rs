//! What happens when one of the two processes, or the way between them, fails.

use crate::metrics::Scrape;
use crate::proxy::Proxy;
use crate::stack;
use crate::stack::{MIB, PAGE, Process, Stack, assert_refused, calls, pages, socket};
use mirror_proto::mmu::{self as wire, Mode};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use tonic_health::pb::health_check_response::ServingStatus;

#[tokio::test]
async fn a_connection_that_breaks_again_and_again_doubles_and_loses_nothing() {
    const PAGES: u64 = 512;
    for (mode, answer_bytes) in [(Mode::Kernel, 6000), (Mode::Batched, 1500)] {
        let dir = tempfile::tempdir().unwrap();
        let (module_at, link_at) = (socket(dir.path(), "module"), socket(dir.path(), "proxy"));
        let module = Process::module(&module_at);
        let proxy = Proxy::cutting_after(&link_at, &module_at, answer_bytes);
        let options = ["--reconnect-attempts", "100"];
        let mut stack = Stack::beside(dir, Some(module), &link_at, &options).await;

        let vm = stack.running_vm(mode, 1, 8 * MIB).await;
        let before = stack.platform().await;
        // Small pieces, so that batches are many in both modes.
        let mut sum = 0;
        for piece in 0..PAGES / 16 {
            let done = stack
                .prefault(vm, piece * 16 * PAGE, 16 * PAGE)
                .await
                .unwrap();
            sum += calls(&done.counts.unwrap(), "TDH.MEM.PAGE.AUG");
        }
        assert_eq!(sum, PAGES, "{mode:?}: each page once");
        let counts = stack.convert(vm, 0, PAGES / 2 * PAGE, 0).await.unwrap();
        assert_eq!(calls(&counts, "TDH.MEM.PAGE.REMOVE"), PAGES / 2, "{mode:?}");
        let after = stack.platform().await;
        assert_eq!(
            pages(&after, "PT_REG") - pages(&before, "PT_REG"),
            PAGES / 2,
            "{mode:?}"
        );
        // The audit reads page by page: its answers are longer than what came through above.
        proxy.heal();
        stack.assert_clean(vm).await;
        assert!(proxy.cuts() >= 3, "{mode:?}: {} cuts", proxy.cuts());
        let metrics = Scrape::of(stack.authority()).await;
        let via = match mode {
            Mode::Kernel => "rpc",
            Mode::Batched | Mode::Unspecified => "stream",
        };
        let retries = metrics.get(&format!(r#"mmu_link_retries_total{{via="{via}"}}"#));
        // A cut may come while nothing is unanswered.
        assert!(retries >= 1, "{mode:?}: no retries");
        assert_eq!(metrics.get("mmu_link_batches_in_flight"), 0);
        let module = Scrape::of(&stack.module.as_ref().unwrap().authority).await;
        let replayed = module.get("tdx_module_batches_replayed_total");
        assert!(replayed <= retries, "{mode:?}: {replayed} of {retries}");
        assert_eq!(stack.destroy(vm).await.pages_leaked, 0);
        stack.assert_all_given_back().await;
        drop(stack);
        proxy.stop();
    }
}

#[tokio::test]
async fn a_restarted_module_kills_its_vms_and_serves_new_ones() {
    let mut stack = Stack::start().await;
    let old = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.prefault(old, 0, MIB).await.unwrap();
    let first_run = stack.stats(0).await.module_instance;

    stack.module.take().unwrap().kill();
    stack.module = Some(Process::module(&socket(stack.dir.path(), "module")));

    // The next call that needs the module finds out; afterwards everybody knows.
    let outcome = stack.prefault(old, MIB, MIB).await;
    assert_refused(outcome, Code::FailedPrecondition, "VM_DEAD");
    let hit = stack.fault(old, 0, 0).await;
    assert_refused(hit, Code::FailedPrecondition, "VM_DEAD");
    let listed = stack.list().await;
    assert_eq!(&*listed[0].state, "dead");
    assert!(
        listed[0].reason.contains("restarted"),
        "{}",
        listed[0].reason
    );

    for mode in [Mode::Batched, Mode::Kernel] {
        let new = stack.running_vm(mode, 1, 8 * MIB).await;
        assert!(new > old);
        stack.prefault(new, 0, MIB).await.unwrap();
        stack.assert_clean(new).await;
        assert_eq!(stack.destroy(new).await.pages_leaked, 0);
    }
    assert_ne!(stack.stats(0).await.module_instance, first_run);
    stack.destroy(old).await;
    assert!(stack.list().await.is_empty());
    stack.assert_all_given_back().await;
}

#[tokio::test]
async fn without_a_module_the_service_says_so_and_recovers_when_it_comes() {
    let dir = tempfile::tempdir().unwrap();
    let module_at = socket(dir.path(), "module");
    let mut stack = Stack::beside(dir, None, &module_at, &["--reconnect-attempts", "2"]).await;
    stack.wait_until(ServingStatus::NotServing).await;
    let outcome = stack
        .client
        .create_vm(wire::CreateVmRequest::default())
        .await;
    let status = outcome.unwrap_err();
    let details = tonic_types::StatusExt::get_error_details(&status);
    assert!(details.retry_info().is_some());
    assert_refused::<()>(Err(status), Code::Unavailable, "MODULE_UNREACHABLE");
    assert!(stack.list().await.is_empty());

    stack.module = Some(Process::module(&module_at));
    stack.wait_until(ServingStatus::Serving).await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.fault(vm, 0, 0).await.unwrap();

    stack.module.take().unwrap().kill();
    stack.wait_until(ServingStatus::NotServing).await;
    assert_eq!(
        stack.fault(vm, 0, 0).await.unwrap().ret_pf(),
        wire::RetPf::Spurious,
        "the mirror answers without the module"
    );
}

#[tokio::test]
async fn an_orderly_end_answers_what_runs_and_gives_everything_back() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Batched, 1, 64 * MIB).await;
    let half_built = stack.vm(Mode::Kernel, 2, 8 * MIB).await;
    assert_ne!(vm_id, half_built);
    let (send, batches) = tokio::sync::mpsc::channel(4);
    let faults = vec![wire::Fault {
        gpa: 0,
        qualification: stack::WRITE,
        ..Default::default()
    }];
    let batch = wire::HandleFaultsRequest {
        vm_id,
        vcpu_id: 0,
        faults,
        tag: 7,
        ..Default::default()
    };
    send.send(batch).await.unwrap();
    let answers = stack
        .client
        .handle_faults(ReceiverStream::new(batches))
        .await
        .unwrap();
    let mut answers = answers.into_inner();
    assert_eq!(answers.message().await.unwrap().unwrap().tag, 7);

    let mut service = stack.service.take().unwrap();
    service.signal();
    // The client still holds its end of the stream open.
    let status = answers.message().await.unwrap_err();
    assert_refused::<()>(Err(status), Code::Unavailable, "DRAINING");
    drop(send);
    service.ended().await;
    stack.assert_all_given_back().await;
}

#[tokio::test]
async fn a_caller_that_hangs_up_does_not_tear_its_operation() {
    let mut stack = Stack::start().await;
    let vm_id = stack.running_vm(Mode::Kernel, 1, 8 * MIB).await;
    let request = wire::PreFaultMemoryRequest {
        vm_id,
        vcpu_id: 0,
        gpa: 0,
        size: 4 * MIB,
    };
    let mut answers = stack
        .client
        .pre_fault_memory(request)
        .await
        .unwrap()
        .into_inner();
    let first = answers.message().await.unwrap().unwrap();
    drop(answers);
    assert!(first.done <= 4 * MIB);
    // Destruction waits for the operation, and then there is nothing left of it.
    assert_eq!(stack.destroy(vm_id).await.pages_leaked, 0);
    stack.assert_all_given_back().await;
}

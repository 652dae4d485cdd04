use proptest::prelude::*;
use proptest::test_runner::{Config as Cases, TestRunner};
use tokio::sync::oneshot;
use transport::{Address, Listener};

use super::*;

/// A module behind a socket, for as long as the test takes.
fn with_module(test: impl FnOnce(&Requests)) {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("module.sock"));
    let (stop, stopped) = oneshot::channel::<()>();
    let (bound, is_bound) = std::sync::mpsc::channel();
    let listen = address.clone();
    let module = std::thread::spawn(move || {
        let runtime = Runtime::new().unwrap();
        runtime.block_on(async move {
            let listener = Listener::bind(&listen).await.unwrap();
            bound.send(()).unwrap();
            let stop = async { drop(stopped.await) };
            tdx_module_svc::run(tdx_module_svc::Config::default(), vec![listener], stop)
                .await
                .unwrap();
        });
    });
    is_bound.recv().unwrap();
    let requests = Requests::on(&address.to_string()).unwrap();
    test(&requests);
    drop(requests);
    drop(stop);
    module.join().unwrap();
}

#[test]
fn seeds_use_every_rpc_and_each_of_their_calls_succeeds() {
    let mut used = std::collections::BTreeSet::new();
    with_module(|requests| {
        for (name, script) in request_seeds() {
            let calls = ScriptedCall::read(&script, RULES);
            used.extend(calls.iter().map(|call| call.path));
            requests.play(&script);
            requests.runtime.block_on(async {
                let shell = Shell::new(
                    requests.limits,
                    requests.gate.clone(),
                    Arc::clone(&requests.link),
                    Metrics::new(),
                    None,
                );
                let service = Service::new(Arc::clone(&shell));
                let routes = Routes::new(MmuServiceServer::new(service));
                for call in calls {
                    let path = call.path;
                    let made = call.make(routes.clone(), path == WATCH).await;
                    assert!(made.is_ok(), "{name}: {path}: {made:?}");
                }
                shell.start_draining();
                shell.finish(Instant::now() + HUNG).await;
            });
        }
    });
    let missing = RULES.iter().filter(|(path, _)| !used.contains(path));
    assert_eq!(missing.collect::<Vec<_>>(), Vec::<&transport::Rule>::new());
}

#[test]
fn kept_scripts_pass() {
    with_module(|requests| super::super::each_kept("mmu", |script| requests.play(script)));
}

#[test]
fn damaged_scripts_get_answers_or_refusals() {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8);
    let cut = prop::option::weighted(0.1, any::<prop::sample::Index>());
    let inputs = (0..request_seeds().len(), changes, cut);
    with_module(|requests| {
        let mut runner = TestRunner::new(Cases {
            failure_persistence: None,
            ..Cases::with_cases(96)
        });
        runner
            .run(&inputs, |(seed, changes, cut)| {
                let mut bytes = request_seeds().swap_remove(seed).1;
                for (at, value) in changes {
                    let at = at.index(bytes.len());
                    bytes[at] = value;
                }
                if let Some(cut) = cut {
                    bytes.truncate(cut.index(bytes.len()));
                }
                requests.play(&bytes);
                Ok(())
            })
            .unwrap();
    });
}

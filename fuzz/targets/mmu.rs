//! libFuzzer target: calls of any RPC of mmu-service, as a script, with a module behind a socket.

#![no_main]

use std::sync::OnceLock;
use std::sync::mpsc;

use mmu_service::fuzz::Requests;
use tdx_module_svc::Config;
use transport::{Address, Listener};

/// The service, on a module that lives as long as this process.
fn requests() -> &'static Requests {
    static REQUESTS: OnceLock<Requests> = OnceLock::new();
    REQUESTS.get_or_init(|| {
        let dir = std::env::temp_dir().join(format!("fuzz-mmu-{}", std::process::id()));
        let address = Address::Unix(dir.join("module.sock"));
        let (bound, is_bound) = mpsc::channel();
        let listen = address.clone();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Runtime::new().expect("a runtime");
            runtime.block_on(async move {
                let listener = Listener::bind(&listen).await.expect("a socket");
                bound.send(()).expect("somebody waits");
                tdx_module_svc::run(Config::default(), vec![listener], std::future::pending())
                    .await
                    .expect("the module serves");
            });
        });
        is_bound.recv().expect("the module listens");
        Requests::on(&address.to_string()).expect("a link to the module")
    })
}

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| requests().play(bytes));

//! A connection that breaks: a proxy between two Unix sockets that cuts when told, or after so
//! many bytes of answers, in the middle of whatever is under way, until it is healed.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use transport::Address;

/// Accepts for as long as it lives.
pub(crate) struct Proxy {
    cuts: Arc<AtomicU64>,
    answer_bytes: Arc<AtomicU64>,
    _runtime: tokio::runtime::Runtime,
}

impl Proxy {
    /// Listens at `from`, connects to `to`, and cuts each connection once it has carried
    /// `answer_bytes` back.
    pub(crate) fn cutting_after(from: &Address, to: &Address, answer_bytes: u64) -> Self {
        let (Address::Unix(from), Address::Unix(to)) = (from.clone(), to.clone()) else {
            panic!("both ends are Unix sockets");
        };
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .unwrap();
        let cuts = Arc::new(AtomicU64::new(0));
        let listener = {
            let _inside = runtime.enter();
            UnixListener::bind(from).unwrap()
        };
        let counter = Arc::clone(&cuts);
        let answer_bytes = Arc::new(AtomicU64::new(answer_bytes));
        let allowed = Arc::clone(&answer_bytes);
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let answer_bytes = allowed.load(Ordering::Relaxed);
                let (to, counter) = (to.clone(), Arc::clone(&counter));
                tokio::spawn(async move {
                    if let Ok(server) = UnixStream::connect(to).await {
                        carry(client, server, answer_bytes).await;
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Self {
            cuts,
            answer_bytes,
            _runtime: runtime,
        }
    }

    /// Connections that have ended.
    pub(crate) fn cuts(&self) -> u64 {
        self.cuts.load(Ordering::Relaxed)
    }

    /// New connections live for ever.
    pub(crate) fn heal(&self) {
        self.answer_bytes.store(u64::MAX, Ordering::Relaxed);
    }

    /// Ends on a thread where that is allowed.
    pub(crate) fn stop(self) {
        std::thread::spawn(move || drop(self)).join().unwrap();
    }
}

async fn carry(mut client: UnixStream, mut server: UnixStream, answer_bytes: u64) {
    let (mut from_client, mut to_client) = client.split();
    let (from_server, mut to_server) = server.split();
    let mut answers = from_server.take(answer_bytes);
    // Ends with the first of the two: the other is dropped in the middle.
    tokio::select! {
        _ = tokio::io::copy(&mut from_client, &mut to_server) => {}
        _ = tokio::io::copy(&mut answers, &mut to_client) => {}
    }
    let _ = to_client.shutdown().await;
}

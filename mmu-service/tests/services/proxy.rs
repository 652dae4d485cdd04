//! A connection that breaks: a proxy between two Unix sockets that cuts when told, or after so
//! many bytes of answers, in the middle of whatever is under way, until it is healed.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{ReadHalf, WriteHalf};
use tokio::net::{UnixListener, UnixStream};
use transport::Address;

/// Does something once so many pieces of requests have gone through.
#[derive(Default)]
struct OnRequest {
    left: AtomicU64,
    act: Mutex<Option<Act>>,
}

type Act = Box<dyn FnOnce() + Send>;

impl OnRequest {
    fn passed(&self) {
        let left = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| {
                left.checked_sub(1)
            });
        if left == Ok(1)
            && let Some(act) = self.act.lock().unwrap().take()
        {
            act();
        }
    }
}

/// Accepts for as long as it lives.
pub(crate) struct Proxy {
    cuts: Arc<AtomicU64>,
    answer_bytes: Arc<AtomicU64>,
    on_request: Arc<OnRequest>,
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
        let on_request = Arc::new(OnRequest::default());
        let passing = Arc::clone(&on_request);
        runtime.spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let answer_bytes = allowed.load(Ordering::Relaxed);
                let (to, counter) = (to.clone(), Arc::clone(&counter));
                let passing = Arc::clone(&passing);
                tokio::spawn(async move {
                    if let Ok(server) = UnixStream::connect(to).await {
                        carry(client, server, answer_bytes, &passing).await;
                        counter.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
        });
        Self {
            cuts,
            answer_bytes,
            on_request,
            _runtime: runtime,
        }
    }

    /// Acts when `pieces` more pieces of requests have gone through.
    pub(crate) fn after_requests(&self, pieces: u64, act: impl FnOnce() + Send + 'static) {
        *self.on_request.act.lock().unwrap() = Some(Box::new(act));
        self.on_request.left.store(pieces, Ordering::SeqCst);
    }

    /// Whether what was to be done has been; it will not be any more.
    pub(crate) fn has_acted(&self) -> bool {
        self.on_request.left.store(0, Ordering::SeqCst);
        self.on_request.act.lock().unwrap().take().is_none()
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

async fn carry(
    mut client: UnixStream,
    mut server: UnixStream,
    answer_bytes: u64,
    on_request: &OnRequest,
) {
    let (mut from_client, mut to_client) = client.split();
    let (from_server, mut to_server) = server.split();
    let mut answers = from_server.take(answer_bytes);
    // Ends with the first of the two: the other is dropped in the middle.
    tokio::select! {
        _ = forward(&mut from_client, &mut to_server, on_request) => {}
        _ = tokio::io::copy(&mut answers, &mut to_client) => {}
    }
    let _ = to_client.shutdown().await;
}

async fn forward(
    from: &mut ReadHalf<'_>,
    to: &mut WriteHalf<'_>,
    on_request: &OnRequest,
) -> std::io::Result<()> {
    let mut piece = vec![0; 64 << 10];
    loop {
        let bytes = from.read(&mut piece).await?;
        if bytes == 0 {
            return Ok(());
        }
        to.write_all(&piece[..bytes]).await?;
        on_request.passed();
    }
}

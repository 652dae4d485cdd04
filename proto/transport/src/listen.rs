//! Binding and accepting, Unix sockets and TCP alike.
//!
//! A Unix socket is private to its user (0600, in a directory made with 0700), unless others are
//! listed: then anybody may connect, and [`Peers`](crate::Peers) tells them apart. The file of a
//! service that died is replaced; the file of one that answers is not (N3), and neither is a file
//! that is no socket. Plain TCP is for this machine only, unless said otherwise: nobody has an
//! identity there, and nothing is hidden from the network.

use std::fs;
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::task::JoinSet;
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;

use crate::handshake;
use crate::socket::{Connection, Plain};
use crate::tls::{ServerTls, ServerTlsFiles, TlsError};
use crate::{Address, error_chain};

/// Pause after a failed accept, in milliseconds: with no file descriptor left every further
/// attempt would fail at once.
const ACCEPT_RETRY_MS: u64 = 50;
/// TLS handshakes under way at a time; further clients wait in the backlog of the socket.
const MAX_HANDSHAKES: usize = 1024;

/// How a service may be reached.
#[derive(Debug, Clone, Default)]
pub struct Exposure {
    /// Certificates for `https://` addresses.
    pub tls: Option<ServerTlsFiles>,
    /// Whether plain TCP may be bound to an address that other machines reach.
    pub insecure_tcp: bool,
    /// Whether users besides the service's own may connect to its Unix sockets.
    pub other_users: bool,
}

impl Exposure {
    /// Binds every address, in order.
    pub async fn bind(&self, addresses: &[Address]) -> Result<Vec<Listener>, BindError> {
        let wants_tls = addresses
            .iter()
            .any(|address| matches!(address, Address::Tls(_)));
        let tls = match &self.tls {
            Some(files) if wants_tls => Some(ServerTls::load(files.clone())?),
            _ => None,
        };
        let mut listeners = Vec::new();
        for address in addresses {
            let tls = match address {
                Address::Tls(_) => Some(tls.clone().ok_or_else(|| BindError::NoCertificate {
                    address: address.clone(),
                })?),
                _ => None,
            };
            let listener = Listener::bind_as(address, tls, self.other_users).await?;
            if !self.insecure_tcp && !listener.is_private() {
                return Err(BindError::Exposed {
                    address: address.clone(),
                });
            }
            listeners.push(listener);
        }
        Ok(listeners)
    }
}

/// Nobody can listen there.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// A service answers at the address.
    #[error("{address} is in use, a service answers there")]
    InUse {
        /// Where.
        address: Address,
    },
    /// Something that is no socket has the name.
    #[error("{address} cannot be bound, the file is not a socket")]
    NotASocket {
        /// Where.
        address: Address,
    },
    /// Other machines would reach it.
    #[error(
        "{address} is plain TCP beyond this machine: listen at https:// with --tls-cert, at \
         127.0.0.1 or at unix://, or accept that anybody may call with --insecure-tcp"
    )]
    Exposed {
        /// Where.
        address: Address,
    },
    /// `https://` without certificates.
    #[error("{address} needs --tls-cert, --tls-key and --tls-client-ca")]
    NoCertificate {
        /// Where.
        address: Address,
    },
    /// The certificates cannot be used.
    #[error("the certificates cannot be used")]
    Tls(#[from] TlsError),
    /// The operating system refused.
    #[error("{address} cannot be bound")]
    Io {
        /// Where.
        address: Address,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A bound address that accepts connections.
#[derive(Debug)]
pub struct Listener(Kind);

#[derive(Debug)]
enum Kind {
    Tcp(TcpListener),
    Tls(TcpListener, ServerTls),
    // The file goes when the listener does; fields drop in order, the socket first.
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Binds `address` for this user and this machine alone; port 0 takes a free port, see
    /// [`address`](Self::address). [`Exposure::bind`] does more.
    pub async fn bind(address: &Address) -> Result<Self, BindError> {
        let [listener] = Exposure::default()
            .bind(std::slice::from_ref(address))
            .await?
            .try_into()
            .unwrap_or_else(|_| unreachable!("one address, one listener"));
        Ok(listener)
    }

    /// Binds an `https://` address.
    pub async fn bind_tls(address: &Address, tls: ServerTls) -> Result<Self, BindError> {
        Self::bind_as(address, Some(tls), false).await
    }

    async fn bind_as(
        address: &Address,
        tls: Option<ServerTls>,
        other_users: bool,
    ) -> Result<Self, BindError> {
        let io = |source: io::Error| match source.kind() {
            io::ErrorKind::AddrInUse => BindError::InUse {
                address: address.clone(),
            },
            _ => BindError::Io {
                address: address.clone(),
                source,
            },
        };
        match address {
            Address::Tcp(authority) | Address::Tls(authority) => TcpListener::bind(authority)
                .await
                .map(|tcp| match tls {
                    Some(tls) => Self(Kind::Tls(tcp, tls)),
                    None => Self(Kind::Tcp(tcp)),
                })
                .map_err(io),
            Address::Unix(path) => {
                let (folder, mode) = if other_users {
                    (0o711, 0o666)
                } else {
                    (0o700, 0o600)
                };
                if let Some(parent) = path.parent() {
                    fs::DirBuilder::new()
                        .recursive(true)
                        .mode(folder)
                        .create(parent)
                        .map_err(io)?;
                }
                clear_stale(address, path).await?;
                let socket = UnixListener::bind(path).map_err(io)?;
                fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(io)?;
                let file = SocketFile::of(path).map_err(io)?;
                Ok(Self(Kind::Unix(socket, file)))
            }
        }
    }

    /// The address as bound, with the port that was taken.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match &self.0 {
            Kind::Tcp(tcp) => Address::Tcp(tcp.local_addr()?.to_string()),
            Kind::Tls(tcp, _) => Address::Tls(tcp.local_addr()?.to_string()),
            Kind::Unix(_, file) => Address::Unix(file.path.clone()),
        })
    }

    /// Whether no other machine can reach it, or only with a certificate.
    fn is_private(&self) -> bool {
        match &self.0 {
            Kind::Tcp(tcp) => tcp
                .local_addr()
                .is_ok_and(|address| address.ip().to_canonical().is_loopback()),
            Kind::Tls(..) | Kind::Unix(..) => true,
        }
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Accepted>> {
        Poll::Ready(match &self.0 {
            Kind::Tcp(tcp) => ready!(tcp.poll_accept(cx)).and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                Ok(Accepted::Ready(Connection::Tcp(Plain::new(stream))))
            }),
            Kind::Tls(tcp, tls) => ready!(tcp.poll_accept(cx)).and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                Ok(Accepted::Tls(stream, tls.clone()))
            }),
            Kind::Unix(unix, _) => ready!(unix.poll_accept(cx))
                .map(|(stream, _)| Accepted::Ready(Connection::Unix(stream))),
        })
    }
}

/// A socket that somebody connected to.
enum Accepted {
    Ready(Connection),
    /// Both sides do not know each other yet.
    Tls(TcpStream, ServerTls),
}

/// Removes a socket file that nobody answers on.
async fn clear_stale(address: &Address, path: &Path) -> Result<(), BindError> {
    let io = |source| BindError::Io {
        address: address.clone(),
        source,
    };
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(io(error)),
        Ok(file) if !file.file_type().is_socket() => {
            return Err(BindError::NotASocket {
                address: address.clone(),
            });
        }
        Ok(_) => {}
    }
    match UnixStream::connect(path).await {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {
            fs::remove_file(path).map_err(io)
        }
        Err(error) => Err(io(error)),
        Ok(_) => Err(BindError::InUse {
            address: address.clone(),
        }),
    }
}

/// The file of a bound socket, removed with it unless another service took the name meanwhile.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device_inode: (u64, u64),
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        Ok(Self {
            path: path.to_owned(),
            device_inode: device_inode(path)?,
        })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if device_inode(&self.path).is_ok_and(|now| now == self.device_inode) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn device_inode(path: &Path) -> io::Result<(u64, u64)> {
    let file = fs::symlink_metadata(path)?;
    Ok((file.dev(), file.ino()))
}

/// Connections of several listeners, as a stream that never ends.
#[derive(Debug)]
pub struct Incoming {
    listeners: Vec<Listener>,
    /// The listener that is asked first, so that a busy one cannot silence the others.
    first: usize,
    pause: Option<Pin<Box<Sleep>>>,
    /// TLS handshakes under way. They run beside each other: a slow client holds up nobody.
    handshakes: JoinSet<Option<Connection>>,
}

impl Incoming {
    /// Accepts on every one of `listeners`.
    pub fn new(listeners: Vec<Listener>) -> Self {
        Self {
            listeners,
            first: 0,
            pause: None,
            handshakes: JoinSet::new(),
        }
    }
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(pause) = &mut self.pause {
                ready!(pause.as_mut().poll(cx));
                self.pause = None;
            }
            match self.handshakes.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Some(connection)))) => {
                    return Poll::Ready(Some(Ok(connection)));
                }
                // A client that was refused, see `handshake`.
                Poll::Ready(Some(Ok(None))) => continue,
                Poll::Ready(Some(Err(error))) => {
                    let error = error_chain(&error);
                    tracing::warn!(error, "a TLS handshake came to no end");
                    continue;
                }
                Poll::Ready(None) | Poll::Pending => {}
            }
            let count = self.listeners.len();
            let is_full = self.handshakes.len() >= MAX_HANDSHAKES;
            let accepted = (self.first..self.first + count)
                .map(|at| at % count)
                .filter(|at| !(is_full && matches!(self.listeners[*at].0, Kind::Tls(..))))
                .find_map(|at| match self.listeners[at].poll_accept(cx) {
                    Poll::Ready(accepted) => Some((at, accepted)),
                    Poll::Pending => None,
                });
            match accepted {
                None => return Poll::Pending,
                Some((at, Ok(accepted))) => {
                    self.first = at + 1;
                    match accepted {
                        Accepted::Ready(connection) => return Poll::Ready(Some(Ok(connection))),
                        Accepted::Tls(tcp, tls) => {
                            self.handshakes.spawn(handshake::accept(tcp, tls));
                        }
                    }
                }
                Some((at, Err(error))) => {
                    self.first = at + 1;
                    tracing::warn!(%error, "a connection could not be accepted");
                    self.pause = Some(Box::pin(sleep(Duration::from_millis(ACCEPT_RETRY_MS))));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio_stream::StreamExt as _;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[tokio::test]
    async fn a_unix_socket_is_private_and_goes_with_its_listener() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/for/it/module.sock");
        let listener = Listener::bind(&Address::Unix(path.clone())).await.unwrap();
        assert_eq!(mode(&path), 0o600);
        assert_eq!(mode(path.parent().unwrap()), 0o700);
        assert_eq!(listener.address().unwrap(), Address::Unix(path.clone()));
        drop(listener);
        assert!(!path.exists());
    }

    #[tokio::test]
    async fn only_a_socket_that_nobody_answers_on_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("module.sock");
        let address = Address::Unix(path.clone());

        // A plain std listener leaves its file behind, as a killed process does.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let living = Listener::bind(&address).await.unwrap();
        assert!(matches!(
            Listener::bind(&address).await,
            Err(BindError::InUse { .. })
        ));
        assert!(path.exists());
        drop(living);

        fs::write(&path, "precious").unwrap();
        assert!(matches!(
            Listener::bind(&address).await,
            Err(BindError::NotASocket { .. })
        ));
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_port_in_use_is_refused_by_address() {
        let first = Listener::bind(&"http://127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let address = first.address().unwrap();
        let error = Listener::bind(&address).await.unwrap_err();
        assert_eq!(
            error.to_string(),
            format!("{address} is in use, a service answers there")
        );
    }

    #[tokio::test]
    async fn plain_tcp_beyond_this_machine_has_to_be_asked_for() {
        for (url, exposed) in [
            ("http://0.0.0.0:0", true),
            ("http://[::]:0", true),
            ("http://127.0.0.1:0", false),
            ("http://localhost:0", false),
        ] {
            let address: Address = url.parse().unwrap();
            match Listener::bind(&address).await {
                Ok(_) => assert!(!exposed, "{url}"),
                Err(error) => {
                    assert!(exposed, "{url}: {error}");
                    assert!(error.to_string().contains("--insecure-tcp"), "{error}");
                }
            }
            let insecure = Exposure {
                insecure_tcp: true,
                ..Exposure::default()
            };
            insecure.bind(&[address]).await.unwrap();
        }
    }

    #[tokio::test]
    async fn tls_without_certificates_is_refused_at_the_start() {
        let error = Listener::bind(&"https://127.0.0.1:0".parse().unwrap())
            .await
            .unwrap_err();
        let wanted = "https://127.0.0.1:0 needs --tls-cert, --tls-key and --tls-client-ca";
        assert_eq!(error.to_string(), wanted);
    }

    #[tokio::test]
    async fn listed_users_find_a_socket_that_they_can_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/module.sock");
        let exposure = Exposure {
            other_users: true,
            ..Exposure::default()
        };
        let _listeners = exposure.bind(&[Address::Unix(path.clone())]).await.unwrap();
        assert_eq!(mode(&path), 0o666);
        assert_eq!(mode(path.parent().unwrap()), 0o711);
    }

    #[tokio::test]
    async fn accepted_tcp_connections_have_nodelay() {
        let dir = tempfile::tempdir().unwrap();
        let unix = Address::Unix(dir.path().join("module.sock"));
        let tcp = Listener::bind(&"http://127.0.0.1:0".parse().unwrap())
            .await
            .unwrap();
        let Address::Tcp(authority) = tcp.address().unwrap() else {
            panic!("bound TCP")
        };
        let mut incoming = Incoming::new(vec![Listener::bind(&unix).await.unwrap(), tcp]);

        let _client = TcpStream::connect(authority).await.unwrap();
        match incoming.next().await {
            Some(Ok(Connection::Tcp(plain))) => assert!(plain.stream().nodelay().unwrap()),
            other => panic!("expected a TCP connection, got {other:?}"),
        }
        let _client = UnixStream::connect(dir.path().join("module.sock"))
            .await
            .unwrap();
        assert!(matches!(
            incoming.next().await,
            Some(Ok(Connection::Unix(_)))
        ));
    }
}

//! Binding and accepting, Unix sockets and TCP alike.
//!
//! A Unix socket is private to its user (0600, in a directory made with 0700): its file mode is
//! all the access control there is. The file of a service that died is replaced; the file of one
//! that answers is not (N3), and neither is a file that is no socket.

use std::fs;
use std::io;
use std::os::unix::fs::{
    DirBuilderExt as _, FileTypeExt as _, MetadataExt as _, PermissionsExt as _,
};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::time::{Sleep, sleep};
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpConnectInfo, UdsConnectInfo};

use crate::Address;

/// Pause after a failed accept, in milliseconds: with no file descriptor left every further
/// attempt would fail at once.
const ACCEPT_RETRY_MS: u64 = 50;

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
    // The file goes when the listener does; fields drop in order, the socket first.
    Unix(UnixListener, SocketFile),
}

impl Listener {
    /// Binds `address`; port 0 takes a free port, see [`address`](Self::address).
    pub async fn bind(address: &Address) -> Result<Self, BindError> {
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
            Address::Tcp(authority) => TcpListener::bind(authority)
                .await
                .map(|tcp| Self(Kind::Tcp(tcp)))
                .map_err(io),
            Address::Unix(path) => {
                if let Some(parent) = path.parent() {
                    fs::DirBuilder::new()
                        .recursive(true)
                        .mode(0o700)
                        .create(parent)
                        .map_err(io)?;
                }
                clear_stale(address, path).await?;
                let socket = UnixListener::bind(path).map_err(io)?;
                fs::set_permissions(path, fs::Permissions::from_mode(0o600)).map_err(io)?;
                let file = SocketFile::of(path).map_err(io)?;
                Ok(Self(Kind::Unix(socket, file)))
            }
        }
    }

    /// The address as bound, with the port that was taken.
    pub fn address(&self) -> io::Result<Address> {
        Ok(match &self.0 {
            Kind::Tcp(tcp) => Address::Tcp(tcp.local_addr()?.to_string()),
            Kind::Unix(_, file) => Address::Unix(file.path.clone()),
        })
    }

    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<Connection>> {
        Poll::Ready(match &self.0 {
            Kind::Tcp(tcp) => ready!(tcp.poll_accept(cx)).and_then(|(stream, _)| {
                stream.set_nodelay(true)?;
                Ok(Connection::Tcp(stream))
            }),
            Kind::Unix(unix, _) => {
                ready!(unix.poll_accept(cx)).map(|(stream, _)| Connection::Unix(stream))
            }
        })
    }
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
}

impl Incoming {
    /// Accepts on every one of `listeners`.
    pub fn new(listeners: Vec<Listener>) -> Self {
        Self {
            listeners,
            first: 0,
            pause: None,
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
            let count = self.listeners.len();
            let accepted = (self.first..self.first + count)
                .map(|at| at % count)
                .find_map(|at| match self.listeners[at].poll_accept(cx) {
                    Poll::Ready(accepted) => Some((at, accepted)),
                    Poll::Pending => None,
                });
            match accepted {
                None => return Poll::Pending,
                Some((at, Ok(connection))) => {
                    self.first = at + 1;
                    return Poll::Ready(Some(Ok(connection)));
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

/// An accepted connection.
#[derive(Debug)]
pub enum Connection {
    /// Over TCP, with Nagle's algorithm off (N1).
    Tcp(TcpStream),
    /// Over a Unix socket.
    Unix(UnixStream),
}

/// Who is at the other end; an extension of each request.
#[derive(Debug, Clone)]
pub enum PeerInfo {
    /// Addresses.
    Tcp(TcpConnectInfo),
    /// Process credentials.
    Unix(UdsConnectInfo),
}

impl Connected for Connection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        match self {
            Self::Tcp(stream) => PeerInfo::Tcp(stream.connect_info()),
            Self::Unix(stream) => PeerInfo::Unix(stream.connect_info()),
        }
    }
}

macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Connection::Tcp($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Connection::Unix($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
        }
    };
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_read(cx, buffer))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => stream.poll_write(cx, bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(stream) => stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_shutdown(cx))
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
            Some(Ok(Connection::Tcp(stream))) => assert!(stream.nodelay().unwrap()),
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

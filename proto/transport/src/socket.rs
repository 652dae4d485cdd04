//! A connection, whatever it runs over, at either end.

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::{fmt, io::IoSlice};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsStream;
use tonic::transport::server::{Connected, TcpConnectInfo, UdsConnectInfo};

use crate::Address;
use crate::access::Roles;
use crate::tls::{ClientTls, Explained, explain, roles_of};

/// First bytes of a TLS connection: a handshake record of any version since 1.0.
const TLS_BEGINS: [u8; 2] = [0x16, 0x03];

/// A connection.
#[derive(Debug)]
pub enum Connection {
    /// Over TCP, with Nagle's algorithm off (N1).
    Tcp(Plain),
    /// Over a Unix socket.
    Unix(UnixStream),
    /// Over TLS over TCP, likewise.
    Tls(Tls),
}

/// Connects to an address; `https://` needs certificates.
pub async fn open(address: &Address, tls: Option<&ClientTls>) -> io::Result<Connection> {
    Ok(match address {
        Address::Unix(path) => Connection::Unix(UnixStream::connect(path).await?),
        Address::Tcp(authority) => Connection::Tcp(Plain::new(dial(authority).await?)),
        Address::Tls(authority) => {
            let Some(tls) = tls else {
                let text = "no certificate authority is given for https://";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            };
            let tcp = dial(authority).await?;
            Connection::Tls(tls.connect(authority, tcp).await?)
        }
    })
}

async fn dial(authority: &str) -> io::Result<TcpStream> {
    let tcp = TcpStream::connect(authority).await?;
    tcp.set_nodelay(true)?;
    Ok(tcp)
}

/// Plain TCP. A caller that begins with TLS is told apart, so that the log can say so.
#[derive(Debug)]
pub struct Plain {
    stream: TcpStream,
    is_new: bool,
}

impl Plain {
    pub(crate) fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            is_new: true,
        }
    }

    /// The socket.
    pub fn stream(&self) -> &TcpStream {
        &self.stream
    }
}

impl AsyncRead for Plain {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buffer))?;
        if self.is_new {
            self.is_new = false;
            if buffer.filled()[before..].starts_with(&TLS_BEGINS) {
                let peer = self.stream.peer_addr().ok();
                tracing::warn!(?peer, "refused a client that speaks TLS to a plain address");
            }
        }
        Poll::Ready(Ok(()))
    }
}

/// TLS over TCP.
pub struct Tls {
    stream: Box<TlsStream<TcpStream>>,
    /// What is at the other end, for errors.
    peer: &'static str,
}

impl Tls {
    pub(crate) fn client(stream: tokio_rustls::client::TlsStream<TcpStream>) -> Self {
        Self {
            stream: Box::new(TlsStream::Client(stream)),
            peer: "service",
        }
    }

    pub(crate) fn server(stream: tokio_rustls::server::TlsStream<TcpStream>) -> Self {
        Self {
            stream: Box::new(TlsStream::Server(stream)),
            peer: "client",
        }
    }
}

impl fmt::Debug for Tls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Nothing of the session (L3).
        f.debug_struct("Tls")
            .field("stream", self.stream.get_ref().0)
            .finish()
    }
}

impl AsyncRead for Tls {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let read = ready!(Pin::new(&mut *self.stream).poll_read(cx, buffer));
        // A service looks at the certificate of its client after the client believes that all is
        // well, so a refusal may come as the answer to the first read.
        Poll::Ready(read.map_err(|error| match explain(&error, self.peer) {
            Some(text) => io::Error::new(error.kind(), Explained { text, error }),
            None => error,
        }))
    }
}

/// Who is at the other end; an extension of each request.
#[derive(Debug, Clone)]
pub enum PeerInfo {
    /// Addresses.
    Tcp(TcpConnectInfo),
    /// Process credentials.
    Unix(UdsConnectInfo),
    /// What the certificate says.
    Tls(TlsPeer),
}

/// The other end of a TLS connection.
#[derive(Debug, Clone)]
pub struct TlsPeer {
    /// Where it is.
    pub address: Option<SocketAddr>,
    /// The roles in its certificate.
    pub roles: Roles,
}

impl fmt::Display for PeerInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(TcpConnectInfo {
                remote_addr: Some(address),
                ..
            })
            | Self::Tls(TlsPeer {
                address: Some(address),
                ..
            }) => address.fmt(f),
            Self::Unix(UdsConnectInfo {
                peer_cred: Some(cred),
                ..
            }) => {
                write!(f, "uid {}", cred.uid())?;
                cred.pid().map_or(Ok(()), |pid| write!(f, " pid {pid}"))
            }
            _ => f.write_str("unknown"),
        }
    }
}

impl Connected for Connection {
    type ConnectInfo = PeerInfo;

    fn connect_info(&self) -> PeerInfo {
        match self {
            Self::Tcp(plain) => PeerInfo::Tcp(plain.stream.connect_info()),
            Self::Unix(stream) => PeerInfo::Unix(stream.connect_info()),
            Self::Tls(tls) => {
                let (tcp, session) = tls.stream.get_ref();
                PeerInfo::Tls(TlsPeer {
                    address: tcp.peer_addr().ok(),
                    roles: roles_of(session.peer_certificates()),
                })
            }
        }
    }
}

macro_rules! delegate {
    ($self:ident, $stream:ident => $call:expr) => {
        match $self.get_mut() {
            Connection::Tcp(plain) => {
                let $stream = Pin::new(&mut plain.stream);
                $call
            }
            Connection::Unix($stream) => {
                let $stream = Pin::new($stream);
                $call
            }
            Connection::Tls(tls) => {
                let $stream = Pin::new(&mut *tls.stream);
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
        match self.get_mut() {
            Self::Tcp(plain) => Pin::new(plain).poll_read(cx, buffer),
            Self::Unix(stream) => Pin::new(stream).poll_read(cx, buffer),
            Self::Tls(tls) => Pin::new(tls).poll_read(cx, buffer),
        }
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
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        delegate!(self, stream => stream.poll_write_vectored(cx, slices))
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Tcp(plain) => plain.stream.is_write_vectored(),
            Self::Unix(stream) => stream.is_write_vectored(),
            Self::Tls(tls) => tls.stream.is_write_vectored(),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_flush(cx))
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        delegate!(self, stream => stream.poll_shutdown(cx))
    }
}

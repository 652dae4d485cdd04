//! The end that calls.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;

use rustls::ClientConfig;
use rustls::client::Resumption;
use rustls::pki_types::ServerName;
use tokio::io::AsyncBufRead as _;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::watched::Watched;
use super::{TlsError, explain, files, provider};
use crate::socket::Tls;

/// Time between two looks at the files.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a service may say nothing about the certificate shown, in milliseconds.
const SILENCE_MS: u64 = 1000;

/// Files of a client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ClientTlsFiles {
    /// Authorities whose certificates services may show.
    pub ca: PathBuf,
    /// Certificate of the client and its key. Without them every service of this project refuses
    /// the connection, and says why.
    pub identity: Option<(PathBuf, PathBuf)>,
}

/// What a client needs for `https://` addresses. The files are watched (L1).
#[derive(Clone)]
pub struct ClientTls(Arc<Watched<ClientConfig>>);

impl ClientTls {
    /// Reads the files.
    pub fn load(files: ClientTlsFiles) -> Result<Self, TlsError> {
        let mut watch = vec![files.ca.clone()];
        if let Some((cert, key)) = &files.identity {
            watch.extend([cert.clone(), key.clone()]);
        }
        Ok(Self(Arc::new(Watched::new(
            watch,
            LOOK_EVERY,
            move || config(&files),
        )?)))
    }

    /// Speaks TLS on a connection to `authority`, a host and port.
    pub(crate) async fn connect(&self, authority: &str, tcp: TcpStream) -> io::Result<Tls> {
        let host = authority
            .rsplit_once(':')
            .map_or(authority, |(host, _)| host);
        let address = host
            .strip_prefix('[')
            .and_then(|host| host.strip_suffix(']'));
        let name = ServerName::try_from(address.unwrap_or(host).to_owned())
            .map_err(|error| io::Error::new(io::ErrorKind::InvalidInput, error))?;
        let connector = TlsConnector::from(self.0.get());
        let connected = async {
            let mut stream = connector.connect(name, tcp).await?;
            accepted(&mut stream).await?;
            Ok(stream)
        };
        match connected.await {
            Ok(stream) => Ok(Tls::client(stream)),
            Err(error) => Err(match explain(&error, "service") {
                Some(text) => io::Error::new(error.kind(), Explained { text, error }),
                None => error,
            }),
        }
    }
}

/// Waits until the service has looked at the certificate of this end.
///
/// In TLS 1.3 a client is done before the service is, and would send its first request into a
/// connection that is refused already. The ticket of a session comes after that look; a service
/// that sends none, or speaks first, is taken at its silence or its word.
async fn accepted(stream: &mut TlsStream<TcpStream>) -> io::Result<()> {
    let answer = poll_fn(|cx| {
        let read = Pin::new(&mut *stream).poll_fill_buf(cx).map_ok(|_| ());
        let is_accepted = stream.get_ref().1.tls13_tickets_received() > 0;
        if read.is_pending() && is_accepted {
            return Poll::Ready(Ok(()));
        }
        read
    });
    tokio::time::timeout(Duration::from_millis(SILENCE_MS), answer)
        .await
        .unwrap_or(Ok(()))
}

/// An error with what it means in front.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
pub(crate) struct Explained {
    pub(crate) text: String,
    #[source]
    pub(crate) error: io::Error,
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ClientTls")
    }
}

fn config(files: &ClientTlsFiles) -> Result<ClientConfig, TlsError> {
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(TlsError::Protocol)?
        .with_root_certificates(files::authorities(&files.ca)?);
    let mut config = match &files.identity {
        None => config.with_no_client_auth(),
        Some((cert, key)) => config
            .with_client_auth_cert(files::certificates(cert)?, files::key(key)?)
            .map_err(|source| TlsError::Identity {
                cert: cert.clone(),
                key: key.clone(),
                source,
            })?,
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.resumption = Resumption::disabled();
    Ok(config)
}

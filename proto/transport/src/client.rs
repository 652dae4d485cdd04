//! Channels to a service.

use std::time::Duration;

use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;

use crate::{
    Address, AddressError, CONNECTION_WINDOW, ClientTls, KEEPALIVE_S, KEEPALIVE_TIMEOUT_S,
    STREAM_WINDOW, open,
};

/// How long opening a connection may take, in seconds.
const CONNECT_TIMEOUT_S: u64 = 5;
/// How long a health check may take, in seconds.
const HEALTH_TIMEOUT_S: u64 = 5;

/// A service cannot be reached.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The URL is none.
    #[error(transparent)]
    Address(#[from] AddressError),
    /// The URL is well-formed and yet no HTTP destination.
    #[error("{address} is not a destination")]
    Destination {
        /// Where.
        address: Address,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
    /// `https://` without certificates.
    #[error("{address} needs --tls-ca, and --tls-cert with --tls-key")]
    NoCertificate {
        /// Where.
        address: Address,
    },
    /// Nobody answers.
    #[error("no service answers at {address}")]
    Unreachable {
        /// Where.
        address: Address,
        /// Why.
        #[source]
        source: tonic::transport::Error,
    },
}

/// A service is not well.
#[derive(Debug, thiserror::Error)]
pub enum HealthError {
    /// It does not answer at all.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// It answers the check with an error.
    #[error("the health check was refused: {}", .0.message())]
    Refused(#[source] Box<tonic::Status>),
    /// It says that it is not serving.
    #[error("the service is {0}")]
    NotServing(&'static str),
}

/// The endpoint of a URL, with the windows and keepalive of this project.
///
/// For `https://` its connector has to speak TLS: tonic's own does not.
pub fn endpoint(url: &str) -> Result<Endpoint, ConnectError> {
    let address: Address = url.parse()?;
    let (destination, origin) = match &address {
        // tonic takes it for its own business to speak TLS where it sees https.
        Address::Tls(authority) => {
            let origin = address.to_string().parse::<Uri>().ok();
            (format!("http://{authority}"), origin)
        }
        _ => (address.to_string(), None),
    };
    let endpoint = Endpoint::from_shared(destination)
        .map_err(|source| ConnectError::Destination { address, source })?;
    let endpoint = match origin {
        Some(origin) => endpoint.origin(origin),
        None => endpoint,
    };
    Ok(endpoint
        .tcp_nodelay(true)
        .connect_timeout(Duration::from_secs(CONNECT_TIMEOUT_S))
        .initial_stream_window_size(STREAM_WINDOW)
        .initial_connection_window_size(CONNECTION_WINDOW)
        .http2_keep_alive_interval(Duration::from_secs(KEEPALIVE_S))
        .keep_alive_timeout(Duration::from_secs(KEEPALIVE_TIMEOUT_S))
        .keep_alive_while_idle(true))
}

/// A channel that is connected now, and connects again by itself when the service comes back.
pub async fn connect(url: &str) -> Result<Channel, ConnectError> {
    connect_with(url, None).await
}

/// The same with certificates, for `https://` addresses.
pub async fn connect_with(url: &str, tls: Option<&ClientTls>) -> Result<Channel, ConnectError> {
    let address: Address = url.parse()?;
    let endpoint = endpoint(url)?;
    let connected = match (&address, tls) {
        (Address::Tls(_), None) => return Err(ConnectError::NoCertificate { address }),
        (Address::Tls(_), Some(tls)) => {
            let (address, tls) = (address.clone(), tls.clone());
            let dial = tower::service_fn(move |_: Uri| {
                let (address, tls) = (address.clone(), tls.clone());
                async move { open(&address, Some(&tls)).await.map(TokioIo::new) }
            });
            endpoint.connect_with_connector(dial).await
        }
        _ => endpoint.connect().await,
    };
    connected.map_err(|source| ConnectError::Unreachable { address, source })
}

/// Asks the service at `url` whether it is serving, by grpc.health.v1.
pub async fn healthcheck(url: &str) -> Result<(), HealthError> {
    healthcheck_with(url, None).await
}

/// The same with certificates, for `https://` addresses.
pub async fn healthcheck_with(url: &str, tls: Option<&ClientTls>) -> Result<(), HealthError> {
    let mut health = HealthClient::new(connect_with(url, tls).await?);
    let mut request = tonic::Request::new(HealthCheckRequest {
        service: String::new(),
    });
    request.set_timeout(Duration::from_secs(HEALTH_TIMEOUT_S));
    let answer = health
        .check(request)
        .await
        .map_err(|status| HealthError::Refused(Box::new(status)))?
        .into_inner();
    match answer.status() {
        ServingStatus::Serving => Ok(()),
        other => Err(HealthError::NotServing(other.as_str_name())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_endpoint_has_nodelay() {
        for url in ["http://127.0.0.1:1", "unix:///run/module.sock"] {
            assert!(endpoint(url).unwrap().get_tcp_nodelay(), "{url}");
        }
    }

    #[tokio::test]
    async fn an_address_without_a_service_is_named_in_the_error() {
        let dir = tempfile::tempdir().unwrap();
        let url = format!("unix://{}", dir.path().join("none.sock").display());
        let error = connect(&url).await.unwrap_err();
        assert_eq!(error.to_string(), format!("no service answers at {url}"));
        assert!(std::error::Error::source(&error).is_some());
    }
}

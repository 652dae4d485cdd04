//! One connection to one module process.
//!
//! An ordinary channel connects again by itself, and then nobody knows which run of the module
//! answers. Here the channel is bound to a single socket: what GetPlatform says about it stays
//! true until the socket dies, so a batch for a TD of an old run cannot reach a new one.

use std::io;
use std::sync::Arc;

use hyper_util::rt::TokioIo;
use mirror_proto::module::GetPlatformRequest;
use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use tonic::transport::{Channel, Uri};

use super::{Attachment, LinkError, Shared};

/// A connection, and the run of the module at its other end.
#[derive(Debug, Clone)]
pub(super) struct Connection {
    pub(super) channel: Channel,
    pub(super) client: TdxModuleServiceClient<Channel>,
    pub(super) attachment: Arc<Attachment>,
}

/// Connects and learns which run of the module answers.
pub(super) async fn dial(shared: &Shared) -> Result<Connection, LinkError> {
    let limit = shared.config.rpc_deadline;
    tokio::time::timeout(limit, connect(shared))
        .await
        .unwrap_or_else(|_| {
            Err(LinkError::Silent {
                module: shared.config.module.clone(),
                limit,
            })
        })
}

async fn connect(shared: &Shared) -> Result<Connection, LinkError> {
    let config = &shared.config;
    let unreachable = |source| LinkError::Unreachable {
        module: config.module.clone(),
        source,
    };
    let socket = transport::open(&config.module, config.tls.as_ref())
        .await
        .map_err(unreachable)?;
    let channel = transport::endpoint(&config.module.to_string())
        .map_err(LinkError::Address)?
        .connect_with_connector(single_use(socket))
        .await
        .map_err(|error| unreachable(io::Error::other(error)))?;
    let mut client = TdxModuleServiceClient::new(channel.clone())
        .max_decoding_message_size(config.message_limit)
        .max_encoding_message_size(config.message_limit);
    let platform = client
        .get_platform(GetPlatformRequest {})
        .await
        .map_err(|status| LinkError::NoPlatform(Box::new(status)))?
        .into_inner();
    let attachment = shared.instances.learn(&platform)?;
    Ok(Connection {
        channel,
        client,
        attachment,
    })
}

/// A connector that has one socket to give. When the connection is lost, calls fail.
fn single_use(
    socket: transport::Connection,
) -> impl tower::Service<
    Uri,
    Response = TokioIo<transport::Connection>,
    Error = io::Error,
    Future = std::future::Ready<io::Result<TokioIo<transport::Connection>>>,
> + Send
+ 'static {
    let mut socket = Some(socket);
    tower::service_fn(move |_: Uri| {
        std::future::ready(
            socket
                .take()
                .map(TokioIo::new)
                .ok_or_else(|| io::Error::new(io::ErrorKind::NotConnected, "connection lost")),
        )
    })
}

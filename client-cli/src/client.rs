//! Calls to the two services: deadlines, interruption, and what an error means.

use std::time::Duration;

use mirror_proto::mmu::mmu_service_client::MmuServiceClient;
use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use telemetry::propagate::{ClientTraceLayer, TracedChannel};
use tonic::{Code, Request, Response, Status, Streaming};
use tower::Layer as _;
use transport::{Address, ClientTls};

use crate::error::{Error, Refusal};
use crate::stop::Stop;

/// Answers are bounded by the services; this only lifts tonic's smaller default.
const MAX_ANSWER_BYTES: usize = 64 << 20;

/// How long to wait for answers.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For a call whose work does not grow with its arguments.
    pub short: Duration,
    /// For one that works through a range or a whole VM, and between messages of a stream.
    pub long: Duration,
}

impl Limits {
    /// As `--timeout` says for every call, else a minute and half an hour.
    pub fn new(timeout: Option<Duration>) -> Self {
        Self {
            short: timeout.unwrap_or(Duration::from_secs(60)),
            long: timeout.unwrap_or(Duration::from_secs(30 * 60)),
        }
    }
}

/// The connections of a command.
#[derive(Debug, Clone)]
pub struct Client {
    /// The MMU service.
    pub mmu: MmuServiceClient<TracedChannel>,
    /// The module, when its URL is known.
    pub module: Option<TdxModuleServiceClient<TracedChannel>>,
    /// How long to wait.
    pub limits: Limits,
    stop: Stop,
}

impl Client {
    /// Connects to the MMU service, and to the module when it has a URL.
    pub async fn connect(
        mmu: &str,
        module: Option<&str>,
        tls: Option<&ClientTls>,
        limits: Limits,
        stop: Stop,
    ) -> Result<Self, Error> {
        let channel = connect("MMU service", mmu, tls, limits, &stop).await?;
        let mmu = MmuServiceClient::new(channel).max_decoding_message_size(MAX_ANSWER_BYTES);
        let module = match module {
            Some(url) => Some(connect_module(url, tls, limits, &stop).await?),
            None => None,
        };
        Ok(Self {
            mmu,
            module,
            limits,
            stop,
        })
    }

    /// The same connections for cleaning up: signals no longer interrupt it, and it gives up soon.
    pub fn for_cleanup(&self, long: Duration) -> Self {
        let limits = Limits {
            short: self.limits.short.min(long),
            long,
        };
        Self {
            limits,
            stop: Stop::never(),
            ..self.clone()
        }
    }

    /// Waits for an answer that comes soon.
    pub async fn short<M, T>(
        &self,
        call: &'static str,
        message: M,
        send: impl AsyncFnOnce(
            MmuServiceClient<TracedChannel>,
            Request<M>,
        ) -> Result<Response<T>, Status>,
    ) -> Result<T, Error> {
        self.within(self.limits.short, call, message, send).await
    }

    /// Waits for an answer that may take its time.
    pub async fn long<M, T>(
        &self,
        call: &'static str,
        message: M,
        send: impl AsyncFnOnce(
            MmuServiceClient<TracedChannel>,
            Request<M>,
        ) -> Result<Response<T>, Status>,
    ) -> Result<T, Error> {
        self.within(self.limits.long, call, message, send).await
    }

    async fn within<M, T>(
        &self,
        limit: Duration,
        call: &'static str,
        message: M,
        send: impl AsyncFnOnce(
            MmuServiceClient<TracedChannel>,
            Request<M>,
        ) -> Result<Response<T>, Status>,
    ) -> Result<T, Error> {
        let request = with_deadline(message, limit);
        let answer = send(self.mmu.clone(), request);
        wait(call, limit, &self.stop, answer).await
    }

    /// Signals that end what is waited for.
    pub fn stop(&self) -> &Stop {
        &self.stop
    }

    /// Opens a stream of requests. It has no deadline as a whole, only between its messages.
    pub async fn open<M, T>(
        &self,
        call: &'static str,
        requests: M,
        send: impl AsyncFnOnce(MmuServiceClient<TracedChannel>, M) -> Result<Response<T>, Status>,
    ) -> Result<T, Error> {
        wait(
            call,
            self.limits.long,
            &self.stop,
            send(self.mmu.clone(), requests),
        )
        .await
    }

    /// Waits for the next message of a stream; `None` at its end.
    pub async fn next<T>(
        &self,
        call: &'static str,
        stream: &mut Streaming<T>,
    ) -> Result<Option<T>, Error> {
        let next = async { stream.message().await.map(Response::new) };
        let answer = wait(call, self.limits.long, &self.stop, next).await;
        // Between messages a signal ends the command as well, however fast they come.
        if self.stop.is_asked() {
            Err(Error::Interrupted)
        } else {
            answer
        }
    }
}

/// Connects to the module alone.
pub async fn connect_module(
    url: &str,
    tls: Option<&ClientTls>,
    limits: Limits,
    stop: &Stop,
) -> Result<TdxModuleServiceClient<TracedChannel>, Error> {
    let channel = connect_module_channel(url, tls, limits, stop).await?;
    Ok(TdxModuleServiceClient::new(channel)
        .max_decoding_message_size(MAX_ANSWER_BYTES)
        .max_encoding_message_size(MAX_ANSWER_BYTES))
}

/// A connection to the module, for any of its services.
pub async fn connect_module_channel(
    url: &str,
    tls: Option<&ClientTls>,
    limits: Limits,
    stop: &Stop,
) -> Result<TracedChannel, Error> {
    connect("TDX module", url, tls, limits, stop).await
}

async fn connect(
    service: &'static str,
    url: &str,
    tls: Option<&ClientTls>,
    limits: Limits,
    stop: &Stop,
) -> Result<TracedChannel, Error> {
    let connected = tokio::select! {
        connected = tokio::time::timeout(limits.short, transport::connect_with(url, tls)) => connected,
        () = stop.asked() => return Err(Error::Interrupted),
    };
    let channel = connected
        .map_err(|_| Error::NoAnswer {
            call: "connect",
            limit: limits.short,
        })?
        .map_err(|source| Error::Connect { service, source })?;
    Ok(trace_layer(url).layer(channel))
}

/// Names the server in the spans of its calls.
fn trace_layer(url: &str) -> ClientTraceLayer {
    let layer = ClientTraceLayer::new();
    match url.parse::<Address>() {
        Ok(address) => {
            let (server, port) = address.server();
            layer.server(&server, port)
        }
        // Nobody could connect to it.
        Err(_) => layer,
    }
}

/// A request that tells the service how long somebody waits.
pub fn with_deadline<M>(message: M, limit: Duration) -> Request<M> {
    let mut request = Request::new(message);
    request.set_timeout(limit);
    request
}

/// Waits for an answer, a deadline or a signal, whatever comes first.
pub async fn wait<T>(
    call: &'static str,
    limit: Duration,
    stop: &Stop,
    answer: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Error> {
    let answer = tokio::select! {
        answer = tokio::time::timeout(limit, answer) => answer,
        () = stop.asked() => return Err(Error::Interrupted),
    };
    match answer {
        Ok(Ok(response)) => Ok(response.into_inner()),
        // tonic reports an expired deadline as a cancelled call.
        Ok(Err(status)) if is_expiry(&status) => Err(Error::NoAnswer { call, limit }),
        Ok(Err(status)) => Err(Error::Refused {
            call,
            source: Refusal::new(status),
        }),
        Err(_) => Err(Error::NoAnswer { call, limit }),
    }
}

fn is_expiry(status: &Status) -> bool {
    status.code() == Code::DeadlineExceeded
        || (status.code() == Code::Cancelled && status.message().contains("Timeout expired"))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn outcome(answer: Result<u32, Status>) -> Result<u32, Error> {
        let answer = async { answer.map(Response::new) };
        wait("Call", Duration::from_secs(60), &Stop::never(), answer).await
    }

    #[tokio::test]
    async fn an_expired_deadline_is_told_from_a_refusal() {
        assert_eq!(outcome(Ok(7)).await.unwrap(), 7);
        for (status, expired) in [
            (Status::cancelled("Timeout expired"), true),
            (Status::deadline_exceeded("late"), true),
            (Status::cancelled("the client went away"), false),
            (Status::not_found("vm 7"), false),
        ] {
            let error = outcome(Err(status.clone())).await.unwrap_err();
            assert_eq!(matches!(error, Error::NoAnswer { .. }), expired, "{status}");
        }
    }

    #[tokio::test]
    async fn a_call_without_an_answer_ends_at_its_limit() {
        let never = std::future::pending::<Result<Response<()>, Status>>();
        let limit = Duration::from_millis(1);
        let error = wait("Call", limit, &Stop::never(), never)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "Call had no answer within the limit of 0.001 s; whether it was carried out is unknown"
        );
    }
}

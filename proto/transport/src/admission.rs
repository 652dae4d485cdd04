//! A bound on the requests that are worked on at a time. Those above it are refused at once.
//!
//! Source: gRPC status RESOURCE_EXHAUSTED with google.rpc.RetryInfo. Nothing has run when it is
//! answered, so the caller may send the same request again after the delay. A call holds its place
//! until its handler returns; a streaming call has other bounds once its stream is open.

mod returns;

use std::collections::HashMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;
use tonic::body::Body;
use tonic_types::{ErrorDetails, StatusExt as _};
use tower::{Layer, Service};

use crate::Reason;
use returns::Returns;

/// Layer that admits `limit` requests at a time to the services behind it, taken together.
#[derive(Debug, Clone)]
pub struct AdmissionLayer {
    places: Arc<Semaphore>,
    limit: usize,
    returns: Arc<Returns>,
    reason: Reason,
    domain: &'static str,
    refused: Arc<AtomicU64>,
}

impl AdmissionLayer {
    /// Admits `limit` requests and tells the others to come back after `retry_after` or later, one
    /// after the other, for `reason` of `domain`.
    pub fn new(limit: usize, retry_after: Duration, reason: Reason, domain: &'static str) -> Self {
        let limit = limit.min(Semaphore::MAX_PERMITS);
        Self {
            places: Arc::new(Semaphore::new(limit)),
            limit,
            returns: Arc::new(Returns::new(retry_after, limit)),
            reason,
            domain,
            refused: Arc::default(),
        }
    }

    /// How many requests found no place so far.
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::Relaxed)
    }

    /// The refusal of a request that found no place.
    fn refusal(&self) -> Status {
        let mut details = ErrorDetails::with_retry_info(Some(self.returns.delay()));
        details.set_error_info(self.reason.word, self.domain, HashMap::new());
        let message = format!("{} requests are in work, the limit", self.limit);
        Status::with_error_details(self.reason.code, message, details)
    }
}

impl<S> Layer<S> for AdmissionLayer {
    type Service = Admission<S>;

    fn layer(&self, inner: S) -> Admission<S> {
        Admission {
            inner,
            layer: self.clone(),
        }
    }
}

/// [`AdmissionLayer`] around a service.
#[derive(Debug, Clone)]
pub struct Admission<S> {
    inner: S,
    layer: AdmissionLayer,
}

impl<S, R> Service<R> for Admission<S>
where
    S: Service<R, Response = http::Response<Body>>,
{
    type Response = http::Response<Body>;
    type Error = S::Error;
    type Future = AdmissionFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: R) -> Self::Future {
        match self.layer.places.clone().try_acquire_owned() {
            Ok(place) => AdmissionFuture::Admitted(Box::pin(self.inner.call(request)), place),
            Err(_) => {
                self.layer.refused.fetch_add(1, Ordering::Relaxed);
                AdmissionFuture::Refused(Some(self.layer.refusal().into_http()))
            }
        }
    }
}

/// The answer of an [`Admission`].
#[derive(Debug)]
pub enum AdmissionFuture<F> {
    /// The call has a place for as long as this lives.
    Admitted(Pin<Box<F>>, OwnedSemaphorePermit),
    /// There was none.
    Refused(Option<http::Response<Body>>),
}

impl<F, E> Future for AdmissionFuture<F>
where
    F: Future<Output = Result<http::Response<Body>, E>>,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<F::Output> {
        match &mut *self {
            Self::Admitted(call, _) => Poll::Ready(ready!(call.as_mut().poll(cx))),
            Self::Refused(refusal) => match refusal.take() {
                Some(refusal) => Poll::Ready(Ok(refusal)),
                None => Poll::Pending,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use tonic::Code;

    use super::*;

    crate::reasons! {
        OVERLOADED: ResourceExhausted, "", "too many", "wait";
    }

    #[tokio::test]
    async fn requests_above_the_limit_are_told_when_to_come_back() {
        let retry_after = Duration::from_millis(20);
        let (release, wait) = tokio::sync::watch::channel(());
        let inner = tower::service_fn(|()| {
            let mut wait = wait.clone();
            async move {
                let _ = wait.changed().await;
                Ok::<_, Infallible>(http::Response::new(Body::empty()))
            }
        });
        let layer = AdmissionLayer::new(2, retry_after, OVERLOADED, "a.b");
        let mut service = layer.layer(inner);
        let admitted = [service.call(()), service.call(())];

        let refused = service.call(()).await.unwrap();
        let status = Status::from_header_map(refused.headers()).unwrap();
        assert_eq!(status.code(), Code::ResourceExhausted);
        assert_eq!(status.message(), "2 requests are in work, the limit");
        let details = status.get_error_details();
        let delay = details.retry_info().unwrap().retry_delay.unwrap();
        // The service's clock may tick between the two.
        assert!(delay >= retry_after && delay < retry_after * 2, "{delay:?}");
        let info = details.error_info().unwrap();
        assert_eq!((&*info.reason, &*info.domain), ("OVERLOADED", "a.b"));
        assert_eq!(layer.refused(), 1);

        release.send(()).unwrap();
        for call in admitted {
            assert!(Status::from_header_map(call.await.unwrap().headers()).is_none());
        }
        drop(release);
        assert!(Status::from_header_map(service.call(()).await.unwrap().headers()).is_none());
    }
}

//! What operators and tools rely on: both transports, health, reflection, a polite end.

use tokio::time::timeout;
use tokio_stream::StreamExt as _;
use tonic::Code;
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_types::StatusExt as _;

use crate::stream::open;
use crate::support::*;

const SERVICE: &str = "tdx.module.v1.TdxModuleService";

#[tokio::test]
async fn both_transports_reach_the_same_module() {
    let server = Server::start().await;
    let mut unix = server.client().await;
    let mut tcp = Client::new(transport::connect(&server.tcp).await.unwrap());
    assert_success(&statuses(&mut unix, vec![create()]).await);
    assert_eq!(pages_in_use(&mut tcp, "PT_TDR").await, 1);
    assert_eq!(
        platform(&mut unix).await.instance,
        platform(&mut tcp).await.instance
    );
}

#[tokio::test]
async fn every_start_is_another_instance() {
    let (one, other) = (Server::start().await, Server::start().await);
    let one = platform(&mut one.client().await).await.instance;
    assert_ne!(one, platform(&mut other.client().await).await.instance);
}

#[tokio::test]
async fn health_is_known_by_service_and_overall() {
    let server = Server::start().await;
    transport::healthcheck(&server.unix).await.unwrap();
    transport::healthcheck(&server.tcp).await.unwrap();
    let mut health = HealthClient::new(transport::connect(&server.unix).await.unwrap());
    let answer = health
        .check(HealthCheckRequest {
            service: SERVICE.into(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(answer.status(), ServingStatus::Serving);
    let unknown = health
        .check(HealthCheckRequest {
            service: "kvm".into(),
        })
        .await
        .unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound);
}

/// Lists services by one version of the protocol.
macro_rules! listed_services {
    ($server:expr, $version:ident) => {{
        use tonic_reflection::pb::$version as pb;
        let channel = transport::connect(&$server.unix).await.unwrap();
        let mut client = pb::server_reflection_client::ServerReflectionClient::new(channel);
        let request = pb::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(pb::server_reflection_request::MessageRequest::ListServices(
                String::new(),
            )),
        };
        let answers = client
            .server_reflection_info(tokio_stream::once(request))
            .await
            .unwrap();
        let answer = answers.into_inner().next().await.unwrap().unwrap();
        match answer.message_response {
            Some(pb::server_reflection_response::MessageResponse::ListServicesResponse(list)) => {
                list.service
                    .into_iter()
                    .map(|service| service.name)
                    .collect::<Vec<_>>()
            }
            other => panic!("{other:?}"),
        }
    }};
}

#[tokio::test]
async fn reflection_lists_what_is_served_in_both_versions() {
    let server = Server::start().await;
    for listed in [
        listed_services!(server, v1),
        listed_services!(server, v1alpha),
    ] {
        for service in [SERVICE, "grpc.health.v1.Health"] {
            assert!(
                listed.iter().any(|name| name == service),
                "{service} in {listed:?}"
            );
        }
        assert!(
            !listed.iter().any(|name| name.starts_with("kvm.")),
            "{listed:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_in_flight_is_answered_after_the_service_was_told_to_stop() {
    let server = Server::start().await;
    let (mut unary, mut streaming) = (server.client().await, server.client().await);
    let mut observer = server.client().await;
    let url = server.unix.clone();

    let (sender, mut answers) = open(&mut streaming).await;
    let long = repeated(rdmd(PAGE), 1 << 19, 0, 0);
    sender
        .send(batch(vec![create(), long.clone()]))
        .await
        .unwrap();
    // Pages in use say that the batch has begun.
    let begun = async { while pages_in_use(&mut observer, "PT_TDR").await == 0 {} };
    timeout(PATIENCE, begun).await.unwrap();
    let unary = tokio::spawn(async move { execute(&mut unary, batch(vec![long; 2])).await });
    let mut health = HealthClient::new(transport::connect(&url).await.unwrap());
    let watch = HealthCheckRequest {
        service: SERVICE.into(),
    };
    let mut watch = health.watch(watch).await.unwrap().into_inner();
    assert_eq!(
        watch.next().await.unwrap().unwrap().status(),
        ServingStatus::Serving
    );

    let (running, _dir) = server.stop();
    assert_eq!(
        watch.next().await.unwrap().unwrap().status(),
        ServingStatus::NotServing
    );
    assert!(watch.next().await.is_none());

    let answer = answers.next().await.unwrap().unwrap();
    assert_eq!(answer.results[1].completed, 1 << 19);
    let end = answers.next().await.unwrap().unwrap_err();
    assert_eq!(end.code(), Code::Unavailable);
    assert_eq!(end.get_details_error_info().unwrap().reason, "DRAINING");
    // It was accepted before the end, or told to go elsewhere: either way it is no half answer.
    if let Ok(answer) = unary.await.unwrap() {
        assert_eq!(answer.results.len(), 2);
    }
    drop((answers, sender, streaming, observer, health, watch));
    timeout(PATIENCE, running).await.unwrap().unwrap().unwrap();
    assert!(transport::connect(&url).await.is_err());
}

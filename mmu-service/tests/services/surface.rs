//! What tools expect of any gRPC service: health and reflection.

use crate::stack::{Stack, socket};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_reflection::pb::{v1, v1alpha};

#[tokio::test]
async fn health_is_reported_for_the_server_and_for_the_service() {
    let stack = Stack::start().await;
    let address = socket(stack.dir.path(), "mmu").to_string();
    let channel = transport::connect(&address).await.unwrap();
    let mut health = tonic_health::pb::health_client::HealthClient::new(channel);
    for service in ["", "kvm.mmu.v1.MmuService"] {
        let request = tonic_health::pb::HealthCheckRequest {
            service: service.into(),
        };
        let answer = health.check(request).await.unwrap().into_inner();
        assert_eq!(answer.status(), ServingStatus::Serving, "{service:?}");
    }
    let request = tonic_health::pb::HealthCheckRequest {
        service: "another".into(),
    };
    assert_eq!(
        health.check(request).await.unwrap_err().code(),
        tonic::Code::NotFound
    );
    transport::healthcheck(&address).await.unwrap();
}

/// Asks one version of the reflection service for its services and for one symbol.
macro_rules! reflected {
    ($version:ident, $channel:expr) => {{
        use $version::server_reflection_request::MessageRequest as Ask;
        use $version::server_reflection_response::MessageResponse as Answer;
        let mut client = $version::server_reflection_client::ServerReflectionClient::new($channel);
        let asked = [
            Ask::ListServices(String::new()),
            Ask::FileContainingSymbol("kvm.mmu.v1.MmuService".into()),
            // A refusal has it among its details.
            Ask::FileContainingSymbol("google.rpc.ErrorInfo".into()),
        ];
        let requests = asked.map(|ask| $version::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(ask),
        });
        let answers = client
            .server_reflection_info(tokio_stream::iter(requests))
            .await
            .unwrap();
        let mut answers = answers.into_inner();
        let Some(Answer::ListServicesResponse(list)) =
            answers.message().await.unwrap().unwrap().message_response
        else {
            panic!("no list of services");
        };
        for _ in 0..2 {
            let Some(Answer::FileDescriptorResponse(file)) =
                answers.message().await.unwrap().unwrap().message_response
            else {
                panic!("no descriptor");
            };
            assert!(!file.file_descriptor_proto.is_empty());
        }
        list.service
            .into_iter()
            .map(|service| service.name)
            .collect::<Vec<_>>()
    }};
}

#[tokio::test]
async fn both_versions_of_reflection_describe_the_service() {
    let stack = Stack::start().await;
    let address = socket(stack.dir.path(), "mmu").to_string();
    let channel = transport::connect(&address).await.unwrap();
    for services in [
        reflected!(v1, channel.clone()),
        reflected!(v1alpha, channel.clone()),
    ] {
        assert!(
            services.contains(&"kvm.mmu.v1.MmuService".to_owned()),
            "{services:?}"
        );
        assert!(
            services.contains(&"grpc.health.v1.Health".to_owned()),
            "{services:?}"
        );
        assert!(
            !services.iter().any(|name| name.starts_with("tdx.module")),
            "{services:?}"
        );
    }
}

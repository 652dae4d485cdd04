//! Certificates that change while a service runs.

use std::path::Path;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
};
use tokio::sync::oneshot;
use transport::{ClientTls, ClientTlsFiles, Exposure, Listener, ServerTls, ServerTlsFiles};

type Authority = CertifiedIssuer<'static, KeyPair>;

fn authority() -> Authority {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    Authority::self_signed(params, KeyPair::generate().unwrap()).unwrap()
}

/// Writes a certificate that is good for both ends, and its authority.
fn write(dir: &Path, name: &str, authority: &Authority) {
    let mut params = CertificateParams::new(["127.0.0.1".to_owned()]).unwrap();
    params.extended_key_usages = vec![
        ExtendedKeyUsagePurpose::ServerAuth,
        ExtendedKeyUsagePurpose::ClientAuth,
    ];
    let key = KeyPair::generate().unwrap();
    let cert = params.signed_by(&key, authority).unwrap();
    std::fs::write(dir.join(format!("{name}.key")), key.serialize_pem()).unwrap();
    std::fs::write(dir.join(format!("{name}.pem")), cert.pem()).unwrap();
    std::fs::write(dir.join(format!("{name}-ca.pem")), authority.pem()).unwrap();
}

fn client(dir: &Path, name: &str) -> ClientTls {
    let identity = (
        dir.join(format!("{name}.pem")),
        dir.join(format!("{name}.key")),
    );
    ClientTls::load(ClientTlsFiles {
        ca: dir.join(format!("{name}-ca.pem")),
        identity: Some(identity),
    })
    .unwrap()
}

#[tokio::test]
async fn a_running_service_takes_new_certificates_and_keeps_the_old_ones_for_broken_files() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let (old, new) = (authority(), authority());
    write(dir, "service", &old);
    write(dir, "old", &old);
    write(dir, "new", &new);
    let files = ServerTlsFiles {
        cert: dir.join("service.pem"),
        key: dir.join("service.key"),
        client_ca: dir.join("service-ca.pem"),
    };
    let tls = ServerTls::watching(files, Duration::ZERO).unwrap();
    let address = "https://127.0.0.1:0".parse().unwrap();
    let listener = Listener::bind_tls(&address, tls).await.unwrap();
    let url = listener.address().unwrap().to_string();
    let (_, health) = tonic_health::server::health_reporter();
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(transport::serve(
        transport::server().add_service(health),
        vec![listener],
        async { drop(stopped.await) },
        Duration::from_secs(5),
    ));
    let (as_old, as_new) = (client(dir, "old"), client(dir, "new"));
    let check = async |tls: &ClientTls| transport::healthcheck_with(&url, Some(tls)).await.is_ok();
    let connected = transport::connect_with(&url, Some(&as_old)).await.unwrap();

    assert_eq!((check(&as_old).await, check(&as_new).await), (true, false));

    // Half of an exchange: the key is of another certificate.
    std::fs::copy(dir.join("new.key"), dir.join("service.key")).unwrap();
    assert_eq!((check(&as_old).await, check(&as_new).await), (true, false));
    std::fs::write(dir.join("service.pem"), "-----BEGIN CERTIFICATE-----\n!").unwrap();
    assert_eq!((check(&as_old).await, check(&as_new).await), (true, false));

    // The other half.
    std::fs::copy(dir.join("new.pem"), dir.join("service.pem")).unwrap();
    std::fs::copy(dir.join("new-ca.pem"), dir.join("service-ca.pem")).unwrap();
    assert_eq!((check(&as_old).await, check(&as_new).await), (false, true));

    // What was connected stays so.
    let mut health = tonic_health::pb::health_client::HealthClient::new(connected);
    let request = tonic_health::pb::HealthCheckRequest::default();
    health.check(request).await.unwrap();
    drop((stop, health));
    serving.await.unwrap().unwrap();
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named_and_not_quoted() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    write(dir, "service", &authority());
    write(dir, "other", &authority());
    std::fs::write(dir.join("odd.pem"), "-----BEGIN SECRET hunter2\nhunter2\n").unwrap();
    for (cert, key, ca, wanted) in [
        (
            "odd.pem",
            "service.key",
            "service-ca.pem",
            "odd.pem holds no certificate",
        ),
        (
            "service.pem",
            "odd.pem",
            "service-ca.pem",
            "odd.pem holds no private key",
        ),
        (
            "service.pem",
            "service.key",
            "odd.pem",
            "odd.pem holds no certificate",
        ),
        (
            "service.pem",
            "other.key",
            "service-ca.pem",
            "cannot be used together",
        ),
        (
            "service.pem",
            "none.key",
            "service-ca.pem",
            "none.key cannot be read",
        ),
    ] {
        let exposure = Exposure {
            tls: Some(ServerTlsFiles {
                cert: dir.join(cert),
                key: dir.join(key),
                client_ca: dir.join(ca),
            }),
            ..Exposure::default()
        };
        let address = "https://127.0.0.1:0".parse().unwrap();
        let error = exposure.bind(&[address]).await.unwrap_err();
        let text = format!("{} {error:?}", transport::error_chain(&error));
        assert!(text.contains(wanted), "{text}");
        assert!(!text.contains("hunter2"), "{text}");
    }
}

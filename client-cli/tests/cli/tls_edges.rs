//! TLS at its edges: pages for people, silent clients, names that do not fit, the wrong protocol.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use client_cli::certs::{Authority, Subject};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use transport::Roles;

use crate::common::{Run, finish, mmuctl};
use crate::tls::{Certs, HOUR, LIMIT};

/// How long a service waits for the first word of a client.
const SILENCE: Duration = Duration::from_secs(10);

fn authority(url: &str) -> &str {
    url.split_once("://").unwrap().1
}

/// A browser that speaks HTTP/1.1 over TLS, with the certificate `name` if there is one.
fn browse(certs: &Certs, url: &str, path: &str, name: Option<&str>) -> std::io::Result<String> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(certs.file("ca.pem")).unwrap();
    roots.add(ca).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match name {
        None => config.with_no_client_auth(),
        Some(name) => {
            let cert = CertificateDer::pem_file_iter(certs.file(&format!("{name}.pem"))).unwrap();
            let cert = cert.collect::<Result<_, _>>().unwrap();
            let key = PrivateKeyDer::from_pem_file(certs.file(&format!("{name}.key"))).unwrap();
            config.with_client_auth_cert(cert, key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    let host = ServerName::try_from("127.0.0.1").unwrap();
    let connection = ClientConnection::new(Arc::new(config), host).unwrap();
    let tcp = TcpStream::connect(authority(url))?;
    tcp.set_read_timeout(Some(LIMIT))?;
    let mut stream = StreamOwned::new(connection, tcp);
    let host = authority(url);
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = Vec::new();
    match stream.read_to_end(&mut answer) {
        // The end of the connection is the end of the answer, whether or not TLS says so first.
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof && !answer.is_empty() => {}
        ended => drop(ended?),
    }
    Ok(String::from_utf8_lossy(&answer).into_owned())
}

#[test]
fn pages_and_metrics_are_for_certificates_with_a_role_that_looks() {
    let certs = Certs::new();
    let module = certs.module("info", &[]);
    let module_url = module.url("https://");
    let mmu = certs.mmu("info", &module_url);
    let mmu_url = mmu.url("https://");
    for (url, path, words) in [
        (&module_url, "/metrics", "tdx_module_info{"),
        (&mmu_url, "/metrics", "mmu_info{"),
        (&mmu_url, "/", "<!doctype html>"),
    ] {
        for name in ["operator", "host"] {
            let answer = browse(&certs, url, path, Some(name)).unwrap();
            assert!(
                answer.starts_with("HTTP/1.1 200 "),
                "{path} {name}: {answer}"
            );
            assert!(answer.contains(words), "{path} {name}: {answer:.400}");
        }
        let answer = browse(&certs, url, path, Some("guest")).unwrap();
        assert!(answer.starts_with("HTTP/1.1 403 "), "{path}: {answer}");
        assert!(
            answer.contains("the role host or operator") && answer.contains("holds guest"),
            "{path}: {answer}"
        );
        let nobody = browse(&certs, url, path, None);
        assert!(nobody.is_err(), "{path} without a certificate: {nobody:?}");
    }
    for service in [&module, &mmu] {
        service
            .log
            .expect(&["WARN", "the client shows no certificate"]);
    }
}

/// The file for a stack with TLS: what it scrapes, and the certificate that it does so with.
#[test]
fn prometheus_scrapes_both_services_with_the_certificate_of_its_settings() {
    let plain = include_str!("../../../deploy/metrics/prometheus.yml");
    let tls = include_str!("../../../deploy/metrics/prometheus.tls.yml");
    let values = |text: &'static str, key: &str| -> Vec<&str> {
        let lines = text
            .lines()
            .map(|line| line.trim().trim_start_matches("- "));
        let found = lines.filter_map(|line| line.strip_prefix(key)?.strip_prefix(": "));
        found.collect()
    };
    for key in ["job_name", "targets", "scrape_interval"] {
        assert_eq!(values(plain, key), values(tls, key), "{key}");
    }
    assert_eq!(values(tls, "scheme"), ["https"; 2]);
    assert_eq!(values(tls, "tls_config"), ["&operator", "*operator"]);
    let file = |key: &str| {
        let [path] = values(tls, key)[..] else {
            panic!("one {key}");
        };
        path.strip_prefix("/certs/").unwrap()
    };
    assert_eq!(file("ca_file"), "ca.pem");
    let name = file("cert_file").strip_suffix(".pem").unwrap();
    assert_eq!(file("key_file"), format!("{name}.key"));
    let certs = Certs::new();
    let module = certs.module("info", &[]);
    let module_url = module.url("https://");
    let mmu = certs.mmu("info", &module_url);
    for url in [&module_url, &mmu.url("https://")] {
        let answer = browse(&certs, url, "/metrics", Some(name)).unwrap();
        assert!(answer.contains("process_resident_memory_bytes"), "{answer}");
    }
}

#[test]
fn a_client_that_says_nothing_is_cut_and_holds_nobody_up() {
    let certs = Certs::new();
    let module = certs.module("info", &[]);
    let url = module.url("https://");
    let begun = Instant::now();
    // One says nothing, others stop in the middle of their first word.
    let mut silent: Vec<TcpStream> = (0..8)
        .map(|_| TcpStream::connect(authority(&url)).unwrap())
        .collect();
    for half in &mut silent[1..] {
        half.write_all(&[0x16, 3, 1, 2, 0, 1]).unwrap();
    }
    let mut call = certs.caller("admin", "seamcall TDH.SYS.INFO");
    let run = finish(call.args(["--module", &url]));
    let took = begun.elapsed();
    assert!(run.stdout.contains("rax"), "{run:?}");
    assert!(took < SILENCE, "others waited {took:?}");
    for stream in &mut silent {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let mut rest = Vec::new();
        // The end, or a reset: no answer either way.
        let _ = stream.read_to_end(&mut rest);
        let after = begun.elapsed();
        assert!(after >= SILENCE, "cut after {after:?}");
        assert!(after < SILENCE * 3, "cut after {after:?}");
    }
    module.log.expect(&["WARN", "no TLS within 10 s"]);
}

#[test]
fn a_certificate_for_another_name_is_refused_with_both_names() {
    let certs = Certs::new();
    let trusted = Authority::new(1).unwrap();
    let _ = std::fs::remove_file(certs.file("ca.pem"));
    std::fs::write(certs.file("ca.pem"), trusted.cert()).unwrap();
    let hosts = ["elsewhere.example".to_owned()];
    let elsewhere = Subject {
        name: "elsewhere",
        hosts: &hosts,
        roles: Roles::empty(),
        not_before: SystemTime::now() - HOUR,
        not_after: SystemTime::now() + HOUR,
    };
    let issued = trusted.issue(&elsewhere).unwrap();
    certs.put("module", &issued);
    certs.put("mmu", &issued);
    let admin = Subject {
        name: "admin",
        hosts: &[],
        roles: Roles::all(),
        ..elsewhere
    };
    certs.put("admin", &trusted.issue(&admin).unwrap());
    let module = certs.module("info", &[]);
    let module_url = module.url("https://");
    let mmu = certs.mmu("info", &module_url);
    let mmu_url = mmu.url("https://");
    for (line, flag, url, log) in [
        (
            "seamcall TDH.SYS.INFO",
            "--module",
            &module_url,
            &module.log,
        ),
        ("vm list", "--mmu", &mmu_url, &mmu.log),
    ] {
        let run = finish(certs.caller("admin", line).args([flag, url]));
        assert_eq!(run.code, Some(1), "{run:?}");
        for words in [
            "the certificate of the service is for another name",
            "127.0.0.1",
            "elsewhere.example",
        ] {
            assert!(run.stderr.contains(words), "{words}: {}", run.stderr);
        }
        log.expect(&["WARN", "the client does not accept the certificate shown"]);
    }
    // One service as the client of the other says the same.
    mmu.log
        .expect(&["the certificate of the service is for another name"]);
}

#[test]
fn the_wrong_protocol_is_told_by_both_services_and_at_both_ends() {
    let certs = Certs::new();
    let module = certs.module("info", &["--listen", "http://127.0.0.1:0"]);
    let (module_tls, module_plain) = (module.url("https://"), module.url("http://"));
    let mmu = certs.mmu_with("info", &module_tls, &["--listen", "http://127.0.0.1:0"]);
    let (mmu_tls, mmu_plain) = (mmu.url("https://"), mmu.url("http://"));
    for (line, flag, tls, plain, log) in [
        (
            "seamcall TDH.SYS.INFO",
            "--module",
            &module_tls,
            &module_plain,
            &module.log,
        ),
        ("vm list", "--mmu", &mmu_tls, &mmu_plain, &mmu.log),
    ] {
        let at_tls = format!("http://{}", authority(tls));
        let mut command = mmuctl();
        command.args(line.split_whitespace()).args([flag, &at_tls]);
        let run: Run = finish(&mut command);
        assert_eq!(run.code, Some(1), "{run:?}");
        let told = "this address speaks TLS: use https:// and a certificate";
        assert!(run.stderr.contains(told), "{}", run.stderr);
        log.expect(&["WARN", "it does not speak TLS, and this address does"]);

        let at_plain = format!("https://{}", authority(plain));
        let run = finish(certs.caller("admin", line).args([flag, &at_plain]));
        assert_eq!(run.code, Some(1), "{run:?}");
        let told = "the service does not speak TLS";
        assert!(run.stderr.contains(told), "{}", run.stderr);
        log.expect(&[
            "WARN",
            "refused a client that speaks TLS to a plain address",
        ]);
    }
}

//! Both services behind TLS, and everybody who is to be kept out.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};

use client_cli::certs::{Authority, Issued, Subject};
use tempfile::TempDir;
use transport::Roles;

use crate::common::{Run, finish, mmuctl};

/// Nothing here takes longer.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
pub(crate) const HOUR: Duration = Duration::from_secs(3600);

/// What a service has logged so far.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<(Mutex<String>, Condvar)>);

impl Log {
    /// Waits for a line with all of `words`.
    #[track_caller]
    pub(crate) fn expect(&self, words: &[&str]) -> String {
        let find = |log: &str| {
            log.lines()
                .find(|line| words.iter().all(|word| line.contains(word)))
                .map(str::to_owned)
        };
        let (log, changed) = &*self.0;
        let log = log.lock().unwrap();
        let (log, _) = changed
            .wait_timeout_while(log, LIMIT, |log| find(log).is_none())
            .unwrap();
        find(&log).unwrap_or_else(|| panic!("{words:?} is not in:\n{log}"))
    }

    fn text(&self) -> String {
        self.0.0.lock().unwrap().clone()
    }
}

/// A service, until dropped.
pub(crate) struct Service {
    child: Child,
    pub(crate) log: Log,
}

impl Service {
    fn start(role: &str, filter: &str, options: &[&str]) -> Self {
        let mut child = mmuctl()
            .arg(role)
            .args(options)
            .env("RUST_LOG", filter)
            .env("NO_COLOR", "1")
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let log = Log::default();
        let (lines, there) = (BufReader::new(child.stderr.take().unwrap()), log.clone());
        std::thread::spawn(move || {
            for line in lines.lines().map_while(Result::ok) {
                let (log, changed) = &*there.0;
                let mut log = log.lock().unwrap();
                log.push_str(&line);
                log.push('\n');
                changed.notify_all();
            }
        });
        Self { child, log }
    }

    /// Where it listens, with the port that it took.
    #[track_caller]
    pub(crate) fn url(&self, scheme: &str) -> String {
        let line = self.log.expect(&["listening", scheme]);
        let (_, rest) = line.split_once(scheme).unwrap();
        let authority = rest.split_whitespace().next().unwrap();
        format!("{scheme}{authority}")
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

/// A folder of certificates.
pub(crate) struct Certs(TempDir);

impl Certs {
    /// As `mmuctl certs` makes them.
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let made = finish(mmuctl().arg("certs").arg(dir.path()));
        assert_eq!(made.code, Some(0), "{}", made.stderr);
        Self(dir)
    }

    pub(crate) fn file(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    pub(crate) fn put(&self, name: &str, issued: &Issued) {
        std::fs::write(self.file(&format!("{name}.pem")), &issued.cert).unwrap();
        std::fs::write(self.file(&format!("{name}.key")), &issued.key).unwrap();
    }

    /// Options of a service with the certificate `name`.
    fn of_service(&self, name: &str) -> [String; 6] {
        [
            "--tls-cert".into(),
            self.file(&format!("{name}.pem")),
            "--tls-key".into(),
            self.file(&format!("{name}.key")),
            "--tls-client-ca".into(),
            self.file("ca.pem"),
        ]
    }

    pub(crate) fn module(&self, filter: &str, more: &[&str]) -> Service {
        let tls = self.of_service("module");
        let mut options = vec!["--listen", "https://127.0.0.1:0"];
        options.extend(tls.iter().map(String::as_str));
        options.extend(more);
        Service::start("__module", filter, &options)
    }

    pub(crate) fn mmu(&self, filter: &str, module: &str) -> Service {
        self.mmu_with(filter, module, &[])
    }

    pub(crate) fn mmu_with(&self, filter: &str, module: &str, more: &[&str]) -> Service {
        let (tls, ca) = (self.of_service("mmu"), self.file("ca.pem"));
        let mut options = vec!["--listen", "https://127.0.0.1:0", "--module", module];
        options.extend(["--module-tls-ca", &ca]);
        options.extend(tls.iter().map(String::as_str));
        options.extend(more);
        Service::start("__mmu", filter, &options)
    }

    /// `mmuctl` as somebody.
    pub(crate) fn caller(&self, name: &str, line: &str) -> Command {
        let mut command = mmuctl();
        command.args(line.split_whitespace());
        command.args(["--output", "json", "--tls-ca", &self.file("ca.pem")]);
        command.args(["--tls-cert", &self.file(&format!("{name}.pem"))]);
        command.args(["--tls-key", &self.file(&format!("{name}.key"))]);
        command
    }
}

/// A certificate with every role that holds from an hour ago for `hours`.
fn issue(authority: &Authority, hours: u32) -> Issued {
    let not_before = SystemTime::now() - HOUR * 2;
    authority
        .issue(&Subject {
            name: "somebody",
            hosts: &[],
            roles: Roles::all(),
            not_before,
            not_after: not_before + HOUR * hours,
        })
        .unwrap()
}

#[test]
fn a_fault_travels_through_both_services_over_tls_and_no_key_is_logged() {
    let certs = Certs::new();
    let module = certs.module("trace", &[]);
    let module_url = module.url("https://");
    let mmu = certs.mmu("trace", &module_url);
    let url = mmu.url("https://");
    let run = |name: &str, line: &str| {
        let run = finish(certs.caller(name, line).args(["--mmu", &url]));
        assert_eq!(run.code, Some(0), "{line}: {}", run.stderr);
        run.json()
    };

    let vm = run("host", "vm create")["vm_id"].to_string();
    run("host", &format!("vcpu add --vm {vm}"));
    run("host", &format!("slot set --vm {vm} --gpa 0 --size 2M"));
    run(
        "host",
        &format!("convert --vm {vm} --gpa 0 --size 2M --to private"),
    );
    run("host", &format!("vm finalize {vm}"));
    let fault = run("guest", &format!("fault --vm {vm} --gpa 0x1000 --write"));
    assert!(
        fault["seamcalls"].to_string().contains("TDH.MEM.PAGE.AUG"),
        "{fault}"
    );
    let audit = run("operator", &format!("audit --vm {vm}"));
    assert_eq!(audit["mismatches"], 0, "{audit}");
    run("host", &format!("vm destroy {vm}"));

    for (role, at) in [("__module", &module_url), ("__mmu", &url)] {
        let mut check = mmuctl();
        check.args([role, "healthcheck", "--endpoint", at]);
        assert_ne!(
            finish_service(&mut check).code,
            Some(0),
            "{role} without a certificate"
        );
        check.args(["--tls-ca", &certs.file("ca.pem")]);
        check.args(["--tls-cert", &certs.file("operator.pem")]);
        check.args(["--tls-key", &certs.file("operator.key")]);
        let healthy = finish_service(&mut check);
        assert_eq!(healthy.code, Some(0), "{role}: {}", healthy.stderr);
    }

    let logs = module.log.text() + &mmu.log.text();
    assert!(logs.contains("TRACE"), "the most that can be logged");
    for name in ["module", "mmu", "host", "guest", "operator"] {
        let key = std::fs::read_to_string(certs.file(&format!("{name}.key"))).unwrap();
        for line in key.lines().filter(|line| !line.starts_with("---")) {
            assert!(!logs.contains(line), "a line of {name}.key is in a log");
        }
    }
}

#[test]
fn who_has_not_the_right_certificate_is_told_so_and_so_is_the_log() {
    let certs = Certs::new();
    let (trusted, foreign) = (Authority::new(1).unwrap(), Authority::new(1).unwrap());
    // The authority of the folder is gone with its key: the services trust this one.
    let _ = std::fs::remove_file(certs.file("ca.pem"));
    std::fs::write(certs.file("ca.pem"), trusted.cert()).unwrap();
    std::fs::write(certs.file("foreign-ca.pem"), foreign.cert()).unwrap();
    certs.put("foreign", &issue(&foreign, 12));
    certs.put("expired", &issue(&trusted, 1));
    certs.put("admin", &issue(&trusted, 12));
    let hosts = ["127.0.0.1".to_owned()];
    let module = Subject {
        name: "module",
        hosts: &hosts,
        roles: Roles::empty(),
        not_before: SystemTime::now() - HOUR,
        not_after: SystemTime::now() + HOUR,
    };
    certs.put("module", &trusted.issue(&module).unwrap());
    let operator = Subject {
        name: "operator",
        hosts: &[],
        roles: Roles::OPERATOR,
        ..module
    };
    certs.put("operator", &trusted.issue(&operator).unwrap());

    let service = certs.module("info", &["--listen", "http://127.0.0.1:0"]);
    let (tls, plain) = (service.url("https://"), service.url("http://"));
    let at = |scheme: &str, url: &str| format!("{scheme}{}", url.split_once("://").unwrap().1);
    let call = |url: &str, ca: &str, name: Option<&str>| -> Run {
        let mut command = mmuctl();
        command.args(["seamcall", "TDH.SYS.INFO", "--module", url]);
        command.args(["--tls-ca", &certs.file(ca)]);
        if let Some(name) = name {
            command.args(["--tls-cert", &certs.file(&format!("{name}.pem"))]);
            command.args(["--tls-key", &certs.file(&format!("{name}.key"))]);
        }
        finish(&mut command)
    };

    for (case, url, ca, name, client, log) in [
        (
            "the caller's certificate is of another authority",
            tls.clone(),
            "ca.pem",
            Some("foreign"),
            "the service does not trust the authority of the certificate shown",
            "the certificate of the client is of an authority that is not trusted here",
        ),
        (
            "the service's certificate is of another authority",
            tls.clone(),
            "foreign-ca.pem",
            Some("admin"),
            "the certificate of the service is of an authority that is not trusted here",
            "the client does not trust the authority of the certificate shown",
        ),
        (
            "expired",
            tls.clone(),
            "ca.pem",
            Some("expired"),
            "the service says that the certificate shown has expired",
            "the certificate of the client has expired",
        ),
        (
            "none",
            tls.clone(),
            "ca.pem",
            None,
            "the service asks for a certificate, and none was shown",
            "the client shows no certificate",
        ),
        (
            "plain client, TLS address",
            at("http://", &tls),
            "ca.pem",
            None,
            "UNAUTHENTICATED: this address speaks TLS: use https:// and a certificate",
            "it does not speak TLS, and this address does",
        ),
        (
            "TLS client, plain address",
            at("https://", &plain),
            "ca.pem",
            Some("admin"),
            "the service does not speak TLS",
            "refused a client that speaks TLS to a plain address",
        ),
        (
            "without the role",
            tls.clone(),
            "ca.pem",
            Some("operator"),
            "PERMISSION_DENIED: tdx.module.v1.TdxModuleService/Execute needs the role host, the \
             caller holds operator",
            "needs the role host, the caller holds operator",
        ),
    ] {
        let run = call(&url, ca, name);
        assert_eq!(run.code, Some(1), "{case}: {run:?}");
        assert!(run.stderr.contains(client), "{case}: {}", run.stderr);
        service.log.expect(&["WARN", log]);
    }
    // Whoever was refused did nobody any harm.
    let run = call(&tls, "ca.pem", Some("admin"));
    assert!(!run.stderr.contains("refused"), "{}", run.stderr);
}

#[test]
fn a_browser_without_tls_is_told_in_words() {
    let certs = Certs::new();
    let service = certs.module("info", &[]);
    let url = service.url("https://");
    let (_, authority) = url.split_once("://").unwrap();
    let mut tcp = std::net::TcpStream::connect(authority).unwrap();
    tcp.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    tcp.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert!(
        answer.ends_with("use https:// and a certificate\n"),
        "{answer}"
    );
}

#[test]
fn a_service_that_would_be_open_does_not_start() {
    for (options, why) in [
        (&["--listen", "http://0.0.0.0:0"][..], "--insecure-tcp"),
        (&["--listen", "https://127.0.0.1:0"], "--tls-client-ca"),
        (&["--tls-cert", "/nonexistent"], "--tls-key"),
        (
            &[
                "--listen",
                "https://127.0.0.1:0",
                "--tls-cert",
                "/nonexistent/c",
                "--tls-key",
                "/nonexistent/k",
                "--tls-client-ca",
                "/nonexistent/a",
            ],
            "/nonexistent/a cannot be read",
        ),
    ] {
        for role in ["__module", "__mmu"] {
            let ended = finish_service(mmuctl().arg(role).args(options));
            assert_ne!(ended.code, Some(0), "{role} {options:?}");
            assert!(ended.stderr.contains(why), "{role}: {}", ended.stderr);
        }
    }
    let dir = tempfile::tempdir().unwrap();
    let listen = format!("unix://{}", dir.path().join("mmu.sock").display());
    let https = ["--listen", &listen, "--module", "https://h:1"];
    let ended = finish_service(mmuctl().arg("__mmu").args(https));
    assert!(ended.stderr.contains("--module-tls-ca"), "{}", ended.stderr);
}

/// Runs as another user when this one is root; else there is nobody to be.
#[test]
fn another_user_is_refused_by_name_of_its_number() {
    use std::os::unix::process::CommandExt as _;

    if !rustix::process::geteuid().is_root() {
        eprintln!("not checked: only root can be somebody else");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o711)).unwrap();
    let url = format!("unix://{}/module.sock", dir.path().display());
    // A program that everybody may run.
    let program = dir.path().join("mmuctl");
    std::fs::copy(mmuctl().get_program(), &program).unwrap();
    let allow = ["--allow-uid", "12345:operator"];
    let options = [&["--listen", &url][..], &allow].concat();
    let service = Service::start("__module", "info", &options);
    service.log.expect(&["listening"]);
    let call = |uid: u32| {
        let mut command = Command::new(&program);
        command
            .args(["seamcall", "TDH.SYS.INFO", "--module", &url])
            .stdin(Stdio::null())
            .current_dir("/")
            .uid(uid);
        finish(&mut command)
    };
    for (uid, wanted) in [
        (
            65534,
            "PERMISSION_DENIED: uid 65534 may not call: this socket is for uid 0, root, and those \
             of --allow-uid (reason NOT_ADMITTED)",
        ),
        (12345, "needs the role host, the caller holds operator"),
    ] {
        let run = call(uid);
        assert_eq!(run.code, Some(1), "{run:?}");
        assert!(run.stderr.contains(wanted), "{uid}: {}", run.stderr);
        service.log.expect(&["WARN", &format!("uid {uid}")]);
    }
    let run = call(0);
    assert!(!run.stderr.contains("PERMISSION_DENIED"), "{}", run.stderr);
}

/// A service that ends by itself. Its standard input stays open: it would end with that, too.
fn finish_service(command: &mut Command) -> Run {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let _stdin = child.stdin.take();
    let output = child.wait_with_output().unwrap();
    Run {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn certs_are_made_for_this_user_alone_and_not_twice() {
    let parent = tempfile::tempdir().unwrap();
    let dir: PathBuf = parent.path().join("certs");
    let make = || {
        let mut command = mmuctl();
        command.args(["certs", "--if-missing", "--host", "module.example"]);
        let run = finish(command.arg(&dir).args(["--output", "json"]));
        assert_eq!(run.code, Some(0), "{}", run.stderr);
        run.json()["files"].as_array().unwrap().len()
    };
    assert_eq!(make(), 15);
    let ca = std::fs::read(dir.join("ca.pem")).unwrap();
    assert_eq!(mode(&dir), 0o700);
    assert_eq!(mode(&dir.join("module.key")), 0o600);
    assert_eq!(make(), 0);
    assert_eq!(std::fs::read(dir.join("ca.pem")).unwrap(), ca);
}

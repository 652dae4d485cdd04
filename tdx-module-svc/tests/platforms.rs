//! The binary on platforms that can be and on those that cannot: exit status and reason.

use std::process::{Command, Output, Stdio};

use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use mirror_proto::module::{
    ExecuteRequest, GetPlatformRequest, GetPlatformResponse, ReservedArea, Seamcall, Tdmr,
};
use tdx_defs::{CompletionStatus, Leaf, TdParams};
use tdx_module_svc::Config;
use tdx_module_svc::config::Profile;
use tokio::sync::oneshot;
use transport::{Address, Listener};

/// Runs the binary with flags, and a platform file if there is text for one, until it ends.
fn start(flags: &[&str], file: Option<&str>) -> Output {
    let dir = tempfile::tempdir().unwrap();
    let url = format!("unix://{}", dir.path().join("module.sock").display());
    let mut command = Command::new(env!("CARGO_BIN_EXE_tdx-module-svc"));
    for variable in ["PROFILE", "PLATFORM", "RELEASE", "LISTEN"] {
        command.env_remove(format!("TDX_MODULE_{variable}"));
    }
    command
        .args(["--listen", &url, "--stop-with-stdin"])
        .args(flags)
        .env_remove("RUST_LOG")
        .env_remove("OTEL_EXPORTER_OTLP_ENDPOINT")
        .stdin(Stdio::null());
    if let Some(text) = file {
        let path = dir.path().join("platform.toml");
        std::fs::write(&path, text).unwrap();
        command.arg("--platform").arg(path);
    }
    command.output().unwrap()
}

#[test]
fn impossible_platforms_end_the_service_at_its_start_with_the_reason() {
    let small = ["--profile", "conformance"];
    let reserved =
        |areas: &str| format!("[[tdmrs]]\nbase = 0x40000000\nsize = \"1G\"\nreserved = [{areas}]");
    let backwards =
        reserved("{ base = 0x60000000, size = 4096 }, { base = 0x50000000, size = 4096 }");
    let outside = reserved("{ base = 0x7FFFF000, size = 8192 }");
    let many = reserved(
        &(0..17)
            .map(|at| format!("{{ base = {}, size = 4096 }},", 0x4000_0000 + at * 8192))
            .collect::<String>(),
    );
    for (flags, file, want) in [
        (
            &["--maxpa", "35"][..],
            None,
            "maxpa is 35, it must be 36 to 52",
        ),
        (&["--maxpa", "53"], None, "maxpa is 53, it must be 36 to 52"),
        (
            &["--hkid-bits", "0"],
            None,
            "hkid_bits is 0, it must be 1 to 15",
        ),
        (
            &["--hkid-bits", "16"],
            None,
            "hkid_bits is 16, it must be 1 to 15",
        ),
        (
            &["--hkids", "0+2"],
            None,
            "hkid_start is 0, it must be 1 to 32767",
        ),
        (
            &["--hkids", "32+1"],
            None,
            "hkid_count is 1, it must be 2 to 32767",
        ),
        (
            &["--hkids", "32+33"],
            None,
            "private key ids end at 65, hkid_bits gives 64 of them",
        ),
        (
            &["--global-hkid", "31"],
            None,
            "global_hkid 31 is not one of the private key ids 32 to 63",
        ),
        (
            &["--logical-processors", "0"],
            None,
            "logical_processors is 0, it must be 1 to 4096",
        ),
        (
            &["--packages", "33"],
            None,
            "packages is 33, it must be 1 to 32",
        ),
        (
            &["--packages", "3"],
            None,
            "packages is 3, 4 logical processors in equal shares leave package 2 empty",
        ),
        (
            &["--tdcs-pages", "3"],
            None,
            "tdcs_pages is 3, it must be 4 to 6",
        ),
        (
            &["--tdcs-pages", "7"],
            None,
            "tdcs_pages is 7, it must be 4 to 6",
        ),
        (
            &["--tdvps-pages", "0"],
            None,
            "tdvps_pages is 0, it must be 1 to 15",
        ),
        (
            &["--max-vcpus", "0"],
            None,
            "max_vcpus is 0, it must be 1 to 65535",
        ),
        (
            &["--attributes", "1/3"],
            None,
            "attributes.fixed1 0x3 has bits that attributes.fixed0 0x1 has not",
        ),
        (
            &["--xfam", "3/7"],
            None,
            "xfam.fixed1 0x7 has bits that xfam.fixed0 0x3 has not",
        ),
        (
            &["--tdmr", "1G+4K"],
            None,
            "tdmrs[0] at 0x40000000 of 0x1000 bytes is not a whole number of GiB",
        ),
        (
            &["--tdmr", "2G+1G", "--tdmr", "1G+1G"],
            None,
            "tdmrs[1] begins before the end of the one before it",
        ),
        (
            &["--tdmr", "1G+2G", "--tdmr", "2G+1G"],
            None,
            "tdmrs[1] begins before the end of the one before it",
        ),
        (
            &["--tdmr", "1G+64T"],
            None,
            "tdmrs[0] ends at 0x400040000000, addresses without a key id end at 0x400000000000",
        ),
        (
            &["--reserved", "0x7fffffff+4K"],
            None,
            "reserved area 1 of tdmrs[0] is misaligned, outside it or out of order",
        ),
        (
            &["--reserved", "0x70000000+4K"],
            None,
            "reserved area 1 of tdmrs[0] is misaligned, outside it or out of order",
        ),
        (
            &["--reserved", "0+4K"],
            None,
            "--reserved 0x0+0x1000: no TDMR holds its first byte",
        ),
        (
            &["--seamrr", "0x40000000+4K"],
            None,
            "seamrr 0x40000000 to 0x40001000 overlaps tdmrs[0]",
        ),
        (&[], Some("tdmrs = []"), "tdmrs is 0, it must be 1 to 64"),
        (&[], Some(&*backwards), "reserved area 1 of tdmrs[0]"),
        (&[], Some(&*outside), "reserved area 0 of tdmrs[0]"),
        (&[], Some(&*many), "reserved area 16 of tdmrs[0]"),
        (&[], Some("hkids = 3"), "unknown field `hkids`"),
        (
            &[],
            Some("release = \"1.4\""),
            "release \"1.4\" is not known",
        ),
        (&[], Some("maxpa = 1000"), "1000"),
        (&[], Some("maxpa"), "malformed"),
        (
            &["--platform", "/nowhere/at/all.toml"],
            None,
            "platform file /nowhere/at/all.toml cannot be read",
        ),
        (
            &["--platform", "/dev/zero"],
            None,
            "platform file /dev/zero is longer than the limit of 1048576 bytes",
        ),
    ] {
        let output = start(&[&small, flags].concat(), file);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(
            output.status.code(),
            Some(1),
            "{flags:?} {file:?}: {stderr}"
        );
        assert!(output.stdout.is_empty(), "{flags:?} {file:?}");
        assert!(
            stderr.starts_with("tdx-module-svc: ") && stderr.contains(want),
            "{flags:?} {file:?}: {stderr}"
        );
        assert!(
            !stderr.contains("listening"),
            "{flags:?} {file:?}: {stderr}"
        );
    }
}

#[test]
fn malformed_flags_are_usage_errors() {
    for (flags, want) in [
        (&["--tdmr", "1G"][..], "BASE+SIZE"),
        (&["--hkids", "1-2"], "START+COUNT"),
        (&["--maxpa", "fifty"], "invalid digit"),
        (
            &["--profile", "huge"],
            "possible values: roomy, conformance",
        ),
        (&["--release", "1.4"], "possible values: 1.5.05, 1.5.34"),
    ] {
        let output = start(flags, None);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {stderr}");
        assert!(stderr.contains(want), "{flags:?}: {stderr}");
    }
}

#[test]
fn possible_platforms_start() {
    let file = "release = \"1.5.34\"\nlogical_processors = 8\n\
                attributes = { fixed0 = \"0x8000000070000001\", fixed1 = 0 }\n\
                [[tdmrs]]\nbase = 0x4000_0000\nsize = 0x4000_0000\n\
                reserved = [{ base = 0x7000_0000, size = 0x100_0000 }]\n";
    for (flags, file) in [
        (&[][..], None),
        (&["--profile", "conformance"], None),
        (&[], Some(file)),
        (
            &[
                "--packages",
                "32",
                "--maxpa",
                "48",
                "--hkid-bits",
                "6",
                "--hkids",
                "32+32",
                "--global-hkid",
                "63",
            ],
            None,
        ),
        (
            &[
                "--seamrr",
                "0+0",
                "--tdmr",
                "0+1G",
                "--tdmr",
                "1G+1G:uninitialized",
            ],
            None,
        ),
    ] {
        let output = start(flags, file);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{flags:?}: {stderr}");
    }
}

/// A service in this process, for as long as `work` takes.
async fn with_service<T>(
    config: Config,
    work: impl AsyncFnOnce(TdxModuleServiceClient<tonic::transport::Channel>) -> T,
) -> T {
    let dir = tempfile::tempdir().unwrap();
    let address = Address::Unix(dir.path().join("module.sock"));
    let listeners = vec![Listener::bind(&address).await.unwrap()];
    let (stop, stopped) = oneshot::channel::<()>();
    let running = tokio::spawn(tdx_module_svc::run(config, listeners, async {
        let _ = stopped.await;
    }));
    let channel = transport::connect(&address.to_string()).await.unwrap();
    let done = work(TdxModuleServiceClient::new(channel)).await;
    stop.send(()).unwrap();
    running.await.unwrap().unwrap();
    done
}

async fn platform(config: Config) -> GetPlatformResponse {
    with_service(config, async |mut client| {
        let answer = client.get_platform(GetPlatformRequest {}).await.unwrap();
        answer.into_inner()
    })
    .await
}

#[tokio::test]
async fn the_conformance_profile_is_the_fixture_of_the_recorded_sequences() {
    let profile = Config {
        profile: Profile::Conformance,
        ..Config::default()
    };
    let platform = platform(profile).await;
    let tdmr = |base, gib: u64, initialized| Tdmr {
        base,
        size: gib << 30,
        reserved: Vec::new(),
        initialized,
    };
    let hole = ReservedArea {
        base: 0x7000_0000,
        size: 0x100_0000,
    };
    assert_eq!(
        platform.tdmrs,
        [
            Tdmr {
                reserved: vec![hole],
                ..tdmr(0x4000_0000, 1, true)
            },
            tdmr(0xC000_0000, 2, true),
            tdmr(0x1_8000_0000, 1, false),
        ]
    );
    assert_eq!((platform.maxpa, platform.hkid_bits), (52, 6));
    assert_eq!((platform.hkid_start, platform.hkid_count), (32, 32));
    assert_eq!(platform.global_hkid, 32);
    assert_eq!((platform.logical_processors, platform.packages), (4, 1));
    assert_eq!((platform.tdcs_pages, platform.tdvps_pages), (6, 6));
    let bits = |bits: &[u32]| bits.iter().fold(0u64, |word, bit| word | 1 << bit);
    assert_eq!(platform.attributes_fixed0, bits(&[0, 28, 29, 30, 63]));
    assert_eq!(platform.attributes_fixed1, 0);
    let xfam = [0, 1, 2, 5, 6, 7, 8, 9, 11, 12, 14, 15, 17, 18];
    assert_eq!(platform.xfam_fixed0, bits(&xfam));
    assert!(platform.five_level);
    assert_eq!(platform.release, "1.5.05");
}

/// The default platform takes a page at either end of 1 TiB, from either end of its memory.
#[tokio::test]
async fn the_default_platform_carries_a_td_of_one_tib() {
    with_service(Config::default(), async |mut client| {
        let answer = client.get_platform(GetPlatformRequest {}).await.unwrap();
        let platform = answer.into_inner();
        let memory = &platform.tdmrs[0];
        let (first, end) = (memory.base, memory.base + memory.size);
        assert!(memory.size > 1 << 40);
        let hkid = u64::from(platform.hkid_start + 1);
        let mut page = (first..).step_by(4096);
        let mut next = || page.next().unwrap();
        let call = |leaf: Leaf, rcx, rdx, r8| Seamcall {
            leaf: leaf.0.into(),
            rcx,
            rdx,
            r8,
            ..Seamcall::default()
        };
        let tdr = next();
        let mut calls = vec![
            call(Leaf::MNG_CREATE, tdr, hkid, 0),
            call(Leaf::MNG_KEY_CONFIG, tdr, 0, 0),
        ];
        for _ in 0..platform.tdcs_pages {
            calls.push(call(Leaf::MNG_ADDCX, next(), tdr, 0));
        }
        let params = TdParams::default()
            .with_xfam(3)
            .with_max_vcpus(64)
            .with_eptp_controls(0x1E)
            .with_tsc_frequency(100);
        calls.push(Seamcall {
            data: params.as_bytes().to_vec().into(),
            ..call(Leaf::MNG_INIT, tdr, 0, 0)
        });
        let tib = 1u64 << 40;
        for gpa in [0, tib - 4096] {
            for level in (1..=3).rev() {
                let base = gpa & !((1 << (12 + 9 * level)) - 1);
                calls.push(call(Leaf::MEM_SEPT_ADD, base | level, tdr, next()));
            }
        }
        calls.push(call(Leaf::MEM_PAGE_ADD, 0, tdr, next()));
        calls.push(call(Leaf::MEM_PAGE_ADD, tib - 4096, tdr, end - 4096));
        let request = ExecuteRequest {
            calls,
            ..ExecuteRequest::default()
        };
        let answer = client.execute(request).await.unwrap().into_inner();
        for (at, result) in answer.results.iter().enumerate() {
            let status = CompletionStatus(result.rax);
            assert!(status.is_success(), "call {at}: {status}");
        }
    })
    .await;
}

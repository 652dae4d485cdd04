//! The page's files and its data, without a browser: what it gets, and who gets nothing.

use mirror_proto::mmu::Mode;
use mirror_proto::module::tdx_module_service_client::TdxModuleServiceClient;
use mirror_proto::module::{ExecuteRequest, Seamcall};
use serde_json::{Value, json};
use tdx_defs::Leaf;
use tonic_health::pb::health_check_response::ServingStatus;

use crate::http::{self, Extra, get, over_tcp, post};
use crate::metrics::Scrape;
use crate::stack::{MIB, PAGE, SHARED, Stack, socket};

/// TDH.MEM.RANGE.BLOCK of a page behind KVM's back, so that the trees differ.
pub(crate) async fn block_behind_the_mirror(stack: &Stack, tdr: &str, gpa: u64) {
    let address = socket(stack.dir.path(), "module").to_string();
    let mut module = TdxModuleServiceClient::new(transport::connect(&address).await.unwrap());
    let call = Seamcall {
        leaf: Leaf::MEM_RANGE_BLOCK.0.into(),
        rcx: gpa,
        rdx: u64::from_str_radix(tdr.trim_start_matches("0x"), 16).unwrap(),
        ..Default::default()
    };
    let request = ExecuteRequest {
        calls: vec![call],
        ..Default::default()
    };
    let answer = module.execute(request).await.unwrap().into_inner();
    assert_eq!(answer.results[0].rax, 0);
}

/// State, number of cells and mapped pages of each run.
fn runs(map: &Value) -> Vec<(String, u64, u64)> {
    let runs = map["runs"].as_array().unwrap().iter();
    runs.map(|run| {
        let number = |name: &str| run[name].as_u64().unwrap();
        let state = run["state"].as_str().unwrap().to_owned();
        (state, number("n"), number("private") + number("shared"))
    })
    .collect()
}

fn run(state: &str, cells: u64, mapped: u64) -> (String, u64, u64) {
    (state.to_owned(), cells, mapped)
}

#[tokio::test]
async fn the_page_needs_nothing_from_anywhere_else() {
    let stack = Stack::start().await;
    for (path, kind) in [
        ("/", "text/html"),
        ("/page.css", "text/css"),
        ("/page.js", "text/javascript"),
    ] {
        let answer = get(stack.authority(), path).await;
        assert_eq!(answer.status, 200, "{path}");
        assert!(
            answer.header("content-type").unwrap().starts_with(kind),
            "{path}"
        );
        let policy = answer.header("content-security-policy").unwrap();
        assert!(policy.starts_with("default-src 'none'"), "{policy}");
        assert!(
            !policy.contains("unsafe") && !policy.contains("http"),
            "{policy}"
        );
        for outside in ["src=\"http", "href=\"http", "url(", "@import", "//cdn"] {
            assert!(!answer.body.contains(outside), "{path} has {outside}");
        }
        assert_eq!(answer.header("x-content-type-options"), Some("nosniff"));
        assert_eq!(answer.header("x-frame-options"), Some("DENY"));
    }
}

#[tokio::test]
async fn the_page_sees_vms_maps_walks_and_batches() {
    let mut stack = Stack::with_options(&["--jaeger-url", "https://jaeger.example/"]).await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.prefault(vm, 0, 3 * PAGE).await.unwrap();
    stack.convert(vm, 2 * MIB, 2 * MIB, 0).await.unwrap();
    stack.fault(vm, 0, 2 * MIB + SHARED).await.unwrap();
    let authority = stack.authority().to_owned();

    let overview = get(&authority, "/api/overview").await.json();
    assert_eq!(overview["jaeger_url"], "https://jaeger.example");
    assert_eq!(overview["module"]["up"], true);
    assert_eq!(
        (&overview["vms_total"], &overview["vms"][0]["id"]),
        (&json!(1), &json!(vm))
    );
    let page = get(&authority, &format!("/api/vms/{vm}")).await.json();
    assert_eq!(page["memory_end"], "0x800000");
    assert_eq!(page["slots"][0]["size"], "0x800000");
    assert_eq!(
        (&page["state"], &page["pages_4k"]),
        (&json!("runnable"), &json!(4))
    );

    let map = async |query: &str| {
        let map = get(&authority, &format!("/api/vms/{vm}/map?{query}"))
            .await
            .json();
        runs(&map)
    };
    let coarse = [
        run("private", 1, 3),
        run("shared", 1, 1),
        run("free", 2, 0),
        run("none", 4, 0),
    ];
    assert_eq!(map("cells=8").await, coarse);
    assert_eq!(
        map("cell=0x1000&cells=8").await,
        [run("private", 3, 1), run("free", 5, 0)]
    );
    let asked = [run("pending", 3, 1), run("free", 5, 0)];
    assert_eq!(map("cell=4096&cells=8&module=true").await, asked);

    let walk = get(&authority, &format!("/api/vms/{vm}/walk?gpa=0x1000"))
        .await
        .json();
    assert_eq!(
        (&walk["root"], &walk["mapped"]),
        (&json!("mirror"), &json!(true))
    );
    let states: Vec<_> = walk["entries"]
        .as_array()
        .unwrap()
        .iter()
        .map(|entry| {
            (
                entry["kind"].as_str().unwrap(),
                entry["sept_state"].as_str().unwrap(),
            )
        })
        .collect();
    let table = ("table", "NL_MAPPED");
    assert_eq!(states, [table, table, table, ("leaf", "PENDING")]);
    let differing = |walk: &Value| {
        let entries = walk["entries"].as_array().unwrap().iter();
        entries.filter(|entry| entry["differs"] == true).count()
    };
    assert_eq!(differing(&walk), 0);

    block_behind_the_mirror(&stack, page["tdr"].as_str().unwrap(), 0x1000).await;
    let walk = get(&authority, &format!("/api/vms/{vm}/walk?gpa=0x1000"))
        .await
        .json();
    assert_eq!(differing(&walk), 1);
    assert_eq!(
        map("cell=0x1000&cells=4&module=true").await,
        [
            run("pending", 1, 1),
            run("blocked", 1, 1),
            run("pending", 1, 1),
            run("free", 1, 0)
        ]
    );

    let batches = get(&authority, "/api/batches?limit=1000").await.json();
    let rows = batches["batches"].as_array().unwrap();
    let last = batches["last"].as_u64().unwrap();
    assert_eq!(rows.last().unwrap()["number"], last);
    let augments = rows.iter().filter(|row| {
        let leaves = row["leaves"].as_array().unwrap();
        leaves.iter().any(|leaf| leaf[0] == "TDH.MEM.PAGE.AUG")
    });
    assert_eq!(augments.count(), 1, "one message for the three pages");
    let trips = &batches["round_trips"]["counts"];
    let sum: u64 = trips
        .as_array()
        .unwrap()
        .iter()
        .map(|n| n.as_u64().unwrap())
        .sum();
    assert_eq!(sum, last);
    let none = get(&authority, &format!("/api/batches?after={last}"))
        .await
        .json();
    assert_eq!(none["batches"], json!([]));
}

#[tokio::test]
async fn buttons_do_what_the_rpcs_of_their_names_do() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    let authority = stack.authority().to_owned();
    let act = async |what: &str, body: Value| {
        let answer = post(&authority, &format!("/api/vms/{vm}/{what}"), &body).await;
        assert_eq!(answer.status, 200, "{what}: {answer:?}");
        answer.json()
    };
    let fault = act("fault", json!({"gpa": "0x3000"})).await;
    assert_eq!(
        (&fault["ret_pf"], &fault["root"]),
        (&json!("RET_PF_FIXED"), &json!("mirror"))
    );
    assert_eq!(fault["seamcalls"].as_array().unwrap().len(), 4);
    assert_eq!(
        fault["seamcalls"][3],
        json!(["TDH.MEM.PAGE.AUG", "TDX_SUCCESS"])
    );
    let again = act("fault", json!({"gpa": 0x3000, "vcpu": 0, "access": "read"})).await;
    assert_eq!(
        (&again["ret_pf"], &again["rpcs"]),
        (&json!("RET_PF_SPURIOUS"), &json!(0))
    );
    let convert = act(
        "convert",
        json!({"gpa": "0", "size": "0x200000", "to": "shared"}),
    )
    .await;
    assert_eq!(
        (&convert["pages_zapped"], &convert["kicks"]),
        (&json!(1), &json!(1))
    );
    act(
        "convert",
        json!({"gpa": 0, "size": 0x1000, "to": "private"}),
    )
    .await;
    act("fault", json!({"gpa": 0})).await;
    let audit = act("audit", json!({})).await;
    assert_eq!(
        (&audit["mismatches"], &audit["frozen"], &audit["leaves"]),
        (&json!(0), &json!(0), &json!(1))
    );
    let stats = stack.stats(vm).await;
    assert_eq!((stats.pages_4k, stats.counts.unwrap().pages_zapped), (1, 1));
}

#[tokio::test]
async fn what_cannot_be_is_refused_by_its_field() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    let authority = stack.authority().to_owned();
    for (path, status, reason, field) in [
        ("/api/vms/77", 404, "NOT_FOUND", Some("vm_id")),
        ("/api/vms/nonsense", 400, "INVALID_FIELD", Some("vm")),
        ("/api/vms/77/map", 404, "NOT_FOUND", Some("vm_id")),
        ("/api/vms/1/map?gpa=x", 400, "INVALID_FIELD", Some("gpa")),
        (
            "/api/vms/1/map?gpa=0x1000",
            400,
            "INVALID_FIELD",
            Some("gpa"),
        ),
        (
            "/api/vms/1/map?gpa=0xffffffffffe00000",
            400,
            "INVALID_FIELD",
            Some("gpa"),
        ),
        ("/api/vms/1/map?cell=3", 400, "INVALID_FIELD", Some("cell")),
        (
            "/api/vms/1/map?module=true",
            400,
            "INVALID_FIELD",
            Some("cell"),
        ),
        (
            "/api/vms/1/map?module=2",
            400,
            "INVALID_FIELD",
            Some("module"),
        ),
        (
            "/api/vms/1/map?cells=0",
            400,
            "INVALID_FIELD",
            Some("cells"),
        ),
        (
            "/api/vms/1/map?cells=4097",
            400,
            "INVALID_FIELD",
            Some("cells"),
        ),
        (
            "/api/vms/1/walk?gpa=0x8000000000000000",
            400,
            "INVALID_FIELD",
            Some("gpa"),
        ),
        (
            "/api/batches?limit=1025",
            400,
            "INVALID_FIELD",
            Some("limit"),
        ),
        ("/api/batches?after=-1", 400, "INVALID_FIELD", Some("after")),
        ("/api/vms/1/fault", 405, "METHOD_NOT_ALLOWED", None),
    ] {
        let expected = (status, reason.to_owned(), field.map(ToOwned::to_owned));
        assert_eq!(get(&authority, path).await.refusal(), expected, "{path}");
    }
    let huge = "9".repeat(8000);
    for (what, body, status, reason, field) in [
        (
            "fault",
            json!({"gpa": "x"}),
            400,
            "INVALID_FIELD",
            Some("body"),
        ),
        ("fault", json!({}), 400, "INVALID_FIELD", Some("body")),
        (
            "fault",
            json!({"gpa": 0, "more": 1}),
            400,
            "INVALID_FIELD",
            Some("body"),
        ),
        (
            "fault",
            json!({"gpa": 0, "vcpu": 9}),
            404,
            "NOT_FOUND",
            Some("vcpu_id"),
        ),
        (
            "fault",
            json!({"gpa": "0x40000000"}),
            409,
            "MEMORY_FAULT",
            None,
        ),
        ("fault", json!({"gpa": huge}), 413, "TOO_LARGE", None),
        (
            "convert",
            json!({"gpa": 1, "size": 4096, "to": "shared"}),
            400,
            "INVALID_FIELD",
            Some("gpa"),
        ),
        (
            "convert",
            json!({"gpa": 0, "size": 0, "to": "shared"}),
            400,
            "INVALID_FIELD",
            Some("size"),
        ),
        (
            "convert",
            json!({"gpa": 0, "size": "0xffffffffffffffff", "to": "shared"}),
            400,
            "INVALID_FIELD",
            Some("size"),
        ),
        (
            "convert",
            json!({"gpa": 0, "size": 4096, "to": "both"}),
            400,
            "INVALID_FIELD",
            Some("body"),
        ),
        (
            "audit",
            json!({"deep": true}),
            400,
            "INVALID_FIELD",
            Some("body"),
        ),
    ] {
        let answer = post(&authority, &format!("/api/vms/{vm}/{what}"), &body).await;
        let expected = (status, reason.to_owned(), field.map(ToOwned::to_owned));
        assert_eq!(answer.refusal(), expected, "{what} {body}");
    }
    assert_eq!(stack.stats(vm).await.pages_4k, 0, "nothing has changed");
}

#[tokio::test]
async fn other_pages_can_neither_read_nor_change_anything() {
    let mut stack = Stack::with_options(&["--page-host", "mmu.internal"]).await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    let authority = stack.authority().to_owned();
    let own = format!("http://{authority}");
    let path = format!("/api/vms/{vm}/fault");
    let json_type = ("Content-Type", "application/json");
    let body = r#"{"gpa": 0}"#;
    for (case, host, headers, status) in [
        (
            "a form of a stranger",
            None,
            &[("Content-Type", "text/plain")][..],
            415,
        ),
        ("no type", None, &[], 415),
        (
            "a script of a stranger",
            None,
            &[json_type, ("Origin", "http://evil.example")],
            403,
        ),
        (
            "a frame without origin",
            None,
            &[json_type, ("Origin", "null")],
            403,
        ),
        (
            "a stranger that hides",
            None,
            &[json_type, ("Sec-Fetch-Site", "cross-site")],
            403,
        ),
        (
            "a name that was rebound",
            Some("evil.example"),
            &[json_type, ("Origin", "http://evil.example")],
            421,
        ),
    ] {
        let more = Extra {
            host,
            headers,
            body,
        };
        let answer = over_tcp(&authority, "POST", &path, &more).await;
        assert_eq!(answer.status, status, "{case}");
        assert_eq!(answer.header("access-control-allow-origin"), None, "{case}");
    }
    assert_eq!(stack.stats(vm).await.pages_4k, 0, "nothing has changed");
    for (host, origin) in [(None, &*own), (Some("mmu.internal"), "http://mmu.internal")] {
        let headers = &[
            json_type,
            ("Origin", origin),
            ("Sec-Fetch-Site", "same-origin"),
        ];
        let more = Extra {
            host,
            headers,
            body,
        };
        assert_eq!(over_tcp(&authority, "POST", &path, &more).await.status, 200);
    }
    for path in ["/", "/api/overview"] {
        let more = Extra {
            host: Some("evil.example"),
            ..Extra::default()
        };
        assert_eq!(
            over_tcp(&authority, "GET", path, &more).await.status,
            421,
            "{path}"
        );
    }
    let preflight = Extra {
        headers: &[
            ("Origin", "http://evil.example"),
            ("Access-Control-Request-Method", "POST"),
        ],
        ..Extra::default()
    };
    let answer = over_tcp(&authority, "OPTIONS", &path, &preflight).await;
    assert!(answer.status >= 400 && answer.header("access-control-allow-origin").is_none());
    let grpc = Extra {
        headers: &[("Content-Type", "text/plain")],
        ..Extra::default()
    };
    let answer = over_tcp(&authority, "POST", "/kvm.mmu.v1.MmuService/ListVms", &grpc).await;
    assert_eq!(answer.status, 404, "gRPC is not for browsers");
}

#[tokio::test]
async fn a_vm_of_a_tebibyte_is_shown_quickly_and_in_a_bounded_answer() {
    let mut stack = Stack::start().await;
    let size = 1 << 40;
    let vm = stack.running_vm(Mode::Batched, 1, size).await;
    let far = size - 2 * MIB;
    stack.prefault(vm, 0, 1024 * MIB).await.unwrap();
    stack.prefault(vm, far, PAGE).await.unwrap();
    let authority = stack.authority().to_owned();
    let answer = get(
        &authority,
        &format!("/api/vms/{vm}/map?cell=0x10000000&cells=4096"),
    )
    .await;
    assert!(
        answer.body.len() < 4096 * 128,
        "{} bytes",
        answer.body.len()
    );
    let map = answer.json();
    assert_eq!(map["sampled"], 1, "little is mapped, so it is exact");
    assert_eq!(
        runs(&map),
        [
            run("private", 4, 65536),
            run("free", 4091, 0),
            run("private", 1, 1)
        ]
    );
}

#[tokio::test]
async fn without_its_module_the_page_still_shows_what_the_mmu_knows() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 8 * MIB).await;
    stack.prefault(vm, 0, PAGE).await.unwrap();
    stack.module.take().unwrap().kill();
    stack.wait_until(ServingStatus::NotServing).await;
    let authority = stack.authority().to_owned();
    let get = async |path: &str| get(&authority, path).await;

    let overview = get("/api/overview").await.json();
    assert_eq!(overview["module"]["up"], false);
    let map = get(&format!("/api/vms/{vm}/map?cells=4")).await.json();
    assert_eq!(runs(&map), [run("private", 1, 1), run("free", 3, 0)]);
    let asked = get(&format!("/api/vms/{vm}/map?cell=4096&cells=4&module=true")).await;
    assert_eq!(
        asked.refusal(),
        (503, "MODULE_UNREACHABLE".to_owned(), None)
    );
    let walk = get(&format!("/api/vms/{vm}/walk?gpa=0")).await.json();
    assert_eq!(
        (&walk["asked"], &walk["mapped"]),
        (&json!(false), &json!(true))
    );
    assert_eq!(walk["entries"][3]["differs"], false, "nobody knows");
    let metrics = Scrape::of(&authority).await;
    assert_eq!(
        (metrics.get("mmu_module_up"), metrics.get("mmu_vms")),
        (0, 1)
    );
}

#[tokio::test]
async fn requests_above_the_limit_are_told_to_come_back() {
    let mut stack = Stack::with_options(&["--max-page-requests", "1"]).await;
    let vm = stack.running_vm(Mode::Batched, 1, 64 * MIB).await;
    stack.prefault(vm, 0, 64 * MIB).await.unwrap();
    let authority = stack.authority().to_owned();
    // Audits of so many entries take long enough to meet each other.
    let mut refused = None;
    for _ in 0..100 {
        let path = format!("/api/vms/{vm}/audit");
        let body = json!({});
        let audit = || post(&authority, &path, &body);
        let answers: [http::Answer; 4] = tokio::join!(audit(), audit(), audit(), audit()).into();
        assert!(answers.iter().any(|answer| answer.status == 200));
        refused = answers.into_iter().find(|answer| answer.status != 200);
        if refused.is_some() {
            break;
        }
    }
    let refused = refused.expect("one of them found no place");
    assert_eq!(refused.refusal(), (429, "OVERLOADED".to_owned(), None));
    assert_eq!(refused.header("retry-after"), Some("1"));
}

//! `/metrics` of both services, scraped, and held against what was done and what is documented.

use std::collections::{BTreeMap, BTreeSet};

use mirror_proto::mmu::{self as wire, Mode};

use crate::http;
use crate::stack::{MIB, PAGE, SHARED, Stack, WRITE, last, pages};

/// The documents that name every metric.
const DOCUMENTED: &str = include_str!("../../../docs/metrics.md");

/// A scrape, taken apart.
pub(crate) struct Scrape {
    /// Kind by family.
    kinds: BTreeMap<String, String>,
    /// Value by series, as written.
    series: BTreeMap<String, f64>,
}

impl Scrape {
    pub(crate) async fn of(authority: &str) -> Self {
        let answer = http::get(authority, "/metrics").await;
        assert_eq!(answer.status, 200);
        let kind = answer.header("content-type").unwrap();
        assert!(kind.starts_with("text/plain; version=0.0.4"), "{kind}");
        Self::parse(&answer.body)
    }

    fn parse(text: &str) -> Self {
        let mut scrape = Self {
            kinds: BTreeMap::new(),
            series: BTreeMap::new(),
        };
        for line in text.lines() {
            if let Some(kind) = line.strip_prefix("# TYPE ") {
                let (name, kind) = kind.split_once(' ').unwrap();
                scrape.kinds.insert(name.into(), kind.into());
            } else if !line.starts_with('#') {
                let (series, value) = line.rsplit_once(' ').unwrap();
                let twice = scrape.series.insert(series.into(), value.parse().unwrap());
                assert_eq!(twice, None, "{series}");
            }
        }
        scrape
    }

    /// The value of a series; 0 for one that is not there yet.
    #[track_caller]
    pub(crate) fn get(&self, series: &str) -> u64 {
        let value = self.series.get(series).copied().unwrap_or(0.0);
        let text = format!("{value}");
        text.parse()
            .unwrap_or_else(|_| panic!("{series} {text} is no count"))
    }

    /// Label names of a family, without the one that every histogram has.
    fn labels(&self, family: &str) -> BTreeSet<String> {
        let of_family = |series: &&String| {
            let name = series.split('{').next().unwrap();
            name == family
                || ["_bucket", "_sum", "_count"]
                    .iter()
                    .any(|part| name.strip_suffix(part) == Some(family))
        };
        self.series
            .keys()
            .filter(of_family)
            .flat_map(|series| pairs(series))
            .map(|(label, _)| label)
            .filter(|label| label != "le")
            .collect()
    }
}

/// Labels and values of a series. No value here has a comma or a quote.
fn pairs(series: &str) -> Vec<(String, String)> {
    let Some((_, labels)) = series.split_once('{') else {
        return Vec::new();
    };
    let labels = labels.trim_end_matches('}').split(',');
    let pair = |label: &str| {
        let (name, value) = label.split_once('=').unwrap();
        (name.to_owned(), value.trim_matches('"').to_owned())
    };
    labels.map(pair).collect()
}

/// Everything that the document lists: name, kind, labels.
pub(crate) fn documented(prefixes: &[&str]) -> BTreeSet<(String, String, BTreeSet<String>)> {
    let rows = DOCUMENTED.lines().filter(|line| line.starts_with("| `"));
    rows.map(|row| {
        let cells: Vec<&str> = row.trim_matches('|').split('|').map(str::trim).collect();
        let [name, kind, labels, _] = cells[..] else {
            panic!("{row:?} has not four cells");
        };
        let labels = labels
            .split(',')
            .map(|label| label.trim().trim_matches('`'));
        let labels = labels.filter(|label| !label.is_empty());
        (
            name.trim_matches('`').to_owned(),
            kind.to_owned(),
            labels.map(ToOwned::to_owned).collect(),
        )
    })
    .filter(|(name, ..)| prefixes.iter().any(|prefix| name.starts_with(prefix)))
    .collect()
}

fn exported(scrape: &Scrape) -> BTreeSet<(String, String, BTreeSet<String>)> {
    let families = scrape.kinds.iter();
    families
        .map(|(name, kind)| (name.clone(), kind.clone(), scrape.labels(name)))
        .collect()
}

/// Both services, and what they say.
async fn scrapes(stack: &Stack) -> (Scrape, Scrape) {
    let module = &stack.module.as_ref().unwrap().authority;
    (
        Scrape::of(stack.authority()).await,
        Scrape::of(module).await,
    )
}

#[tokio::test]
async fn the_documents_list_exactly_what_both_services_export() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 4 * MIB).await;
    stack.fault(vm, 0, 0x1000).await.unwrap();
    let (mmu, module) = scrapes(&stack).await;
    for (scrape, prefix) in [(mmu, "mmu_"), (module, "tdx_module_")] {
        let (documented, exported) = (documented(&[prefix, "process_"]), exported(&scrape));
        let missing: Vec<_> = exported.difference(&documented).collect();
        let stale: Vec<_> = documented.difference(&exported).collect();
        assert!(
            missing.is_empty() && stale.is_empty(),
            "not documented: {missing:#?}\nnot exported: {stale:#?}"
        );
        for (name, kind, _) in exported {
            assert!(
                name.starts_with(prefix) || name.starts_with("process_"),
                "{name}"
            );
            assert_eq!(
                name.ends_with("_total"),
                kind == "counter",
                "{name} is a {kind}"
            );
        }
    }
}

#[tokio::test]
async fn counters_say_what_was_done() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 2, 8 * MIB).await;
    let (before, module_before) = scrapes(&stack).await;

    stack.fault(vm, 0, 0x1000).await.unwrap();
    stack.fault(vm, 1, 0x1000).await.unwrap();
    stack.prefault(vm, 2 * MIB, 512 * PAGE).await.unwrap();
    stack.convert(vm, 2 * MIB, 2 * MIB, 0).await.unwrap();
    stack.fault(vm, 0, 2 * MIB + SHARED).await.unwrap();
    // Out of every slot: an exit record.
    stack.fault(vm, 0, 512 * MIB).await.unwrap_err();
    let stats = stack.stats(vm).await;

    let (after, module_after) = scrapes(&stack).await;
    for (series, grown) in [
        (
            r#"mmu_faults_total{outcome="RET_PF_FIXED",root="mirror"}"#,
            1,
        ),
        (
            r#"mmu_faults_total{outcome="RET_PF_SPURIOUS",root="mirror"}"#,
            1,
        ),
        (
            r#"mmu_faults_total{outcome="RET_PF_FIXED",root="direct"}"#,
            1,
        ),
        (r#"mmu_faults_total{outcome="error",root="mirror"}"#, 1),
        (
            r#"mmu_seamcalls_total{leaf="TDH.MEM.PAGE.AUG",status="TDX_SUCCESS"}"#,
            513,
        ),
        (
            r#"mmu_seamcalls_total{leaf="TDH.MEM.RANGE.BLOCK",status="TDX_SUCCESS"}"#,
            512,
        ),
        (
            r#"mmu_seamcalls_total{leaf="TDH.MEM.PAGE.REMOVE",status="TDX_SUCCESS"}"#,
            512,
        ),
        (
            r#"mmu_seamcalls_total{leaf="TDH.MEM.TRACK",status="TDX_SUCCESS"}"#,
            1,
        ),
        ("mmu_mirror_hits_total", 1),
        ("mmu_pages_mapped_total", 514),
        ("mmu_pages_zapped_total", 512),
        ("mmu_kicks_total", 1),
        (r#"mmu_requests_refused_total{reason="MEMORY_FAULT"}"#, 1),
        (r#"mmu_pages{level="4k"}"#, 2),
        (r#"mmu_link_retries_total{via="stream"}"#, 0),
    ] {
        assert_eq!(after.get(series) - before.get(series), grown, "{series}");
    }
    assert_eq!(after.get("mmu_vms"), 1);
    assert_eq!(after.get("mmu_hkids_in_use"), 1);
    assert_eq!(after.get("mmu_module_up"), 1);
    assert_eq!(after.get("mmu_page_table_bytes"), stats.page_table_bytes);
    assert_eq!(after.get("mmu_host_pages_in_use"), stats.host_pages_in_use);
    assert_eq!(after.get("mmu_link_batches_in_flight"), 0);

    // What left here is what came there: nothing else talks to this module.
    for (series, value) in &after.series {
        if let Some(labels) = series.strip_prefix("mmu_seamcalls_total") {
            let there = module_after
                .series
                .get(&format!("tdx_module_seamcalls_total{labels}"));
            assert_eq!(there.copied().unwrap_or(0.0), *value, "{series}");
        }
    }
    let batches = after.get(r#"mmu_link_batches_total{outcome="answered",via="stream"}"#);
    let round_trips = after.get(r#"mmu_link_round_trip_seconds_count{via="stream"}"#);
    assert_eq!(batches, round_trips);
    assert_eq!(
        module_after.get(r#"tdx_module_batches_total{via="stream"}"#),
        batches
    );
    assert_eq!(module_after.get("tdx_module_batch_seconds_count"), batches);
    assert_eq!(
        module_after.get("tdx_module_batch_calls_count"),
        after.get("mmu_link_batch_calls_count")
    );
    assert_eq!(
        module_after.get("tdx_module_batch_calls_sum"),
        after.get("mmu_link_batch_calls_sum")
    );
    assert!(
        module_before.get("tdx_module_batch_calls_sum")
            < module_after.get("tdx_module_batch_calls_sum")
    );

    let platform = stack.platform().await;
    for name in ["PT_REG", "PT_TDR", "PT_TDCX", "PT_TDVPR", "PT_EPT"] {
        let series = format!(r#"tdx_module_pamt_pages{{type="{name}"}}"#);
        assert_eq!(module_after.get(&series), pages(&platform, name), "{name}");
    }
    assert_eq!(module_after.get("tdx_module_hkids_in_use"), 1);

    stack.destroy(vm).await;
    let (end, module_end) = scrapes(&stack).await;
    for gone in [
        "mmu_vms",
        "mmu_hkids_in_use",
        "mmu_page_table_bytes",
        r#"mmu_pages{level="4k"}"#,
    ] {
        assert_eq!(end.get(gone), 0, "{gone}");
    }
    assert_eq!(module_end.get("tdx_module_hkids_in_use"), 0);
    assert_eq!(
        end.get("mmu_pages_mapped_total"),
        after.get("mmu_pages_mapped_total"),
        "counters never go back"
    );
}

#[tokio::test]
async fn batches_of_faults_are_counted_by_their_root() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Kernel, 1, 8 * MIB).await;
    stack.convert(vm, 4 * MIB, MIB, 0).await.unwrap();
    let fault = |gpa| wire::Fault {
        gpa,
        qualification: WRITE,
        ..Default::default()
    };
    let batch = |faults: &[u64]| wire::HandleFaultsRequest {
        vm_id: vm,
        vcpu_id: 0,
        faults: faults.iter().map(|gpa| fault(*gpa)).collect(),
        ..Default::default()
    };
    let shared = 4 * MIB + SHARED;
    let batches = [
        batch(&[0, PAGE, PAGE]),
        batch(&[shared, shared + PAGE]),
        batch(&[2 * PAGE, shared + 2 * PAGE, 512 * MIB]),
    ];
    let answers = stack
        .client
        .handle_faults(tokio_stream::iter(batches))
        .await;
    last(answers.unwrap().into_inner()).await.unwrap();
    let after = Scrape::of(stack.authority()).await;
    for (series, faults) in [
        (
            r#"mmu_faults_total{outcome="RET_PF_FIXED",root="mirror"}"#,
            2,
        ),
        (
            r#"mmu_faults_total{outcome="RET_PF_SPURIOUS",root="mirror"}"#,
            1,
        ),
        (
            r#"mmu_faults_total{outcome="RET_PF_FIXED",root="direct"}"#,
            2,
        ),
        (r#"mmu_faults_total{outcome="RET_PF_FIXED",root="both"}"#, 2),
        (r#"mmu_faults_total{outcome="error",root="both"}"#, 1),
    ] {
        assert_eq!(after.get(series), faults, "{series}");
    }
    let calls = after.get(r#"mmu_link_batches_total{outcome="answered",via="rpc"}"#);
    assert!(calls > 0, "mode kernel calls one by one");
}

/// What a caller chooses must not become a label, and no label has many values.
#[tokio::test]
async fn label_sets_stay_as_they_are_whatever_callers_do() {
    let mut stack = Stack::start().await;
    let vm = stack.running_vm(Mode::Batched, 1, 64 * MIB).await;
    let names = |scrape: &Scrape| scrape.series.keys().cloned().collect::<BTreeSet<_>>();
    let act = async |stack: &mut Stack, at: u64| {
        let label = format!("label-{at}");
        let request = wire::CreateVmRequest {
            label,
            ..Default::default()
        };
        let other = stack
            .client
            .create_vm(request)
            .await
            .unwrap()
            .into_inner()
            .vm_id;
        stack.fault(vm, 0, at * 37 * PAGE).await.unwrap();
        stack.convert(vm, at * 37 * PAGE, PAGE, 0).await.unwrap();
        stack.fault(vm, 0, at * 37 * PAGE + SHARED).await.unwrap();
        stack.fault(vm, 0, (1 << 40) + at * PAGE).await.unwrap_err();
        stack.fault(vm + 100 + at, 0, 0).await.unwrap_err();
        stack.fault(vm, 77, 0).await.unwrap_err();
        stack.destroy(other).await;
    };
    act(&mut stack, 1).await;
    let (mmu, module) = scrapes(&stack).await;
    for at in 2..30 {
        act(&mut stack, at).await;
    }
    let (mmu_later, module_later) = scrapes(&stack).await;
    assert_eq!(names(&mmu_later), names(&mmu));
    assert_eq!(names(&module_later), names(&module));

    for scrape in [&mmu_later, &module_later] {
        let mut values: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for (label, value) in scrape.series.keys().flat_map(|series| pairs(series)) {
            values.entry(label).or_default().insert(value);
        }
        for (label, values) in values {
            let bound = match &*label {
                "leaf" => tdx_defs::Leaf::NAMED.len() + 1,
                "le" => 32,
                "reason" | "status" => 24,
                _ => 8,
            };
            assert!(values.len() <= bound, "{label}: {values:?}");
        }
    }
}

#[tokio::test]
async fn the_unix_socket_serves_it_too() {
    let stack = Stack::start().await;
    for (socket, name) in [("mmu", "mmu_vms"), ("module", "tdx_module_hkids")] {
        let answer =
            http::over_unix(&stack.dir.path().join(format!("{socket}.sock")), "/metrics").await;
        assert!(answer.body.contains(name), "{}", answer.body);
    }
}

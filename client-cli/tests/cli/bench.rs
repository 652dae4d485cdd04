//! `mmuctl bench`: every benchmark runs and tells its figure beside a floor. Only counts are judged:
//! times belong to the machine.

use crate::common::run;

#[test]
fn every_benchmark_tells_a_figure_beside_its_floor() {
    for (name, size, ops) in [
        ("populate", "4M", 1024),
        ("convert", "4M", 1024),
        ("life", "4M", 1024),
        ("growth", "16M", 512),
        ("scatter", "4M", 1024),
        ("build", "2M", 512),
        ("hit", "4M", 64 * 4096),
        ("scale", "4M", 1024),
        ("fault", "2M", 100),
        ("trace", "4M", 1 << 16),
        ("restart", "4M", 1024),
        ("raw", "2M", 1000),
    ] {
        let ran = run([
            "--output",
            "json",
            "bench",
            name,
            "--size",
            size,
            "--repeats",
            "1",
            "--warm-up",
            "0",
        ]);
        assert_eq!(ran.code, Some(0), "{name}: {ran:?}");
        let figure = ran.json();
        assert_eq!(figure["ops"], ops, "{name}");
        for key in ["ns_per_op", "floor_ns_per_op", "ratio"] {
            assert!(
                figure[key].as_f64().unwrap() > 0.0,
                "{name} {key}: {figure}"
            );
        }
        for service in ["mmu", "module"] {
            let rss = figure["rss_bytes"][service].as_u64().unwrap();
            assert!(rss > 1 << 20, "{name}: {figure}");
        }
        match name {
            "populate" => {
                assert_eq!(figure["seamcalls"]["TDH.MEM.PAGE.AUG"], 1024);
                assert!(figure["rpcs"].as_u64().unwrap() <= 2, "{figure}");
            }
            "life" => {
                let figures = figure["figures"].as_array().unwrap();
                assert_eq!(figures.len(), 4);
                assert!(figure["memory"]["bytes_per_page"]["module"].is_number());
            }
            "restart" => {
                let figures = figure["figures"].as_array().unwrap();
                assert_eq!(figures.len(), 2, "{figure}");
                assert!(figure["recovery_s"].as_f64().unwrap() > 0.0, "{figure}");
                assert_eq!(figures[1]["ops"], 100, "{figure}");
            }
            "trace" => {
                let figures = figure["figures"].as_array().unwrap();
                let ops: Vec<u64> = figures
                    .iter()
                    .map(|one| one["ops"].as_u64().unwrap())
                    .collect();
                assert_eq!(ops, [1 << 16, 1 << 16, 4096, 1024], "{figure}");
            }
            "growth" => {
                let figures = figure["figures"].as_array().unwrap();
                let size = |figure: &serde_json::Value| figure["size"].as_u64().unwrap();
                let sizes: Vec<u64> = figures.iter().map(size).collect();
                assert_eq!(sizes, [2 << 20, 16 << 20]);
            }
            "convert" => {
                assert_eq!(figure["seamcalls"]["TDH.MEM.TRACK"], 1);
                assert!(figure["rpcs"].as_u64().unwrap() <= 3, "{figure}");
            }
            "build" => assert_eq!(figure["seamcalls"]["TDH.MR.EXTEND"], 512 * 16),
            "fault" => assert_eq!(figure["rpcs"], 100, "one message a fault"),
            "scale" => {
                let figures = figure["figures"].as_array().unwrap();
                assert_eq!(figures.len(), 3);
                for figure in figures {
                    assert_eq!(figure["augs"], 1024, "one call a page: {figure}");
                }
            }
            _ => {}
        }
    }
}

#[test]
fn growth_is_drawn_and_nothing_else_is() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("growth.svg");
    let file = file.to_str().unwrap();
    let drawn = |name, size| {
        let what = ["bench", name, "--size", size];
        let how = ["--repeats", "1", "--warm-up", "0", "--plot", file];
        run(what.into_iter().chain(how))
    };
    let ran = drawn("growth", "16M");
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let svg = std::fs::read_to_string(file).unwrap();
    assert!(svg.contains("16 MiB") && svg.ends_with("</svg>\n"), "{svg}");
    let ran = drawn("populate", "4M");
    assert_eq!(ran.code, Some(2), "{ran:?}");
    assert!(ran.stderr.contains("--plot"), "{ran:?}");
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for size in ["0", "4097", "2T"] {
        let ran = run(["bench", "populate", "--size", size]);
        assert_eq!(ran.code, Some(2), "{ran:?}");
        assert!(ran.stderr.contains("--size"), "{ran:?}");
    }
}

#[test]
fn an_overload_is_refused_in_part_and_answered_in_part() {
    let args = "--output json bench overload --size 2M --repeats 1 --warm-up 0";
    let ran = run(args.split_whitespace());
    // No call failed and none was without an answer: either ends the command.
    assert_eq!(ran.code, Some(0), "{ran:?}");
    let figure = ran.json();
    assert_eq!(
        (&figure["places"], &figure["clients"]),
        (&32.into(), &320.into())
    );
    assert!(figure["refused"].as_u64().unwrap() > 0, "{figure}");
    assert!(figure["ops"].as_u64().unwrap() > 320, "{figure}");
}

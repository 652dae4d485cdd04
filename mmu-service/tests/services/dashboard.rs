//! The Grafana dashboard asks for metrics that exist, with labels that they have.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::metrics::documented;

const PREFIXES: [&str; 3] = ["mmu_", "tdx_module_", "process_"];
const DASHBOARD: &str = include_str!("../../../deploy/metrics/dashboards/tdx-mirror-mmu.json");

/// Each query of the dashboard, with the title of its panel.
fn queries() -> Vec<(String, String)> {
    let dashboard: Value = serde_json::from_str(DASHBOARD).unwrap();
    let mut queries = Vec::new();
    for panel in dashboard["panels"].as_array().unwrap() {
        let title = panel["title"].as_str().unwrap();
        for target in panel["targets"].as_array().into_iter().flatten() {
            queries.push((
                title.to_owned(),
                target["expr"].as_str().unwrap().to_owned(),
            ));
        }
    }
    queries
}

/// Words of a query that can only be names of metrics: they have the prefix of one.
fn families(query: &str) -> BTreeSet<String> {
    query
        .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'))
        .filter(|word| PREFIXES.iter().any(|prefix| word.starts_with(prefix)))
        .map(|word| {
            ["_bucket", "_sum", "_count"]
                .iter()
                .find_map(|part| word.strip_suffix(part))
                .unwrap_or(word)
                .to_owned()
        })
        .collect()
}

/// Labels that a query groups by.
fn grouped_by(query: &str) -> BTreeSet<String> {
    query
        .split("by (")
        .skip(1)
        .flat_map(|rest| rest.split(')').next().unwrap().split(','))
        .map(|label| label.trim().to_owned())
        .filter(|label| label != "le")
        .collect()
}

#[test]
fn every_query_of_the_dashboard_names_metrics_and_labels_that_exist() {
    // Another test holds the document against what both services export.
    let labels: BTreeMap<_, _> = documented(&PREFIXES)
        .into_iter()
        .map(|(name, _, labels)| (name, labels))
        .collect();
    let queries = queries();
    assert!(queries.len() > 20, "{} queries", queries.len());
    for (panel, query) in queries {
        let families = families(&query);
        assert!(!families.is_empty(), "{panel}: {query}");
        for family in families {
            let has = labels
                .get(&family)
                .unwrap_or_else(|| panic!("{panel}: nobody has a metric {family}"));
            let missing: Vec<_> = grouped_by(&query).difference(has).cloned().collect();
            assert!(missing.is_empty(), "{panel}: {family} has no {missing:?}");
        }
    }
}

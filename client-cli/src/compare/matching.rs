//! Two streams of events: the same, the same in another order, or different.

use std::collections::BTreeMap;

use super::pages::Pages;
use super::seen::Seen;

/// How the events of a step compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Match {
    Same,
    Reordered,
    Different {
        /// Which event, or what of it.
        what: String,
        expected: String,
        got: String,
    },
}

const NOTHING: &str = "nothing";

/// Compares the events of a step, and learns which page is which.
pub(super) fn compare(pages: &mut Pages, recorded: &[Seen], model: &[Seen]) -> Match {
    let first = recorded
        .iter()
        .zip(model)
        .position(|(recorded, model)| recorded.key != model.key);
    let at = match first {
        None if recorded.len() == model.len() => return in_order(pages, recorded, model),
        None => recorded.len().min(model.len()),
        Some(at) => at,
    };
    let rest = by_key(pages, recorded, model);
    if rest {
        return Match::Reordered;
    }
    let text = |events: &[Seen]| {
        events
            .get(at)
            .map_or(NOTHING, |event| &event.key)
            .to_owned()
    };
    Match::Different {
        what: format!("event {at}"),
        expected: text(recorded),
        got: text(model),
    }
}

fn in_order(pages: &mut Pages, recorded: &[Seen], model: &[Seen]) -> Match {
    let mut verdict = Match::Same;
    for (at, (recorded, model)) in recorded.iter().zip(model).enumerate() {
        for (&r, &m) in recorded.pages.iter().zip(&model.pages) {
            // The others are still taken in, for the steps that follow.
            if !pages.pair(r, m) && verdict == Match::Same {
                verdict = Match::Different {
                    what: format!("page of event {at}"),
                    expected: format!("{} page {:x}", recorded.key, r.frame),
                    got: format!("{} page {:x}, another one before", model.key, m.frame),
                };
            }
        }
    }
    verdict
}

/// Pairs events with equal keys whatever their order. Whether none is left over.
fn by_key(pages: &mut Pages, recorded: &[Seen], model: &[Seen]) -> bool {
    let mut waiting: BTreeMap<&str, Vec<&Seen>> = BTreeMap::new();
    for event in model.iter().rev() {
        waiting.entry(&event.key).or_default().push(event);
    }
    let mut paired = 0;
    for event in recorded {
        let Some(other) = waiting.get_mut(&*event.key).and_then(Vec::pop) else {
            continue;
        };
        paired += 1;
        for (&r, &m) in event.pages.iter().zip(&other.pages) {
            pages.pair(r, m);
        }
    }
    paired == recorded.len() && paired == model.len()
}

/// Leaves out the tables of faults that lost the race to link them: the kernel prints that it made
/// one, and frees it without a word. At most one for each vCPU but the winner's.
pub(super) fn without_lost_races(recorded: &mut Vec<Seen>, model: &[Seen], vcpus: usize) {
    const MADE: &str = "get_page ";
    let mut made: BTreeMap<&str, usize> = BTreeMap::new();
    for event in model.iter().filter(|event| event.key.starts_with(MADE)) {
        *made.entry(&event.key).or_default() += 1;
    }
    let mut seen: BTreeMap<String, usize> = BTreeMap::new();
    recorded.retain(|event| {
        let Some(&made) = made.get(&*event.key) else {
            return true;
        };
        let seen = seen.entry(event.key.clone()).or_default();
        *seen += 1;
        *seen <= made || *seen >= made + vcpus
    });
}

#[cfg(test)]
mod tests {
    use super::super::seen::Page;
    use super::*;

    fn events(list: &[(&str, u64)]) -> Vec<Seen> {
        let event = |&(key, frame): &(&str, u64)| Seen {
            key: key.into(),
            pages: vec![Page {
                frame,
                defines: key.starts_with("new").then_some(1),
            }],
        };
        list.iter().map(event).collect()
    }

    #[test]
    fn order_keys_and_pages_are_told_apart() {
        let recorded = [("new a", 1), ("new b", 2), ("old a", 1)];
        for (model, expected) in [
            (vec![("new a", 7), ("new b", 8), ("old a", 7)], "same"),
            (vec![("new b", 8), ("new a", 7), ("old a", 7)], "reordered"),
            (
                vec![("new a", 7), ("new b", 8), ("old a", 8)],
                "page of event 2",
            ),
            (vec![("new a", 7), ("new b", 8)], "event 2"),
            (vec![("new a", 7), ("new c", 8), ("old a", 7)], "event 1"),
            (
                vec![("new a", 7), ("new b", 8), ("old a", 7), ("x", 0)],
                "event 3",
            ),
        ] {
            let found = match compare(&mut Pages::default(), &events(&recorded), &events(&model)) {
                Match::Same => "same".to_owned(),
                Match::Reordered => "reordered".to_owned(),
                Match::Different { what, .. } => what,
            };
            assert_eq!(found, expected, "{model:?}");
        }
    }

    #[test]
    fn a_table_that_lost_its_race_is_left_out_once_for_each_other_vcpu() {
        let table = ("get_page a", 0);
        let model = events(&[table, ("x", 0)]);
        for (recorded, vcpus, left) in [
            (vec![table, table, ("x", 0)], 2, 2),
            (vec![table, table, table], 2, 2),
            (vec![("get_page b", 0), table], 2, 2),
        ] {
            let mut recorded = events(&recorded);
            without_lost_races(&mut recorded, &model, vcpus);
            assert_eq!(recorded.len(), left, "{recorded:?}");
        }
    }
}

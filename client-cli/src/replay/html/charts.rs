//! The charts of the page, from what was measured.

use std::fmt::Write as _;

use super::super::map::{AddressMap, Cell};
use super::super::meter::{Bin, Meter, Timeline};
use super::svg::{Bars, WIDTH, escape, open};
use super::{grouped, rounded, size};
use crate::tally::Tally;

/// Cells in a row of a map: of a small guest, and of any other.
const ROWS: [usize; 2] = [60, 120];
/// Cells of a small guest.
const FEW_CELLS: usize = 1200;
/// Labels below a chart.
const TICKS: usize = 6;

/// When the recording has its faults.
pub(super) fn recorded(times_ns: &[u64]) -> String {
    let Some(first) = times_ns.iter().min() else {
        return "<p>There is nothing to show.</p>\n".to_owned();
    };
    let mut timeline = Timeline::default();
    for time in times_ns {
        let one = Bin {
            faults: 1,
            messages: 0,
        };
        timeline.add(time - first, one);
    }
    faults_over_time("Faults a second in the recording", &timeline)
}

/// When the replay had its answers.
pub(super) fn rates(meter: &Meter) -> String {
    faults_over_time("Faults a second in the replay", &meter.timeline)
}

fn faults_over_time(title: &str, timeline: &Timeline) -> String {
    let width_s = timeline.width_ns() as f64 / 1e9;
    let rate = |bin: &Bin| bin.faults as f64 / width_s;
    let values: Vec<f64> = timeline.bins().iter().map(rate).collect();
    let hints: Vec<String> = timeline
        .bins()
        .iter()
        .enumerate()
        .map(|(at, bin)| {
            let from = seconds(at as f64 * width_s);
            format!("from {from}: {} faults", grouped(bin.faults))
        })
        .collect();
    let ticks: Vec<(f64, String)> = (0..=TICKS)
        .map(|tick| values.len() as f64 * tick as f64 / TICKS as f64)
        .map(|place| (place, seconds(place * width_s)))
        .collect();
    let chart = Bars {
        title,
        values: &values,
        hints: &hints,
        unit: "faults a second, over time",
        ticks: &ticks,
    };
    let most = values.iter().copied().fold(0.0, f64::max);
    format!(
        "{}<p>At most {} faults a second, in bins of {}.</p>\n",
        chart.draw(),
        grouped(rounded(most)),
        seconds(width_s)
    )
}

/// How long messages of faults took.
pub(super) fn response_times(meter: &Meter, faults: u64) -> String {
    let classes = meter.messages.classes();
    let values: Vec<f64> = classes.iter().map(|&(_, _, count)| count as f64).collect();
    let hints: Vec<String> = classes
        .iter()
        .map(|&(start, end, count)| {
            format!(
                "{} to {}: {}",
                duration(start),
                duration(end),
                grouped(count)
            )
        })
        .collect();
    let ticks: Vec<(f64, String)> = (0..=TICKS)
        .filter_map(|tick| {
            let place = classes.len() * tick / TICKS;
            let start = match classes.get(place) {
                Some(&(start, _, _)) => start,
                None => classes.last()?.1,
            };
            Some((place as f64, duration(start)))
        })
        .collect();
    let chart = Bars {
        title: "Messages of faults by the time to their answer",
        values: &values,
        hints: &hints,
        unit: "messages, by time to answer (sixteen classes for each doubling)",
        ticks: &ticks,
    };
    let mut html = chart.draw();
    let count = meter.messages.count();
    html.push_str("<table><thead><tr><th class=\"number\">messages</th><th class=\"number\">faults in one</th>");
    let quantiles = [("half", 0.5), ("90 %", 0.9), ("99 %", 0.99)];
    for (name, _) in quantiles {
        let _ = write!(html, "<th class=\"number\">{name} within</th>");
    }
    let _ = write!(
        html,
        "<th class=\"number\">longest</th></tr></thead>\n<tbody><tr>\
         <td class=\"number\" id=\"fault-messages\">{}</td><td class=\"number\">{:.1}</td>",
        grouped(count),
        faults as f64 / count.max(1) as f64
    );
    for (_, share) in quantiles {
        let _ = write!(
            html,
            "<td class=\"number\">{}</td>",
            duration(meter.messages.quantile_ns(share))
        );
    }
    let longest = duration(meter.messages.longest_ns());
    let _ = writeln!(
        html,
        "<td class=\"number\">{longest}</td></tr></tbody></table>"
    );
    html
}

/// Calls by leaf.
pub(super) fn seamcalls(tally: &Tally) -> String {
    let all = tally.seamcall_count();
    if all == 0 {
        return "<p>The module was not called.</p>\n".to_owned();
    }
    let most = tally.seamcalls().map(|(_, count)| count).max().unwrap_or(1);
    let mut html = String::from(
        "<table><thead><tr><th>leaf</th><th class=\"number\">calls</th>\
         <th class=\"number\">share</th><th class=\"wide\"></th></tr></thead>\n<tbody>\n",
    );
    for (name, count) in tally.seamcalls() {
        let name = escape(name);
        let _ = writeln!(
            html,
            "<tr><td><code>{name}</code></td><td class=\"number\" id=\"calls-{name}\">{}</td>\
             <td class=\"number\">{:.1} %</td><td><svg class=\"share\" viewBox=\"0 0 100 8\" \
             preserveAspectRatio=\"none\" xmlns=\"http://www.w3.org/2000/svg\">\
             <rect class=\"bar\" width=\"{:.2}\" height=\"8\"/></svg></td></tr>",
            grouped(count),
            100.0 * count as f64 / all as f64,
            (100.0 * count as f64 / most as f64).max(0.5),
        );
    }
    html.push_str("</tbody></table>\n");
    html
}

/// The map before and behind the replay, with what the colours mean.
pub(super) fn address_map(before: &AddressMap, after: &AddressMap) -> String {
    let mut html = String::from("<ul class=\"legend\">\n");
    for (class, text) in [
        ("shared", "shared, not mapped"),
        ("private", "private, not mapped"),
        ("m1", "private, up to a third mapped"),
        ("m2", "up to two thirds"),
        ("m3", "more"),
        ("direct", "shared, mapped"),
        ("both", "both kinds mapped"),
    ] {
        let _ = writeln!(
            html,
            "<li><svg viewBox=\"0 0 8 8\" xmlns=\"http://www.w3.org/2000/svg\">\
             <rect class=\"{class}\" width=\"8\" height=\"8\"/></svg>{text}</li>"
        );
    }
    let _ = writeln!(html, "</ul>\n<p>A cell is {}.</p>", size(after.cell_size));
    let all: usize = after.slots.iter().map(|slot| slot.cells.len()).sum();
    let row = if all <= FEW_CELLS { ROWS[0] } else { ROWS[1] };
    for (title, map) in [("Before", before), ("After", after)] {
        let (mirror, direct) = map.mapped();
        let _ = writeln!(
            html,
            "<h3>{title}</h3>\n<p>Mapped: {} private, {} shared.</p>",
            size(mirror),
            size(direct)
        );
        for slot in &map.slots {
            let _ = writeln!(
                html,
                "<p class=\"slot\"><code>{:#x}</code> to <code>{:#x}</code>, {}</p>",
                slot.range.start,
                slot.range.end,
                size(slot.range.size())
            );
            html.push_str(&cells(title, &slot.cells, map.cell_size, row));
        }
    }
    html
}

/// The cells of a slot; neighbours that look alike are one rectangle.
fn cells(title: &str, cells: &[Cell], cell_size: u64, in_row: usize) -> String {
    let rows = cells.len().div_ceil(in_row);
    let side = WIDTH / in_row as f64;
    let mut svg = open(
        &format!("{title}: guest memory in cells"),
        rows as f64 * side,
    );
    for (row, line) in cells.chunks(in_row).enumerate() {
        let mut at = 0;
        for run in line.chunk_by(|a, b| class_of(a, cell_size) == class_of(b, cell_size)) {
            // Half a unit short, so that rows stay apart.
            let _ = writeln!(
                svg,
                "<rect class=\"{}\" x=\"{}\" y=\"{}\" width=\"{}\" height=\"{}\"/>",
                class_of(&run[0], cell_size),
                at as f64 * side,
                row as f64 * side,
                run.len() as f64 * side,
                side - 0.5,
            );
            at += run.len();
        }
    }
    svg.push_str("</svg>\n");
    svg
}

fn class_of(cell: &Cell, cell_size: u64) -> &'static str {
    match (cell.mirror, cell.direct) {
        (0, 0) if cell.private > 0 => "private",
        (0, 0) => "shared",
        (0, _) => "direct",
        (_, direct) if direct > 0 => "both",
        (mirror, _) if mirror <= cell_size / 3 => "m1",
        (mirror, _) if mirror <= cell_size / 3 * 2 => "m2",
        _ => "m3",
    }
}

fn seconds(seconds: f64) -> String {
    duration(rounded(seconds * 1e9))
}

/// A time with three digits or so.
fn duration(ns: u64) -> String {
    let (value, unit) = match ns {
        0 => return "0".to_owned(),
        1..=999 => return format!("{ns} ns"),
        1_000..=999_999 => (ns as f64 / 1e3, "µs"),
        1_000_000..=999_999_999 => (ns as f64 / 1e6, "ms"),
        _ => (ns as f64 / 1e9, "s"),
    };
    let text = if value < 10.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    };
    format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cell_is_coloured_by_what_is_mapped_in_it() {
        let cell = |private, mirror, direct| Cell {
            private,
            mirror,
            direct,
        };
        for (cell, class) in [
            (cell(0, 0, 0), "shared"),
            (cell(300, 0, 0), "private"),
            (cell(300, 1, 0), "m1"),
            (cell(300, 150, 0), "m2"),
            (cell(300, 300, 0), "m3"),
            (cell(0, 0, 1), "direct"),
            (cell(150, 1, 1), "both"),
        ] {
            assert_eq!(class_of(&cell, 300), class, "{cell:?}");
        }
    }

    #[test]
    fn neighbours_that_look_alike_are_one_rectangle() {
        let svg = cells("After", &[Cell::default(); 130], 2 << 20, 120);
        assert_eq!(svg.matches("<rect").count(), 2, "{svg}");
        assert!(
            svg.contains("width=\"720\"") && svg.contains("width=\"60\""),
            "{svg}"
        );
    }

    #[test]
    fn times_have_few_digits() {
        for (ns, text) in [
            (0, "0"),
            (999, "999 ns"),
            (1_000, "1 µs"),
            (35_400, "35 µs"),
            (1_500_000, "1.5 ms"),
            (12_000_000_000, "12 s"),
        ] {
            assert_eq!(duration(ns), text);
        }
    }
}

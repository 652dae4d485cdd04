//! `replay --report`: one page about a replay, for somebody who plans capacity.
//!
//! The page needs nothing from outside and no script, and follows the reader's light or dark
//! scheme. Every figure on it comes from the runs that it tells of; those that scripts may want
//! have an `id`, the mode and the name of the JSON member.

mod charts;
mod svg;

use std::fmt::Write as _;

use super::map::AddressMap;
use super::meter::Meter;
use super::report::Report;
use crate::local::ProcessMemory;
use charts::{address_map, rates, recorded, response_times, seamcalls};
use svg::escape;

/// Mapped pages below which the growth of a process says nothing about a page.
const MIN_PAGES: u64 = 4096;
const STYLE: &str = include_str!("style.css");
const EXAGGERATIONS: &str = include_str!("exaggerates.html");

/// One run of the recording.
#[derive(Debug, Clone)]
pub struct MeasuredRun {
    /// What came of it.
    pub report: Report,
    /// How it went.
    pub meter: Meter,
    /// The VM before the first fault.
    pub before: AddressMap,
    /// And behind the last one.
    pub after: AddressMap,
    /// The processes before the VM was made and behind the last fault; `None` unless they are
    /// children of this program.
    pub memory: Option<(ProcessMemory, ProcessMemory)>,
}

/// A row of the comparison: name in ids, name for people, value, digits behind the point.
type Row = (&'static str, &'static str, fn(&Report) -> f64, usize);

/// What the page is about.
#[derive(Debug)]
pub struct Page<'a> {
    /// Name of the recording.
    pub file: &'a str,
    /// How to get the same page again.
    pub command: &'a str,
    /// Times of the recording's faults, in nanoseconds, ascending or not.
    pub recorded_ns: &'a [u64],
    /// The run that was asked for.
    pub run: &'a MeasuredRun,
    /// The same in the other mode.
    pub other: Option<&'a MeasuredRun>,
}

impl Page<'_> {
    /// The page.
    pub fn html(&self) -> String {
        let report = &self.run.report;
        let mut body = String::new();
        let mut section = |title: &str, lead: &str, content: &str| {
            let _ = writeln!(
                body,
                "<section><h2>{title}</h2>\n<p>{lead}</p>\n{content}</section>"
            );
        };
        section(
            "In short",
            "What was played, and what it took.",
            &self.summary(),
        );
        section(
            "One call at a time, or many",
            "Mode <code>kernel</code> sends each SEAMCALL as a message of its own, in the kernel's \
             order and number. Mode <code>batched</code> sends chains and runs of them. Both end in \
             the same state.",
            &self.comparison(),
        );
        section(
            "Faults in the recording",
            "When the recorded guest faulted, by its own clock: the load that a host has to take.",
            &recorded(self.recorded_ns),
        );
        section(
            "Faults in the replay",
            "How fast the model answered, with the guest always ready for the next one.",
            &rates(&self.run.meter),
        );
        section(
            "Time to answer",
            "From the sending of a message of faults to its answer. Up to eight are under way, so \
             the time in line is part of it.",
            &response_times(&self.run.meter, report.played.faults),
        );
        section(
            "Calls of the TDX module",
            "By leaf function, with the share of all calls.",
            &seamcalls(&report.played.tally),
        );
        section(
            "Guest memory",
            "Each cell is a piece of guest memory, from left to right and from top to bottom, a \
             block for each memory slot.",
            &address_map(&self.run.before, &self.run.after),
        );
        section(
            "Memory of both processes",
            "Resident memory, before the VM was made and when the last fault was answered.",
            &self.memory(),
        );
        section(
            "What the model exaggerates",
            "Counts are exact. Times are those of two processes on one machine, not of a TDX host.",
            EXAGGERATIONS,
        );
        section(
            "Again",
            "The counts will be the same, the times will not.",
            &format!("<pre id=\"command\">{}</pre>\n", escape(self.command)),
        );
        let file = escape(self.file);
        format!(
            "<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\"/>\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\"/>\n\
             <meta name=\"color-scheme\" content=\"light dark\"/>\n\
             <title>Replay of {file}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<main>\n\
             <h1>Replay of {file}</h1>\n{body}</main>\n</body>\n</html>\n"
        )
    }

    fn summary(&self) -> String {
        let report = &self.run.report;
        let (played, plan) = (&report.played, &report.plan);
        let (mirror, direct) = self.run.after.mapped();
        let guest: u64 = plan.slots.iter().map(|slot| slot.range.size()).sum();
        let audit = match report.audit.verdict() {
            None => "clean".to_owned(),
            Some(_) => format!("{} mismatches", report.audit.mismatches),
        };
        let tiles = [
            ("faults", grouped(played.faults), "faults played".to_owned()),
            (
                "faults_per_s",
                grouped(rounded(report.faults_per_s())),
                format!("faults a second, mode {}", report.mode),
            ),
            (
                "seamcalls",
                grouped(played.tally.seamcall_count()),
                "calls of the module".to_owned(),
            ),
            (
                "rpcs",
                grouped(played.tally.rpcs),
                "messages to the module".to_owned(),
            ),
            (
                "mapped",
                size(mirror + direct),
                format!("of {} guest memory mapped", size(guest)),
            ),
            (
                "audit",
                audit,
                format!("audit of {} entries", grouped(report.audit.entries)),
            ),
        ];
        let mut html = String::from("<div class=\"tiles\">\n");
        for (id, value, what) in tiles {
            let _ = writeln!(
                html,
                "<div class=\"tile\"><strong id=\"{id}\">{value}</strong><span>{}</span></div>",
                escape(&what)
            );
        }
        html.push_str("</div>\n");
        let mut outcomes: Vec<String> = played
            .ret_pf
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| format!("{} RET_PF_{name}", grouped(*count)))
            .collect();
        let errors = played.errors.iter();
        outcomes.extend(
            errors.map(|(name, count)| format!("{} left KVM_RUN with {name}", grouped(*count))),
        );
        let accepted = played.accepted.map_or_else(String::new, |accepted| {
            format!(" Accepted by the guest: {}.", grouped(accepted.pages))
        });
        let _ = writeln!(
            html,
            "<p>vCPUs: {}. Memory slots: {}. Order: <code>{}</code>. Outcomes: {}. Host unmaps: {}. \
             Answered by the mirror alone: {}.{accepted}</p>",
            plan.vcpus.len(),
            plan.slots.len(),
            report.order,
            escape(&outcomes.join(", ")),
            grouped(played.unmaps),
            grouped(played.tally.mirror_hits),
        );
        html
    }

    fn comparison(&self) -> String {
        let runs: Vec<&MeasuredRun> = std::iter::once(self.run).chain(self.other).collect();
        let mut html = String::from("<table><thead><tr><th></th>");
        for run in &runs {
            let _ = write!(html, "<th class=\"number\">{}</th>", run.report.mode);
        }
        if self.other.is_some() {
            html.push_str("<th class=\"number\">ratio</th>");
        }
        html.push_str("</tr></thead>\n<tbody>\n");
        let rows: [Row; 7] = [
            (
                "seamcalls",
                "calls",
                |one| one.played.tally.seamcall_count() as f64,
                0,
            ),
            (
                "rpcs",
                "messages to the module",
                |one| one.played.tally.rpcs as f64,
                0,
            ),
            (
                "kicks",
                "kicks of the vCPUs",
                |one| one.played.tally.kicks as f64,
                0,
            ),
            (
                "flushes",
                "TLB flushes",
                |one| one.played.tally.flushes as f64,
                0,
            ),
            (
                "pages_mapped",
                "pages mapped",
                |one| one.played.tally.pages_mapped as f64,
                0,
            ),
            (
                "pages_zapped",
                "pages zapped",
                |one| one.played.tally.pages_zapped as f64,
                0,
            ),
            (
                "elapsed_s",
                "seconds",
                |one| one.played.elapsed.as_secs_f64(),
                3,
            ),
        ];
        for (id, name, value, digits) in rows {
            let _ = write!(html, "<tr><td>{name}</td>");
            let values: Vec<f64> = runs.iter().map(|run| value(&run.report)).collect();
            for (run, value) in runs.iter().zip(&values) {
                let text = match digits {
                    0 => grouped(rounded(*value)),
                    _ => format!("{value:.digits$}"),
                };
                let mode = run.report.mode;
                let _ = write!(html, "<td class=\"number\" id=\"{mode}-{id}\">{text}</td>");
            }
            if let [one, other] = values[..] {
                let (more, less) = (one.max(other), one.min(other));
                let ratio = match less {
                    less if less > 0.0 => format!("{:.1} ×", more / less),
                    _ => "–".to_owned(),
                };
                let _ = write!(html, "<td class=\"number\">{ratio}</td>");
            }
            html.push_str("</tr>\n");
        }
        html.push_str("</tbody></table>\n");
        if self.other.is_none() {
            html.push_str("<p>The other mode was left out, as asked.</p>\n");
        }
        html
    }

    fn memory(&self) -> String {
        let Some((before, after)) = self.run.memory else {
            return "<p>The services are not children of mmuctl; their memory is not known here. \
                    Use <code>--local</code>.</p>\n"
                .to_owned();
        };
        let (mirror, direct) = self.run.after.mapped();
        let pages = (mirror + direct) >> 12;
        let mut html = String::from(
            "<table><thead><tr><th>process</th><th class=\"number\">before</th>\
             <th class=\"number\">after</th><th class=\"number\">growth a mapped 4 KiB</th></tr>\
             </thead>\n<tbody>\n",
        );
        for (id, name, before, after) in [
            ("mmu", "MMU service", before.mmu, after.mmu),
            ("module", "TDX module", before.module, after.module),
        ] {
            let growth = if pages < MIN_PAGES {
                "–".to_owned()
            } else {
                let bytes = after.saturating_sub(before) as f64 / pages as f64;
                format!("{bytes:.1} bytes")
            };
            let _ = writeln!(
                html,
                "<tr><td>{name}</td><td class=\"number\">{}</td>\
                 <td class=\"number\" id=\"{id}-rss\" data-bytes=\"{after}\">{}</td>\
                 <td class=\"number\">{growth}</td></tr>",
                size(before),
                size(after),
            );
        }
        html.push_str("</tbody></table>\n<p>Growth holds buffers of the connections beside tables and is told from 16 MiB of mapped memory on.</p>\n");
        html
    }
}

/// The nearest whole number; the figures here are far from the limits.
#[allow(
    clippy::cast_possible_truncation,
    reason = "a number above u64::MAX would be shown as that"
)]
fn rounded(value: f64) -> u64 {
    value.round() as u64
}

/// A count with a thin space between thousands.
fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3 * 3);
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push('\u{202f}');
        }
        text.push(digit);
    }
    text
}

/// Bytes for people.
fn size(bytes: u64) -> String {
    for (unit, shift) in [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)] {
        if bytes >> shift > 0 {
            let value = bytes as f64 / (1u64 << shift) as f64;
            let text = format!("{value:.1}");
            return format!("{} {unit}", text.strip_suffix(".0").unwrap_or(&text));
        }
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_sizes_have_their_unit() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(180_129), "180\u{202f}129");
        assert_eq!(grouped(1_000_000), "1\u{202f}000\u{202f}000");
        assert_eq!(size(512), "512 bytes");
        assert_eq!(size(2 << 20), "2 MiB");
        assert_eq!(size(3 << 29), "1.5 GiB");
    }
}

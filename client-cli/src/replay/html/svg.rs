//! Charts as inline SVG, coloured by the page's style sheet.

use std::fmt::Write as _;

/// Width of a chart, in SVG units.
pub(super) const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 180.0;
/// Room for the axes: left, bottom, top.
const LEFT: f64 = 56.0;
const BOTTOM: f64 = 34.0;
const TOP: f64 = 10.0;

/// A bar chart.
pub(super) struct Bars<'a> {
    /// For who cannot see it.
    pub(super) title: &'a str,
    /// Heights.
    pub(super) values: &'a [f64],
    /// What a bar says when pointed at.
    pub(super) hints: &'a [String],
    /// Unit of the heights.
    pub(super) unit: &'a str,
    /// Labels below: place among the bars, text.
    pub(super) ticks: &'a [(f64, String)],
}

impl Bars<'_> {
    /// The chart; a sentence when there is nothing to show.
    pub(super) fn draw(&self) -> String {
        let top = self.values.iter().copied().fold(0.0, f64::max);
        if top <= 0.0 {
            return "<p>There is nothing to show.</p>".to_owned();
        }
        let scale = nice(top);
        let (plot, high) = (WIDTH - LEFT, HEIGHT - TOP - BOTTOM);
        let step = plot / self.values.len() as f64;
        let mut svg = open(self.title, HEIGHT);
        for part in 0..=2 {
            let share = f64::from(part) / 2.0;
            let y = TOP + high * (1.0 - share);
            let label = short(scale * share);
            let _ = writeln!(
                svg,
                "<line class=\"grid\" x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{WIDTH}\" y2=\"{y:.1}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"end\">{label}</text>",
                LEFT - 6.0,
                y + 4.0,
            );
        }
        for (at, (&value, hint)) in self.values.iter().zip(self.hints).enumerate() {
            if value > 0.0 {
                // Thin enough to tell neighbours apart, never too thin to see.
                let (width, height) = (
                    (step - 1.0).max(step * 0.8),
                    (high * value / scale).max(0.8),
                );
                let _ = writeln!(
                    svg,
                    "<rect class=\"bar\" x=\"{:.2}\" y=\"{:.2}\" width=\"{width:.2}\" \
                     height=\"{height:.2}\"><title>{}</title></rect>",
                    LEFT + at as f64 * step,
                    TOP + high - height,
                    escape(hint),
                );
            }
        }
        for (place, text) in self.ticks {
            let x = LEFT + place * step;
            let anchor = if x > WIDTH - 40.0 { "end" } else { "middle" };
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{:.1}\" text-anchor=\"{anchor}\">{}</text>",
                HEIGHT - BOTTOM + 16.0,
                escape(text),
            );
        }
        let _ = writeln!(
            svg,
            "<text class=\"unit\" x=\"{LEFT}\" y=\"{:.1}\">{}</text></svg>",
            HEIGHT - 3.0,
            escape(self.unit),
        );
        svg
    }
}

/// Begins a drawing that is as wide as a chart.
pub(super) fn open(title: &str, height: f64) -> String {
    let title = escape(title);
    format!(
        "<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{title}\" \
         xmlns=\"http://www.w3.org/2000/svg\">\n"
    )
}

/// The next of 1, 2, 5 × a power of ten.
fn nice(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|step| step * power >= value);
    step.unwrap_or(10.0) * power
}

/// A number for an axis.
fn short(value: f64) -> String {
    let (scaled, suffix) = match value {
        value if value >= 1e9 => (value / 1e9, " G"),
        value if value >= 1e6 => (value / 1e6, " M"),
        value if value >= 1e3 => (value / 1e3, " k"),
        value => (value, ""),
    };
    let text = format!("{scaled:.1}");
    format!("{}{suffix}", text.strip_suffix(".0").unwrap_or(&text))
}

/// Text for an element or an attribute.
pub(super) fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '"' => escaped.push_str("&quot;"),
            // XML has no place for these.
            control if control.is_control() && !matches!(control, '\n' | '\t') => {
                escaped.push('\u{fffd}');
            }
            other => escaped.push(other),
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn axes_end_at_round_numbers() {
        for (value, end, label) in [
            (0.7, 1.0, "1"),
            (1.0, 1.0, "1"),
            (13.0, 20.0, "20"),
            (4_100.0, 5_000.0, "5 k"),
            (5_100_000.0, 10_000_000.0, "10 M"),
        ] {
            assert!((nice(value) - end).abs() < end * 1e-9, "{value}");
            assert_eq!(short(nice(value)), label);
        }
    }

    #[test]
    fn text_cannot_become_markup() {
        assert_eq!(
            escape("<a b=\"&\">\u{1b}"),
            "&lt;a b=&quot;&amp;&quot;&gt;\u{fffd}"
        );
    }
}

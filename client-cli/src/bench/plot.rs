//! Figures as a drawing: one line for the figure, one for its floor, over the number of operations.

use std::fmt::Write as _;

use super::figure::Figure;

const WIDTH: f64 = 640.0;
const HEIGHT: f64 = 320.0;
const LEFT: f64 = 64.0;
const RIGHT: f64 = 24.0;
const TOP: f64 = 40.0;
const BOTTOM: f64 = 48.0;
/// Colours of the figure and of its floor.
const COLOURS: [&str; 2] = ["#1f6feb", "#bf5700"];

/// An SVG of `figures`: nanoseconds an operation over operations, the latter on a logarithmic axis.
pub fn plot(title: &str, lines: [&str; 2], figures: &[Figure]) -> String {
    let points: Vec<(f64, [f64; 2])> = figures.iter().map(Figure::point).collect();
    let most = points
        .iter()
        .flat_map(|(_, values)| *values)
        .fold(1.0, f64::max);
    let top = (most / 100.0).ceil() * 100.0;
    let place = |ops: f64| ops.max(1.0).log2();
    let first = points.first().map_or(0.0, |point| place(point.0));
    let last = points
        .last()
        .map_or(1.0, |point| place(point.0))
        .max(first + 1.0);
    let x = |ops: f64| LEFT + (place(ops) - first) / (last - first) * (WIDTH - LEFT - RIGHT);
    let y = |ns: f64| TOP + (1.0 - ns / top) * (HEIGHT - TOP - BOTTOM);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" \
         font-family=\"sans-serif\" font-size=\"12\">\n<title>{title}</title>\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>\n"
    );
    for part in 0..=4 {
        let ns = top * f64::from(part) / 4.0;
        let _ = writeln!(
            svg,
            "<path d=\"M{LEFT} {at:.1}H{end}\" stroke=\"#ddd\"/>\
             <text x=\"{label}\" y=\"{at:.1}\" dy=\"4\" text-anchor=\"end\">{ns:.0}</text>",
            at = y(ns),
            end = WIDTH - RIGHT,
            label = LEFT - 8.0,
        );
    }
    for (figure, (ops, _)) in figures.iter().zip(&points) {
        let _ = writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            x(*ops),
            HEIGHT - BOTTOM + 20.0,
            figure.name().trim_start_matches("a page of "),
        );
    }
    for (at, (line, colour)) in lines.iter().zip(COLOURS).enumerate() {
        let path: Vec<String> = points
            .iter()
            .map(|(ops, values)| format!("{:.1},{:.1}", x(*ops), y(values[at])))
            .collect();
        let _ = writeln!(
            svg,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"/>\
             <text x=\"{:.1}\" y=\"20\" fill=\"{colour}\">{line}</text>",
            path.join(" "),
            [LEFT, WIDTH / 2.0][at],
        );
    }
    svg.push_str("</svg>\n");
    svg
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_figure_is_a_point_of_both_lines() {
        let figures: Vec<Figure> = [512, 4096, 262_144]
            .map(|ops| Figure::new(("a page of 1 GiB", "b"), ops, &[(150.0, 300.0)]))
            .into();
        let svg = plot("cost", ["one", "other"], &figures);
        for line in svg.lines().filter(|line| line.contains("points=")) {
            let points = line.split('"').nth(1).expect("an attribute");
            assert_eq!(points.split(' ').count(), 3, "{line}");
        }
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert_eq!(svg.matches(">1 GiB<").count(), 3);
        assert!(!svg.contains("NaN"), "{svg}");
    }
}

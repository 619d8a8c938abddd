//! Charts as SVG: lines and dots against time, legible on paper, on a screen, and on a dark one.
//!
//! Owns the drawing, and which way of moving has which colour: the same in every chart. Knows
//! nothing of what is drawn.

use std::fmt::Write as _;

const WIDTH: f64 = 900.0;
const HEIGHT: f64 = 400.0;
const LEFT: f64 = 72.0;
const RIGHT: f64 = 20.0;
const BOTTOM: f64 = 50.0;
/// Below the title; the legend's lines follow.
const TITLE_BOTTOM: f64 = 38.0;
const LEGEND_LINE: f64 = 20.0;
/// About what a character of the legend takes.
const CHARACTER: f64 = 7.2;
/// The least that a logarithmic axis shows.
const LOG_FLOOR: f64 = 0.02;

/// Colours that differ in lightness too, for those who see few; the first names are ours.
const COLOURS: [(&str, &str); 9] = [
    ("hikkoshi", "#e4572e"),
    ("hikkoshi, nbdkit source", "#f0a202"),
    ("hikkoshi, heat known", "#b5179e"),
    ("nbdcopy", "#2a7fba"),
    ("qemu-img convert", "#56c1d6"),
    ("qemu stream", "#4c9f50"),
    ("nbdkit scan", "#8d6cc9"),
    ("", "#9a7b4f"),
    ("", "#7d8597"),
];

/// The style of a chart, once in each file.
const STYLE: &str = "\
.hk{font:13px system-ui,sans-serif;--ink:#1d2433;--soft:#5b6475;--grid:#e3e6ec;--paper:#fff}\
@media(prefers-color-scheme:dark){.hk{--ink:#e6e9f0;--soft:#9aa3b5;--grid:#333b4a;--paper:#161b26}}\
.hk text{fill:var(--ink)}.hk .soft{fill:var(--soft)}.hk .title{font-size:16px;font-weight:600}\
.hk .grid{stroke:var(--grid);stroke-width:1}.hk .axis{stroke:var(--soft);stroke-width:1}\
.hk .mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:5 4}\
.hk .line{fill:none;stroke-width:1.8;stroke-linejoin:round}.hk .ours{stroke-width:2.8}\
.hk .dots{fill:none;stroke-width:3.2;stroke-linecap:round;stroke-opacity:.55}";

/// How points are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Line,
    Dots,
}

/// What one way of moving did.
#[derive(Clone, Debug)]
pub struct Series {
    name: String,
    points: Vec<(f64, f64)>,
    form: Form,
}

impl Series {
    /// A line through the points.
    pub fn line(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_owned(),
            points,
            form: Form::Line,
        }
    }

    /// A dot for each.
    pub fn dots(name: &str, points: Vec<(f64, f64)>) -> Self {
        Self {
            name: name.to_owned(),
            points,
            form: Form::Dots,
        }
    }
}

/// A chart.
#[derive(Clone, Debug)]
pub struct Chart {
    /// Its file's name, without the ending.
    pub file: String,
    /// Heading.
    pub title: String,
    /// Under the horizontal axis.
    pub x_label: String,
    /// At the vertical axis.
    pub y_label: String,
    /// The vertical axis ends here, if not at the highest point.
    pub y_max: Option<f64>,
    /// Whether the vertical axis is logarithmic.
    pub log: bool,
    /// Horizontal lines with a name.
    pub marks: Vec<(String, f64)>,
    /// What is drawn.
    pub series: Vec<Series>,
}

/// An axis: values to positions.
struct Axis {
    low: f64,
    high: f64,
    log: bool,
    from: f64,
    to: f64,
}

impl Axis {
    fn place(&self, value: f64) -> f64 {
        let of = |value: f64| {
            if self.log {
                value.max(LOG_FLOOR).log10()
            } else {
                value
            }
        };
        let part = (of(value) - of(self.low)) / (of(self.high) - of(self.low));
        self.from + part.clamp(0.0, 1.0) * (self.to - self.from)
    }

    fn ticks(&self) -> Vec<f64> {
        if self.log {
            let powers = -2..=6;
            let ticks = powers.flat_map(|power| [1.0, 3.0].map(|n| n * 10_f64.powi(power)));
            return ticks
                .filter(|tick| (self.low..=self.high).contains(tick))
                .collect();
        }
        let step = nice((self.high - self.low) / 6.0);
        let mut ticks = Vec::new();
        let mut tick = (self.low / step).ceil() * step;
        while tick <= self.high + step * 1e-6 {
            ticks.push(tick);
            tick += step;
        }
        ticks
    }
}

/// The next number of the form 1, 2, 2.5, 5 times a power of ten.
fn nice(raw: f64) -> f64 {
    let power = 10_f64.powf(raw.max(1e-9).log10().floor());
    let factor = raw / power;
    let factor = [1.0, 2.0, 2.5, 5.0].into_iter().find(|f| factor <= *f);
    factor.unwrap_or(10.0) * power
}

fn label(tick: f64) -> String {
    let text = format!("{tick:.2}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" {
        "0".into()
    } else {
        text.into()
    }
}

/// The colour of the series `name`, the `index`-th of its chart.
fn colour(name: &str, index: usize) -> &'static str {
    let known = COLOURS.iter().find(|(known, _)| *known == name);
    // A name from the command line gets one that no other has.
    known.map_or(COLOURS[7 + index % 2].1, |(_, colour)| colour)
}

impl Chart {
    /// Whether there is anything to draw.
    pub fn is_empty(&self) -> bool {
        self.series.iter().all(|series| series.points.is_empty())
    }

    /// The chart as an SVG document.
    pub fn svg(&self) -> String {
        let mut out = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" class=\"hk\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
             role=\"img\" aria-label=\"{title}\"><style>{STYLE}</style>\
             <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" rx=\"8\" fill=\"var(--paper)\"/>\
             <text class=\"title\" x=\"{LEFT}\" y=\"26\">{title}</text>",
            title = escape(&self.title)
        );
        let top = self.legend(&mut out) + 8.0;
        let (x, y) = self.axes(top);
        self.grid(&mut out, &x, &y);
        for (index, series) in self.series.iter().enumerate() {
            draw(&mut out, series, colour(&series.name, index), &x, &y);
        }
        out.push_str("</svg>\n");
        out
    }

    /// Draws it; returns where it ends.
    fn legend(&self, out: &mut String) -> f64 {
        let (mut x, mut y) = (LEFT, TITLE_BOTTOM + 12.0);
        for (index, series) in self.series.iter().enumerate() {
            let width = 26.0 + series.name.chars().count() as f64 * CHARACTER + 16.0;
            if x > LEFT && x + width > WIDTH - RIGHT {
                (x, y) = (LEFT, y + LEGEND_LINE);
            }
            let _ = write!(
                out,
                "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"18\" height=\"4\" rx=\"2\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{y:.1}\">{}</text>",
                y - 6.0,
                colour(&series.name, index),
                x + 24.0,
                escape(&series.name)
            );
            x += width;
        }
        y
    }

    fn axes(&self, top: f64) -> (Axis, Axis) {
        let points = || self.series.iter().flat_map(|series| &series.points);
        let right = points().map(|point| point.0).fold(0.0, f64::max).max(1e-3);
        let marks = self.marks.iter().map(|mark| mark.1);
        let highest = points()
            .map(|point| point.1)
            .chain(marks)
            .fold(0.0, f64::max);
        let lowest = points().map(|point| point.1).fold(f64::INFINITY, f64::min);
        let (low, high) = if self.log {
            (lowest.clamp(LOG_FLOOR, 1.0), highest.max(2.0) * 1.3)
        } else {
            (0.0, self.y_max.unwrap_or(highest.max(1e-3) * 1.06))
        };
        let x = Axis {
            low: 0.0,
            high: right,
            log: false,
            from: LEFT,
            to: WIDTH - RIGHT,
        };
        let y = Axis {
            low,
            high,
            log: self.log,
            from: HEIGHT - BOTTOM,
            to: top,
        };
        (x, y)
    }

    fn grid(&self, out: &mut String, x: &Axis, y: &Axis) {
        for tick in y.ticks() {
            let at = y.place(tick);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"soft\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                x.from,
                x.to,
                x.from - 8.0,
                at + 4.5,
                label(tick)
            );
        }
        for tick in x.ticks() {
            let at = x.place(tick);
            let _ = write!(
                out,
                "<line class=\"axis\" x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{}\" y2=\"{}\"/>\
                 <text class=\"soft\" x=\"{at:.1}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
                y.from,
                y.from + 5.0,
                y.from + 20.0,
                label(tick)
            );
        }
        for (name, value) in &self.marks {
            let at = y.place(*value);
            let _ = write!(
                out,
                "<line class=\"mark\" x1=\"{}\" x2=\"{}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"soft\" x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                x.from,
                x.to,
                x.to - 4.0,
                at - 5.0,
                escape(name)
            );
        }
        let _ = write!(
            out,
            "<line class=\"axis\" x1=\"{left}\" x2=\"{right}\" y1=\"{base}\" y2=\"{base}\"/>\
             <text class=\"soft\" x=\"{middle}\" y=\"{under}\" text-anchor=\"middle\">{}</text>\
             <text class=\"soft\" transform=\"translate(18 {height}) rotate(-90)\" \
             text-anchor=\"middle\">{}</text>",
            escape(&self.x_label),
            escape(&self.y_label),
            left = x.from,
            right = x.to,
            base = y.from,
            middle = f64::midpoint(x.from, x.to),
            under = HEIGHT - 10.0,
            height = f64::midpoint(y.from, y.to),
        );
    }
}

fn draw(out: &mut String, series: &Series, colour: &str, x: &Axis, y: &Axis) {
    if series.points.is_empty() {
        return;
    }
    let class = match series.form {
        Form::Line if series.name == "hikkoshi" => "line ours",
        Form::Line => "line",
        Form::Dots => "dots",
    };
    let _ = write!(out, "<path class=\"{class}\" stroke=\"{colour}\" d=\"");
    for (index, (at, value)) in series.points.iter().enumerate() {
        let (at, value) = (x.place(*at), y.place(*value));
        let _ = match series.form {
            Form::Line if index > 0 => write!(out, "L{at:.1} {value:.1}"),
            Form::Line => write!(out, "M{at:.1} {value:.1}"),
            // A line of no length with round ends: a dot.
            Form::Dots => write!(out, "M{at:.1} {value:.1}h0"),
        };
    }
    out.push_str("\"/>");
}

/// Text that is safe within HTML and SVG.
pub fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chart(log: bool, points: Vec<(f64, f64)>) -> Chart {
        Chart {
            file: "f".into(),
            title: "a < b & c".into(),
            x_label: "s".into(),
            y_label: "ms".into(),
            y_max: None,
            log,
            marks: vec![("mark".into(), 5.0)],
            series: vec![
                Series::line("hikkoshi", points.clone()),
                Series::dots("own", points),
            ],
        }
    }

    #[test]
    fn points_are_drawn_inside_the_frame() {
        for log in [false, true] {
            let svg = chart(log, vec![(0.0, 0.0), (1.0, 10.0), (2.0, 1e6)]).svg();
            assert!(
                svg.contains("a &lt; b &amp; c") && !svg.contains("NaN"),
                "{svg}"
            );
            let path = svg.split("class=\"line ours\"").nth(1).unwrap();
            let path = path
                .split("d=\"M")
                .nth(1)
                .unwrap()
                .split('"')
                .next()
                .unwrap();
            let points: Vec<(f64, f64)> = path
                .split('L')
                .map(|point| {
                    let (x, y) = point.split_once(' ').unwrap();
                    (x.parse().unwrap(), y.parse().unwrap())
                })
                .collect();
            assert_eq!(points.len(), 3);
            for (x, y) in &points {
                assert!((LEFT..=WIDTH - RIGHT).contains(x), "{points:?}");
                assert!((TITLE_BOTTOM..=HEIGHT - BOTTOM).contains(y), "{points:?}");
            }
            assert!(points[0].0 < points[1].0 && points[1].1 > points[2].1);
        }
    }

    #[test]
    fn ticks_are_round_numbers() {
        for (raw, step) in [(0.9, 1.0), (1.2, 2.0), (33.0, 50.0), (67.0, 100.0)] {
            assert!((nice(raw) - step).abs() < 1e-9, "{raw}");
        }
        assert_eq!([label(0.5), label(20.0), label(0.0)], ["0.5", "20", "0"]);
    }

    #[test]
    fn nothing_to_draw_is_said_and_does_no_harm() {
        let empty = chart(true, Vec::new());
        assert!(empty.is_empty() && !empty.svg().contains("NaN"));
    }
}

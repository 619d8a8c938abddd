//! Figures as people and programs read them.
//!
//! Owns medians, spreads, ratios, the Markdown tables and the JSON form. A ratio is taken within
//! each round, between measurements that are seconds apart, and then the median of the rounds is
//! shown: the machine may drift over a run without the ratio noticing.

use serde::Serialize;

use crate::client::Sample;

/// A client busier than this is what limits the measurement.
const CLIENT_LIMIT: f64 = 0.9;

/// What a column is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Compared with the references; gets ratio columns.
    Subject,
    /// The best of these, in each row, is what subjects are compared with.
    Reference,
    /// Shown only.
    Other,
}

/// How a row's rate is expressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Unit {
    /// Operations per second; CPU in microseconds an operation.
    Iops,
    /// 10^6 bytes per second; CPU in microseconds an operation.
    MegabytesPerSecond,
    /// 10^6 bytes per second; CPU in milliseconds a GiB.
    Pass,
}

/// One workload, measured in every column.
#[derive(Debug, Serialize)]
pub struct Row {
    /// Its name.
    pub workload: String,
    /// Its unit.
    pub unit: Unit,
    /// Samples by column, then by round.
    pub samples: Vec<Vec<Sample>>,
}

/// A table.
#[derive(Debug, Serialize)]
pub struct Table {
    /// Heading.
    pub title: String,
    /// What was done, in a sentence or two.
    pub note: String,
    /// Names and roles of the columns.
    pub columns: Vec<(String, Role)>,
    /// Workloads.
    pub rows: Vec<Row>,
}

impl Unit {
    fn rate(self, sample: &Sample) -> f64 {
        match self {
            Self::Iops => sample.operations as f64 / sample.seconds,
            Self::MegabytesPerSecond | Self::Pass => sample.bytes as f64 / sample.seconds / 1e6,
        }
    }

    fn cost(self, sample: &Sample) -> f64 {
        match self {
            Self::Iops | Self::MegabytesPerSecond => {
                sample.server_cpu_s * 1e6 / sample.operations as f64
            }
            Self::Pass => sample.server_cpu_s * 1e3 / (sample.bytes as f64 / (1_u64 << 30) as f64),
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Iops => "IOPS",
            Self::MegabytesPerSecond | Self::Pass => "MB/s",
        }
    }
}

impl Row {
    fn rates(&self, column: usize) -> Vec<f64> {
        self.samples[column]
            .iter()
            .map(|sample| self.unit.rate(sample))
            .collect()
    }

    fn costs(&self, column: usize) -> Vec<f64> {
        self.samples[column]
            .iter()
            .map(|sample| self.unit.cost(sample))
            .collect()
    }

    /// Whether the client, not the server, set the pace of `column`.
    fn client_bound(&self, column: usize) -> bool {
        median(
            self.samples[column]
                .iter()
                .map(|s| s.client_cpu_s / s.seconds),
        ) >= CLIENT_LIMIT
    }

    /// Subject against reference, round by round.
    fn ratio(subject: &[f64], reference: &[f64]) -> f64 {
        median(
            subject
                .iter()
                .zip(reference)
                .map(|(subject, reference)| subject / reference),
        )
    }
}

impl Table {
    /// The table in Markdown, aligned for the terminal.
    pub fn markdown(&self) -> String {
        let with_role = |role| {
            let columns = self.columns.iter().enumerate();
            columns
                .filter(move |(_, (_, r))| *r == role)
                .map(|(index, _)| index)
        };
        let subjects: Vec<usize> = with_role(Role::Subject).collect();
        let references: Vec<usize> = with_role(Role::Reference).collect();
        let compare = !subjects.is_empty() && !references.is_empty();
        let mut head = vec!["workload".to_owned(), "unit".to_owned()];
        head.extend(self.columns.iter().map(|(name, _)| name.clone()));
        if compare {
            head.extend(
                subjects
                    .iter()
                    .map(|&s| format!("{} ratio", self.columns[s].0)),
            );
        }
        head.extend(self.columns.iter().map(|(name, _)| format!("{name} CPU")));
        if compare {
            head.extend(
                subjects
                    .iter()
                    .map(|&s| format!("{} CPU ratio", self.columns[s].0)),
            );
        }
        head.push("busy s/c %".to_owned());
        let mut lines = vec![head];
        for row in &self.rows {
            let columns = 0..self.columns.len();
            let mut line = vec![row.workload.clone(), row.unit.name().to_owned()];
            line.extend(columns.clone().map(|column| {
                let mark = if row.client_bound(column) { "†" } else { "" };
                format!("{}{mark}", spread(&row.rates(column)))
            }));
            if compare {
                let best = references
                    .iter()
                    .copied()
                    .max_by(|&a, &b| median(row.rates(a)).total_cmp(&median(row.rates(b))));
                line.extend(subjects.iter().map(|&subject| {
                    let mark = if row.client_bound(subject) { "†" } else { "" };
                    best.map_or_else(String::new, |best| {
                        format!(
                            "{:.2}x{mark}",
                            Row::ratio(&row.rates(subject), &row.rates(best))
                        )
                    })
                }));
            }
            line.extend(
                columns
                    .clone()
                    .map(|column| short(median(row.costs(column)))),
            );
            if compare {
                let best = references
                    .iter()
                    .copied()
                    .min_by(|&a, &b| median(row.costs(a)).total_cmp(&median(row.costs(b))));
                line.extend(subjects.iter().map(|&subject| {
                    best.map_or_else(String::new, |best| {
                        format!("{:.2}x", Row::ratio(&row.costs(subject), &row.costs(best)))
                    })
                }));
            }
            let busy = columns.map(|column| {
                let part = |cpu: fn(&Sample) -> f64| {
                    median(
                        row.samples[column]
                            .iter()
                            .map(|s| 100.0 * cpu(s) / s.seconds),
                    )
                };
                format!(
                    "{:.0}/{:.0}",
                    part(|s| s.server_cpu_s),
                    part(|s| s.client_cpu_s)
                )
            });
            line.push(busy.collect::<Vec<_>>().join(" "));
            lines.push(line);
        }
        let samples = self
            .rows
            .iter()
            .flat_map(|row| row.samples.iter().flatten());
        let others: Vec<f64> = samples.filter_map(|sample| sample.others).collect();
        let others = if others.is_empty() {
            String::new()
        } else {
            format!(
                " Others used {:.0}% of the machine (median).",
                100.0 * median(others)
            )
        };
        let Self { title, note, .. } = self;
        format!("\n### {title}\n\n{note}{others}\n\n{}", align(&lines))
    }
}

/// Lines of cells as a Markdown table: the first is the head, the first column is left-aligned.
pub fn align(lines: &[Vec<String>]) -> String {
    let columns = lines.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        let cells = lines.iter().filter_map(|line| line.get(column));
        cells
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
            .max(3)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for (index, line) in lines.iter().enumerate() {
        for (column, (cell, &width)) in line.iter().zip(&widths).enumerate() {
            let cell = if column == 0 {
                format!("{cell:<width$}")
            } else {
                format!("{cell:>width$}")
            };
            out.push_str(&format!("| {cell} "));
        }
        out.push_str("|\n");
        if index == 0 {
            for (column, &width) in widths.iter().enumerate() {
                let dashes = "-".repeat(width);
                out.push_str(&if column == 0 {
                    format!("| {dashes} ")
                } else {
                    format!("| {}: ", &dashes[1..])
                });
            }
            out.push_str("|\n");
        }
    }
    out
}

/// The middle of some figures, or the mean of the two in the middle; 0 of none.
pub fn median(figures: impl IntoIterator<Item = f64>) -> f64 {
    let mut figures: Vec<f64> = figures.into_iter().collect();
    figures.sort_by(f64::total_cmp);
    let half = figures.len() / 2;
    match figures.len() {
        0 => 0.0,
        even if even % 2 == 0 => f64::midpoint(figures[half - 1], figures[half]),
        _ => figures[half],
    }
}

/// Median, least and greatest.
pub fn spread(figures: &[f64]) -> String {
    let least = figures.iter().copied().fold(f64::INFINITY, f64::min);
    let greatest = figures.iter().copied().fold(0.0, f64::max);
    format!(
        "{} ({}–{})",
        short(median(figures.iter().copied())),
        short(least),
        short(greatest)
    )
}

/// Three or four digits.
pub fn short(figure: f64) -> String {
    match figure {
        f if f >= 100_000.0 => format!("{:.0}k", f / 1000.0),
        f if f >= 10_000.0 => format!("{:.1}k", f / 1000.0),
        f if f >= 100.0 => format!("{f:.0}"),
        f if f >= 10.0 => format!("{f:.1}"),
        f => format!("{f:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(operations: u64, server_cpu_s: f64, client_cpu_s: f64) -> Sample {
        let bytes = operations * 4096;
        Sample {
            operations,
            bytes,
            seconds: 1.0,
            server_cpu_s,
            client_cpu_s,
            others: None,
        }
    }

    #[test]
    fn the_middle_of_odd_even_and_no_figures() {
        assert!((median([3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median([4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median([]).abs() < 1e-9);
    }

    #[test]
    fn ratios_pair_rounds_and_take_the_better_reference() {
        // The machine halves its speed in the second round; the ratio is 1.5 in both.
        let table = Table {
            title: "t".into(),
            note: "n".into(),
            columns: vec![
                ("ours".into(), Role::Subject),
                ("slow".into(), Role::Reference),
                ("fast".into(), Role::Reference),
            ],
            rows: vec![Row {
                workload: "w".into(),
                unit: Unit::Iops,
                samples: vec![
                    vec![sample(3000, 0.3, 0.95), sample(1500, 0.15, 0.95)],
                    vec![sample(100, 0.5, 0.1), sample(50, 0.5, 0.1)],
                    vec![sample(2000, 0.4, 0.1), sample(1000, 0.2, 0.1)],
                ],
            }],
        };
        let text = table.markdown();
        assert!(text.contains("1.50x†"), "{text}");
        assert!(text.contains("0.50x"), "{text}");
        assert!(text.contains("2250 (1500–3000)†"), "{text}");
    }
}

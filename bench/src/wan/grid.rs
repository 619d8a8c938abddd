//! The tables: a figure a row, a way of moving a column.
//!
//! Owns how figures stand beside their peers and beside the bound that the project has set itself.
//! A bound that is not met is said, and nothing else comes of it.

use serde::Serialize;

use crate::report::{Role, align, median, short};

/// What was measured of one figure in one column, over all rounds.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Cell {
    /// One value a round.
    pub values: Vec<f64>,
    /// The measurement was cut off, and the value is what its pace came to.
    pub projected: bool,
}

impl Cell {
    /// The median; `None` if there is nothing.
    pub fn middle(&self) -> Option<f64> {
        (!self.values.is_empty()).then(|| median(self.values.iter().copied()))
    }

    fn text(&self) -> String {
        let Some(middle) = self.middle() else {
            return "–".to_owned();
        };
        let mark = if self.projected { "≈ " } else { "" };
        let mut text = format!("{mark}{}", short(middle));
        if self.values.len() > 1 {
            let least = self.values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = self.values.iter().copied().fold(0.0, f64::max);
            text.push_str(&format!(" ({}–{})", short(least), short(most)));
        }
        text
    }
}

/// Which way a figure is better.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Better {
    /// Times, bytes.
    Less,
    /// Rates, shares of the link.
    More,
}

/// What the project wants of a figure.
#[derive(Clone, Debug, Serialize)]
pub struct Bound {
    /// In words.
    pub text: String,
    /// The number that it comes to here; `None` if what it depends on is missing.
    pub limit: Option<f64>,
}

/// One figure.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// What, with its unit.
    pub figure: String,
    /// Which way is better.
    pub better: Better,
    /// By column.
    pub cells: Vec<Cell>,
    /// What ours should be.
    pub bound: Option<Bound>,
}

/// A table.
#[derive(Clone, Debug, Serialize)]
pub struct Grid {
    /// The section it belongs to.
    pub section: &'static str,
    /// Heading.
    pub title: String,
    /// What was done.
    pub note: String,
    /// Names and roles of the columns.
    pub columns: Vec<(String, Role)>,
    /// Figures.
    pub rows: Vec<Row>,
}

impl Row {
    /// A row with no values yet.
    pub fn new(figure: &str, better: Better, columns: usize) -> Self {
        Self {
            figure: figure.to_owned(),
            better,
            cells: vec![Cell::default(); columns],
            bound: None,
        }
    }

    /// The best of the columns in `among`.
    fn best(&self, among: impl Iterator<Item = usize>) -> Option<(usize, f64)> {
        let values = among.filter_map(|index| Some((index, self.cells.get(index)?.middle()?)));
        match self.better {
            Better::Less => values.min_by(|a, b| a.1.total_cmp(&b.1)),
            Better::More => values.max_by(|a, b| a.1.total_cmp(&b.1)),
        }
    }

    /// Whether this value is within the bound.
    pub fn met(&self, value: f64) -> Option<bool> {
        let limit = self.bound.as_ref()?.limit?;
        Some(match self.better {
            Better::Less => value <= limit,
            Better::More => value >= limit,
        })
    }
}

impl Grid {
    /// The columns with this role.
    fn with(&self, role: Role) -> impl Iterator<Item = usize> {
        let columns = self.columns.iter().enumerate();
        columns.filter_map(move |(index, (_, r))| (*r == role).then_some(index))
    }

    /// Head and lines, as text.
    pub fn lines(&self) -> Vec<Vec<String>> {
        let mut head = vec!["figure".to_owned()];
        head.extend(self.columns.iter().map(|(name, _)| name.clone()));
        head.extend(["best peer", "ours / it", "wanted", ""].map(str::to_owned));
        let mut lines = vec![head];
        // Ours is the first column that is.
        let ours = self.with(Role::Subject).next();
        for row in &self.rows {
            let mut line = vec![row.figure.clone()];
            line.extend(row.cells.iter().map(Cell::text));
            let value = ours.and_then(|index| row.cells.get(index)?.middle());
            let best = row.best(self.with(Role::Reference));
            let (name, ratio) = match (best, value) {
                (Some((index, best)), Some(value)) if best > 0.0 => (
                    self.columns[index].0.clone(),
                    format!("{:.2}x", value / best),
                ),
                (Some((index, _)), _) => (self.columns[index].0.clone(), String::new()),
                (None, _) => (String::new(), String::new()),
            };
            let wanted = row.bound.as_ref().map_or_else(String::new, |bound| {
                let sign = match row.better {
                    Better::Less => "≤",
                    Better::More => "≥",
                };
                let limit = bound.limit.map_or_else(|| "?".to_owned(), short);
                format!("{sign} {limit} ({})", bound.text)
            });
            let verdict = match (row.bound.is_some(), value.and_then(|value| row.met(value))) {
                (false, _) => "",
                (true, Some(true)) => "met",
                (true, Some(false)) => "not met",
                (true, None) => "not measured",
            };
            line.extend([name, ratio, wanted, verdict.to_owned()]);
            lines.push(line);
        }
        lines
    }

    /// The table in Markdown.
    pub fn markdown(&self) -> String {
        format!(
            "\n### {}\n\n{}\n\n{}",
            self.title,
            self.note,
            align(&self.lines())
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grid(ours: &[f64], limit: Option<f64>, better: Better) -> String {
        let cell = |values: &[f64]| Cell {
            values: values.to_vec(),
            projected: false,
        };
        let grid = Grid {
            section: "s",
            title: "t".into(),
            note: "n".into(),
            columns: vec![
                ("hikkoshi".into(), Role::Subject),
                ("slow".into(), Role::Reference),
                ("fast".into(), Role::Reference),
            ],
            rows: vec![Row {
                figure: "time, s".into(),
                better,
                cells: vec![cell(ours), cell(&[40.0]), cell(&[20.0])],
                bound: Some(Bound {
                    text: "half of fast's".into(),
                    limit,
                }),
            }],
        };
        grid.markdown()
    }

    #[test]
    fn ours_stands_beside_the_best_peer_and_the_bound() {
        let text = grid(&[9.0, 8.0, 12.0], Some(10.0), Better::Less);
        assert!(text.contains("9.00 (8.00–12.0)"), "{text}");
        assert!(text.contains("0.45x"), "{text}");
        assert!(text.contains("| met"), "{text}");
        let text = grid(&[11.0], Some(10.0), Better::Less);
        assert!(text.contains("not met"), "{text}");
        let text = grid(&[11.0], Some(10.0), Better::More);
        assert!(text.contains("| met") && text.contains("0.28x"), "{text}");
    }

    #[test]
    fn what_was_not_measured_is_not_met_either() {
        for text in [
            grid(&[], Some(10.0), Better::Less),
            grid(&[5.0], None, Better::Less),
        ] {
            assert!(text.contains("not measured"), "{text}");
            assert!(!text.contains("| met"), "{text}");
        }
    }
}

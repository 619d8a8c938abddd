//! The report: one file that holds everything, tables and charts.
//!
//! Owns its form. Charts are inline, and beside it as files of their own.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result};

use super::grid::Grid;
use super::plot::{Chart, escape};

const STYLE: &str = "
:root{color-scheme:light dark;--ink:#1d2433;--soft:#5b6475;--line:#dfe3ea;--paper:#fff;--page:#f4f6f9;--good:#1b7f4b;--bad:#b3261e}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9f0;--soft:#9aa3b5;--line:#333b4a;--paper:#161b26;--page:#0e121a;--good:#5fd39a;--bad:#ff8a80}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--page);margin:0 auto;padding:24px;max-width:1360px}
h1{font-size:26px;margin:0 0 4px}h2{font-size:19px;margin:36px 0 4px}
p{color:var(--soft);max-width:85ch;margin:4px 0 12px}
.scroll{overflow-x:auto;background:var(--paper);border-radius:8px;padding:4px 10px}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{padding:7px 8px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--soft);font-weight:500;vertical-align:bottom;white-space:normal;min-width:60px}
th:first-child,td:first-child{text-align:left;white-space:normal;min-width:190px}
td:nth-last-child(2){white-space:normal;min-width:130px;color:var(--soft);font-size:13px}
tr:last-child td{border-bottom:0}td:nth-child(2){font-weight:600}
.met{color:var(--good);font-weight:600}.not{color:var(--bad);font-weight:600}
svg{display:block;width:100%;height:auto;margin:14px 0}
";

/// Writes the report into the directory `to`, which is made if need be.
pub fn write(to: &Path, facts: &[String], findings: &[(Grid, Vec<Chart>)]) -> Result<()> {
    fs::create_dir_all(to).with_context(|| format!("make {}", to.display()))?;
    let mut page = format!(
        "<!doctype html><html lang=\"en\"><meta charset=\"utf-8\">\
         <meta name=\"viewport\" content=\"width=device-width\">\
         <title>hikkoshi across a wide-area link</title><style>{STYLE}</style>\
         <h1>hikkoshi across a wide-area link</h1>"
    );
    for fact in facts {
        let _ = write!(page, "<p>{}</p>", escape(fact));
    }
    for (grid, charts) in findings {
        let _ = write!(
            page,
            "<h2>{}</h2><p>{}</p>",
            escape(&grid.title),
            escape(&grid.note)
        );
        table(&mut page, grid);
        for chart in charts.iter().filter(|chart| !chart.is_empty()) {
            let svg = chart.svg();
            let path = to.join(format!("{}.svg", chart.file));
            fs::write(&path, &svg).with_context(|| format!("write {}", path.display()))?;
            page.push_str(&svg);
        }
    }
    page.push_str("</html>\n");
    let path = to.join("index.html");
    fs::write(&path, page).with_context(|| format!("write {}", path.display()))
}

fn table(page: &mut String, grid: &Grid) {
    page.push_str("<div class=\"scroll\"><table>");
    for (number, line) in grid.lines().iter().enumerate() {
        page.push_str("<tr>");
        for cell in line {
            let class = match cell.as_str() {
                "met" => " class=\"met\"",
                "not met" | "not measured" => " class=\"not\"",
                _ => "",
            };
            let tag = if number == 0 { "th" } else { "td" };
            let _ = write!(page, "<{tag}{class}>{}</{tag}>", escape(cell));
        }
        page.push_str("</tr>");
    }
    page.push_str("</table></div>");
}

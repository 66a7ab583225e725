//! The results of the benchmarks: a table for the terminal, and JSON. Pure.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::statistics::Summary;

/// The budget of a measurement.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Budget {
    /// A maximum of the measured value.
    AtMost(f64),
    /// A minimum of the measured value.
    AtLeast(f64),
    /// A maximum of the ratio to the compared value.
    RatioAtMost(f64),
    /// A minimum of the ratio to the compared value.
    RatioAtLeast(f64),
}

/// One line of the table.
#[derive(Clone, Debug)]
pub(crate) struct Row {
    what: String,
    unit: &'static str,
    found: Result<Summary, String>,
    beside: Option<(String, Summary)>,
    budget: Option<Budget>,
}

impl Row {
    /// A row of measured values.
    pub(crate) fn new(what: impl Into<String>, unit: &'static str, values: &[f64]) -> Self {
        Self {
            what: what.into(),
            unit,
            found: Summary::of(values).ok_or_else(|| "nothing was measured".to_owned()),
            beside: None,
            budget: None,
        }
    }

    /// A row for something that could not be measured here, with the reason.
    pub(crate) fn unavailable(what: impl Into<String>, reason: &str) -> Self {
        Self {
            what: what.into(),
            unit: "",
            found: Err(reason.to_owned()),
            beside: None,
            budget: None,
        }
    }

    /// Adds a comparison with another party, round by round.
    #[must_use]
    pub(crate) fn beside(self, what: impl Into<String>, ratios: &[f64]) -> Self {
        let beside = Summary::of(ratios).map(|summary| (what.into(), summary));
        Self { beside, ..self }
    }

    /// Adds a budget.
    #[must_use]
    pub(crate) fn budget(self, budget: Budget) -> Self {
        Self {
            budget: Some(budget),
            ..self
        }
    }

    /// Whether the median is within the budget. `None` without a budget or a figure.
    pub(crate) fn is_met(&self) -> Option<bool> {
        let value = self.found.as_ref().ok()?.median;
        let ratio = self.beside.as_ref().map(|(_, ratio)| ratio.median);
        match self.budget? {
            Budget::AtMost(limit) => Some(value <= limit),
            Budget::AtLeast(limit) => Some(value >= limit),
            Budget::RatioAtMost(limit) => ratio.map(|ratio| ratio <= limit),
            Budget::RatioAtLeast(limit) => ratio.map(|ratio| ratio >= limit),
        }
    }

    fn cells(&self) -> [String; 5] {
        let found = match &self.found {
            Ok(summary) => format!("{} {}", shown(summary), self.unit),
            Err(reason) => format!("not available: {reason}"),
        };
        let (ratio, beside) = self.beside.as_ref().map_or_else(
            || (String::new(), String::new()),
            |(what, ratio)| (format!("x{}", shown(ratio)), what.clone()),
        );
        [self.what.clone(), found, ratio, beside, self.verdict()]
    }

    fn verdict(&self) -> String {
        let Some(budget) = self.budget else {
            return String::new();
        };
        let limit = match budget {
            Budget::AtMost(limit) => format!("<= {} {}", figure(limit), self.unit),
            Budget::AtLeast(limit) => format!(">= {} {}", figure(limit), self.unit),
            Budget::RatioAtMost(limit) => format!("<= x{}", figure(limit)),
            Budget::RatioAtLeast(limit) => format!(">= x{}", figure(limit)),
        };
        match self.is_met() {
            Some(true) => format!("{limit}: met"),
            Some(false) => format!("{limit}: NOT met"),
            None => format!("{limit}: not measured"),
        }
    }

    fn json(&self) -> Value {
        let summary = |found: &Summary| {
            json!({"median": found.median, "lower_quartile": found.low,
                   "upper_quartile": found.high, "count": found.count})
        };
        let mut value = json!({"what": self.what});
        match &self.found {
            Ok(found) => {
                value["unit"] = json!(self.unit);
                value["value"] = summary(found);
            }
            Err(reason) => value["not_available"] = json!(reason),
        }
        if let Some((what, ratio)) = &self.beside {
            value["beside"] = json!(what);
            value["ratio"] = summary(ratio);
        }
        if self.budget.is_some() {
            value["budget"] = json!(self.verdict());
            value["met"] = json!(self.is_met());
        }
        value
    }
}

/// The results of one benchmark.
#[derive(Debug)]
pub(crate) struct Section {
    /// The benchmark's name.
    pub(crate) name: &'static str,
    /// The benchmark's description, in a sentence.
    pub(crate) about: &'static str,
    /// The figures, or the reason why there are none.
    pub(crate) rows: Result<Vec<Row>, String>,
    /// The duration in seconds.
    pub(crate) seconds: f64,
}

impl Section {
    /// The table of this benchmark.
    pub(crate) fn table(&self) -> String {
        let mut text = format!("{}: {}\n", self.name, self.about);
        match &self.rows {
            Ok(rows) => text.push_str(&table(rows)),
            Err(error) => {
                let _ = writeln!(text, "  failed: {error}");
            }
        }
        text
    }

    /// The results as JSON.
    pub(crate) fn json(&self) -> Value {
        let mut value = json!({"name": self.name, "about": self.about, "seconds": self.seconds});
        match &self.rows {
            Ok(rows) => value["rows"] = rows.iter().map(Row::json).collect(),
            Err(error) => value["failed"] = json!(error),
        }
        value
    }
}

const HEADINGS: [&str; 5] = [
    "what",
    "median (quartiles)",
    "ratio (quartiles)",
    "to",
    "budget",
];

fn table(rows: &[Row]) -> String {
    let cells: Vec<[String; 5]> = std::iter::once(HEADINGS.map(str::to_owned))
        .chain(rows.iter().map(Row::cells))
        .collect();
    let width = |column: usize| {
        let widths = cells.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or(0)
    };
    let widths: [usize; 5] = std::array::from_fn(width);
    let mut text = String::new();
    for row in &cells {
        let mut line = String::from(" ");
        for (cell, width) in row.iter().zip(widths) {
            // Writing to a string does not fail.
            let _ = write!(line, " {cell:width$} ");
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

fn shown(summary: &Summary) -> String {
    if summary.count == 1 {
        return figure(summary.median);
    }
    format!(
        "{} ({} to {})",
        figure(summary.median),
        figure(summary.low),
        figure(summary.high)
    )
}

/// Formats a number with about three significant digits.
fn figure(value: f64) -> String {
    let digits = match value.abs() {
        size if size >= 100.0 => 0,
        size if size >= 10.0 => 1,
        size if size >= 1.0 => 3,
        0.0 => 0,
        _ => 4,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_budget_is_met_by_the_median() {
        let row = Row::new("a", "ns", &[1.0, 12.0, 90.0]);
        assert_eq!(row.is_met(), None);
        assert_eq!(
            row.clone().budget(Budget::AtMost(12.0)).is_met(),
            Some(true)
        );
        assert_eq!(
            row.clone().budget(Budget::AtMost(11.0)).is_met(),
            Some(false)
        );
        let row = row.beside("bare", &[1.02, 1.03, 1.04]);
        let met = |budget| row.clone().budget(budget).is_met();
        assert_eq!(met(Budget::RatioAtMost(1.025)), Some(false));
        assert_eq!(met(Budget::RatioAtLeast(1.025)), Some(true));
    }

    #[test]
    fn a_budget_without_a_figure_is_not_met() {
        let row = Row::unavailable("a", "no kernel module").budget(Budget::AtMost(1.0));
        assert_eq!(row.is_met(), None);
        assert!(row.cells()[4].ends_with("not measured"));
        assert_eq!(row.json()["not_available"], "no kernel module");
        let alone = Row::new("a", "us", &[1.0]).budget(Budget::RatioAtMost(1.0));
        assert_eq!(alone.is_met(), None);
    }

    #[test]
    fn the_columns_of_a_table_are_aligned() {
        let rows = [
            Row::new("bare", "us", &[3.5]),
            Row::new("tracked", "us", &[3.6, 3.7, 3.8])
                .beside("bare", &[1.01, 1.02, 1.03])
                .budget(Budget::RatioAtMost(1.025)),
        ];
        let text = table(&rows);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[1], "  bare     3.500 us");
        assert_eq!(
            lines[2],
            "  tracked  3.700 (3.650 to 3.750) us  x1.020 (1.015 to 1.025)  bare  <= x1.025: met"
        );
        assert!(lines[0].starts_with("  what     median"));
    }

    #[test]
    fn numbers_have_the_digits_that_matter() {
        let shown = [123_456.7, 12.34, 1.2345, 0.01234, 0.0, -12.34].map(figure);
        assert_eq!(shown, ["123457", "12.3", "1.234", "0.0123", "0", "-12.3"]);
    }
}

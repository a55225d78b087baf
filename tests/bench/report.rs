//! Samples, quantiles and the table.

use std::fmt::Write;

use serde::Serialize;

/// Quantiles of a series.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Quantiles {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
    pub(crate) n: usize,
}

impl Quantiles {
    /// Quantiles by nearest rank.
    pub(crate) fn of(samples: &[f64]) -> Self {
        assert!(!samples.is_empty(), "a figure needs samples");
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let rank = |percent: usize| {
            let last = sorted.len() - 1;
            sorted[(sorted.len() * percent).div_ceil(100).saturating_sub(1).min(last)]
        };
        Self { p50: rank(50), p99: rank(99), n: sorted.len() }
    }
}

/// What a figure has to be.
#[derive(Clone, Copy, Debug, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Must {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
    /// It is shown.
    Shown,
}

/// One line of the table.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figure {
    pub(crate) name: String,
    pub(crate) unit: &'static str,
    pub(crate) ours: Quantiles,
    /// The peer's or other path's name and figure.
    pub(crate) other: Option<(String, Quantiles)>,
    /// What `must` is about: the ratio of the p50s (of some figures of the p99s) where there is another path, else our p50.
    pub(crate) value: f64,
    pub(crate) must: Must,
    pub(crate) holds: bool,
}

/// Every figure of a run.
#[derive(Debug, Default, Serialize)]
pub(crate) struct Report {
    pub(crate) figures: Vec<Figure>,
}

impl Report {
    /// Adds a figure that stands alone.
    pub(crate) fn alone(&mut self, name: &str, unit: &'static str, samples: &[f64], must: Must) {
        let ours = Quantiles::of(samples);
        let value = ours.p50;
        self.push(name, unit, ours, None, value, must);
    }

    /// Adds a figure against another path measured in the same run.
    pub(crate) fn against(
        &mut self,
        name: &str,
        unit: &'static str,
        ours: &[f64],
        (other, theirs): (&str, &[f64]),
        must: Must,
    ) {
        let (ours, theirs) = (Quantiles::of(ours), Quantiles::of(theirs));
        let value = ours.p50 / theirs.p50;
        self.push(name, unit, ours, Some((other.to_owned(), theirs)), value, must);
    }

    /// Adds a figure whose p99 is compared with another path's.
    pub(crate) fn tails(
        &mut self,
        name: &str,
        unit: &'static str,
        ours: &[f64],
        (other, theirs): (&str, &[f64]),
        must: Must,
    ) {
        let (ours, theirs) = (Quantiles::of(ours), Quantiles::of(theirs));
        let value = ours.p99 / theirs.p99;
        self.push(name, unit, ours, Some((other.to_owned(), theirs)), value, must);
    }

    /// Adds how far the p99 of a series is from its own p50.
    pub(crate) fn spread(&mut self, name: &str, unit: &'static str, ours: &[f64], must: Must) {
        let ours = Quantiles::of(ours);
        let (value, own) = (ours.p99 / ours.p50, Quantiles::of(&[ours.p50]));
        self.push(name, unit, ours, Some(("its p50".to_owned(), own)), value, must);
    }

    fn push(
        &mut self,
        name: &str,
        unit: &'static str,
        ours: Quantiles,
        other: Option<(String, Quantiles)>,
        value: f64,
        must: Must,
    ) {
        let holds = match must {
            Must::AtMost(bound) => value <= bound,
            Must::AtLeast(bound) => value >= bound,
            Must::Shown => true,
        };
        self.figures.push(Figure { name: name.to_owned(), unit, ours, other, value, must, holds });
    }

    /// The table people read.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        let head = ("figure", "ours p50 / p99", "other p50 / p99", "ratio", "must");
        let _ = writeln!(text, "\n{:<52} {:>20} {:>34} {:>8}  {}", head.0, head.1, head.2, head.3, head.4);
        for f in &self.figures {
            let ours = format!("{} / {} {}", number(f.ours.p50), number(f.ours.p99), f.unit);
            let (other, ratio) = match &f.other {
                Some((name, q)) => {
                    (format!("{name} {} / {}", number(q.p50), number(q.p99)), format!("{:.2}x", f.value))
                }
                None => (String::new(), String::new()),
            };
            let unit = if f.other.is_some() { "x" } else { f.unit };
            let must = match f.must {
                Must::AtMost(b) => format!("<= {b}{unit}  {}", verdict(f.holds)),
                Must::AtLeast(b) => format!(">= {b}{unit}  {}", verdict(f.holds)),
                Must::Shown => "shown".to_owned(),
            };
            let _ = writeln!(text, "{:<52} {ours:>20} {other:>34} {ratio:>8}  {must}", f.name);
        }
        text
    }
}

fn verdict(holds: bool) -> &'static str {
    if holds { "holds" } else { "MISSED" }
}

fn number(value: f64) -> String {
    if value >= 100.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_by_nearest_rank() {
        let samples: Vec<f64> = (1..=200).map(f64::from).collect();
        let q = Quantiles::of(&samples);
        assert!((q.p50 - 100.0).abs() < f64::EPSILON && (q.p99 - 198.0).abs() < f64::EPSILON);
        let one = Quantiles::of(&[7.0]);
        assert!((one.p50 - 7.0).abs() < f64::EPSILON && (one.p99 - 7.0).abs() < f64::EPSILON);
    }
}

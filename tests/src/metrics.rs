//! The parts of the Prometheus text format that the tests read.

use anyhow::{Context as _, Result, ensure};

/// The metrics of one scrape.
#[derive(Clone, Debug)]
pub struct Metrics(String);

impl Metrics {
    /// Takes the text of `/metrics`.
    pub fn new(text: String) -> Self {
        Self(text)
    }

    /// The sum of a metric's samples that have all of these labels.
    ///
    /// # Errors
    ///
    /// Fails if there is no metric of this name, so that a misspelt one does not count as 0.
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        // The parts of a histogram are listed under its name.
        let family = ["_count", "_sum"]
            .into_iter()
            .find_map(|part| name.strip_suffix(part));
        let type_line = |line: &str| {
            let described = line
                .strip_prefix("# TYPE ")
                .and_then(|rest| rest.split(' ').next());
            described.is_some_and(|found| found == name || Some(found) == family)
        };
        ensure!(
            self.0.lines().any(type_line),
            "no metric {name} in\n{}",
            self.0
        );
        let mut sum = 0.0;
        for line in self.0.lines() {
            if let Some(value) = sample(line, name, labels) {
                sum += value
                    .parse::<f64>()
                    .with_context(|| format!("the value of {line:?}"))?;
            }
        }
        Ok(sum)
    }

    /// The whole text.
    pub fn text(&self) -> &str {
        &self.0
    }
}

/// The value of a sample line, if it is of this metric and has these labels.
fn sample<'a>(line: &'a str, name: &str, labels: &[(&str, &str)]) -> Option<&'a str> {
    let rest = line.strip_prefix(name)?;
    let (set, value) = match rest.strip_prefix('{') {
        Some(rest) => rest.rsplit_once("} ")?,
        None => ("", rest.strip_prefix(' ')?),
    };
    let has = |(key, value): &(&str, &str)| {
        let wanted = format!("{key}=\"{value}\"");
        set.split(',').any(|label| label == wanted)
    };
    labels.iter().all(has).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
# HELP a_total Things.
# TYPE a_total counter
a_total{rule=\"x\",result=\"reset\"} 2
a_total{rule=\"y\",result=\"reset\"} 3
# TYPE a_total_more gauge
a_total_more 7
";

    #[test]
    fn samples_are_summed_over_the_labels_that_are_not_asked_for() {
        let metrics = Metrics::new(TEXT.to_owned());
        assert_eq!(metrics.get("a_total", &[]).unwrap(), 5.0);
        assert_eq!(metrics.get("a_total", &[("rule", "y")]).unwrap(), 3.0);
        assert_eq!(metrics.get("a_total", &[("rule", "z")]).unwrap(), 0.0);
        assert_eq!(metrics.get("a_total_more", &[]).unwrap(), 7.0);
    }

    #[test]
    fn a_metric_that_is_not_there_is_an_error() {
        let metrics = Metrics::new(TEXT.to_owned());
        assert!(metrics.get("b_total", &[]).is_err());
        assert!(metrics.get("a_total_more_sum", &[]).is_ok());
    }
}

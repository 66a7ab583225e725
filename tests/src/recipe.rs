//! The shipped configurations, with limits that are short enough for a test.

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};

/// The folder of the configurations.
const EXAMPLES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../session-enforcer/examples");

const MINUTE: Duration = Duration::from_secs(60);

/// A shipped enforcing configuration. Its limits are divided by a number, and it can get the addresses and
/// ports of a test.
#[derive(Clone, Debug)]
pub struct Recipe {
    text: String,
    shorter: u32,
    shorter_lifetimes: u32,
}

impl Recipe {
    /// Reads `NAME.toml`. Limits are divided by `shorter`, lifetimes by `shorter_lifetimes`: with the same
    /// divisor, a lifetime of a day would be too long for a test with an idle limit of minutes.
    ///
    /// # Errors
    ///
    /// Fails if the file does not exist, or if a limit is not written like `15m`.
    pub fn new(name: &str, [shorter, shorter_lifetimes]: [u32; 2]) -> Result<Self> {
        let path = Path::new(EXAMPLES).join(name).with_extension("toml");
        let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let recipe = Self {
            text,
            shorter,
            shorter_lifetimes,
        };
        let lines: Result<Vec<_>> = recipe
            .text
            .lines()
            .map(|line| recipe.divided(line))
            .collect();
        let text = lines?.join("\n");
        Self { text, ..recipe }.with("mode = \"observe\"", "mode = \"enforce\"")
    }

    /// Replaces a text that the configuration must contain.
    ///
    /// # Errors
    ///
    /// Fails if the text is missing.
    pub fn with(mut self, shipped: &str, own: &str) -> Result<Self> {
        ensure!(
            self.text.contains(shipped),
            "no {shipped:?} in {}",
            self.text
        );
        self.text = self.text.replace(shipped, own);
        Ok(self)
    }

    /// The test's equivalent of this number of minutes of a limit.
    pub fn minutes(&self, minutes: u32) -> Duration {
        MINUTE * minutes / self.shorter
    }

    /// The test's equivalent of this number of hours of a lifetime.
    pub fn lifetime(&self, hours: u32) -> Duration {
        MINUTE * 60 * hours / self.shorter_lifetimes
    }

    /// The configuration.
    pub fn text(&self) -> &str {
        &self.text
    }

    fn divided(&self, line: &str) -> Result<String> {
        let Some((key, value)) = line.split_once(" = \"") else {
            return Ok(line.to_owned());
        };
        let divisor = match key {
            "max_lifetime" => self.shorter_lifetimes,
            key if key.ends_with("_timeout") => self.shorter,
            _ => return Ok(line.to_owned()),
        };
        let (time, rest) = value.split_once('"').with_context(|| line.to_owned())?;
        let time = parse(time).with_context(|| line.to_owned())? / divisor;
        Ok(format!("{key} = \"{}ms\"{rest}", time.as_millis()))
    }
}

/// Parses a whole number with its unit.
fn parse(time: &str) -> Option<Duration> {
    let (number, unit) = time.split_at_checked(time.len().checked_sub(1)?)?;
    let unit = match unit {
        "s" => Duration::from_secs(1),
        "m" => MINUTE,
        "h" => MINUTE * 60,
        "d" => MINUTE * 60 * 24,
        _ => return None,
    };
    Some(unit * number.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limits_of_a_shipped_file_are_divided_and_the_rest_stays() {
        let recipe = Recipe::new("ssh-bastion", [150, 5_400]).unwrap();
        let text = recipe.text();
        assert!(text.contains("mode = \"enforce\""), "{text}");
        assert_eq!(text.matches("\nidle_timeout = \"6000ms\"\n").count(), 2);
        assert_eq!(text.matches("\nmax_lifetime = \"8000ms\"").count(), 2);
        assert_eq!(text.matches("\nmax_lifetime = \"16000ms\"").count(), 1);
        assert!(text.contains("activity = \"received\"\n"), "{text}");
        assert_eq!(recipe.minutes(15), Duration::from_secs(6));
        assert_eq!(recipe.lifetime(12), Duration::from_secs(8));
        assert!(recipe.with("no such text", "").is_err());
    }

    #[test]
    fn a_remark_after_a_limit_stays() {
        let recipe = Recipe::new("redis-pubsub", [150, 1]).unwrap();
        let line = "\nresponse_timeout = \"24000ms\"    # BLPOP";
        assert!(recipe.text().contains(line), "{}", recipe.text());
    }
}

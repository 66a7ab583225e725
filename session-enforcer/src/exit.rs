//! The exit statuses on which scripts and service managers rely, and the one line on stderr that says what is wrong,
//! where, and what to do.

use std::process::ExitCode;

use crate::config::{ConfigError, ConfigErrors};

/// Begins each line on stderr.
const PROGRAM: &str = "session-enforcer";

/// The exit status of a failure. The names of 69, 75, 77 and 78 are those of `sysexits.h`, which systemd prints too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ExitStatus {
    /// Any other error.
    Other = 1,
    /// The command line is wrong.
    Usage = 2,
    /// The kernel lacks a required feature, or no daemon answers (`EX_UNAVAILABLE`).
    Unavailable = 69,
    /// Part of the request failed (`EX_TEMPFAIL`).
    Partly = 75,
    /// Privileges are missing (`EX_NOPERM`).
    NoPermission = 77,
    /// The configuration is invalid (`EX_CONFIG`).
    Configuration = 78,
}

impl ExitStatus {
    /// Every status but success.
    pub const ALL: [Self; 6] = [
        Self::Other,
        Self::Usage,
        Self::Unavailable,
        Self::Partly,
        Self::NoPermission,
        Self::Configuration,
    ];

    /// The number that the parent process sees.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Its description in `--help`.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::Other => "any other error",
            Self::Usage => "wrong usage",
            Self::Unavailable => "the kernel lacks a required feature, or no daemon answers",
            Self::Partly => "part of the request failed",
            Self::NoPermission => "privileges are missing",
            Self::Configuration => "the configuration is invalid",
        }
    }

    /// The status of an error: that of its outermost [`Failure`] or [`ConfigError`], or [`ExitStatus::Other`].
    pub fn of(error: &anyhow::Error) -> Self {
        // `downcast_ref` finds a failure attached with `context`; the chain finds one among the sources.
        if let Some(failure) = error.downcast_ref::<Failure>() {
            return failure.status;
        }
        error
            .chain()
            .find_map(|cause| {
                let failure = cause.downcast_ref::<Failure>().map(|f| f.status);
                let wrong_file = cause.is::<ConfigError>() || cause.is::<ConfigErrors>();
                failure.or_else(|| wrong_file.then_some(Self::Configuration))
            })
            .unwrap_or(Self::Other)
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        Self::from(status.code())
    }
}

/// An error with its exit status.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// The exit status.
    pub status: ExitStatus,
    /// What is wrong, where, and what to do.
    pub message: String,
}

impl Failure {
    /// A failure with this status and this line.
    pub fn new(status: ExitStatus, message: impl Into<String>) -> Self {
        let message = message.into();
        Self { status, message }
    }
}

/// Gives an exit status to the error of a result.
pub trait OrExit<T> {
    /// Converts the error to a [`Failure`] with this status.
    ///
    /// # Errors
    ///
    /// The error with its causes in one line.
    fn or_exit(self, status: ExitStatus) -> Result<T, Failure>;
}

impl<T, E: Into<anyhow::Error>> OrExit<T> for Result<T, E> {
    fn or_exit(self, status: ExitStatus) -> Result<T, Failure> {
        self.map_err(|error| Failure::new(status, causes(&error.into())))
    }
}

/// The error with its causes. A cause that the text before it contains is omitted, because many messages contain theirs.
pub fn causes(error: &anyhow::Error) -> String {
    let all = error.chain().map(ToString::to_string);
    let joined = all.reduce(|text, cause| match text.contains(&cause) {
        true => text,
        false => format!("{text}: {cause}"),
    });
    joined.unwrap_or_default()
}

/// The line on stderr: the error with its causes.
pub fn line(error: &anyhow::Error) -> String {
    let text = causes(error);
    // A cause from a library may have several lines; a log reader expects one.
    let parts: Vec<&str> = text.lines().map(str::trim).collect();
    format!("{PROGRAM}: {}", parts.join(" ").trim_end())
}

/// Prints the error, or each error of a configuration, as one line on stderr. Returns the exit code.
pub fn report(error: &anyhow::Error) -> ExitCode {
    match error.downcast_ref::<ConfigErrors>() {
        Some(errors) => errors
            .iter()
            .for_each(|error| eprintln!("{PROGRAM}: {error}")),
        None => eprintln!("{}", line(error)),
    }
    ExitStatus::of(error).into()
}

#[cfg(test)]
mod tests {
    use anyhow::{Context as _, anyhow};

    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_contract() {
        let codes = ExitStatus::ALL.map(ExitStatus::code);
        assert_eq!(codes, [1, 2, 69, 75, 77, 78]);
    }

    #[test]
    fn a_status_is_found_under_and_over_context() {
        let failure = || Failure::new(ExitStatus::NoPermission, "CAP_BPF is missing");
        let under = anyhow::Error::from(failure()).context("attaching");
        assert_eq!(ExitStatus::of(&under), ExitStatus::NoPermission);
        let over = anyhow!("EPERM").context(failure()).context("attaching");
        assert_eq!(ExitStatus::of(&over), ExitStatus::NoPermission);
        assert_eq!(ExitStatus::of(&anyhow!("something")), ExitStatus::Other);
    }

    #[test]
    fn a_wrong_configuration_needs_no_status_of_its_own() {
        let wrong = crate::config::Config::parse("x.toml", "a").unwrap_err();
        let error = anyhow::Error::from(wrong).context("loading");
        assert_eq!(ExitStatus::of(&error), ExitStatus::Configuration);
    }

    #[test]
    fn a_failure_is_one_line_with_its_causes() {
        let result: anyhow::Result<()> = Err(anyhow!("first\n  second\n")).context("verifying");
        let failure = result.or_exit(ExitStatus::Unavailable).unwrap_err();
        assert_eq!(failure.status, ExitStatus::Unavailable);
        let printed = line(&failure.into());
        assert_eq!(printed, "session-enforcer: verifying: first second");
    }

    #[test]
    fn a_cause_that_its_message_names_is_said_once() {
        let error = |path: &str| crate::host::cgroup::Cgroup::open(path.as_ref()).unwrap_err();
        let missing = "/nonexistent: No such file or directory (os error 2)";
        let printed = line(&anyhow::Error::from(error("/nonexistent")).context("reloading"));
        assert_eq!(printed, format!("session-enforcer: reloading: {missing}"));
        let failure = Err::<(), _>(error("/nonexistent")).or_exit(ExitStatus::Unavailable);
        assert_eq!(failure.unwrap_err().message, missing);
    }

    #[test]
    fn the_page_for_operators_has_every_status() {
        let page = include_str!("../docs/operations.md");
        for status in ExitStatus::ALL {
            let row = format!("\n| {} | {}", status.code(), status.meaning());
            assert!(page.contains(&row), "{row}");
        }
    }
}

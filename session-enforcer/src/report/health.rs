//! The reasons why the daemon does not enforce or record everything, for `/readyz` and the metrics. Pure.

/// A degradation that lasts until its cause is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DegradedCause {
    /// Connections that are older than the daemon are not adopted yet.
    NotAdopted,
    /// Some sessions that a rule matches are not tracked.
    Untracked,
    /// The sockets of a network namespace cannot be listed.
    Namespace,
    /// Audit records are lost.
    Audit,
    /// The programs are no longer attached to an existing cgroup.
    Detached,
    /// Resets hang because processes keep their sockets locked.
    Stuck,
}

impl DegradedCause {
    /// The number of causes.
    pub const COUNT: usize = Self::ALL.len();

    /// Every cause, in the order of its discriminant.
    pub const ALL: [Self; 6] = [
        Self::NotAdopted,
        Self::Untracked,
        Self::Namespace,
        Self::Audit,
        Self::Detached,
        Self::Stuck,
    ];

    /// The name in metrics.
    pub const fn name(self) -> &'static str {
        match self {
            Self::NotAdopted => "not_adopted",
            Self::Untracked => "untracked",
            Self::Namespace => "namespace",
            Self::Audit => "audit",
            Self::Detached => "detached",
            Self::Stuck => "stuck",
        }
    }
}

/// The present causes, each with a description and a remedy.
#[derive(Debug, Default)]
pub struct Health {
    now: [Option<String>; DegradedCause::COUNT],
}

impl Health {
    /// The health of a starting daemon: not ready until the first adoption, which is no error.
    pub fn of_a_start() -> Self {
        let mut health = Self::default();
        health.now[DegradedCause::NotAdopted as usize] =
            Some("the connections that are older than the daemon are not adopted yet".to_owned());
        health
    }

    /// Sets or clears a cause. Logs when it begins and when it ends.
    pub fn set(&mut self, cause: DegradedCause, what: Option<&str>) {
        let before = &mut self.now[cause as usize];
        match (&before, what) {
            (None, Some(what)) => tracing::error!("{what}"),
            (Some(_), None) if cause != DegradedCause::NotAdopted => {
                tracing::info!("no longer degraded: {}", cause.name());
            }
            _ => {}
        }
        if before.as_deref() != what {
            *before = what.map(str::to_owned);
        }
    }

    /// The present causes, by discriminant.
    pub fn causes(&self) -> [bool; DegradedCause::COUNT] {
        std::array::from_fn(|number| self.now[number].is_some())
    }

    /// The present causes, each with a description and a remedy.
    pub fn list(&self) -> Vec<(DegradedCause, &str)> {
        let all = DegradedCause::ALL.into_iter().zip(&self.now);
        all.filter_map(|(cause, what)| Some((cause, what.as_deref()?)))
            .collect()
    }

    /// Whether no cause is present.
    ///
    /// # Errors
    ///
    /// The descriptions of the present causes, in one line.
    pub fn ready(&self) -> Result<(), String> {
        let all: Vec<&str> = self.now.iter().flatten().map(String::as_str).collect();
        if all.is_empty() {
            return Ok(());
        }
        Err(all.join("; "))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_is_in_the_order_of_the_numbers() {
        for (number, cause) in DegradedCause::ALL.into_iter().enumerate() {
            assert_eq!(cause as usize, number);
        }
    }

    #[test]
    fn every_cause_is_reported_until_it_ends() {
        let mut health = Health::default();
        assert_eq!(health.ready(), Ok(()));
        health.set(DegradedCause::Audit, Some("the disk is full"));
        health.set(DegradedCause::Untracked, Some("the map is full"));
        assert_eq!(
            health.ready(),
            Err("the map is full; the disk is full".to_owned())
        );
        assert!(health.causes()[DegradedCause::Audit as usize]);
        health.set(DegradedCause::Untracked, None);
        health.set(DegradedCause::Audit, Some("the disk is gone"));
        assert_eq!(health.ready(), Err("the disk is gone".to_owned()));
        health.set(DegradedCause::Audit, None);
        assert_eq!(health.ready(), Ok(()));
        assert_eq!(health.causes(), [false; DegradedCause::COUNT]);
    }

    #[test]
    fn the_page_for_operators_says_what_to_do_about_each() {
        let page = include_str!("../../docs/operations.md");
        for cause in DegradedCause::ALL {
            let row = format!("\n| `{}` | ", cause.name());
            assert!(page.contains(&row), "{row}");
        }
    }
}

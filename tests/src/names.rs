//! Names for everything that a test creates on the machine, and the names that killed tests left behind.

use std::{
    fs,
    path::Path,
    process,
    sync::atomic::{AtomicU32, Ordering},
};

const PREFIX: &str = "session-enforcer-test-";

/// A unique name. Parallel tests differ by the counter, parallel runs by the process.
pub(crate) fn unique() -> String {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    format!("{PREFIX}{}-{count}", process::id())
}

/// The names in a directory that belong to killed test processes, whose `Drop` did not run.
pub(crate) fn left_behind(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| is_left_behind(name)).collect()
}

fn is_left_behind(name: &str) -> bool {
    let pid = name
        .strip_prefix(PREFIX)
        .and_then(|rest| rest.split('-').next());
    pid.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_differ_and_are_not_left_behind_while_their_process_runs() {
        let (first, second) = (unique(), unique());
        assert_ne!(first, second);
        assert!(!is_left_behind(&first));
        assert!(is_left_behind("session-enforcer-test-99999999-0"));
        assert!(!is_left_behind("docker-99999999"));
    }
}

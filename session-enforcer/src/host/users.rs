//! The users and groups of this host, by name and by number.

use std::{collections::HashMap, fs, io};

use nix::unistd::User;

/// Returns the UID of a user name, or `None` if the host has no such user.
///
/// # Errors
///
/// Fails if the host's user database cannot be queried.
pub fn uid_of(name: &str) -> io::Result<Option<u32>> {
    let user = User::from_name(name)?;
    Ok(user.map(|user| user.uid.as_raw()))
}

/// User or group names by number, for the audit and for messages.
///
/// The names come only from the local file: another user database may be on the network, and no query may
/// delay the enforcement. A user without a name in the file is recorded by number.
#[derive(Debug, Default)]
pub struct Names(HashMap<u32, String>);

impl Names {
    /// Reads the users of /etc/passwd (passwd(5)). If the file is missing, no number has a name.
    pub fn read() -> Self {
        Self::of(&fs::read("/etc/passwd").unwrap_or_default())
    }

    /// Reads the groups of /etc/group (group(5)), which has name and number in the same fields.
    pub fn read_groups() -> Self {
        Self::of(&fs::read("/etc/group").unwrap_or_default())
    }

    /// Invalid UTF-8 in one line must not hide the names of other users.
    fn of(passwd: &[u8]) -> Self {
        Self::parse(&String::from_utf8_lossy(passwd))
    }

    fn parse(passwd: &str) -> Self {
        let mut names = HashMap::new();
        for line in passwd.lines() {
            let mut fields = line.split(':');
            let (Some(name), Some(uid)) = (fields.next(), fields.nth(1)) else {
                continue;
            };
            if let Ok(uid) = uid.parse() {
                // If a number has several names, programs show the first one.
                names.entry(uid).or_insert_with(|| name.to_owned());
            }
        }
        Self(names)
    }

    /// Adds a name from another source.
    pub fn add(&mut self, uid: u32, name: &str) {
        self.0.entry(uid).or_insert_with(|| name.to_owned());
    }

    /// The name of the user or group.
    pub fn name(&self, uid: u32) -> Option<&str> {
        self.0.get(&uid).map(String::as_str)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_name_of_a_number_is_its_name_and_nonsense_is_passed_over() {
        let names = Names::parse(
            "root:x:0:0:root:/root:/bin/bash\ntoor:x:0:0::/root:/bin/sh\n\n+::::::\nx:y\n\
             postgres:x:113:120:PostgreSQL,,,:/var/lib/postgresql:/bin/bash\n",
        );
        assert_eq!(names.name(0), Some("root"));
        assert_eq!(names.name(113), Some("postgres"));
        assert_eq!(names.name(1), None);
        assert_eq!(names.0.len(), 2);
    }

    #[test]
    fn a_field_that_is_no_utf_8_hides_no_other_name() {
        let names = Names::of(
            b"m:x:7:7:M\xfcller:/:/bin/sh\npostgres:x:113:120:PostgreSQL,,,:/:/bin/bash\n",
        );
        assert_eq!(
            (names.name(7), names.name(113)),
            (Some("m"), Some("postgres"))
        );
    }

    #[test]
    fn the_superuser_is_known_by_both() {
        assert_eq!(uid_of("root").unwrap(), Some(0));
        assert_eq!(uid_of("no such user").unwrap(), None);
    }
}

//! The users of this host, by name and by number.

use std::{collections::HashMap, fs, io};

use nix::unistd::User;

/// The number of the user of this name; none where the host knows no such user.
///
/// # Errors
///
/// Where the host's user database cannot be asked.
pub fn uid_of(name: &str) -> io::Result<Option<u32>> {
    let user = User::from_name(name)?;
    Ok(user.map(|user| user.uid.as_raw()))
}

/// Names by number, for the audit and for messages.
///
/// Only those of the file: a database beyond it may be on the network, and nothing may hold up the
/// enforcement. A user without a name here is recorded by number.
#[derive(Debug, Default)]
pub struct Names(HashMap<u32, String>);

impl Names {
    /// Reads the file of users (passwd(5)). Without it, there are no names.
    pub fn read() -> Self {
        Self::of(&fs::read("/etc/passwd").unwrap_or_default())
    }

    /// Reads the file of groups (group(5)), which has name and number in the same fields.
    pub fn read_groups() -> Self {
        Self::of(&fs::read("/etc/group").unwrap_or_default())
    }

    /// A field of somebody that is no UTF-8 must not hide the names of the others.
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
                // Of several names of a number, the first is the one that programs show.
                names.entry(uid).or_insert_with(|| name.to_owned());
            }
        }
        Self(names)
    }

    /// Adds a name that was found elsewhere.
    pub fn add(&mut self, uid: u32, name: &str) {
        self.0.entry(uid).or_insert_with(|| name.to_owned());
    }

    /// The user's name.
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

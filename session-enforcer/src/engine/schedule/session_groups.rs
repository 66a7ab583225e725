//! The groups of sessions, each identified by a small number.

use std::collections::HashMap;

use super::Group;

/// The groups that have sessions. There are few of them compared to sessions, which refer to them by number. The number
/// of a group without sessions is reused.
#[derive(Debug, Default)]
pub(super) struct Groups {
    /// Group and number of its sessions, by group number.
    used: Vec<(Group, u32)>,
    free: Vec<u32>,
    numbers: HashMap<Group, u32>,
    /// Number of groups, by namespace cookie.
    namespaces: HashMap<u64, u32>,
}

impl Groups {
    /// Counts a new session in its group; returns the group number.
    pub(super) fn enter(&mut self, group: Group) -> u32 {
        let number = match self.numbers.get(&group) {
            Some(number) => *number,
            None => self.begin(group),
        };
        self.used[number as usize].1 += 1;
        number
    }

    fn begin(&mut self, group: Group) -> u32 {
        *self.namespaces.entry(group.netns_cookie).or_default() += 1;
        let number = self.free.pop().unwrap_or_else(|| {
            self.used.push((group, 0));
            self.used.len() as u32 - 1
        });
        self.used[number as usize].0 = group;
        self.numbers.insert(group, number);
        number
    }

    /// Counts a session out of its group; returns the group.
    pub(super) fn leave(&mut self, number: u32) -> Group {
        let (group, sessions) = &mut self.used[number as usize];
        let group = *group;
        *sessions -= 1;
        if *sessions == 0 {
            self.end(group, number);
        }
        group
    }

    fn end(&mut self, group: Group, number: u32) {
        self.numbers.remove(&group);
        self.free.push(number);
        if let Some(groups) = self.namespaces.get_mut(&group.netns_cookie) {
            *groups -= 1;
            if *groups == 0 {
                self.namespaces.remove(&group.netns_cookie);
            }
        }
    }

    /// The group with this number.
    pub(super) fn group(&self, number: u32) -> Group {
        self.used[number as usize].0
    }

    /// Whether a group of this namespace has sessions.
    pub(super) fn has_namespace(&self, netns_cookie: u64) -> bool {
        self.namespaces.contains_key(&netns_cookie)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(netns_cookie: u64, rule: u16) -> Group {
        Group { netns_cookie, rule }
    }

    #[test]
    fn a_group_has_a_number_while_it_has_sessions_and_the_number_is_used_again() {
        let mut groups = Groups::default();
        let first = groups.enter(group(1, 0));
        let second = groups.enter(group(1, 1));
        assert_ne!(first, second);
        assert_eq!(groups.enter(group(1, 0)), first);
        assert_eq!(groups.leave(first), group(1, 0));
        assert_eq!(groups.group(first), group(1, 0));
        assert_eq!(groups.leave(first), group(1, 0));
        assert_eq!(groups.enter(group(2, 0)), first);
        assert_eq!(groups.group(first), group(2, 0));
        assert_eq!(groups.group(second), group(1, 1));
    }

    #[test]
    fn a_namespace_is_known_while_one_of_its_groups_has_sessions() {
        let mut groups = Groups::default();
        let numbers = [0, 1, 1].map(|rule| groups.enter(group(7, rule)));
        for number in numbers {
            assert!(groups.has_namespace(7));
            groups.leave(number);
        }
        assert!(!groups.has_namespace(7));
        assert_eq!(groups.free.len(), 2);
        assert!(groups.numbers.is_empty() && groups.namespaces.is_empty());
    }
}

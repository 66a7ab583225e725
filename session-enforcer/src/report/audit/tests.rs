use std::{
    fs,
    io::{self, Write},
    sync::{Arc, Mutex},
};

use proptest::prelude::*;
use session_enforcer_common::{Address, Direction, Owner};

use super::{sink::Sink, writer::Output, *};
use crate::engine::fixtures;

fn v4(octets: [u8; 4]) -> Address {
    Address::from_ipv4(u32::from_ne_bytes(octets))
}

pub(in crate::report) fn session() -> Session {
    Session {
        last_received_ns: 1_003_000_000,
        last_sent_ns: 1_000_000_000,
        answered_ns: 0,
        bytes_received: 120,
        bytes_sent: 4096,
        established_ns: 1_000_000_000,
        local: v4([10, 0, 0, 5]),
        remote: v4([10, 0, 0, 7]),
        local_port: 5432,
        remote_port: 51234,
        owner: Owner {
            cgroup_id: 77,
            uid: 113,
            unused: 0,
        },
        ..fixtures::session()
    }
}

pub(in crate::report) fn termination(session: &Session) -> Termination<'_> {
    Termination {
        cookie: 4711,
        session,
        rule: "postgres",
        reason: Reason::IdleTimeout,
        mode: Mode::Enforce,
        end: End::Reset(Some(Queued {
            send: 11,
            receive: 0,
        })),
        limit: Some(Duration::from_secs(900)),
        deadline_ns: 901_003_000_000,
        idle_since_ns: 1_003_000_000,
        answered_ns: 901_004_000_000,
        process: Some(Process {
            pid: 812,
            name: *b"postgres\0\0\0\0\0\0\0\0",
        }),
        cgroup: Some("/system.slice/postgresql.service"),
        user: Some("postgres"),
        requested_by: None,
    }
}

/// Renders the record as if the kernel had answered at noon of the wall clock.
fn line(termination: &Termination<'_>) -> String {
    let clock = WallClock::pair(1_767_268_800_000_000_000, 901_004_000_000);
    written(|out| termination.write_json(&RECORD_ID, &clock, out))
}

const RECORD_ID: RecordId<'_> = RecordId {
    boot: "b007",
    run_ns: 255,
    sequence: 7,
};

/// The line that `write` appends, without the newline.
fn written(write: impl FnOnce(&mut Vec<u8>)) -> String {
    let mut out = Vec::new();
    write(&mut out);
    let mut text = String::from_utf8(out).unwrap();
    assert_eq!(text.pop(), Some('\n'));
    text
}

#[test]
fn an_inbound_ipv4_session_is_this_line() {
    assert_eq!(
        line(&termination(&session())),
        concat!(
            r#"{"@timestamp":"2026-01-01T12:00:00.000000000Z","event":{"kind":"event","#,
            r#""category":["network"],"type":["end"],"action":"session-terminated","#,
            r#""outcome":"success","reason":"idle_timeout","duration":900004000000,"#,
            r#""id":"b007-1267-3b9aca00-0","sequence":7},"#,
            r#""rule":{"name":"postgres"},"#,
            r#""network":{"transport":"tcp","type":"ipv4","direction":"inbound"},"#,
            r#""source":{"ip":"10.0.0.7","port":51234,"bytes":120},"#,
            r#""destination":{"ip":"10.0.0.5","port":5432,"bytes":4096},"#,
            r#""process":{"pid":812,"name":"postgres"},"user":{"id":"113","name":"postgres"},"#,
            r#""session_enforcer":{"id":4711,"mode":"enforce","result":"reset","netns":3,"#,
            r#""cgroup":"/system.slice/postgresql.service","cgroup_id":77,"#,
            r#""established":"2026-01-01T11:44:59.996000000Z","#,
            r#""last_received":"2026-01-01T11:44:59.999000000Z","#,
            r#""counted_from":"2026-01-01T11:44:59.999000000Z","#,
            r#""deadline":"2026-01-01T11:59:59.999000000Z","limit_seconds":900.0,"#,
            r#""idle_seconds":900.001,"lateness_seconds":0.001,"#,
            r#""queued_bytes":{"send":11,"receive":0}}}"#
        )
    );
}

#[test]
fn the_source_is_who_dialled_and_the_family_is_told() {
    let octets = [0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
    let session = Session {
        direction: Direction::Outbound as u8,
        local: Address::from_octets(octets),
        remote: Address::from_octets([0; 16]),
        ..session()
    };
    let line = line(&termination(&session));
    let expected = concat!(
        r#""network":{"transport":"tcp","type":"ipv6","direction":"outbound"},"#,
        r#""source":{"ip":"2001:db8::1","port":5432,"bytes":4096},"#,
        r#""destination":{"ip":"::","port":51234,"bytes":120}"#
    );
    assert!(line.contains(expected), "{line}");
}

#[test]
fn a_failure_names_its_cause_and_an_observation_has_no_outcome() {
    let session = session();
    let failed = Termination {
        end: End::Failed("SOCK_DESTROY: Operation not permitted"),
        ..termination(&session)
    };
    let failed = line(&failed);
    assert!(failed.contains(r#""action":"session-termination-failed","outcome":"failure""#));
    assert!(failed.contains(r#""error":{"message":"SOCK_DESTROY: Operation not permitted"}"#));
    let observed = Termination {
        end: End::Observed,
        mode: Mode::Observe,
        ..termination(&session)
    };
    let observed = line(&observed);
    assert!(observed.contains(r#""action":"session-would-terminate","reason":"idle_timeout""#));
    assert!(observed.contains(r#""mode":"observe","result":"none""#));
}

#[test]
fn unknown_fields_of_the_owner_are_left_out() {
    let unknown = Session {
        owner: Owner::UNKNOWN,
        ..session()
    };
    let nobody = line(&Termination {
        process: None,
        cgroup: None,
        user: None,
        ..termination(&unknown)
    });
    for name in ["process", "user", "cgroup"] {
        assert!(!nobody.contains(&format!("\"{name}\":")), "{nobody}");
    }
    let session = session();
    let nameless = line(&Termination {
        process: None,
        user: None,
        ..termination(&session)
    });
    assert!(nameless.contains(r#""user":{"id":"113"},"#), "{nameless}");
    assert!(!nameless.contains("process"), "{nameless}");
}

#[test]
fn a_clock_that_is_set_moves_every_time_of_a_record_and_no_duration() {
    const YEAR: i128 = 365 * 86_400 * 1_000_000_000;
    let (session, noon) = (session(), 1_767_268_800_000_000_000);
    let record = |realtime_ns| -> serde_json::Value {
        let clock = WallClock::pair(realtime_ns, 901_004_000_000);
        let line = written(|out| termination(&session).write_json(&RECORD_ID, &clock, out));
        serde_json::from_str(&line).unwrap()
    };
    let [before, after] = [record(noon), record(noon - YEAR)];
    let own = |record: &serde_json::Value, key: &str| record["session_enforcer"][key].clone();
    assert_eq!(before["event"], after["event"]);
    for key in ["limit_seconds", "idle_seconds", "lateness_seconds"] {
        assert_eq!(own(&before, key), own(&after, key));
    }
    let year_before = |time: serde_json::Value| time.as_str().unwrap().replace("2026-", "2025-");
    for key in ["established", "last_received", "counted_from", "deadline"] {
        assert_eq!(year_before(own(&before, key)), own(&after, key));
    }
    assert_eq!(
        year_before(before["@timestamp"].clone()),
        after["@timestamp"]
    );
}

#[test]
fn seconds_have_no_more_digits_than_the_times() {
    let session = session();
    let line = line(&Termination {
        limit: Some(Duration::from_millis(1_590)),
        idle_since_ns: 901_004_000_000 - 4_988_000_000,
        ..termination(&session)
    });
    for part in [r#""limit_seconds":1.59,"#, r#""idle_seconds":4.988,"#] {
        assert!(line.contains(part), "{line}");
    }
}

#[test]
fn a_reset_before_its_deadline_would_show() {
    let session = session();
    let early = Termination {
        answered_ns: 901_002_000_000,
        ..termination(&session)
    };
    assert!(line(&early).contains(r#""lateness_seconds":-0.001,"#));
}

#[test]
fn the_age_of_a_session_older_than_the_daemon_is_not_invented() {
    let session = Session {
        flags: session_enforcer_common::flags::END_UNREPORTED,
        ..session()
    };
    let line = line(&termination(&session));
    assert!(
        !line.contains("established") && !line.contains("duration"),
        "{line}"
    );
    assert!(line.contains(r#""last_received":"2026-01-01T11:44:59.999000000Z""#));
    // The stamp may be the one of the session's minimum age.
    assert!(line.contains(r#""last_sent":"2026-01-01T11:44:59.996000000Z""#));
}

#[test]
fn the_age_of_a_session_that_was_never_tracked_is_not_invented() {
    let session = session();
    let line = line(&Termination {
        reason: Reason::Untracked,
        ..termination(&session)
    });
    let invented = line.contains("established") || line.contains("duration");
    assert!(!invented, "{line}");
    assert!(line.contains(r#""last_sent":"2026-01-01T11:44:59.996000000Z""#));
}

#[test]
fn a_direction_without_payload_has_no_time() {
    let silent = Session {
        last_received_ns: session().established_ns,
        bytes_received: 0,
        ..session()
    };
    let too_small = Session {
        bytes_received: 3,
        ..silent
    };
    for session in [silent, too_small] {
        let line = line(&termination(&session));
        assert!(!line.contains("last_received"), "{line}");
        assert!(!line.contains("last_sent"), "{line}");
    }
}

#[test]
fn payload_before_another_socket_took_the_connection_over_keeps_its_time() {
    let restored = Session {
        bytes_received: 0,
        bytes_sent: 0,
        ..session()
    };
    let line = line(&termination(&restored));
    assert!(line.contains(r#""last_received":"2026-01-01T11:44:59.999000000Z""#));
}

#[test]
fn a_limit_has_its_beginning_in_the_record_and_a_policy_change_has_none() {
    let session = session();
    let old = Termination {
        reason: Reason::MaxLifetime,
        limit: Some(Duration::from_secs(901)),
        ..termination(&session)
    };
    let old = line(&old);
    assert!(
        old.contains(r#""counted_from":"2026-01-01T11:44:58.999000000Z""#),
        "{old}"
    );
    let by_policy = line(&Termination {
        reason: Reason::Policy,
        limit: None,
        ..termination(&session)
    });
    assert!(!by_policy.contains("counted_from"), "{by_policy}");
}

#[test]
fn the_end_of_a_session_has_one_name_and_what_is_not_its_end_another_each_time() {
    let session = session();
    let id = |end, answered_ns| -> String {
        let line = line(&Termination {
            end,
            answered_ns,
            ..termination(&session)
        });
        let record: serde_json::Value = serde_json::from_str(&line).unwrap();
        record["event"]["id"].as_str().unwrap().to_owned()
    };
    assert_eq!(id(End::Reset(None), 1), id(End::Gone, 2));
    let others = [
        id(End::Reset(None), 1),
        id(End::Failed("refused"), 1),
        id(End::Failed("refused"), 2),
        id(End::Observed, 3),
    ];
    let different: std::collections::BTreeSet<&String> = others.iter().collect();
    assert_eq!(different.len(), others.len());
}

proptest! {
    #[test]
    fn any_text_gives_one_line_of_json_that_says_it(
        rule in any::<String>(),
        error in any::<String>(),
        direction: u8,
        octets: [u8; 16],
        times: [u64; 4],
    ) {
        let session = Session {
            direction,
            local: Address::from_octets(octets),
            established_ns: times[0],
            last_received_ns: times[1],
            ..session()
        };
        let record = line(&Termination {
            rule: &rule,
            end: End::Failed(&error),
            deadline_ns: times[2],
            answered_ns: times[3],
            ..termination(&session)
        });
        prop_assert!(!record.contains(['\n', '\r']));
        let json: serde_json::Value = serde_json::from_str(&record).unwrap();
        prop_assert_eq!(json["rule"]["name"].as_str(), Some(rule.as_str()));
        prop_assert_eq!(json["error"]["message"].as_str(), Some(error.as_str()));
    }
}

#[test]
fn the_daemon_s_own_records_name_version_and_rules() {
    let clock = WallClock::pair(1_767_268_800_000_000_000, 0);
    let started =
        written(|out| record::lifecycle("enforcer-started", "start", &RECORD_ID, &clock, out));
    let version = env!("CARGO_PKG_VERSION");
    assert!(
        started.contains(r#""id":"b007-ff-7","sequence":7}"#),
        "{started}"
    );
    assert!(started.ends_with(&format!(
        r#""session_enforcer":{{"version":"{version}"}}}}"#
    )));
    let rules = ["a".to_owned(), "b".to_owned()];
    let policy =
        written(|out| record::policy(Mode::Observe, &rules, None, &RECORD_ID, &clock, out));
    assert!(policy.contains(r#""action":"policy-loaded""#), "{policy}");
    assert!(
        policy.contains(r#""mode":"observe","rules":["a","b"]"#),
        "{policy}"
    );
}

/// Accepts this many bytes, then fails until it gets more room.
#[derive(Clone, Debug, Default)]
struct Disk(Arc<Mutex<(Vec<u8>, usize)>>);

impl Sink for Disk {
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for Disk {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (written, room) = &mut *self.0.lock().unwrap();
        if *room == 0 {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let taken = bytes.len().min(*room);
        written.extend(&bytes[..taken]);
        *room -= taken;
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Disk {
    fn with_room(room: usize) -> Self {
        Self(Arc::new(Mutex::new((Vec::new(), room))))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().0.clone()).unwrap()
    }
}

/// Writes each line as a batch. Returns the content of the disk and the number of lost records.
fn write_lines(room: usize, lines: &[&str]) -> (String, u64) {
    let disk = Disk::with_room(room);
    let mut output = Output::new(disk.clone(), None);
    for line in lines {
        output.write(format!("{line}\n").as_bytes(), 1);
    }
    (disk.text(), output.lost())
}

#[test]
fn records_that_fit_are_written_and_the_others_are_counted() {
    assert_eq!(
        write_lines(100, &["one", "two"]),
        ("one\ntwo\n".to_owned(), 0)
    );
    assert_eq!(write_lines(4, &["one", "two"]), ("one\n".to_owned(), 1));
    assert_eq!(write_lines(0, &["one", "two"]), (String::new(), 2));
}

#[test]
fn only_the_rest_of_a_truncated_batch_is_lost() {
    let disk = Disk::with_room(6);
    let mut output = Output::new(disk.clone(), None);
    output.write(b"one\ntwo\nthree\n", 3);
    assert_eq!((disk.text().as_str(), output.lost()), ("one\ntw", 2));
}

#[test]
fn a_record_that_was_cut_does_not_swallow_the_next() {
    let disk = Disk::with_room(6);
    let mut output = Output::new(disk.clone(), None);
    output.write(b"one\n", 1);
    output.write(b"two\n", 1);
    disk.0.lock().unwrap().1 = 100;
    output.write(b"three\n", 1);
    assert_eq!(
        (disk.text().as_str(), output.lost()),
        ("one\ntw\nthree\n", 1)
    );
}

#[test]
fn a_record_that_was_cut_is_ended_once() {
    let disk = Disk::with_room(6);
    let mut output = Output::new(disk.clone(), None);
    for (line, room) in [("one\n", 6), ("two\n", 2), ("three\n", 1), ("four\n", 100)] {
        disk.0.lock().unwrap().1 = room;
        output.write(line.as_bytes(), 1);
    }
    assert_eq!(
        (disk.text().as_str(), output.lost()),
        ("one\ntw\nfour\n", 2)
    );
}

/// A disk that blocks once before the first write.
struct Slow(Disk, Option<Duration>);

impl Sink for Slow {
    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Write for Slow {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Some(delay) = self.1.take() {
            std::thread::sleep(delay);
        }
        self.0.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One record with these bytes.
fn one(bytes: Vec<u8>) -> Pending {
    Pending {
        bytes,
        records: 1,
        receipts: Vec::new(),
    }
}

/// A receipt that notes, when dropped, how much the disk had received.
#[derive(Debug)]
struct Receipted(Disk, Arc<Mutex<Vec<usize>>>);

impl Drop for Receipted {
    fn drop(&mut self) {
        let written = self.0.text().lines().count();
        self.1.lock().unwrap().push(written);
    }
}

#[test]
fn a_receipt_is_dropped_when_its_record_is_written() {
    let disk = Disk::with_room(usize::MAX);
    let slow = Slow(disk.clone(), Some(Duration::from_millis(100)));
    let writer = Writer::start(Output::new(slow, None)).unwrap();
    let mut audit = Audit::of(writer, false);
    let dropped = Arc::new(Mutex::new(Vec::new()));
    let session = session();
    for _ in 0..3 {
        let receipt = Receipted(disk.clone(), Arc::clone(&dropped));
        audit.termination(&termination(&session), Some(Box::new(receipt)));
        audit.flush();
    }
    audit.close();
    assert_eq!(*dropped.lock().unwrap(), [1, 2, 3]);
}

#[test]
fn the_names_of_the_records_of_a_file_are_known_but_for_what_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.json");
    fs::write(&path, "no JSON\n{}\n").unwrap();
    let mut audit = Audit::open(&AuditTarget::File(path.clone()), false).unwrap();
    let session = session();
    audit.termination(&termination(&session), None);
    audit.close();
    let id = audit.id_of_end(4711, session.established_ns);
    let known = HashSet::from([id]);
    let audit = Audit::open(&AuditTarget::File(path.clone()), false).unwrap();
    assert_eq!(audit.recorded(), known);
    let text = fs::read(&path).unwrap();
    fs::write(&path, &text[..text.len() - 1]).unwrap();
    assert_eq!(audit.recorded(), HashSet::new());
}

#[test]
fn a_disk_that_stands_still_for_a_moment_loses_nothing() {
    let disk = Disk::with_room(usize::MAX);
    let slow = Slow(disk.clone(), Some(Duration::from_millis(100)));
    let mut writer = Writer::start(Output::new(slow, None)).unwrap();
    for _ in 0..10_000 {
        writer.write(one(b"one\n".to_vec()));
    }
    assert_eq!(writer.lost(), 0);
    writer.close();
    assert_eq!(disk.text().lines().count(), 10_000);
}

#[test]
fn a_reader_that_stands_still_costs_bounded_memory_and_each_loss_is_counted() {
    let disk = Disk::with_room(usize::MAX);
    let slow = Slow(disk.clone(), Some(Duration::from_secs(1)));
    let mut writer = Writer::start(Output::new(slow, None)).unwrap();
    let megabyte = [vec![b'x'; (1 << 20) - 1], vec![b'\n']].concat();
    for _ in 0..40 {
        writer.write(one(megabyte.clone()));
    }
    assert_eq!(writer.lost(), 8);
    writer.close();
    assert_eq!(disk.text().lines().count(), 32);
}

/// Without the bound, the records of 100,000 sessions that expire with one policy change would form one batch
/// that exceeds the queue and is lost as a whole.
#[test]
fn records_before_a_batch_is_handed_to_the_writer_are_bounded() {
    let disk = Disk::with_room(usize::MAX);
    let writer = Writer::start(Output::new(disk.clone(), None)).unwrap();
    let mut audit = Audit::of(writer, false);
    let session = session();
    for _ in 0..2_000 {
        audit.termination(&termination(&session), None);
        assert!(audit.pending.bytes.len() < MAX_PENDING_BYTES);
    }
    audit.close();
    assert_eq!(disk.text().lines().count(), 2_000);
}

#[test]
fn the_end_waits_for_the_last_record() {
    let disk = Disk::with_room(1000);
    let writer = Writer::start(Output::new(disk.clone(), None)).unwrap();
    let mut audit = Audit::of(writer, false);
    audit.started();
    audit.policy_loaded(Mode::Enforce, &[], None);
    audit.stopped();
    audit.close();
    assert_eq!(disk.text().lines().count(), 3);
}

#[test]
fn a_file_is_appended_to_and_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.json");
    fs::write(&path, "before\n").unwrap();
    let mut audit = Audit::open(&AuditTarget::File(path.clone()), false).unwrap();
    audit.add(|_, _, out| out.extend_from_slice(b"one\n"));
    audit.flush();
    let moved = dir.path().join("audit.json.1");
    fs::rename(&path, &moved).unwrap();
    audit.reopen();
    audit.add(|_, _, out| out.extend_from_slice(b"two\n"));
    audit.close();
    assert_eq!(fs::read_to_string(moved).unwrap(), "before\none\n");
    assert_eq!(fs::read_to_string(path).unwrap(), "two\n");
}

#[test]
fn a_line_that_an_earlier_run_or_the_same_one_left_open_is_ended() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.json");
    fs::write(&path, "cut").unwrap();
    let mut audit = Audit::open(&AuditTarget::File(path.clone()), false).unwrap();
    audit.add(|_, _, out| out.extend_from_slice(b"one\n"));
    audit.flush();
    audit.reopen();
    audit.add(|_, _, out| out.extend_from_slice(b"two\n"));
    audit.close();
    assert_eq!(fs::read_to_string(&path).unwrap(), "cut\none\ntwo\n");
}

#[test]
fn a_file_that_cannot_be_opened_is_named() {
    let target = AuditTarget::File("/nowhere/audit.json".into());
    let error = Audit::open(&target, false).unwrap_err().to_string();
    assert!(
        error.starts_with("audit.path: /nowhere/audit.json: "),
        "{error}"
    );
}

#[test]
fn a_fifo_is_written_to_where_somebody_reads_it_and_refused_where_nobody_does() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("fifo");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let target = AuditTarget::File(path.clone());
    let error = Audit::open(&target, false).unwrap_err().to_string();
    assert!(error.contains("nobody reads this FIFO"), "{error}");
    let reads = std::thread::spawn(move || fs::read_to_string(path));
    // Retry until the reader has opened the FIFO.
    let mut audit = loop {
        match Audit::open(&target, false) {
            Ok(audit) => break audit,
            Err(_) => std::thread::yield_now(),
        }
    };
    // The record exceeds the pipe's capacity, so the writer blocks.
    let record = vec![b'x'; 200_000];
    audit.add(|_, _, out| out.extend_from_slice(&record));
    audit.close();
    assert_eq!(reads.join().unwrap().unwrap().len(), record.len());
}

/// The paths of a record's fields, such as `event.action`.
fn fields(path: &str, value: &serde_json::Value, found: &mut Vec<String>) {
    let Some(object) = value.as_object() else {
        found.push(path.to_owned());
        return;
    };
    for (key, value) in object {
        let dot = if path.is_empty() { "" } else { "." };
        fields(&format!("{path}{dot}{key}"), value, found);
    }
}

#[test]
fn the_requester_of_a_reset_is_recorded_as_far_as_it_is_known() {
    let session = session();
    let by = |requester: &Requester, user: Option<&str>| {
        let record = line(&Termination {
            reason: Reason::Admin,
            limit: None,
            requested_by: Some(RequestedBy { requester, user }),
            ..termination(&session)
        });
        let record: serde_json::Value = serde_json::from_str(&record).unwrap();
        assert_eq!(record["event"]["reason"], "admin");
        record["session_enforcer"]["requested_by"].to_string()
    };
    let mut requester = Requester {
        uid: 1000,
        pid: 12,
        command: "curl".to_owned(),
    };
    assert_eq!(
        by(&requester, Some("mia")),
        r#"{"command":"curl","pid":12,"user":"mia"}"#
    );
    (requester.pid, requester.command) = (0, String::new());
    assert_eq!(by(&requester, None), r#"{"user":"1000"}"#);
}

#[test]
fn the_page_has_each_field_of_a_record() {
    let page = include_str!("../../../docs/audit.md");
    let session = session();
    let reset = termination(&session);
    let failed = Termination {
        end: End::Failed("EPERM"),
        ..reset
    };
    let requester = Requester {
        uid: 0,
        pid: 1,
        command: "curl".to_owned(),
    };
    let asked_for = Termination {
        reason: Reason::Admin,
        requested_by: Some(RequestedBy {
            requester: &requester,
            user: Some("root"),
        }),
        ..reset
    };
    let mut found = Vec::new();
    for record in [reset, failed, asked_for] {
        let record = serde_json::from_str(&line(&record)).unwrap();
        fields("", &record, &mut found);
    }
    assert!(found.len() > 25, "{found:?}");
    for field in found {
        assert!(page.contains(&format!("`{field}`")), "{field}");
    }
}

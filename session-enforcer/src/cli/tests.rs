use clap::CommandFactory as _;

use super::*;
use crate::config::{Action, MAX_LIMIT, MIN_LIMIT, QUICK_RULE};

fn parse(line: &str) -> Result<Cli, clap::Error> {
    // An empty argument is written as ''.
    let unquote = |word: &str| word.replace("''", "");
    Cli::try_parse_from(line.split(' ').map(unquote))
}

fn run_args(line: &str) -> RunArgs {
    match parse(line).unwrap().command {
        Command::Run(args) => args,
        other => panic!("{other:?}"),
    }
}

fn refused(line: &str) -> String {
    let error = parse(line).unwrap_err();
    assert_eq!(error.exit_code(), 2, "{error}");
    let line = usage_line(&error);
    assert!(!line.contains('\n'), "{line:?}");
    let end = "; see session-enforcer --help";
    assert!(line.ends_with(end), "{line:?}");
    line.replace(end, "")
}

#[test]
fn the_definition_is_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn the_quick_form_is_one_inbound_rule() {
    let args = run_args(
        "session-enforcer run --port 5432,6000-6010 --idle-timeout 15m --max-lifetime 12h",
    );
    assert_eq!(args.config_path(), None);
    let config = args.to_config().unwrap();
    let expected = Config::parse(
        "x.toml",
        "[[rule]]\nname = 'cli'\ndirection = 'inbound'\nlocal_ports = [5432, '6000-6010']\n\
         idle_timeout = '15m'\nmax_lifetime = '12h'\n",
    );
    let expected = Config {
        file: None,
        ..expected.unwrap()
    };
    assert_eq!(config, expected);
    assert_eq!(config.rules[0].name, QUICK_RULE);
    assert_eq!(config.effective_action(&config.rules[0]), Action::Enforce);
}

#[test]
fn a_flag_stands_above_the_key_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    let text = "[daemon]\ncgroup = '/a'\n[metrics]\nlisten = '127.0.0.1:1'\n\
                [[rule]]\nname = 'a'\nidle_timeout = '1s'\n";
    std::fs::write(&path, text).unwrap();
    let line = format!("session-enforcer run --config {}", path.display());
    let file = run_args(&line).to_config().unwrap();
    assert_eq!(file, Config::parse(&path, text).unwrap());
    let line = format!("{line} --cgroup /b --observe --metrics-listen [::1]:2 --audit /c");
    let config = run_args(&line).to_config().unwrap();
    assert_eq!(config.cgroup.as_deref(), Some(Path::new("/b")));
    assert_eq!(config.mode, Mode::Observe);
    let listen = MetricsListen::Tcp("[::1]:2".parse().unwrap());
    assert_eq!(config.metrics_listen, Some(listen));
    assert_eq!(config.audit, AuditTarget::File("/c".into()));
    assert_eq!(config.rules, file.rules);
    assert_eq!(config.effective_action(&config.rules[0]), Action::Observe);
}

#[test]
fn the_pin_directory_is_that_of_the_flag_of_the_file_or_the_usual_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("config.toml");
    let text = "[daemon]\npin_dir = '/a'\n[[rule]]\nname = 'a'\nidle_timeout = '1s'\n";
    std::fs::write(&path, text).unwrap();
    let file = format!("--config {}", path.display());
    let run = |args: &str| run_args(&format!("session-enforcer run {args}")).to_config();
    assert_eq!(run(&file).unwrap().pin_dir, Some("/a".into()));
    let none = run(&format!("{file} --pin-dir ''")).unwrap();
    assert_eq!(none.pin_dir, None);
    let detach = |args: &str| match parse(&format!("session-enforcer detach {args}"))
        .unwrap()
        .command
    {
        Command::Detach(args) => args.pin_dir().unwrap(),
        other => panic!("{other:?}"),
    };
    assert_eq!(detach(&file), Some("/a".into()));
    assert_eq!(detach("--pin-dir /b"), Some("/b".into()));
    assert_eq!(detach("--pin-dir ''"), None);
    assert!(refused("session-enforcer detach --pin-dir b").contains("absolute path"));
    let both = format!("session-enforcer detach --pin-dir /b {file}");
    assert!(refused(&both).contains("--config"));
}

#[test]
fn metrics_and_audit_can_be_turned_elsewhere_in_the_quick_form() {
    let line = "session-enforcer run --port 22 --max-lifetime 1d --metrics-listen '' --audit -";
    let config = run_args(line).to_config().unwrap();
    assert_eq!(config.metrics_listen, None);
    assert_eq!(config.audit, AuditTarget::Stdout);
    let line = "session-enforcer run --port 22 --max-lifetime 1d --audit a.json";
    let config = run_args(line).to_config().unwrap();
    let here = std::env::current_dir().unwrap();
    assert_eq!(config.audit, AuditTarget::File(here.join("a.json")));
    let line = "session-enforcer run --port 22 --max-lifetime 1d --audit journald";
    let config = run_args(line).to_config().unwrap();
    assert_eq!(config.audit, AuditTarget::Journald);
}

#[test]
fn without_a_file_and_ports_the_default_file_is_read() {
    let args = run_args("session-enforcer run --observe");
    assert_eq!(args.config_path(), Some(DEFAULT_CONFIG.into()));
    let args = run_args("session-enforcer run --config beside.toml");
    let here = std::env::current_dir().unwrap();
    assert_eq!(args.config_path(), Some(here.join("beside.toml")));
    let Command::Check(check) = parse("session-enforcer check").unwrap().command else {
        panic!("must be check");
    };
    assert_eq!(check.config, Path::new(DEFAULT_CONFIG));
}

fn explain_args(arguments: &str) -> ExplainArgs {
    match parse(&format!("session-enforcer explain {arguments}"))
        .unwrap()
        .command
    {
        Command::Explain(args) => args,
        other => panic!("{other:?}"),
    }
}

#[test]
fn explain_takes_what_ss_prints() {
    let plain = |end: &str| explain_args(&format!("{end} {end}")).ends().unwrap();
    for (printed, end) in [
        ("[fe80::1]%eth0:22", "[fe80::1]:22"),
        ("[fe80::1]%eth0:1:22", "[fe80::1]:22"),
        ("[fe80::1%eth0]:22", "[fe80::1]:22"),
        ("[fe80::1%br-0:1]:22", "[fe80::1]:22"),
        ("[fe80::1%a]b]:22", "[fe80::1]:22"),
        ("[2001:db8::5%2]:22", "[2001:db8::5]:22"),
        ("10.0.0.5%veth0:5432", "10.0.0.5:5432"),
        ("10.0.0.5%eth0:1:5432", "10.0.0.5:5432"),
        ("[::ffff:10.0.0.5]:5432", "10.0.0.5:5432"),
        ("[::ffff:10.0.0.5%eth0]:5432", "10.0.0.5:5432"),
    ] {
        assert_eq!(plain(printed), plain(end), "{printed}");
    }
    for wrong in [
        "[fe80::1%]:22",
        "10.0.0.5%:22",
        "10.0.0.5%eth0",
        "[fe80::1%eth0]",
        "[fe80::1%eth0]:0",
        "[fe80::1]%eth0",
        "[fe80::1]%:22",
        "%eth0:22",
        "[%eth0]:22",
        "*:22",
    ] {
        let line = format!("session-enforcer explain {wrong} 10.0.0.9:1");
        parse(&line).unwrap_err();
    }
}

#[test]
fn explain_takes_two_ends_of_one_family() {
    let args = explain_args("10.0.0.5:5432 10.0.0.9:50000");
    assert_eq!(args.config_path(), Path::new(DEFAULT_CONFIG));
    assert_eq!(args.direction, None);
    let ends = args.ends().unwrap();
    let mapped = explain_args("[::ffff:10.0.0.5]:5432 10.0.0.9:50000 --direction outbound");
    assert_eq!(mapped.ends().unwrap(), ends);
    assert_eq!(mapped.direction, Some(Direction::Outbound));
    let inbound = explain_args("[2001:db8::5]:22 [2001:db8::9]:50000 --direction inbound");
    inbound.ends().unwrap();
    assert_eq!(inbound.direction, Some(Direction::Inbound));
}

#[test]
fn ends_of_two_families_are_wrong_usage() {
    let args = explain_args("10.0.0.5:5432 [2001:db8::9]:50000");
    let failure = args.ends().unwrap_err();
    assert_eq!(failure.status, ExitStatus::Usage);
    let message = "10.0.0.5 is an IPv4 address and 2001:db8::9 is an IPv6 address; both must be of \
                   the same family";
    assert_eq!(failure.message, message);
}

#[test]
fn wrong_usage_is_one_line() {
    let cases = [
        (
            "run --port 22",
            "the following required arguments were not provided: \
             <--idle-timeout <DUR>|--max-lifetime <DUR>>",
        ),
        (
            "run --idle-timeout 15m",
            "the following required arguments were not provided: --port <LIST>",
        ),
        (
            "run --config a --port 22 --idle-timeout 15m",
            "the argument '--config <FILE>' cannot be used with: --port <LIST> --idle-timeout <DUR>",
        ),
        (
            "run --config a --idle-timeout 15m",
            "the argument '--config <FILE>' cannot be used with '--idle-timeout <DUR>'",
        ),
        (
            "run --last-good a --max-lifetime 12h",
            "the argument '--last-good <FILE>' cannot be used with '--max-lifetime <DUR>'",
        ),
        (
            "run --port 0 --idle-timeout 15m",
            "invalid value '0' for '--port <LIST>': found \"0\"; allowed: a port from 1 to 65535, \
             or a range of ports such as \"6000-6010\"",
        ),
        (
            "run --port 22,9-1 --idle-timeout 15m",
            "invalid value '9-1' for '--port <LIST>': the range \"9-1\" runs backwards; \
             write \"1-9\"",
        ),
        (
            "run --port 22 --idle-timeout 900",
            "invalid value '900' for '--idle-timeout <DUR>': 900 has no unit; write \"900s\" for \
             seconds, or m, h or d after it",
        ),
        (
            "run --port 22 --max-lifetime 10ms",
            "invalid value '10ms' for '--max-lifetime <DUR>': \"10ms\" is shorter than 1s, the \
             shortest limit; for no limit, leave it out",
        ),
        (
            "run --metrics-listen 127.0.0.1",
            "invalid value '127.0.0.1' for '--metrics-listen <LISTEN>': \"127.0.0.1\" has no \
             port; write \"127.0.0.1:9847\"",
        ),
        (
            "run --cgroup ''",
            "a value is required for '--cgroup <DIR>' but none was supplied",
        ),
        (
            "explain 10.0.0.5 10.0.0.9:1",
            "invalid value '10.0.0.5' for '[LOCAL]': allowed: an address and a port, such as \
             10.0.0.5:5432 or [2001:db8::5]:5432",
        ),
        (
            "explain 10.0.0.5:1 2001:db8::9:0",
            "invalid value '2001:db8::9:0' for '[REMOTE]': allowed: an address and a port, such \
             as 10.0.0.5:5432 or [2001:db8::5]:5432",
        ),
        (
            "explain 10.0.0.5:1 10.0.0.9:0",
            "invalid value '10.0.0.9:0' for '[REMOTE]': allowed: an address and a port, such as \
             10.0.0.5:5432 or [2001:db8::5]:5432",
        ),
        (
            "explain 10.0.0.5:1 10.0.0.9:1 --direction any",
            "invalid value 'any' for '--direction <DIRECTION>' [possible values: inbound, \
             outbound]",
        ),
        (
            "check --confg a",
            "unexpected argument '--confg' found; tip: a similar argument exists: '--config'",
        ),
        (
            "chekc",
            "unrecognized subcommand 'chekc'; tip: a similar subcommand exists: 'check'",
        ),
        (
            "doctor --log-level inof",
            "invalid value 'inof' for '--log-level <LEVEL>': allowed: error, warn, info, debug, \
             trace, off, or a filter such as info,session_enforcer::engine=debug",
        ),
    ];
    for (arguments, message) in cases {
        assert_eq!(refused(&format!("session-enforcer {arguments}")), message);
    }
}

#[test]
fn the_level_of_the_log_is_a_word_or_a_filter() {
    for (level, printed) in [
        ("debug", "debug"),
        ("WARN", "warn"),
        ("off", "off"),
        (
            "info,session_enforcer::engine=trace",
            "session_enforcer::engine=trace,info",
        ),
    ] {
        let cli = parse(&format!("session-enforcer doctor --log-level {level}")).unwrap();
        assert_eq!(cli.log_filter().unwrap().to_string(), printed);
    }
    let cli = parse("session-enforcer doctor").unwrap();
    let filter = |variable: Option<&str>| cli.log_filter_or(variable.map(str::to_owned));
    assert_eq!(filter(None).unwrap().to_string(), "info");
    assert_eq!(filter(Some("")).unwrap().to_string(), "info");
    assert_eq!(filter(Some("trace")).unwrap().to_string(), "trace");
    let failure = filter(Some("a=b=c")).unwrap_err();
    assert_eq!(failure.status, ExitStatus::Usage);
    let start = "RUST_LOG=\"a=b=c\" is not a filter: ";
    assert!(failure.message.starts_with(start), "{failure}");
    assert!(
        failure.message.ends_with("; try RUST_LOG=info"),
        "{failure}"
    );
}

#[test]
fn help_and_version_are_not_errors() {
    for line in [
        "--help",
        "--version",
        "run --help",
        "check -h",
        "explain -h",
    ] {
        let error = parse(&format!("session-enforcer {line}")).unwrap_err();
        assert_eq!(error.exit_code(), 0);
        assert!(is_help(&error));
    }
}

#[test]
fn help_names_every_exit_status_and_default() {
    for status in ExitStatus::ALL {
        let (code, meaning) = (status.code(), status.meaning());
        let line = format!("  {code:<2}  {meaning}");
        assert!(EXIT_STATUS_HELP.contains(&line), "{line}");
    }
    let run = Cli::command().find_subcommand("run").cloned().unwrap();
    let help = run.clone().render_help().to_string();
    let listen = crate::config::DEFAULT_METRICS_LISTEN.to_string();
    for part in [DEFAULT_CONFIG, &listen, EXIT_STATUS_HELP, RUN_EXAMPLES] {
        assert!(help.contains(part), "{part} is not in:\n{help}");
    }
}

#[test]
fn the_examples_of_the_help_are_accepted() {
    let texts = [
        EXAMPLES,
        RUN_EXAMPLES,
        EXPLAIN_EXAMPLE,
        live::LIST_EXAMPLES,
        live::KILL_EXAMPLES,
    ];
    let lines = texts.into_iter().flat_map(str::lines).map(str::trim);
    let examples: Vec<_> = lines
        .filter(|line| line.starts_with("session-enforcer "))
        .collect();
    assert_eq!(examples.len(), 9);
    for example in examples {
        parse(example).unwrap();
    }
    let toml: String = RUN_EXAMPLES
        .lines()
        .skip(1)
        .take_while(|line| !line.is_empty())
        .flat_map(|line| [line, "\n"])
        .collect();
    Config::parse("x.toml", &toml).unwrap();
}

#[test]
fn the_shortest_and_the_longest_limit_are_accepted() {
    let line = "session-enforcer run --port 22 --idle-timeout 1s --max-lifetime 36500d";
    let args = run_args(line);
    assert_eq!(args.idle_timeout, Some(MIN_LIMIT));
    assert_eq!(args.max_lifetime, Some(MAX_LIMIT));
}

#[test]
fn the_reference_has_each_flag_of_run() {
    let page = include_str!("../../docs/configuration.md");
    let cli = Cli::command();
    let run = cli.find_subcommand("run").unwrap();
    let flags = run.get_arguments().filter_map(clap::Arg::get_long);
    // The file itself is no key of it.
    for flag in flags.filter(|flag| *flag != "config") {
        assert!(page.contains(&format!("`--{flag}")), "{flag}");
    }
}

//! Tests of unreadable files and of texts that are not TOML.

use super::*;

#[test]
fn the_example_configurations_load_without_a_warning() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let paths = std::fs::read_dir(directory).unwrap();
    let paths = paths.map(|entry| entry.unwrap().path());
    let toml: Vec<_> = paths
        .filter(|path| path.extension() == Some("toml".as_ref()))
        .collect();
    assert!(!toml.is_empty());
    for path in toml {
        let config = Config::load(&path).unwrap();
        assert_eq!(config.warnings, [], "{}", path.display());
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let error = |name: &str| {
        let message = Config::load(path(name)).unwrap_err().to_string();
        message.replace(&directory.path().display().to_string(), "")
    };
    assert_eq!(
        error("none.toml"),
        "/none.toml: cannot be read: No such file or directory (os error 2); give a file that \
         exists and that this user may read"
    );
    assert_eq!(error("."), "/.: is a directory; give the path of a file");
    std::fs::write(path("latin1.toml"), b"[daemon]\n# caf\xe9\n").unwrap();
    assert_eq!(
        error("latin1.toml"),
        "/latin1.toml:2:6: is not UTF-8 text from here on; save the file as UTF-8"
    );
    std::fs::write(path("large.toml"), vec![b'#'; MAX_FILE_BYTES as usize + 1]).unwrap();
    assert_eq!(
        error("large.toml"),
        "/large.toml: is larger than 4194304 bytes, which no configuration is; give another file"
    );
}

#[test]
fn a_file_name_cannot_break_the_line() {
    let error = Config::load("/none\n\x1b[2J.toml").unwrap_err().to_string();
    assert!(
        error.starts_with("/none\\n\\u{1b}[2J.toml: cannot be read"),
        "{error}"
    );
}

#[test]
fn a_device_without_end_is_refused() {
    let error = Config::load("/dev/zero").unwrap_err().to_string();
    assert!(error.contains("is larger than"), "{error}");
}

#[test]
fn a_text_that_is_not_toml_is_pointed_at() {
    all_refused(&[
        (
            "[[rule]]\nname = postgres\n",
            "x.toml:2:8: is not TOML: string values must be quoted, expected literal string; \
             found \"postgres\"",
        ),
        (
            "[[rule]]\nidle_timeout = 15m\n",
            "x.toml:2:16: is not TOML: string values must be quoted, expected literal string; \
             found \"15m\"",
        ),
        (
            "[daemon]\nmode = \"observe\nmax_sessions = 1\n",
            "x.toml:2:16: is not TOML: invalid basic string, expected `\"`; \
             found the end of the line",
        ),
        (
            "[daemon\n",
            "x.toml:1:8: is not TOML: unclosed table, expected `]`; found the end of the line",
        ),
        (
            "[daemon]\nmode =\n",
            "x.toml:2:7: is not TOML: string values must be quoted, expected literal string; \
             found the end of the line",
        ),
        (
            "[daemon]\ncgroup = \"/a\\q\"\n",
            "x.toml:2:14: is not TOML: missing escaped value, expected `b`, `e`, `f`, `n`, `r`, \
             `\\`, `\"`, `x`, `u`, `U`; found \"q\\\"\"",
        ),
    ]);
}

#[test]
fn a_key_or_table_written_twice_is_pointed_at() {
    all_refused(&[
        (
            "[daemon]\nmode = 'observe'\nmode = 'enforce'\n",
            "x.toml:3:1: mode: is here for the second time; keep one",
        ),
        (
            "[daemon]\n[daemon]\n",
            "x.toml:2:2: daemon: is here for the second time; keep one",
        ),
        (
            "[[rule]]\nname = 'a'\n[rule]\n",
            "x.toml:3:2: rule: found [rule]; allowed: each rule under a header of its own, \
             [[rule]]",
        ),
    ]);
}

#[test]
fn lines_and_columns_count_characters() {
    let rule = "[[rule]]\r\nname = 'a' # \u{e9}\u{e9}\r\n";
    let error = refused(&format!(
        "{rule}local_ports = ['\u{e9}', 0]\r\nidle_timeout = '1s'"
    ));
    assert!(
        error.starts_with("x.toml:3:16: rule \"a\": local_ports: found \"\u{e9}\""),
        "{error}"
    );
    let error = refused(&format!("\u{feff}{rule}idle_timeout = 5\r\n"));
    assert!(
        error.starts_with("x.toml:3:16: rule \"a\": idle_timeout: 5 has no unit"),
        "{error}"
    );
}

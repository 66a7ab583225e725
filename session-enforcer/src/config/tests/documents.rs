//! Tests of the documentation: its keys and configurations, the tests that it names, and its links.

use std::collections::{BTreeMap, BTreeSet};

use super::*;

const CONFIGURATION: &str = include_str!("../../../docs/configuration.md");
const COOKBOOK: &str = include_str!("../../../docs/cookbook.md");
const FAULTS: &str = include_str!("../../../docs/faults.md");
const REPORTS: &str = include_str!("../../../docs/design/reports.md");
const README: &str = include_str!("../../../../README.md");
const PACKAGED: &str = include_str!("../../../packaging/config.toml");
const TOUR: &str = include_str!("../../../docs/tour.md");

/// The folder of the pages that the README links to.
const DOCS: &str = "session-enforcer/docs";

/// The example for the README's first configuration. No page shows it.
const FIRST: &str = "config.toml";

fn examples() -> BTreeMap<String, String> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples");
    let paths = std::fs::read_dir(directory).unwrap();
    let named = paths.map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, std::fs::read_to_string(&path).unwrap())
    });
    named.collect()
}

/// The TOML blocks of a page, each with the text before it.
fn blocks(page: &str) -> Vec<(&str, &str)> {
    let mut blocks = Vec::new();
    let mut rest = page;
    while let Some((before, after)) = rest.split_once("```toml\n") {
        let (block, after) = after.split_once("```").unwrap();
        blocks.push((before, block));
        rest = after;
    }
    blocks
}

#[test]
fn each_example_is_in_the_cookbook_word_for_word() {
    let mut missing = examples();
    missing.remove(FIRST).unwrap();
    for (before, block) in blocks(COOKBOOK) {
        let name = before.trim_end().rsplit("](../examples/").next().unwrap();
        let name = name.trim_end_matches(')');
        let example = missing.remove(name);
        assert_eq!(example.as_deref(), Some(block), "{name} above the block");
    }
    assert_eq!(missing, BTreeMap::new());
}

#[test]
fn configurations_in_the_pages_are_valid_and_without_a_warning() {
    let shown = blocks(COOKBOOK).into_iter().chain(blocks(README));
    let configs = shown.map(|(_, block)| Config::parse("x.toml", block).unwrap());
    let configs: Vec<_> = configs.collect();
    assert_eq!(configs.len(), examples().len() - 1 + 1);
    for config in configs {
        assert_eq!(config.warnings, []);
        assert_eq!(config.mode, Mode::Observe, "what is copied cuts nobody");
    }
}

#[test]
fn the_packaged_rules_are_valid_and_ssh_has_the_rule_of_the_readme() {
    let is_toml = |line: &str| line == "[[rule]]" || line.split_once(" = ").is_some_and(is_key);
    let uncommented = PACKAGED.lines().flat_map(|line| {
        let commented = line.strip_prefix("# ").filter(|line| is_toml(line));
        [commented.unwrap_or(line), "\n"]
    });
    let uncommented: String = uncommented.collect();
    let ssh = |text: &str| {
        let mut rules = Config::parse("x.toml", text).unwrap().rules.into_iter();
        rules.find(|rule| rule.name == "ssh").unwrap()
    };
    let [(_, readme)] = blocks(README)[..] else {
        panic!("the README has one configuration");
    };
    assert_eq!(
        Config::parse("x.toml", &uncommented).unwrap().rules.len(),
        3
    );
    for text in [PACKAGED, &uncommented, &examples()[FIRST]] {
        assert_eq!(ssh(text), ssh(readme));
    }
}

fn is_key((name, _): (&str, &str)) -> bool {
    name.chars().all(|c| c.is_ascii_lowercase() || c == '_')
}

#[test]
fn each_recipe_has_its_parts_and_a_place_in_the_list() {
    let recipes: Vec<_> = COOKBOOK
        .split("\n## ")
        .filter(|part| part.contains("```toml\n"))
        .collect();
    assert_eq!(recipes.len(), examples().len() - 1);
    for recipe in recipes {
        let title = recipe.lines().next().unwrap();
        for part in [
            "\nFor ",
            "\n**What it does.** ",
            "\n**Limits.** ",
            "\n**Introduce it.** ",
        ] {
            assert!(recipe.contains(part), "{title}: {part}");
        }
        assert!(COOKBOOK.contains(&format!("\n- [{title}](#")), "{title}");
    }
}

/// The file and the name of each test that a page names.
fn named_tests(page: &str) -> Vec<(&str, &str)> {
    let words = page.split('`').skip(1).step_by(2);
    let tests = words.filter_map(|word| word.split_once("::"));
    tests.filter(|named| *named != ("file", "name")).collect()
}

#[test]
fn each_test_that_the_pages_of_faults_and_reports_name_is_there() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (faults, reports) = (named_tests(FAULTS), named_tests(REPORTS));
    assert!(faults.len() > 40, "{}", faults.len());
    assert!(reports.len() >= 10, "{}", reports.len());
    let tests = package.join("../tests/tests");
    let folders = std::fs::read_dir(&tests).unwrap();
    let folders = folders.map(|folder| folder.unwrap().path());
    let places: Vec<PathBuf> = folders.chain([tests, package.join("src")]).collect();
    for (file, name) in faults.into_iter().chain(reports) {
        let mut sources = places
            .iter()
            .filter_map(|place| std::fs::read_to_string(place.join(format!("{file}.rs"))).ok());
        let test = format!("#[test]\nfn {name}(");
        let indented = format!("#[test]\n    fn {name}(");
        assert!(
            sources.any(|source| source.contains(&test) || source.contains(&indented)),
            "{file}::{name}"
        );
    }
}

#[test]
fn each_fault_has_a_test() {
    let rows = FAULTS.lines().filter(|line| line.starts_with("| "));
    for row in rows.filter(|row| !row.starts_with("| fault |")) {
        assert_eq!(row.matches(" |").count(), 4, "{row}");
        assert!(row.contains("::"), "{row}");
    }
}

/// The rows of the reference by key, such as `rule.name`: the other cells of the row.
fn reference() -> BTreeMap<&'static str, Vec<&'static str>> {
    let rows = CONFIGURATION
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.strip_suffix(" |"));
    let keys = rows.filter_map(|row| row.split_once("` | "));
    // Rows of other tables of the page begin with flags.
    let keys = keys.filter(|(key, _)| !key.starts_with('-'));
    let cells = keys.map(|(key, cells)| (key, cells.split(" | ").collect()));
    cells.collect()
}

#[test]
fn the_reference_has_each_key_that_is_read_and_no_other() {
    let header = |header: &str| header.trim_matches(['[', ']']).to_owned();
    let tables = read::TABLES.iter().filter(|t| t.header.starts_with('['));
    let known: BTreeSet<String> = tables
        .flat_map(|table| {
            let key = |key| format!("{}.{key}", header(table.header));
            table.known.iter().map(key)
        })
        .collect();
    let documented: BTreeSet<String> = reference().into_keys().map(str::to_owned).collect();
    assert_eq!(documented, known);
}

#[test]
fn the_reference_has_the_bounds_and_defaults_of_the_code() {
    let reference = reference();
    let limit = format!("a time from `{}` to `36500d`", format_duration(MIN_LIMIT));
    assert_eq!(format_duration(MAX_LIMIT), "36500d");
    let jitter = format!("`\"0%\"` to `\"{MAX_LIFETIME_JITTER_PERCENT}%\"`, whole percents");
    let interval = format!("`\"{}\"`", format_duration(DEFAULT_RECONCILE_INTERVAL));
    for (key, allowed, default) in [
        (
            "daemon.max_sessions",
            format!("1 to {MAX_MAX_SESSIONS}"),
            format!("`{DEFAULT_MAX_SESSIONS}`"),
        ),
        (
            "daemon.pin_dir",
            "absolute path on bpffs; `\"\"`".to_owned(),
            format!("`\"{DEFAULT_PIN_DIR}\"`"),
        ),
        ("daemon.reconcile_interval", limit.clone(), interval),
        (
            "metrics.listen",
            "IP address and port; `\"unix:\"` and an absolute path; `\"\"`".to_owned(),
            format!("`\"{DEFAULT_METRICS_LISTEN}\"`"),
        ),
        ("rule.idle_timeout", limit.clone(), "none".to_owned()),
        ("rule.max_lifetime", limit.clone(), "none".to_owned()),
        ("rule.response_timeout", limit, "none".to_owned()),
        ("rule.lifetime_jitter", jitter, "`\"0%\"`".to_owned()),
        (
            "rule.min_payload",
            format!("1 to {MAX_MIN_PAYLOAD}"),
            format!("`{DEFAULT_MIN_PAYLOAD}`"),
        ),
        (
            "rule.min_answer",
            format!("1 to {MAX_MIN_ANSWER}"),
            format!("`{DEFAULT_MIN_ANSWER}`"),
        ),
        (
            "rule.max_sessions",
            format!("0 to {MAX_MAX_SESSIONS}"),
            "`0`".to_owned(),
        ),
    ] {
        assert_eq!(reference[key][..2], [&allowed[..], &default[..]], "{key}");
    }
}

/// Every page, by its path from the root of the repository.
fn pages() -> BTreeMap<PathBuf, String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let in_folder = |folder: &'static str| {
        let entries = std::fs::read_dir(root.join(folder)).into_iter().flatten();
        entries.map(move |entry| Path::new(folder).join(entry.unwrap().file_name()))
    };
    let above = [
        "README.md",
        "ARCHITECTURE.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
    ]
    .map(PathBuf::from);
    let folders = [DOCS, "session-enforcer/docs/design"];
    let pages = folders.into_iter().flat_map(in_folder).chain(above);
    let read = |path: PathBuf| {
        let text = std::fs::read_to_string(root.join(&path)).unwrap();
        (path, text)
    };
    pages
        .filter(|path| path.extension().is_some())
        .map(read)
        .collect()
}

/// Resolves each `..` of the path, which here always follows a directory.
fn without_parents(path: &Path) -> PathBuf {
    let mut parts = Vec::new();
    for part in path.components() {
        if part.as_os_str() == ".." {
            parts.pop();
        } else {
            parts.push(part);
        }
    }
    parts.into_iter().collect()
}

/// The anchors that forges make of a page's headings.
fn anchors(page: &str) -> BTreeSet<String> {
    let headings = page.lines().filter(|line| line.starts_with('#'));
    let anchor = |heading: &str| {
        let text = heading.trim_start_matches('#').trim().to_lowercase();
        let kept = text
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
        kept.map(|c| if c == ' ' { '-' } else { c }).collect()
    };
    headings.map(anchor).collect()
}

#[test]
fn each_link_of_the_pages_leads_somewhere() {
    let pages = pages();
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for (path, text) in &pages {
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.contains("://") {
                continue;
            }
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => without_parents(&path.parent().unwrap().join(file)),
            };
            let place = path.display();
            assert!(root.join(&target).exists(), "{place}: {link}");
            let there = anchor.is_empty() || anchors(&pages[&target]).contains(anchor);
            assert!(there, "{place}: {link}");
        }
    }
}

#[test]
fn the_readme_leads_to_each_page() {
    let pages = pages();
    let reference = pages
        .keys()
        .filter(|path| path.parent() == Some(Path::new(DOCS)));
    for path in reference {
        let link = format!("]({})", path.display());
        assert!(README.contains(&link), "{link}");
    }
}

#[test]
fn the_architecture_is_a_map_that_leads_to_each_design_note() {
    let pages = pages();
    let map = &pages[Path::new("ARCHITECTURE.md")];
    assert!(map.split_whitespace().count() <= 1_500);
    let folder = Path::new(DOCS).join("design");
    for note in pages.keys().filter(|path| path.parent() == Some(&folder)) {
        let link = format!("]({})", note.display());
        assert!(map.contains(&link), "{link}");
    }
}

#[test]
fn each_of_the_ten_stops_of_the_tour_leads_to_a_function() {
    let docs = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs");
    let stops: Vec<_> = TOUR.split("\n## ").skip(1).collect();
    assert_eq!(stops.len(), 10);
    for stop in stops {
        let title = stop.lines().next().unwrap();
        let links: Vec<_> = stop.split("[`").skip(1).collect();
        assert!(!links.is_empty(), "{title}");
        for link in links {
            let (name, rest) = link.split_once("`](").unwrap();
            let path = docs.join(rest.split(')').next().unwrap());
            let source = std::fs::read_to_string(&path).unwrap_or_default();
            let defined = source.contains(&format!("fn {name}("));
            assert!(defined, "{title}: {name} in {}", path.display());
        }
    }
}

/// The sources of the daemon, the programs and the types that both share.
fn sources() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let crates = ["", "-common", "-ebpf"];
    let mut folders: Vec<PathBuf> = crates
        .map(|name| root.join(format!("session-enforcer{name}/src")))
        .into();
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else {
                let text = std::fs::read_to_string(&path).unwrap();
                sources.push((path, text));
            }
        }
    }
    sources
}

/// Code such as `judge::judge` or `Session::SHUT` in a note: the first name is that of a module's file or of a type,
/// and a source that defines it, or uses it where it is a type, has the second.
#[test]
fn names_in_the_design_notes_are_in_the_code() {
    let sources = sources();
    let has = |text: &str, word: &str| {
        let is_part = |c: char| c.is_alphanumeric() || c == '_';
        text.split(|c| !is_part(c)).any(|found| found == word)
    };
    let mut missing = Vec::new();
    for (page, text) in pages() {
        let of_tests = ["reports.md", "testing.md"].map(|name| page.ends_with(name));
        let is_note = page.starts_with(Path::new(DOCS).join("design")) && of_tests == [false; 2];
        let codes = text.split('`').skip(1).step_by(2);
        for code in codes.filter(|_| is_note) {
            let names: Vec<_> = code.split("::").collect();
            let [first, second] = names[..] else {
                continue;
            };
            if !code.contains(char::is_alphabetic) || first.starts_with("session_enforcer") {
                continue;
            }
            let is_there = sources.iter().any(|(path, source)| {
                let is_module = path.file_stem().unwrap() == first
                    || path.parent().is_some_and(|folder| folder.ends_with(first))
                    || source.contains(&format!("mod {first} {{"));
                let is_type = first.starts_with(char::is_uppercase) && has(source, first);
                (is_module || is_type) && has(source, second)
            });
            if !is_there {
                missing.push(format!("{}: {code}", page.display()));
            }
        }
    }
    assert_eq!(missing, Vec::<String>::new());
}

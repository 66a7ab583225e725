//! The test programs. They are built on this machine and run in the virtual one.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::plan::Program;
use crate::arch::Arch;
use crate::build::TEST_OF_DAEMON;
use crate::workspace::Workspace;

/// The test program of whole hosts. Its tests need a machine each.
pub(super) const HOST: &str = "host";

/// Time limit of a program, in seconds. Under emulation the longest part takes a tenth of it.
const LIMIT_SECONDS: u64 = 1200;

/// A test program without modules, or one module of a suite. Each part runs as a process of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Part {
    program: String,
    module: Option<String>,
    /// Modules of the program whose tests libtest would also run, because it looks for the filter anywhere in a name.
    others: Vec<String>,
}

impl Part {
    /// A program without modules.
    fn whole(program: &str) -> Self {
        Self {
            program: program.to_owned(),
            module: None,
            others: Vec::new(),
        }
    }

    /// The name of the module, or of the program if it has no modules. All names differ.
    pub(super) fn name(&self) -> &str {
        self.module.as_ref().unwrap_or(&self.program)
    }

    /// The filter arguments for the tests that `words` select.
    fn filters(&self, words: &[String]) -> Vec<String> {
        let Some(module) = &self.module else {
            return words.to_vec();
        };
        let of_module = |start: &str| format!("{module}::{start}");
        let mut filters: Vec<String> = if words.is_empty() {
            vec![of_module("")]
        } else {
            words.iter().map(|word| of_module(word)).collect()
        };
        for other in &self.others {
            filters.extend(["--skip".to_owned(), format!("{other}::")]);
        }
        filters
    }
}

/// All parts. The `main.rs` of a suite names its modules. They are read from the sources, because programs for another
/// architecture cannot list their tests here.
pub(super) fn parts(workspace: &Workspace) -> Result<Vec<Part>> {
    let folder = workspace.root().join("tests").join("tests");
    let mut parts = Vec::new();
    let read = || -> io::Result<Vec<PathBuf>> {
        let entries = fs::read_dir(&folder)?;
        entries.map(|entry| Ok(entry?.path())).collect()
    };
    let mut paths = read().with_context(|| format!("cannot read {}", folder.display()))?;
    paths.sort();
    for path in paths {
        let name = path.file_stem().and_then(OsStr::to_str);
        let program = name.context("the name of a test file is not UTF-8")?;
        if path.is_file() {
            parts.push(Part::whole(program));
        } else if let Ok(main) = fs::read_to_string(path.join("main.rs")) {
            parts.extend(modules(program, &main));
        }
    }
    Ok(parts)
}

/// The modules of a test program, which its `main.rs` names.
fn modules(program: &str, main: &str) -> Vec<Part> {
    let named = |line: &str| {
        line.strip_prefix("mod ")?
            .strip_suffix(';')
            .map(str::to_owned)
    };
    let names: Vec<String> = main.lines().filter_map(named).collect();
    let part = |name: &String| {
        let others = names
            .iter()
            .filter(|other| *other != name && other.ends_with(name));
        Part {
            program: program.to_owned(),
            module: Some(name.clone()),
            others: others.cloned().collect(),
        }
    };
    names.iter().map(part).collect()
}

/// A part with the path of its program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Built {
    part: Part,
    path: PathBuf,
}

impl Built {
    pub(super) fn name(&self) -> &str {
        self.part.name()
    }

    /// The process that runs the tests that `words` select (all if there are none), `threads` at a time.
    pub(super) fn program(&self, threads: usize, words: &[String]) -> Program {
        self.named(self.name(), threads, self.part.filters(words))
    }

    /// The process that runs the tests of a module whose names contain one of these words, one after the other.
    pub(super) fn part(&self, module: &str, words: &[String]) -> Program {
        self.named(&format!("{}-{module}", self.name()), 1, words.to_vec())
    }

    fn named(&self, name: &str, threads: usize, words: Vec<String>) -> Program {
        let mut arguments = vec![format!("--test-threads={threads}")];
        arguments.extend(words);
        Program {
            name: name.to_owned(),
            path: self.path.clone(),
            arguments,
            limit_seconds: LIMIT_SECONDS,
        }
    }
}

/// The selected parts, each with the words that select its tests; without words, all of its tests.
pub(super) type Chosen<T> = Vec<(T, Vec<String>)>;

/// Builds the test programs of the selected parts; static ones for another architecture, and its daemon. If everything
/// was selected, programs that `cargo test` does not run are left out, except the tests of whole hosts.
pub(super) fn build(
    workspace: &Workspace,
    foreign: Option<Arch>,
    mut chosen: Chosen<Part>,
    is_all: bool,
) -> Result<Chosen<Built>> {
    let mut paths = BTreeMap::new();
    if is_all {
        paths.extend(build_some(workspace, foreign, &["--tests"])?);
        paths.extend(build_some(workspace, foreign, &["--test", HOST])?);
        // The unit tests of the harness are none of the files.
        let is_named = |name: &str| chosen.iter().any(|(part, _)| part.program == name);
        let unnamed = paths.keys().filter(|name| !is_named(name));
        let unnamed: Vec<_> = unnamed
            .map(|name| (Part::whole(name), Vec::new()))
            .collect();
        chosen.extend(unnamed);
    } else {
        let programs: BTreeSet<&str> = chosen
            .iter()
            .map(|(part, _)| part.program.as_str())
            .collect();
        let which: Vec<&str> = programs.iter().flat_map(|name| ["--test", name]).collect();
        paths.extend(build_some(workspace, foreign, &which)?);
    }
    let built = chosen.into_iter().filter_map(|(part, words)| {
        let path = paths.get(&part.program)?.clone();
        Some((Built { part, path }, words))
    });
    Ok(built.collect())
}

/// Builds test programs. Returns their names and paths.
fn build_some(
    workspace: &Workspace,
    foreign: Option<Arch>,
    which: &[&str],
) -> Result<Vec<(String, PathBuf)>> {
    let mut cargo = match foreign {
        Some(arch) => workspace.cargo_for(arch)?,
        None => workspace.cargo(),
    };
    cargo
        .args(["test", "--no-run", "--package", "session-enforcer-tests"])
        .args(which);
    if foreign.is_some() {
        // One build for both: that of an integration test includes the binaries of its package.
        cargo.args(["--package", "session-enforcer", "--test", TEST_OF_DAEMON]);
    }
    cargo
        .arg("--message-format=json-render-diagnostics")
        .stderr(Stdio::inherit());
    let output = cargo.output().context("cannot start cargo")?;
    if !output.status.success() {
        bail!("the tests do not build ({})", output.status);
    }
    let text = String::from_utf8(output.stdout).context("cargo's messages are no text")?;
    text.lines()
        .filter_map(|line| artifact(line).transpose())
        .collect()
}

/// The test program in a message of cargo, if it announces one.
fn artifact(line: &str) -> Result<Option<(String, PathBuf)>> {
    let message: Value = serde_json::from_str(line).context("a message of cargo is no JSON")?;
    let is_test = message["reason"] == "compiler-artifact" && message["profile"]["test"] == true;
    let (Some(path), Some(name)) = (
        message["executable"].as_str(),
        message["target"]["name"].as_str(),
    ) else {
        return Ok(None);
    };
    Ok(is_test.then(|| (name.to_owned(), path.into())))
}

/// Selects parts by the words of the command line: `MODULE` or `PROGRAM`; `MODULE::START` for the tests of a module
/// whose names begin with START; `PROGRAM::PART`, for a program without modules, for the tests whose names contain PART.
/// The name of a module may follow that of its program. Without words everything is selected.
pub(super) fn chosen(parts: &[Part], words: &[String]) -> Result<Chosen<Part>> {
    if words.is_empty() {
        return Ok(parts.iter().map(|one| (one.clone(), Vec::new())).collect());
    }
    // A part without words of its own runs all of its tests.
    let mut chosen: Vec<(Part, Option<Vec<String>>)> = Vec::new();
    for word in words {
        for (part, rest) in named(parts, word)? {
            match chosen.iter_mut().find(|(one, _)| one == part) {
                Some((_, words)) => {
                    *words = words.take().zip(rest).map(|(mut words, rest)| {
                        words.push(rest.to_owned());
                        words
                    });
                }
                None => chosen.push((part.clone(), rest.map(|rest| vec![rest.to_owned()]))),
            }
        }
    }
    let chosen = chosen.into_iter();
    Ok(chosen
        .map(|(one, words)| (one, words.unwrap_or_default()))
        .collect())
}

/// The parts that a word names, with the filter for the names of their tests.
fn named<'a>(parts: &'a [Part], word: &'a str) -> Result<Vec<(&'a Part, Option<&'a str>)>> {
    let split = |word: &'a str| match word.split_once("::") {
        Some((name, rest)) => (name, Some(rest)),
        None => (word, None),
    };
    let (first, rest) = split(word);
    if let Some(part) = parts.iter().find(|part| part.name() == first) {
        return Ok(vec![(part, rest)]);
    }
    let mut of_program: Vec<_> = parts
        .iter()
        .filter(|part| part.program == first)
        .map(|part| (part, None))
        .collect();
    if let Some(rest) = rest {
        let (module, rest) = split(rest);
        of_program.retain(|(part, _)| part.name() == module);
        of_program.iter_mut().for_each(|one| one.1 = rest);
    }
    if of_program.is_empty() {
        let names: Vec<_> = parts.iter().map(Part::name).collect();
        bail!(
            "there is no test {word}; the tests are: {}",
            names.join(", ")
        );
    }
    Ok(of_program)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn some() -> Vec<Part> {
        let mut parts = modules(
            "sessions",
            "//! Doc.\n\nmod gate;\nmod idle;\n\nfn other() {}\n",
        );
        parts.push(Part::whole("verifier"));
        parts
    }

    fn words(words: &[&str]) -> Vec<String> {
        words.iter().map(|&word| word.into()).collect()
    }

    /// Names, and what each is started with.
    fn asked(asked: &[&str]) -> Vec<(String, Vec<String>)> {
        let chosen = chosen(&some(), &words(asked)).expect("all are there");
        let shown = |(part, words): &(Part, Vec<String>)| (part.name().into(), part.filters(words));
        chosen.iter().map(shown).collect()
    }

    #[test]
    fn only_test_programs_are_taken() {
        let test = r#"{"reason":"compiler-artifact","target":{"name":"idle"},"profile":{"test":true},"executable":"/t/idle-1"}"#;
        let found = artifact(test).expect("JSON").expect("a test program");
        assert_eq!(found, ("idle".to_owned(), "/t/idle-1".into()));
        let agent = test.replace("true", "false");
        assert_eq!(artifact(&agent).expect("JSON"), None);
        assert_eq!(
            artifact(r#"{"reason":"build-finished"}"#).expect("JSON"),
            None
        );
    }

    #[test]
    fn words_choose_programs_modules_and_tests_of_them() {
        let gate = || ("gate".to_owned(), words(&["gate::"]));
        let idle = || ("idle".to_owned(), words(&["idle::"]));
        let verifier = || ("verifier".to_owned(), Vec::new());
        assert_eq!(asked(&[]), [gate(), idle(), verifier()]);
        assert_eq!(asked(&["verifier", "idle"]), [verifier(), idle()]);
        assert_eq!(asked(&["sessions::idle"]), [idle()]);
        let two = ("gate".to_owned(), words(&["gate::frozen", "gate::late"]));
        assert_eq!(asked(&["gate::frozen", "sessions::gate::late"]), [two]);
        let part = ("verifier".to_owned(), words(&["has"]));
        assert_eq!(asked(&["verifier::has"]), [part]);
        for whole in [["sessions", "gate::frozen"], ["gate::frozen", "sessions"]] {
            assert_eq!(asked(&whole), [gate(), idle()]);
        }
        for none in ["gat", "sessions::gat", "gat::idle"] {
            let error = chosen(&some(), &words(&[none])).expect_err("none");
            assert!(
                error
                    .to_string()
                    .ends_with("the tests are: gate, idle, verifier"),
                "{error}"
            );
        }
    }

    #[test]
    fn a_module_whose_name_ends_that_of_another_is_run_without_that() {
        let parts = modules("sessions", "mod activity;\nmod not_activity;\n");
        let filters: Vec<_> = parts.iter().map(|part| part.filters(&[])).collect();
        let alone = words(&["activity::", "--skip", "not_activity::"]);
        assert_eq!(filters, [alone, words(&["not_activity::"])]);
    }

    /// Or a word would not say which is meant.
    #[test]
    fn no_module_has_the_name_of_another_or_of_a_program() {
        let parts = parts(&Workspace::find().expect("the workspace")).expect("the tests");
        let modules = parts.iter().map(Part::name);
        let names: Vec<&str> = modules.chain(suites(&parts)).collect();
        assert!(
            names.contains(&"idle") && names.contains(&HOST),
            "{names:?}"
        );
        for (index, name) in names.iter().enumerate() {
            assert!(!names[..index].contains(name), "{name}");
        }
    }

    #[test]
    fn each_file_of_a_suite_is_named_in_it() {
        let workspace = Workspace::find().expect("the workspace");
        let parts = parts(&workspace).expect("the tests");
        let mut named = 0;
        for suite in suites(&parts) {
            let folder = workspace.root().join("tests").join("tests").join(suite);
            for file in fs::read_dir(&folder).expect("the suite's folder") {
                let path = file.expect("a file").path();
                let name = path.file_stem().and_then(OsStr::to_str);
                let is_part = |part: &Part| part.program == suite && Some(part.name()) == name;
                assert!(
                    name == Some("main") || parts.iter().any(is_part),
                    "{}",
                    path.display()
                );
                named += 1;
            }
        }
        assert!(named > 60, "{named}");
    }

    #[test]
    fn each_test_of_the_heavy_suite_takes_its_turn() {
        let workspace = Workspace::find().expect("the workspace");
        let folder = workspace.root().join("tests/tests/heavy");
        for file in fs::read_dir(&folder).expect("the suite's folder") {
            let path = file.expect("a file").path();
            let text = fs::read_to_string(&path).expect("a source");
            let tests = text.matches("#[test]\n").count();
            let turns = text
                .matches("    let _turn = turn(module_path!());\n")
                .count();
            let is_main = path.ends_with("main.rs");
            assert!(is_main || tests == turns, "{}", path.display());
        }
    }

    fn suites(parts: &[Part]) -> BTreeSet<&str> {
        let suites = parts.iter().filter(|part| part.module.is_some());
        suites.map(|part| part.program.as_str()).collect()
    }
}

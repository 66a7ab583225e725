//! Builds the test programs for the machines.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::Stdio;

use anyhow::{Context as _, Result, bail};
use serde_json::Value;

use super::plan::Program;
use crate::arch::Arch;
use crate::workspace::Workspace;

/// The test program that needs a machine of its own.
pub(super) const HOST: &str = "host";

/// The time limit of a program in seconds. Under emulation the longest program takes a tenth of it.
const LIMIT_SECONDS: u64 = 1200;

/// A built test program.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Built {
    pub(super) name: String,
    path: PathBuf,
}

impl Built {
    /// Runs the whole program, or its tests whose names contain one of these words, with this many threads.
    pub(super) fn program(&self, threads: usize, words: &[String]) -> Program {
        self.named(&self.name, threads, words)
    }

    /// Runs the tests whose names contain one of these words, one at a time, under the name of a module.
    pub(super) fn part(&self, module: &str, words: &[String]) -> Program {
        self.named(&format!("{}-{module}", self.name), 1, words)
    }

    fn named(&self, name: &str, threads: usize, words: &[String]) -> Program {
        let mut arguments = vec![format!("--test-threads={threads}")];
        arguments.extend_from_slice(words);
        Program {
            name: name.to_owned(),
            path: self.path.clone(),
            arguments,
            limit_seconds: LIMIT_SECONDS,
        }
    }
}

/// Builds the privileged test programs that the words name (see [`chosen`]), including those of whole hosts;
/// without words, all of them. For another architecture they are static.
pub(super) fn build(
    workspace: &Workspace,
    foreign: Option<Arch>,
    words: &[String],
) -> Result<Vec<Built>> {
    let named: BTreeSet<&str> = words.iter().map(|word| program_of(word).0).collect();
    let mut built = Vec::new();
    if named.is_empty() {
        // `--tests` excludes programs that are not for `cargo test`.
        built.extend(build_some(workspace, foreign, &["--tests"])?);
        built.extend(build_some(workspace, foreign, &["--test", HOST])?);
    } else {
        let which: Vec<&str> = named.iter().flat_map(|name| ["--test", name]).collect();
        built.extend(build_some(workspace, foreign, &which)?);
    }
    built.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(built)
}

fn build_some(workspace: &Workspace, foreign: Option<Arch>, which: &[&str]) -> Result<Vec<Built>> {
    let mut cargo = match foreign {
        Some(arch) => workspace.cargo_for(arch)?,
        None => workspace.cargo(),
    };
    cargo
        .args(["test", "--no-run", "--package", "session-enforcer-tests"])
        .args(which)
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

/// The test program that a message of cargo announces.
fn artifact(line: &str) -> Result<Option<Built>> {
    let message: Value = serde_json::from_str(line).context("a message of cargo is no JSON")?;
    let is_test = message["reason"] == "compiler-artifact" && message["profile"]["test"] == true;
    let (Some(path), Some(name)) = (
        message["executable"].as_str(),
        message["target"]["name"].as_str(),
    ) else {
        return Ok(None);
    };
    Ok(is_test.then(|| Built {
        name: name.to_owned(),
        path: path.into(),
    }))
}

/// Splits a word into the program and the part of its tests' names.
fn program_of(word: &str) -> (&str, Option<&str>) {
    match word.split_once("::") {
        Some((name, part)) => (name, Some(part)),
        None => (word, None),
    }
}

/// The programs that the command line requests: `PROGRAM`, or `PROGRAM::PART` for its tests whose names
/// contain the part. Without words, all programs.
pub(super) fn chosen(built: &[Built], words: &[String]) -> Result<Vec<(Built, Vec<String>)>> {
    if words.is_empty() {
        return Ok(built.iter().map(|one| (one.clone(), Vec::new())).collect());
    }
    // `None` runs the whole program.
    let mut chosen: Vec<(Built, Option<Vec<String>>)> = Vec::new();
    for word in words {
        let (name, part) = program_of(word);
        let part = part.map(str::to_owned);
        let Some(found) = built.iter().find(|one| one.name == name) else {
            let names: Vec<_> = built.iter().map(|one| one.name.as_str()).collect();
            bail!(
                "there is no test program {name}; there are: {}",
                names.join(", ")
            );
        };
        match chosen.iter_mut().find(|(one, _)| one == found) {
            Some((_, parts)) => {
                *parts = parts.take().zip(part).map(|(mut parts, part)| {
                    parts.push(part);
                    parts
                });
            }
            None => chosen.push((found.clone(), part.map(|part| vec![part]))),
        }
    }
    let chosen = chosen.into_iter();
    Ok(chosen
        .map(|(one, parts)| (one, parts.unwrap_or_default()))
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(name: &str) -> Built {
        Built {
            name: name.to_owned(),
            path: name.into(),
        }
    }

    #[test]
    fn only_test_programs_are_taken() {
        let test = r#"{"reason":"compiler-artifact","target":{"name":"idle"},"profile":{"test":true},"executable":"/t/idle-1"}"#;
        let found = artifact(test).expect("JSON").expect("a test program");
        assert_eq!(
            (found.name.as_str(), found.path),
            ("idle", "/t/idle-1".into())
        );
        let agent = test.replace("true", "false");
        assert_eq!(artifact(&agent).expect("JSON"), None);
        assert_eq!(
            artifact(r#"{"reason":"build-finished"}"#).expect("JSON"),
            None
        );
    }

    #[test]
    fn words_choose_programs_and_parts_of_them() {
        let all = [built("gate"), built("idle")];
        let words =
            |words: &[&str]| -> Vec<String> { words.iter().map(|&word| word.into()).collect() };
        assert_eq!(chosen(&all, &[]).expect("all").len(), 2);
        let some = chosen(&all, &words(&["gate::frozen", "gate::late"])).expect("one");
        assert_eq!(some, [(built("gate"), words(&["frozen", "late"]))]);
        for whole in [["gate", "gate::frozen"], ["gate::frozen", "gate"]] {
            let found = chosen(&all, &words(&whole)).expect("one");
            assert_eq!(found, [(built("gate"), Vec::new())]);
        }
        let error = chosen(&all, &words(&["gat"])).expect_err("none");
        assert!(
            error.to_string().ends_with("there are: gate, idle"),
            "{error}"
        );
    }
}

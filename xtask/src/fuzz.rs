//! `cargo xtask fuzz`: runs each fuzz target from its seeds.
//!
//! cargo-fuzz builds the targets with libFuzzer. A stable compiler accepts the unstable options with
//! `RUSTC_BOOTSTRAP=1`. This command starts the programs itself, because cargo-fuzz would write its findings
//! beside the sources; here everything goes into the target directory.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::build::Profile;
use crate::process::{find_program, output_of, run, say};
use crate::rustc::Rustc;
use crate::setup::{lock, setup};
use crate::workspace::{Workspace, install, without_flags};

// The seeds' test is compiled from the same file.
#[expect(
    unreachable_pub,
    reason = "it is public in the crate of the fuzz targets"
)]
#[path = "../../tests/fuzz/src/seeds.rs"]
mod seeds;

const VERSION: &str = "0.13.2";

/// The maximum length of an input. Longer inputs reach nothing new.
const MAX_INPUT_BYTES: u32 = 4096;

/// After this time one input counts as a hang.
const MAX_SECONDS_EACH: u32 = 10;

/// What is fuzzed.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Target {
    /// Configuration files.
    Config,
    /// Netlink datagrams in which the kernel lists sockets.
    Netlink,
    /// Records in the ring buffer and the maps.
    Records,
    /// Packet headers.
    Packet,
}

impl Target {
    const ALL: [Self; 4] = [Self::Config, Self::Netlink, Self::Records, Self::Packet];

    fn name(self) -> &'static str {
        match self {
            Self::Config => "config",
            Self::Netlink => "netlink",
            Self::Records => "records",
            Self::Packet => "packet",
        }
    }
}

/// Arguments of `fuzz`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Target to run [default: all, one after another].
    target: Option<Target>,
    /// Time for each target, in seconds.
    #[arg(long, value_name = "N", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..))]
    seconds: u32,
}

/// Runs all targets, then fails if one has found something.
pub(crate) fn fuzz(workspace: &Workspace, args: &Args) -> Result<()> {
    setup(workspace)?;
    let cargo_fuzz = ensure_cargo_fuzz(workspace)?;
    let folder = workspace.target().join("fuzz");
    say!("building the fuzz targets (some minutes at first)");
    run(&mut build_command(workspace, &cargo_fuzz, &folder))?;
    let programs = folder.join(Rustc::find()?.host).join("release");
    let chosen = args.target.map_or(Target::ALL.to_vec(), |one| vec![one]);
    let mut failed = Vec::new();
    for target in chosen {
        let name = target.name();
        say!("{name}, for {} s", args.seconds);
        let places = Places::prepare(workspace, &folder, name)?;
        let program = programs.join(name);
        if let Err(error) = run(&mut places.command(&program, args.seconds)) {
            say!("{error:#}");
            say!(
                "the input is in {}; `{} FILE` runs it again",
                places.found.display(),
                program.display()
            );
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("these targets found something: {}", failed.join(", "));
    }
    Ok(())
}

/// The folders of a target's inputs.
struct Places {
    /// The seeds in the target's input format.
    seeds: PathBuf,
    /// Inputs of this and earlier runs that reach new code.
    corpus: PathBuf,
    /// Inputs at which the target failed.
    found: PathBuf,
    /// The dictionary of the target's format, if it has one.
    dictionary: PathBuf,
}

impl Places {
    fn prepare(workspace: &Workspace, folder: &Path, name: &str) -> Result<Self> {
        let sources = workspace.fuzz_crate();
        let of = |kind: &str| folder.join(kind).join(name);
        let places = Self {
            seeds: of("seeds"),
            corpus: of("corpus"),
            found: of("found"),
            dictionary: sources.join("dictionaries").join(name),
        };
        for place in [&places.seeds, &places.corpus, &places.found] {
            fs::create_dir_all(place)
                .with_context(|| format!("cannot create {}", place.display()))?;
        }
        let from = sources.join("seeds").join(name);
        let inputs = seeds::read(&from)
            .with_context(|| format!("cannot read the seeds in {}", from.display()))?;
        for (name, input) in inputs {
            let file = places.seeds.join(name);
            fs::write(&file, input).with_context(|| format!("cannot write {}", file.display()))?;
        }
        Ok(places)
    }

    fn command(&self, program: &Path, seconds: u32) -> Command {
        let mut command = Command::new(program);
        // libFuzzer writes new inputs into the first folder.
        command.arg(&self.corpus).arg(&self.seeds);
        let mut prefix = OsString::from("-artifact_prefix=");
        prefix.push(self.found.join(""));
        command.arg(prefix);
        if self.dictionary.exists() {
            let mut dictionary = OsString::from("-dict=");
            dictionary.push(&self.dictionary);
            command.arg(dictionary);
        }
        command.args([
            format!("-max_total_time={seconds}"),
            format!("-timeout={MAX_SECONDS_EACH}"),
            format!("-max_len={MAX_INPUT_BYTES}"),
            "-print_final_stats=1".to_owned(),
        ]);
        command
    }
}

/// Ensures that cargo-fuzz is installed in the pinned version.
fn ensure_cargo_fuzz(workspace: &Workspace) -> Result<PathBuf> {
    if find_program("c++", &[]).is_none() {
        bail!(
            "there is no C++ compiler (`c++`), which builds libFuzzer; remedy: install one, on \
             Debian the package g++"
        );
    }
    let _lock = lock(workspace)?;
    let folder = workspace.target().join("fuzz-tools");
    let program = folder.join("bin").join("cargo-fuzz");
    let stands = output_of(Command::new(&program).args(["fuzz", "--version"]))
        .is_ok_and(|version| version.trim().ends_with(VERSION));
    if !stands {
        say!("building cargo-fuzz {VERSION}, which builds the fuzz targets (a minute or so)");
        install("cargo-fuzz", VERSION, &folder, Profile::Release)?;
    }
    Ok(program)
}

fn build_command(workspace: &Workspace, cargo_fuzz: &Path, folder: &Path) -> Command {
    let mut command = Command::new(cargo_fuzz);
    command
        .args(["fuzz", "build", "--fuzz-dir"])
        .arg(workspace.fuzz_crate())
        .arg("--target-dir")
        .arg(folder)
        .env("RUSTC_BOOTSTRAP", "1");
    without_flags(&mut command);
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_target_has_seeds_and_a_program() {
        let workspace = Workspace::find().unwrap();
        let sources = workspace.fuzz_crate();
        for target in Target::ALL {
            let name = target.name();
            assert!(
                sources
                    .join("targets")
                    .join(name)
                    .with_extension("rs")
                    .exists()
            );
            assert!(
                !seeds::read(&sources.join("seeds").join(name))
                    .unwrap()
                    .is_empty()
            );
        }
    }
}

//! `cargo xtask vm`: runs the privileged tests on other kernels in virtual machines.
//!
//! The machine's root is this machine's file system, read-only below a layer in memory, so that it has every
//! service and test program. For another architecture, the root is a Debian for it that contains this
//! machine's project folders. The machine writes its results into a shared folder.

mod debugger;
mod guest;
mod initramfs;
mod kernels;
mod machine;
mod plan;
mod programs;
mod report;
mod system;

use std::collections::HashSet;
use std::env;
use std::fs::{self, File, TryLockError};
use std::iter;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use session_enforcer_tests::BINARY;

use self::initramfs::Inside;
use self::kernels::{Kernel, MATRIX};
use self::machine::{Accelerator, Machine};
use self::plan::{
    BOOTS, Boot, FAULTS, Hierarchy, OUTCOMES, Outcome, PLAN, Plan, Program, outcomes,
};
use self::programs::{Built, Chosen, HOST};
use self::report::{Ran, Results};
use crate::arch::Arch;
use crate::build::daemon_of_tests;
use crate::node;
use crate::packages::{self, Missing};
use crate::process::{run, say};
use crate::setup::setup;
use crate::workspace::Workspace;

pub(crate) use self::guest::guest;

/// Some kernels of the matrix, and the tests on each.
type Choice = &'static [(&'static str, &'static [&'static str])];

/// The choice of `--ci` for this machine's architecture: on the oldest kernel the tests that use each kernel interface
/// of the daemon once, on the newest one whole hosts.
const CI: Choice = &[
    ("6.1", &["verifier", "idle", "gate::nothing_passes"]),
    ("backports", &["verifier", HOST]),
];

/// The choice of `--ci` for another architecture, whose emulation is slower.
const CI_FOREIGN: Choice = &[("backports", &["verifier", "idle::an_idle_session"])];

/// The tests on another architecture if none are named.
const FOREIGN_TESTS: [&str; 4] = ["verifier", "idle", "gate::nothing_passes", HOST];

/// The results of the last run.
const RESULTS: &str = "results.json";

/// Arguments of `vm`.
#[derive(clap::Args)]
pub(crate) struct Args {
    /// Kernel to test: a name from `--list`, or a series such as 6.16. Can be given several times.
    /// [default: the whole matrix]
    #[arg(long, value_name = "VERSION")]
    kernel: Vec<String>,
    /// Architecture of the virtual machines. Another one than this machine's is emulated, with a small
    /// Debian as the root file system, and the default is then a selection of the tests.
    #[arg(long, default_value = "x86_64")]
    arch: Arch,
    /// List the kernels of the matrix.
    #[arg(long)]
    list: bool,
    /// Run a selection of the tests on the oldest and the newest kernel at the same time; for another
    /// architecture on the newest one.
    #[arg(long, conflicts_with_all = ["kernel", "tests", "machines"])]
    ci: bool,
    /// Download the newest kernels, even if older ones have been downloaded.
    #[arg(long)]
    update: bool,
    /// Number of virtual machines that run at the same time.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    machines: u8,
    /// Processors of each virtual machine.
    #[arg(long, value_name = "N", default_value_t = 2)]
    processors: u32,
    /// Time limit of each virtual machine, in minutes.
    #[arg(long, value_name = "N", default_value_t = 90)]
    minutes: u64,
    /// Do not install packages. If any are missing, print their names and fail.
    #[arg(long)]
    no_install: bool,
    /// Tests to run [default: all]: a test module such as `idle`, or `MODULE::START` for the tests of a
    /// module whose names begin with START; a test program such as `sessions`; for tests of whole hosts,
    /// `host::MODULE` or `host::MODULE::START`.
    #[arg(last = true, value_name = "TEST")]
    tests: Vec<String>,
}

impl Args {
    /// The choice of `--ci`, if that is asked for.
    fn ci_choice(&self) -> Option<Choice> {
        let choice = if self.arch == Arch::HOST {
            CI
        } else {
            CI_FOREIGN
        };
        self.ci.then_some(choice)
    }

    /// Whether this kernel runs the tests of this name.
    fn includes(&self, kernel: &str, test: &str) -> bool {
        let Some(ci) = self.ci_choice() else {
            return true;
        };
        let is_it = |word: &&str| word.split("::").next() == Some(test);
        ci.iter()
            .any(|(name, tests)| *name == kernel && tests.iter().any(is_it))
    }

    /// The kernels, the tests, and the number of machines that run at the same time.
    fn choice(&self) -> (Vec<String>, Vec<String>, usize) {
        let owned = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        if let Some(ci) = self.ci_choice() {
            let kernels: Vec<&str> = ci.iter().map(|(kernel, _)| *kernel).collect();
            let mut tests: Vec<&str> = ci.iter().flat_map(|(_, tests)| *tests).copied().collect();
            tests.sort_unstable();
            tests.dedup();
            return (owned(&kernels), owned(&tests), kernels.len());
        }
        let tests = if self.arch == Arch::HOST || !self.tests.is_empty() {
            self.tests.clone()
        } else {
            owned(&FOREIGN_TESTS)
        };
        let mut kernels = if self.kernel.is_empty() {
            owned(&MATRIX.map(|wanted| wanted.name))
        } else {
            self.kernel.clone()
        };
        // Each kernel has one folder, so remove duplicates.
        let mut named = HashSet::new();
        kernels.retain(|name| named.insert(name.clone()));
        (kernels, tests, self.machines.into())
    }
}

/// Runs the tests on each kernel, then fails if a required one failed.
pub(crate) fn vm(workspace: &Workspace, args: &Args) -> Result<()> {
    let folder = folder(workspace, args.arch);
    if args.list {
        kernels::list(&folder);
        return Ok(());
    }
    if !cfg!(target_arch = "x86_64") {
        bail!("this machine is not x86-64: `cargo xtask vm` needs an x86-64 machine");
    }
    if let Some(own) = guest::hidden_by(workspace.target()) {
        bail!(
            "the virtual machines mount their own {own}, which hides {}: move the checkout to a folder \
             outside of {own}",
            workspace.target().display()
        );
    }
    let _alone = alone_in(&folder)?;
    let (names, tests, machines) = args.choice();
    check_modules(&tests)?;
    let chosen = programs::chosen(&programs::parts(workspace)?, &tests)?;
    let missing = Missing::unless(args.no_install);
    let foreign = (args.arch != Arch::HOST).then_some(args.arch);
    if foreign.is_none() {
        packages::ensure(&packages::TESTS, missing)?;
        node::ensure(workspace, missing)?;
    }
    packages::ensure(&[packages::qemu(args.arch)], missing)?;
    packages::ensure(&packages::VIRTUAL_MACHINES, missing)?;
    packages::ensure(&packages::SHARING, missing)?;
    setup(workspace)?;
    let mut kernels = Vec::new();
    let mut all = Vec::new();
    for name in &names {
        match kernels::kernel(&folder, args.arch, name, args.update) {
            Ok(kernel) => kernels.push(kernel),
            // The other kernels can still be tested.
            Err(error) => {
                say!("{error:#}");
                let must_pass = kernels::is_meant(name) || args.kernel.contains(name);
                all.push(Results::unfetched(name, must_pass, &error));
            }
        }
    }
    let first = kernels.first().context("no kernel is available")?;
    let accelerator = Accelerator::find(first)?;
    say!("the machines run with {accelerator:?}");
    let inside = inside(workspace, foreign, &folder)?;
    let chosen = programs::build(workspace, foreign, chosen, tests.is_empty())?;
    let job = Job {
        accelerator,
        inside,
        daemon: match foreign {
            Some(arch) => workspace.target_for(arch).join("debug/session-enforcer"),
            None => daemon_of_tests(workspace)?,
        },
        chosen,
        folder,
        machines,
        args,
    };
    all.extend(job.run_all(&kernels)?);
    report(&job.folder, &all)
}

/// The folder of all machines of an architecture.
fn folder(workspace: &Workspace, arch: Arch) -> PathBuf {
    let all = workspace.target().join("vm");
    if arch == Arch::HOST {
        all
    } else {
        all.join(arch.name())
    }
}

/// This machine's files, or a root file system for another architecture with xtask and the project folders.
fn inside(workspace: &Workspace, foreign: Option<Arch>, folder: &Path) -> Result<Inside> {
    let Some(arch) = foreign else {
        return Ok(Inside {
            guest: env::current_exe().context("cannot determine the path of this program")?,
            system: None,
            folders: Vec::new(),
        });
    };
    run(workspace
        .cargo_for(arch)?
        .args(["build", "--package", "xtask"]))?;
    Ok(Inside {
        guest: workspace.target_for(arch).join("debug/xtask"),
        system: Some(system::ensure(folder, arch)?),
        folders: vec![workspace.root().to_owned(), workspace.target().to_owned()],
    })
}

/// Locks the folder for this run and removes the results of the previous run. Two runs would delete each
/// other's files.
fn alone_in(folder: &Path) -> Result<File> {
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))?;
    let path = folder.join("lock");
    let lock = File::create(&path).with_context(|| format!("cannot open {}", path.display()))?;
    match lock.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => bail!(
            "another `cargo xtask vm` is running in {}: wait for it",
            folder.display()
        ),
        Err(TryLockError::Error(error)) => {
            return Err(error).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    let results = folder.join(RESULTS);
    if results.exists() {
        fs::remove_file(&results)
            .with_context(|| format!("cannot remove {}", results.display()))?;
    }
    Ok(lock)
}

fn report(folder: &Path, all: &[Results]) -> Result<()> {
    let path = folder.join(RESULTS);
    fs::write(&path, serde_json::to_string_pretty(all)?)
        .with_context(|| format!("writing {}", path.display()))?;
    print!("{}", report::table(all));
    say!(
        "results: {}; the output of all programs is in the same folder",
        path.display()
    );
    let bad = all
        .iter()
        .filter(|results| results.must_pass && !results.is_green());
    let bad: Vec<_> = bad.map(|results| results.release.as_str()).collect();
    if !bad.is_empty() {
        bail!("tests failed on {}", bad.join(", "));
    }
    Ok(())
}

/// The work on each kernel.
struct Job<'a> {
    accelerator: Accelerator,
    inside: Inside,
    daemon: PathBuf,
    chosen: Chosen<Built>,
    machines: usize,
    folder: PathBuf,
    args: &'a Args,
}

impl Job<'_> {
    /// Runs all kernels, some at a time. Results are in the given order.
    fn run_all(&self, kernels: &[Kernel]) -> Result<Vec<Results>> {
        let next = AtomicUsize::new(0);
        let run_some = || -> Vec<(usize, Results)> {
            let take = || {
                let index = next.fetch_add(1, Ordering::Relaxed);
                Some((index, kernels.get(index)?))
            };
            let taken = iter::from_fn(take);
            taken
                .map(|(index, kernel)| (index, self.tried(kernel)))
                .collect()
        };
        let mut all = thread::scope(|scope| -> Result<Vec<_>> {
            let machines = 0..self.machines.min(kernels.len());
            let threads: Vec<_> = machines.map(|_| scope.spawn(run_some)).collect();
            let mut all = Vec::new();
            for thread in threads {
                all.extend(thread.join().ok().context("a machine's thread panicked")?);
            }
            Ok(all)
        })?;
        all.sort_by_key(|(index, _)| *index);
        Ok(all.into_iter().map(|(_, results)| results).collect())
    }

    /// Runs one kernel. A failure to run it is also a result.
    fn tried(&self, kernel: &Kernel) -> Results {
        self.run(kernel).unwrap_or_else(|error| {
            say!("{}: {error:#}", kernel.release);
            Results::untried(
                &kernel.name,
                kernel.release.clone(),
                self.must_pass(kernel),
                &error,
            )
        })
    }

    /// Runs one kernel. Failures in the machine are results; an error means that it was not tested.
    fn run(&self, kernel: &Kernel) -> Result<Results> {
        let shared = self.folder.join("runs").join(&kernel.name);
        let initramfs = self.prepare(kernel, &shared)?;
        let plan = self.plan(kernel)?;
        fs::write(shared.join(PLAN), serde_json::to_string_pretty(&plan)?)?;
        let machine = Machine {
            kernel,
            accelerator: self.accelerator,
            initramfs: &initramfs,
            shared: &shared,
            processors: self.args.processors,
            memory_mib: 3072,
        };
        let limit = Duration::from_secs(self.args.minutes * 60);
        let start = Instant::now();
        let mut told = 0;
        let ended = machine.run(limit, || {
            told = tell(kernel, &shared, told);
            plan.awaited(begun_boots(&shared)?, told)
        });
        let seconds = start.elapsed().as_secs_f64();
        let done = ended_programs(&shared);
        let expected: usize = plan.boots.iter().map(|boot| boot.programs.len()).sum();
        let faults = fs::read_to_string(shared.join(FAULTS)).unwrap_or_default();
        let error = match ended {
            Err(error) => Some(format!("{error:#}")),
            Ok(()) if done.len() < expected => Some(format!(
                "{} of {expected} programs ended; {}",
                done.len(),
                machine.last_words()
            )),
            Ok(()) => None,
        };
        let faults = (!faults.is_empty()).then(|| format!("faults inside:\n{faults}"));
        let errors: Vec<String> = error.into_iter().chain(faults).collect();
        let error = (!errors.is_empty()).then(|| errors.join("\n"));
        Ok(Results {
            kernel: kernel.name.clone(),
            release: kernel.release.clone(),
            must_pass: self.must_pass(kernel),
            error,
            seconds,
            programs: done.iter().map(|outcome| ran(&shared, outcome)).collect(),
        })
    }

    /// Creates an empty folder for the run and the initramfs.
    fn prepare(&self, kernel: &Kernel, shared: &Path) -> Result<PathBuf> {
        if shared.exists() {
            fs::remove_dir_all(shared)
                .with_context(|| format!("cannot remove {}", shared.display()))?;
        }
        fs::create_dir_all(shared)
            .with_context(|| format!("cannot create {}", shared.display()))?;
        fs::write(shared.join(BOOTS), "0")?;
        let initramfs = shared.join("initramfs");
        initramfs::write(kernel, &self.inside, &initramfs)?;
        Ok(initramfs)
    }

    fn plan(&self, kernel: &Kernel) -> Result<Plan> {
        let daemon = self
            .daemon
            .to_str()
            .context("the path of the daemon is not UTF-8")?;
        let path = match self.inside.system {
            Some(_) => system::PATH.to_owned(),
            None => env::var("PATH").context("the environment variable PATH is not set")?,
        };
        let variables = [
            (BINARY, daemon),
            ("PATH", path.as_str()),
            ("HOME", "/root"),
            ("LANG", "C.UTF-8"),
            ("RUST_BACKTRACE", "1"),
        ];
        let slower = self.accelerator.slower();
        let slower = slower.map(|factor| ("SESSION_ENFORCER_SLOWER", factor));
        let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        Ok(Plan {
            modules: kernel.modules(),
            environment: variables.into_iter().chain(slower).map(own).collect(),
            boots: self.boots(kernel),
        })
    }

    /// Whether the run tests the daemon's refusal on an unsupported kernel.
    fn is_below_floor(&self, kernel: &Kernel) -> bool {
        kernel.refused && self.args.tests.is_empty()
    }

    /// Whether failed tests fail the run.
    fn must_pass(&self, kernel: &Kernel) -> bool {
        kernel.supported || self.is_below_floor(kernel)
    }

    fn boots(&self, kernel: &Kernel) -> Vec<Boot> {
        if !self.is_below_floor(kernel) {
            return self.boots_of_suite(kernel);
        }
        let host = self.chosen.iter().find(|(built, _)| built.name() == HOST);
        host.map(|(host, _)| BELOW_FLOOR.boot(host, &[]))
            .into_iter()
            .collect()
    }

    /// The test suite on a system like one with systemd, then the tests of whole hosts.
    fn boots_of_suite(&self, kernel: &Kernel) -> Vec<Boot> {
        let chosen = self.chosen.iter();
        let chosen = chosen.filter(|(built, _)| self.args.includes(&kernel.name, built.name()));
        let (hosts, suite): (Vec<_>, Vec<_>) = chosen.partition(|(built, _)| built.name() == HOST);
        let threads = self.accelerator.tests_at_once();
        let suite = suite
            .iter()
            .map(|(built, words)| built.program(threads, words));
        let mut boots = vec![Boot {
            hierarchy: Hierarchy::Unified,
            bpffs: true,
            sock_destroy: true,
            at_once: self.accelerator.programs_at_once(),
            programs: suite.collect(),
        }];
        for (host, words) in hosts {
            boots.extend(STAGES.iter().map(|stage| stage.boot(host, words)));
        }
        boots.retain(|boot| !boot.programs.is_empty());
        boots
    }
}

/// A boot for tests of whole hosts, with the test modules that belong to it.
struct Stage {
    modules: &'static [&'static str],
    hierarchy: Hierarchy,
    sock_destroy: bool,
}

/// The boots in order. None has bpffs mounted, because the tests include that the daemon mounts it.
const STAGES: [Stage; 4] = [
    Stage {
        modules: &["hybrid"],
        hierarchy: Hierarchy::Hybrid,
        sock_destroy: true,
    },
    Stage {
        modules: &["unified", "before_restart"],
        hierarchy: Hierarchy::Unified,
        sock_destroy: true,
    },
    Stage {
        modules: &["after_restart"],
        hierarchy: Hierarchy::Unified,
        sock_destroy: true,
    },
    Stage {
        modules: &["without_destroy"],
        hierarchy: Hierarchy::Unified,
        sock_destroy: false,
    },
];

/// The boot for kernels older than the supported ones.
const BELOW_FLOOR: Stage = Stage {
    modules: &["below_floor"],
    hierarchy: Hierarchy::Unified,
    sock_destroy: true,
};

impl Stage {
    fn boot(&self, host: &Built, words: &[String]) -> Boot {
        Boot {
            hierarchy: self.hierarchy,
            bpffs: false,
            sock_destroy: self.sock_destroy,
            at_once: 1,
            programs: self.programs(host, words),
        }
    }

    /// The tests of its modules; with `words`, only those that match.
    fn programs(&self, host: &Built, words: &[String]) -> Vec<Program> {
        let of_module = |module: &&str| {
            let whole = format!("{module}::");
            if words.is_empty() || words.iter().any(|word| word == module) {
                return Some(host.part(module, &[whole]));
            }
            let parts = words.iter().filter(|word| word.starts_with(&whole));
            let parts: Vec<String> = parts.cloned().collect();
            (!parts.is_empty()).then(|| host.part(module, &parts))
        };
        self.modules.iter().filter_map(of_module).collect()
    }
}

/// Checks that a boot exists for the requested tests of whole hosts.
fn check_modules(tests: &[String]) -> Result<()> {
    let modules: Vec<&str> = STAGES
        .iter()
        .flat_map(|stage| stage.modules)
        .copied()
        .collect();
    for test in tests {
        let Some(part) = test
            .strip_prefix(HOST)
            .and_then(|rest| rest.strip_prefix("::"))
        else {
            continue;
        };
        let module = part.split("::").next().unwrap_or(part);
        if !modules.contains(&module) {
            bail!(
                "{HOST} has no module {module}; it has {}: write {HOST}::MODULE or \
                 {HOST}::MODULE::START",
                modules.join(", ")
            );
        }
    }
    Ok(())
}

fn ran(shared: &Path, outcome: &Outcome) -> Ran {
    let log = fs::read(shared.join(format!("{}.log", outcome.name))).unwrap_or_default();
    Ran::new(outcome, &String::from_utf8_lossy(&log))
}

/// The number of started boots. `None` if the number is just being written.
fn begun_boots(shared: &Path) -> Option<usize> {
    let text = fs::read_to_string(shared.join(BOOTS)).ok()?;
    text.trim().parse().ok()
}

fn ended_programs(shared: &Path) -> Vec<Outcome> {
    let text = fs::read_to_string(shared.join(OUTCOMES)).unwrap_or_default();
    outcomes(&text).unwrap_or_default()
}

/// Reports newly ended programs. Returns the total number of reported ones.
fn tell(kernel: &Kernel, shared: &Path, told: usize) -> usize {
    let ended = ended_programs(shared);
    for outcome in ended.iter().skip(told) {
        let ran = ran(shared, outcome);
        say!("{}: {}", kernel.release, report::line(&ran));
    }
    ended.len()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_hosts_tests_are_asked_for_by_module() {
        let check = |word: &str| check_modules(&[word.to_owned()]);
        for word in [
            "host",
            "host::hybrid",
            "host::unified::reboot",
            "gate::late",
        ] {
            check(word).expect(word);
        }
        let error = check("host::wall_clock").expect_err("no module");
        assert!(
            error.to_string().contains("it has hybrid, unified"),
            "{error}"
        );
    }
}

//! `cargo xtask dist`: builds the published files of a release.
//!
//! These are static binaries with separate debug information, a Debian package, an RPM, a tarball with an
//! install script, a container image, an SBOM, and checksums. The build is reproducible: the same sources
//! give the same bytes in any folder.

mod image;
mod sbom;
mod tools;
mod trial;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use self::tools::Tool;
use crate::arch::Arch;
use crate::build::Profile;
use crate::process::{output_of, run, say};
use crate::rustc::Rustc;
use crate::setup::setup;
use crate::workspace::Workspace;

const NAME: &str = "session-enforcer";

/// Arguments of `dist`.
#[derive(clap::Args, Default)]
pub(crate) struct Args {
    /// Architecture to build for [default: all].
    #[arg(long)]
    arch: Option<Arch>,
    /// Build again in another folder, and fail if a byte differs. Runs before `--test`.
    #[arg(long)]
    twice: bool,
    /// Install the Debian package in containers with systemd, and run the image in podman. Needs root.
    #[arg(long)]
    test: bool,
    /// Build quickly and with debug assertions, make no RPM, and test in one Debian release only, as CI does. The result
    /// is not meant to be published.
    #[arg(long)]
    debug: bool,
}

/// Builds the release in the target directory.
pub(crate) fn dist(workspace: &Workspace, args: &Args) -> Result<()> {
    let archs = args.arch.map_or(Arch::ALL.to_vec(), |one| vec![one]);
    if args.test {
        trial::prepare(&archs)?;
    }
    setup(workspace)?;
    let out = workspace.target().join("dist");
    let profile = Profile::debug_if(args.debug);
    let tools = tools::ensure(workspace, profile)?;
    let plan = Plan {
        tools,
        archs,
        profile,
        epoch: source_date(workspace)?,
    };
    plan.build(workspace, &out)?;
    if args.twice {
        plan.build_again(workspace, &out)?;
    }
    if args.test {
        trial::run_in_machines(workspace, &out, profile)?;
    }
    println!("{}", out.display());
    Ok(())
}

/// What both builds of a release have in common.
struct Plan {
    tools: tools::Tools,
    archs: Vec<Arch>,
    profile: Profile,
    /// The time stamp of all files and packages, in seconds since 1970.
    epoch: String,
}

impl Plan {
    /// Builds the release of a checkout.
    fn build(&self, checkout: &Workspace, out: &Path) -> Result<()> {
        renew(out)?;
        let release = Release {
            checkout,
            plan: self,
            version: version(checkout)?,
            // The stage folder is not published.
            stage: checkout.target().join("dist-stage"),
            out: out.to_owned(),
        };
        renew(&release.stage)?;
        release.make()
    }

    /// Builds a copy of the sources and compares the results.
    fn build_again(&self, workspace: &Workspace, first: &Path) -> Result<()> {
        let folder = workspace.target().join("dist-again");
        say!("building a second time, in {}", folder.display());
        renew(&folder)?;
        let checkout = workspace.copy_sources(&folder)?;
        let second = folder.join("dist");
        self.build(&checkout, &second)?;
        let sums = |out: &Path| {
            let path = out.join("SHA256SUMS");
            fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        let (one, other) = (sums(first)?, sums(&second)?);
        let differing = differing(&one, &other);
        ensure!(
            differing.is_empty(),
            "two builds of the same sources differ in {}; compare the files of {} and {}",
            differing.join(", "),
            first.display(),
            second.display()
        );
        say!("both builds are identical");
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))
    }
}

/// The files whose checksums differ between two lists, or that one list lacks.
fn differing<'a>(one: &'a str, other: &'a str) -> Vec<&'a str> {
    let lines = |sums: &'a str| sums.lines().collect::<BTreeSet<_>>();
    let (one, other) = (lines(one), lines(other));
    // Each line has the checksum, two spaces and the name.
    let name = |line: &&'a str| line.split_once("  ").map_or(*line, |(_, name)| name);
    let names: BTreeSet<_> = one.symmetric_difference(&other).map(name).collect();
    names.into_iter().collect()
}

/// A release that is being built.
struct Release<'a> {
    checkout: &'a Workspace,
    plan: &'a Plan,
    version: String,
    stage: PathBuf,
    out: PathBuf,
}

impl Release<'_> {
    fn make(&self) -> Result<()> {
        say!("the manual pages and completions");
        let pages = self.stage.join("pages");
        self.pages(&pages)?;
        for arch in &self.plan.archs {
            say!("the binary for {}", arch.name());
            self.one(*arch, &pages)?;
        }
        let sbom = self.out.join(format!("{NAME}-{}.cdx.json", self.version));
        fs::write(&sbom, sbom::of(self.checkout)?)
            .with_context(|| format!("cannot write {}", sbom.display()))?;
        self.checksums()
    }

    /// Generates the pages from the library, which knows the command line and the configuration keys.
    fn pages(&self, pages: &Path) -> Result<()> {
        let mut cargo = self.checkout.cargo();
        cargo.args(["run", "--quiet", "--package", NAME, "--example", "pages"]);
        run(cargo.arg("--").arg(pages))?;
        for entry in list(&pages.join("man"))? {
            run(Command::new("gzip").args(["-9n", "--"]).arg(entry))?;
        }
        let changelog = pages.join("changelog.Debian");
        fs::write(&changelog, self.debian_changelog()?)
            .with_context(|| format!("cannot write {}", changelog.display()))?;
        run(Command::new("gzip").args(["-9n", "--"]).arg(changelog))
    }

    fn debian_changelog(&self) -> Result<String> {
        let mut date = Command::new("date");
        date.args(["--utc", "--rfc-email", "--date"]);
        let date = output_of(date.arg(format!("@{}", self.plan.epoch)).env("LC_ALL", "C"))?;
        Ok(format!(
            "{NAME} ({}-1) unstable; urgency=medium\n\n  * What is new is in CHANGELOG.md.\n\n \
             -- {}  {}",
            self.version,
            maintainer(self.checkout)?,
            date
        ))
    }

    fn one(&self, arch: Arch, pages: &Path) -> Result<()> {
        let binary = self.binary(arch)?;
        // Both packagers expect the binary in TARGET_DIR/TRIPLE/release.
        let folder = self.stage.join(arch.triple()).join("release");
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        self.strip(arch, &binary, &folder.join(NAME))?;
        run(Command::new("cp").arg("-r").arg(pages).arg(&folder))?;
        self.deb(arch)?;
        if let Profile::Release = self.plan.profile {
            self.rpm(arch)?;
        }
        self.tarball(arch, &folder)?;
        self.image(arch, &folder.join(NAME))
    }

    /// Builds the daemon without paths of the build machine in the binary.
    fn binary(&self, arch: Arch) -> Result<PathBuf> {
        arch.ensure_target()?;
        let rustc = Rustc::find()?;
        let remap = |from: &Path, to: &str| format!("--remap-path-prefix={}={to}", from.display());
        let flags = [
            "-Clinker=rust-lld".to_owned(),
            remap(&cargo_home()?, "/cargo"),
            remap(&rustc.sysroot.join("lib/rustlib/src/rust"), "/rust"),
            remap(self.checkout.target(), "/target"),
            remap(self.checkout.root(), NAME),
        ];
        let profile = self.plan.profile;
        let mut cargo = self.checkout.cargo();
        cargo
            .env("CARGO_PROFILE_RELEASE_LTO", "thin")
            .args([
                "build",
                "--locked",
                "--profile",
                profile.name(),
                "--package",
                NAME,
            ])
            .arg("--target")
            .arg(arch.triple())
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
        run(&mut cargo)?;
        let folder = self.checkout.target().join(arch.triple());
        Ok(folder.join(profile.folder()).join(NAME))
    }

    /// Moves the debug information into a separate file that debuggers find beside the binary.
    fn strip(&self, arch: Arch, binary: &Path, stripped: &Path) -> Result<()> {
        let rustc = Rustc::find()?;
        let objcopy = rustc
            .sysroot
            .join("lib/rustlib")
            .join(&rustc.host)
            .join("bin/rust-objcopy");
        let name = format!("{NAME}-{}-{}.debug", self.version, arch.name());
        let debug = self.out.join(&name);
        let objcopy = || Command::new(&objcopy);
        run(objcopy().arg("--only-keep-debug").arg(binary).arg(&debug))?;
        let mut strip = objcopy();
        strip
            .arg("--strip-all")
            .arg(format!("--add-gnu-debuglink={name}"));
        run(strip.arg(binary).arg(stripped).current_dir(&self.out))
    }

    fn deb(&self, arch: Arch) -> Result<()> {
        let name = format!("{NAME}_{}-1_{}.deb", self.version, arch.debian());
        let mut deb = self.packager(Tool::Deb, arch);
        deb.args(["--no-build", "--no-strip", "--quiet", "--output"]);
        run(deb.arg(self.out.join(name)))
    }

    fn rpm(&self, arch: Arch) -> Result<()> {
        let name = format!("{NAME}-{}-1.{}.rpm", self.version, arch.name());
        let mut rpm = self.packager(Tool::Rpm, arch);
        rpm.args(["--auto-req", "disabled", "--target-dir"]);
        rpm.arg(&self.stage).arg("--output");
        run(rpm.arg(self.out.join(name)))
    }

    fn packager(&self, tool: Tool, arch: Arch) -> Command {
        let mut packager = self.plan.tools.command(tool);
        packager
            .args(["--package", NAME, "--target"])
            .arg(arch.triple())
            .current_dir(self.checkout.root())
            .env("CARGO_TARGET_DIR", &self.stage)
            .env("SOURCE_DATE_EPOCH", &self.plan.epoch);
        packager
    }

    fn tarball(&self, arch: Arch, built: &Path) -> Result<()> {
        let name = format!("{NAME}-{}-{}", self.version, arch.name());
        let folder = self.stage.join(&name);
        fs::create_dir_all(&folder)
            .with_context(|| format!("cannot create {}", folder.display()))?;
        let root = self.checkout.root();
        let packaging = root.join(NAME).join("packaging");
        let mut copy = Command::new("cp");
        copy.arg("-r")
            .arg(built.join(NAME))
            .arg(built.join("pages/man"));
        copy.arg(built.join("pages/completions"));
        for file in [
            "config.toml",
            "install.sh",
            "session-enforcer.catalog",
            "session-enforcer.logrotate",
            "session-enforcer.service",
        ] {
            copy.arg(packaging.join(file));
        }
        for file in ["CHANGELOG.md", "LICENSE-APACHE", "LICENSE-MIT", "README.md"] {
            copy.arg(root.join(file));
        }
        run(copy.arg(&folder))?;
        let mut tar = Command::new("tar");
        tar.args(["--create", "--sort=name", "--owner=0", "--group=0"]);
        tar.args(["--numeric-owner", "--mode=u=rwX,go=rX"]);
        tar.arg(format!("--mtime=@{}", self.plan.epoch));
        tar.args(["--use-compress-program=gzip -9n", "--file"]);
        tar.arg(self.out.join(format!("{name}.tar.gz")));
        run(tar.arg("--directory").arg(&self.stage).arg(&name))
    }

    fn image(&self, arch: Arch, binary: &Path) -> Result<()> {
        let name = format!("{NAME}-{}-{}.oci.tar", self.version, arch.name());
        let stage = self.stage.join("image").join(arch.name());
        let source = self.checkout.root().join(NAME).join("packaging/container");
        let image = image::Image {
            arch,
            version: &self.version,
            epoch: &self.plan.epoch,
            binary,
            source: &source,
            stage: &stage,
        };
        image.archive(&self.out.join(name))
    }

    fn checksums(&self) -> Result<()> {
        let names = list(&self.out)?;
        let names = names.iter().filter_map(|path| path.file_name());
        let mut sum = Command::new("sha256sum");
        let sums = output_of(sum.args(names).current_dir(&self.out))?;
        let path = self.out.join("SHA256SUMS");
        fs::write(&path, sums).with_context(|| format!("cannot write {}", path.display()))
    }
}

/// Creates an empty folder.
fn renew(folder: &Path) -> Result<()> {
    if folder.exists() {
        fs::remove_dir_all(folder)
            .with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(folder).with_context(|| format!("cannot create {}", folder.display()))
}

/// The files of a folder, sorted by name.
fn list(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries =
        fs::read_dir(folder).with_context(|| format!("cannot list {}", folder.display()))?;
    let mut paths = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<std::io::Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

/// cargo's metadata of the daemon's package.
fn package(checkout: &Workspace) -> Result<serde_json::Value> {
    let mut cargo = checkout.cargo();
    let text = output_of(cargo.args(["metadata", "--locked", "--no-deps", "--format-version=1"]))?;
    let metadata: serde_json::Value = serde_json::from_str(&text)?;
    let packages = metadata["packages"].as_array().into_iter().flatten();
    let own = packages.into_iter().find(|package| package["name"] == NAME);
    own.cloned()
        .context("cargo knows no package session-enforcer")
}

pub(crate) fn version(checkout: &Workspace) -> Result<String> {
    let package = package(checkout)?;
    let version = package["version"].as_str();
    Ok(version.context("the package has no version")?.to_owned())
}

fn maintainer(checkout: &Workspace) -> Result<String> {
    let package = package(checkout)?;
    let maintainer = package["metadata"]["deb"]["maintainer"].as_str();
    Ok(maintainer
        .context("no package.metadata.deb.maintainer")?
        .to_owned())
}

/// The time of the sources: `SOURCE_DATE_EPOCH`, otherwise that of the last commit.
fn source_date(workspace: &Workspace) -> Result<String> {
    if let Some(epoch) = env::var_os("SOURCE_DATE_EPOCH") {
        return Ok(epoch.to_string_lossy().into_owned());
    }
    let mut git = Command::new("git");
    git.args(["log", "-1", "--format=%ct"])
        .current_dir(workspace.root());
    let epoch = output_of(&mut git)
        .context("cannot read the date of the last commit; without git, set SOURCE_DATE_EPOCH")?;
    Ok(epoch.trim().to_owned())
}

fn cargo_home() -> Result<PathBuf> {
    if let Some(home) = env::var_os("CARGO_HOME") {
        return Ok(home.into());
    }
    let home = env::home_dir().context("neither CARGO_HOME nor HOME is set")?;
    Ok(home.join(".cargo"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_differ_or_are_in_one_build_only_are_named() {
        let one = "aa  x.deb\nbb  x.rpm\ncc  x.tar.gz\n";
        assert!(differing(one, one).is_empty());
        assert_eq!(
            differing(one, "aa  x.deb\nb0  x.rpm\n"),
            ["x.rpm", "x.tar.gz"]
        );
        assert_eq!(differing("", "aa  x.deb\n"), ["x.deb"]);
    }
}

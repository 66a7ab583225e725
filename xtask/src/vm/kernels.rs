//! Fetches Debian's cloud kernels and unpacks them without installing them.

use std::cmp::Reverse;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::apt::PrivateApt;
use crate::arch::Arch;
use crate::process::{find_program, output_of, run, say};

/// A kernel of the matrix: the newest release of a series in a suite.
pub(super) struct Wanted {
    pub(super) name: &'static str,
    suite: &'static str,
    /// The prefix of its version. Empty for the newest kernel.
    series: &'static str,
    /// Whether session-enforcer must work on it.
    pub(super) supported: bool,
}

const fn wanted(name: &'static str, suite: &'static str, series: &'static str) -> Wanted {
    Wanted {
        name,
        suite,
        series,
        supported: true,
    }
}

/// The matrix, oldest first. The suites have code names, so that a new Debian release does not change their
/// kernels.
pub(super) const MATRIX: [Wanted; 6] = [
    Wanted {
        supported: false,
        ..wanted("5.10", "bullseye", "5.10")
    },
    wanted("6.1", "bookworm", "6.1"),
    wanted("6.12", "trixie", "6.12"),
    wanted("6.18", "trixie-backports", "6.18"),
    wanted("backports", "trixie-backports", ""),
    wanted("experimental", "experimental", ""),
];

/// Suites to search for a series outside the matrix.
const SUITES: [&str; 5] = [
    "trixie-backports",
    "sid",
    "experimental",
    "bookworm-backports",
    "bullseye-backports",
];

/// The number of releases of a series to try in a suite.
const MAX_RELEASES: usize = 5;

/// An unpacked kernel.
#[derive(Debug)]
pub(super) struct Kernel {
    /// Its architecture.
    pub(super) arch: Arch,
    /// The requested name: a name of the matrix or a series.
    pub(super) name: String,
    /// Its `uname -r`.
    pub(super) release: String,
    /// The folder with `vmlinuz` and `lib/modules`.
    pub(super) folder: PathBuf,
    /// Whether session-enforcer must work on it.
    pub(super) supported: bool,
    /// Whether session-enforcer is known not to work on it.
    pub(super) refused: bool,
}

impl Kernel {
    pub(super) fn image(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    pub(super) fn modules(&self) -> PathBuf {
        self.folder.join("lib/modules")
    }
}

/// The kernel of this name, or the newest of this series. `base` is the machines' folder of the architecture.
/// Fetches the kernel if it is missing or if `update` is set.
pub(super) fn kernel(base: &Path, arch: Arch, name: &str, update: bool) -> Result<Kernel> {
    let folder = folder(base, name);
    if update || known_release(&folder).is_none() {
        fetch(base, arch, name, &folder).with_context(|| format!("fetching the kernel {name}"))?;
    }
    let release = known_release(&folder).context("the kernel has just been unpacked")?;
    let listed = MATRIX.iter().find(|wanted| wanted.name == name);
    Ok(Kernel {
        arch,
        name: name.to_owned(),
        supported: listed.map_or_else(|| is_supported(&release), |wanted| wanted.supported),
        refused: listed.is_some_and(|wanted| !wanted.supported),
        release,
        folder,
    })
}

/// Whether session-enforcer must work on the kernel of this name, whatever its release is.
pub(super) fn is_meant(name: &str) -> bool {
    let listed = MATRIX.iter().find(|wanted| wanted.name == name);
    listed.map_or_else(|| is_supported(name), |wanted| wanted.supported)
}

/// Linux 6.1 is the oldest supported version.
fn is_supported(release: &str) -> bool {
    numbers(release) >= vec![6, 1]
}

/// Prints the matrix.
pub(super) fn list(base: &Path) {
    for wanted in &MATRIX {
        let release = known_release(&folder(base, wanted.name));
        let release = release.unwrap_or_else(|| "not fetched yet".to_owned());
        let note = if wanted.supported {
            ""
        } else {
            "  (below the floor)"
        };
        println!(
            "{:<13} {:<24} {release}{note}",
            wanted.name,
            format!("Debian {}", wanted.suite)
        );
    }
    println!("or a series that a suite of Debian has, such as 6.16");
}

fn folder(base: &Path, name: &str) -> PathBuf {
    base.join("kernels").join(name)
}

fn known_release(folder: &Path) -> Option<String> {
    fs::read_to_string(folder.join("release")).ok()
}

fn fetch(base: &Path, arch: Arch, name: &str, folder: &Path) -> Result<()> {
    if !name
        .chars()
        .all(|letter| letter.is_ascii_alphanumeric() || letter == '.')
    {
        bail!("{name:?} is neither a name of `cargo xtask vm --list` nor a series like 6.16");
    }
    let listed = MATRIX.iter().find(|wanted| wanted.name == name);
    let (suites, series) = listed.map_or((&SUITES[..], name), |wanted| {
        (std::slice::from_ref(&wanted.suite), wanted.series)
    });
    if listed.is_none() && numbers(series).is_empty() {
        bail!("{name:?} is neither a name of `cargo xtask vm --list` nor a series like 6.16");
    }
    let apt = PrivateApt::of(base.join("apt"), arch)?;
    let fetched = fetch_from(&apt, arch, suites, series, folder);
    apt.remove();
    fetched
}

/// Fetches the newest kernel of a series from the first suite that has all of its packages.
fn fetch_from(
    apt: &PrivateApt,
    arch: Arch,
    suites: &[&str],
    series: &str,
    folder: &Path,
) -> Result<()> {
    let mut tried = Vec::new();
    for suite in suites {
        // Mirrors may lack some suites, so continue.
        let releases = match apt.open(suite).and_then(|()| releases(apt, arch, series)) {
            Ok(releases) => releases,
            Err(error) => {
                tried.push(format!("{suite}: {error:#}"));
                continue;
            }
        };
        if releases.is_empty() {
            tried.push(format!("{suite} has none"));
        }
        // A suite may list a release without some of its packages.
        for release in releases.into_iter().take(MAX_RELEASES) {
            match unpack(apt, &release, folder) {
                Ok(()) => return Ok(()),
                Err(error) => tried.push(format!("{suite}: {release}: {error:#}")),
            }
        }
    }
    bail!("no such kernel for clouds: {}", tried.join("; "))
}

/// The releases of a series, newest first.
fn releases(apt: &PrivateApt, arch: Arch, series: &str) -> Result<Vec<String>> {
    let packages = apt.names(&format!("^linux-image-[0-9].*-cloud-{}$", arch.debian()))?;
    let releases = packages.iter().filter_map(|package| release_of(package));
    Ok(newest_first(releases, series))
}

fn release_of(package: &str) -> Option<&str> {
    package.strip_prefix("linux-image-")
}

fn newest_first<'a>(releases: impl Iterator<Item = &'a str>, series: &str) -> Vec<String> {
    let series = numbers(series);
    let of_series = releases.filter(|release| numbers(release).starts_with(&series));
    let mut found: Vec<_> = of_series.map(str::to_owned).collect();
    found.sort_by_cached_key(|release| Reverse(numbers(release)));
    found
}

/// The numbers of a release without the flavour, for sorting.
fn numbers(release: &str) -> Vec<u32> {
    let version = release.split("-cloud").next().unwrap_or(release);
    let groups = version.split(|letter: char| !letter.is_ascii_digit());
    // In `6.12.107+deb13` the last number is Debian's.
    groups.filter_map(|group| group.parse().ok()).collect()
}

/// Creates a kernel's folder, or keeps the existing one.
fn unpack(apt: &PrivateApt, release: &str, folder: &Path) -> Result<()> {
    say!(
        "fetching Linux {release}, to unpack it into {}",
        folder.display()
    );
    let mut half = folder.as_os_str().to_owned();
    half.push(".partial");
    let half = PathBuf::from(half);
    remove(&half)?;
    let made = unpack_into(apt, release, &half).and_then(|()| {
        remove(folder)?;
        fs::rename(&half, folder).with_context(|| format!("cannot rename to {}", folder.display()))
    });
    made.inspect_err(|_| drop(remove(&half)))
}

/// Unpacks image and modules with their index. Writes the release name last, as a mark of completeness.
fn unpack_into(apt: &PrivateApt, release: &str, half: &Path) -> Result<()> {
    fs::create_dir_all(half).with_context(|| format!("cannot create {}", half.display()))?;
    let package = apt.fetch(&format!("linux-image-{release}"))?;
    let depends = output_of(
        Command::new("dpkg-deb")
            .arg("--field")
            .arg(&package)
            .arg("Depends"),
    )?;
    extract(&package, half)?;
    let mut lacking = Vec::new();
    for part in parts(&depends, release) {
        match apt.fetch(part) {
            Ok(package) => extract(&package, half)?,
            // A suite may lack a package that is not needed here.
            Err(error) => lacking.push(format!("{error:#}")),
        }
    }
    arrange(half, release).with_context(|| lacking.join("; "))
}

fn extract(package: &Path, folder: &Path) -> Result<()> {
    run(Command::new("dpkg-deb")
        .arg("--extract")
        .arg(package)
        .arg(folder))
}

/// Parses the packages that newer kernels are split into from a package's dependencies.
fn parts<'a>(depends: &'a str, release: &str) -> Vec<&'a str> {
    let names = depends
        .split(',')
        .filter_map(|item| item.split_whitespace().next());
    names
        .filter(|name| name.starts_with("linux-") && name.ends_with(release))
        .collect()
}

/// Moves image and modules to the places that [`Kernel`] documents, independent of the package's layout.
fn arrange(folder: &Path, release: &str) -> Result<()> {
    let modules = folder.join("lib/modules");
    if !modules.exists() {
        fs::create_dir_all(folder.join("lib"))
            .and_then(|()| fs::rename(folder.join("usr/lib/modules"), &modules))
            .context("the package has no modules")?;
    }
    let places = [
        folder.join(format!("boot/vmlinuz-{release}")),
        modules.join(release).join("vmlinuz"),
    ];
    let image = places.iter().find(|place| place.is_file());
    let image = image.context("the package has no image")?;
    fs::rename(image, folder.join("vmlinuz"))?;
    output_of(
        Command::new(find_program("depmod", &[]).context("there is no depmod")?)
            .arg("-b")
            .arg(folder)
            .arg(release),
    )?;
    fs::write(folder.join("release"), release)?;
    Ok(())
}

fn remove(folder: &Path) -> Result<()> {
    if !folder.exists() {
        return Ok(());
    }
    fs::remove_dir_all(folder).with_context(|| format!("cannot remove {}", folder.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_is_made_of_whole_numbers_and_the_newest_counts_as_numbers() {
        let releases = [
            "6.1.0-9-cloud-amd64",
            "6.1.0-50-cloud-amd64",
            "6.12.95+deb13-cloud-amd64",
            "6.12.107+deb13-cloud-amd64",
            "7.3-cloud-amd64",
        ];
        let newest = |series| {
            let found = newest_first(releases.into_iter(), series);
            found.into_iter().next()
        };
        assert_eq!(newest("6.1").as_deref(), Some("6.1.0-50-cloud-amd64"));
        assert_eq!(
            newest("6.12").as_deref(),
            Some("6.12.107+deb13-cloud-amd64")
        );
        assert_eq!(newest("").as_deref(), Some("7.3-cloud-amd64"));
        assert_eq!(newest("5.15"), None);
        assert!(is_supported("6.1.0-50-cloud-amd64"));
        assert!(is_supported("7.3-cloud-amd64"));
        assert!(!is_supported("5.10.0-32-cloud-amd64"));
    }

    #[test]
    fn the_parts_of_a_kernel_are_those_of_its_release() {
        let release = "7.2.11+deb13-cloud-amd64";
        let depends = "dracut | initramfs-tools (>= 0.120), linux-base-7.2.11+deb13-cloud-amd64 (= 7.2.11-1), \
                       linux-modules-7.2.11+deb13-cloud-amd64 (= 7.2.11-1), linux-base (>= 4)";
        assert_eq!(
            parts(depends, release),
            [
                "linux-base-7.2.11+deb13-cloud-amd64",
                "linux-modules-7.2.11+deb13-cloud-amd64"
            ]
        );
        assert!(parts("kmod, linux-base (>= 4.3~)", release).is_empty());
    }

    #[test]
    fn each_kernel_of_the_matrix_has_a_name_of_its_own() {
        let mut names: Vec<_> = MATRIX.iter().map(|wanted| wanted.name).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), MATRIX.len());
    }
}

//! Fetches single Debian packages without changing the system's apt.
//!
//! This apt has its own sources, lists and cache in a folder of the project. It takes from the machine's
//! configuration only the mirrors, how to reach them (proxies, certificates), and the archive's keys.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::arch::Arch;
use crate::process::{find_program, output_of, say};

/// Suites with recent compilers, the most likely and smallest ones first. These names of Debian stay valid
/// after its next release.
const SUITES: [&str; 5] = [
    "stable-backports",
    "unstable",
    "testing",
    "stable",
    "oldstable-backports",
];

/// The keys of Debian's archive, as installed by the package debian-archive-keyring.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// An apt with its own state.
pub(crate) struct PrivateApt {
    folder: PathBuf,
    mirrors: Vec<String>,
    /// The architecture of the packages. `None` for that of this machine.
    arch: Option<Arch>,
}

impl PrivateApt {
    /// An apt for packages of this machine's architecture.
    pub(crate) fn new(folder: PathBuf) -> Result<Self> {
        Self::made(folder, None)
    }

    /// An apt for packages of another architecture.
    pub(crate) fn of(folder: PathBuf, arch: Arch) -> Result<Self> {
        Self::made(folder, Some(arch))
    }

    fn made(folder: PathBuf, arch: Option<Arch>) -> Result<Self> {
        for program in ["apt-get", "apt-cache", "apt-config", "dpkg-deb", "tar"] {
            if find_program(program, &[]).is_none() {
                bail!("this is no Debian-like system: there is no {program}");
            }
        }
        // This prints the URIs of an update. It works for any user and needs no lists.
        let listing = output_of(Command::new("apt-get").args([
            "--print-uris",
            "-o",
            "Debug::NoLocking=1",
            "update",
        ]))?;
        let mirrors = mirrors(&listing);
        if mirrors.is_empty() {
            bail!("apt has no sources: /etc/apt/sources.list and sources.list.d name no mirror");
        }
        for part in ["lists/partial", "cache/archives/partial", "sources"] {
            let path = folder.join(part);
            fs::create_dir_all(&path)
                .with_context(|| format!("cannot create {}", path.display()))?;
        }
        let apt = Self {
            folder,
            mirrors,
            arch,
        };
        apt.write("status", "")?;
        apt.write("apt.conf", &apt.configuration()?)?;
        Ok(apt)
    }

    /// Downloads `package` in the upstream version `release` from the first suite that has it.
    pub(crate) fn download(&self, package: &str, release: &str) -> Result<PathBuf> {
        let mut tried = Vec::new();
        for mirror in &self.mirrors {
            for suite in SUITES {
                match self.version_in(mirror, suite, package, release) {
                    Ok(Some(version)) => {
                        say!("found {package} {version} in {suite}");
                        return self.fetch(&format!("{package}={version}"));
                    }
                    Ok(None) => tried.push(format!("{suite} of {mirror} has another version")),
                    // Most mirrors lack some of the suites, so continue.
                    Err(error) => tried.push(format!("{suite} of {mirror}: {error:#}")),
                }
            }
        }
        bail!(
            "{package} {release} is not to be found:\n  {}",
            tried.join("\n  ")
        )
    }

    /// Finds the version in one suite. `fetch` then uses the lists of this suite.
    fn version_in(
        &self,
        mirror: &str,
        suite: &str,
        package: &str,
        release: &str,
    ) -> Result<Option<String>> {
        self.open_at(mirror, suite)?;
        let offered = output_of(self.tool("apt-cache").args(["madison", package]))?;
        Ok(version_of(&offered, release).map(str::to_owned))
    }

    /// Reads a suite's lists from the first mirror that has them. `names` and `fetch` then use this suite.
    pub(crate) fn open(&self, suite: &str) -> Result<()> {
        let mut tried = Vec::new();
        for mirror in &self.mirrors {
            match self.open_at(mirror, suite) {
                Ok(()) => return Ok(()),
                Err(error) => tried.push(format!("{mirror}: {error:#}")),
            }
        }
        bail!("{}", tried.join("; "))
    }

    fn open_at(&self, mirror: &str, suite: &str) -> Result<()> {
        self.write("sources/one.sources", &source(mirror, suite))?;
        // By default apt treats an unreachable mirror as a success.
        let strict = ["-o", "APT::Update::Error-Mode=any"];
        output_of(self.tool("apt-get").args(strict).arg("update")).map(drop)
    }

    /// The names of the open suite's packages that match a regular expression.
    pub(crate) fn names(&self, expression: &str) -> Result<Vec<String>> {
        let mut search = self.tool("apt-cache");
        let found = output_of(search.args(["search", "--names-only", expression]))?;
        let names = found.lines().filter_map(|line| line.split(' ').next());
        Ok(names.map(str::to_owned).collect())
    }

    /// Removes lists, cache and packages after use.
    pub(crate) fn remove(&self) {
        if let Err(error) = fs::remove_dir_all(&self.folder) {
            say!(
                "{} is of no more use but cannot be removed: {error}",
                self.folder.display()
            );
        }
    }

    /// Downloads a package, `NAME` or `NAME=VERSION`, from the open suite.
    pub(crate) fn fetch(&self, package: &str) -> Result<PathBuf> {
        let place = self.folder.join("packages").join(package);
        // The remains of an aborted download would be taken for the package.
        let _ = fs::remove_dir_all(&place);
        fs::create_dir_all(&place).with_context(|| format!("cannot create {}", place.display()))?;
        let mut download = self.tool("apt-get");
        output_of(download.arg("download").arg(package).current_dir(&place))?;
        let entries =
            fs::read_dir(&place).with_context(|| format!("cannot list {}", place.display()))?;
        entries
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get left no package in {}", place.display()))
    }

    /// Downloads packages with all their dependencies from the open suite.
    pub(crate) fn fetch_whole(&self, packages: &[&str]) -> Result<Vec<PathBuf>> {
        let mut install = self.tool("apt-get");
        // Nothing is installed, so the system's lock is not needed.
        install
            .args(["--yes", "--no-install-recommends", "--download-only"])
            .args(["-o", "Debug::NoLocking=1", "install"])
            .args(packages);
        output_of(&mut install)?;
        let cache = self.folder.join("cache/archives");
        let entries =
            fs::read_dir(&cache).with_context(|| format!("cannot list {}", cache.display()))?;
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let mut packages: Vec<_> = paths
            .filter(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .collect();
        packages.sort();
        Ok(packages)
    }

    fn tool(&self, name: &str) -> Command {
        let mut tool = Command::new(name);
        tool.env("APT_CONFIG", self.folder.join("apt.conf"));
        tool
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.folder.join(name);
        fs::write(&path, text).with_context(|| format!("cannot write {}", path.display()))
    }

    fn configuration(&self) -> Result<String> {
        let machine = output_of(Command::new("apt-config").arg("dump"))?;
        let folder = &self.folder;
        let at = |part: &str| folder.join(part).display().to_string();
        let own = [
            ("Dir::State", at("")),
            ("Dir::State::lists", at("lists")),
            ("Dir::State::status", at("status")),
            ("Dir::Cache", at("cache")),
            ("Dir::Etc::sourcelist", "/dev/null".to_owned()),
            ("Dir::Etc::sourceparts", at("sources")),
            // Do not read the machine's files again: their hooks would run as root on the machine's state.
            ("Dir::Etc::main", "/dev/null".to_owned()),
            ("Dir::Etc::parts", "/dev/null".to_owned()),
            ("Dir::Etc::preferences", "/dev/null".to_owned()),
            ("Dir::Etc::preferencesparts", "/dev/null".to_owned()),
            // apt's own user may be unable to read the folder. Signatures are checked in any case.
            ("APT::Sandbox::User", "root".to_owned()),
        ];
        let mut text = transport(&machine);
        let arch = self
            .arch
            .map(|arch| ("APT::Architecture", arch.debian().to_owned()));
        for (key, value) in own.into_iter().chain(arch) {
            text.push_str(&format!("{key} \"{value}\";\n"));
        }
        if let Some(arch) = self.arch {
            text.push_str(&format!(
                "APT::Architectures {{ \"{}\"; }};\n",
                arch.debian()
            ));
        }
        Ok(text)
    }
}

/// Parses the mirrors from the output of `apt-get --print-uris update`, in the machine's order.
fn mirrors(listing: &str) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for line in listing.lines() {
        let Some(uri) = line
            .strip_prefix('\'')
            .and_then(|rest| rest.split('\'').next())
        else {
            continue;
        };
        let Some((mirror, _)) = uri.split_once("/dists/") else {
            continue;
        };
        // The security archive has none of the wanted suites.
        if !mirror.ends_with("-security") && !found.iter().any(|known| known == mirror) {
            found.push(mirror.to_owned());
        }
    }
    found
}

/// The settings of `apt-config dump` for reaching a mirror, without the index targets.
fn transport(dump: &str) -> String {
    dump.lines()
        .filter(|line| line.starts_with("Acquire::") && !line.starts_with("Acquire::IndexTargets"))
        .flat_map(|line| [line, "\n"])
        .collect()
}

/// One entry of apt's sources.
fn source(mirror: &str, suite: &str) -> String {
    let mut entry = format!("Types: deb\nURIs: {mirror}\nSuites: {suite}\nComponents: main\n");
    // Without the file, the keys that apt trusts for all sources apply.
    if Path::new(KEYRING).is_file() {
        entry.push_str(&format!("Signed-By: {KEYRING}\n"));
    }
    entry
}

/// The package version of an upstream release, from the output of `apt-cache madison`.
fn version_of<'a>(offered: &'a str, release: &str) -> Option<&'a str> {
    offered
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|version| {
            // 1.95.0+dfsg1-2 and 1.95.0-1 are 1.95.0; 1.95.0~beta.3 and 1.95.01 are not.
            let rest = version.strip_prefix(release);
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(['+', '-']))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrors_come_in_order_once_each_and_without_security() {
        let listing = "\
'http://mirror.test/debian/dists/bookworm/InRelease' mirror.test_debian_dists_bookworm_InRelease 0 
'http://mirror.test/debian/dists/bookworm-updates/InRelease' mirror.test_x 0 
'http://mirror.test/debian-security/dists/bookworm-security/InRelease' mirror.test_y 0 
'mirror+file:/etc/apt/mirrors.list/dists/bookworm/main/binary-amd64/Packages.xz' z 0 
'http://flat.test/repo/./InRelease' flat.test 0 
Reading package lists...
";
        assert_eq!(
            mirrors(listing),
            [
                "http://mirror.test/debian",
                "mirror+file:/etc/apt/mirrors.list"
            ]
        );
    }

    #[test]
    fn no_sources_give_no_mirrors() {
        assert!(mirrors("").is_empty());
    }

    #[test]
    fn the_way_to_the_mirror_is_kept_and_hooks_are_not() {
        let dump = "\
APT::Update::Post-Invoke:: \"rm -f /var/cache/apt/*.bin\";
Dir::Etc::parts \"apt.conf.d\";
Acquire::http::Proxy \"http://proxy.test:3128\";
Acquire::IndexTargets::deb::DEP-11::MetaKey \"x\";
Acquire::Languages:: \"none\";
";
        assert_eq!(
            transport(dump),
            "Acquire::http::Proxy \"http://proxy.test:3128\";\nAcquire::Languages:: \"none\";\n"
        );
    }

    #[test]
    fn only_the_exact_release_is_taken() {
        let offered = "\
  rust-src | 1.96.1+dfsg1-2~bpo13+1 | http://mirror.test/debian stable-backports/main amd64 Packages
  rust-src | 1.95.0~beta.3+dfsg1-1 | http://mirror.test/debian stable-backports/main amd64 Packages
  rust-src | 1.95.0+dfsg1-2~bpo13+1 | http://mirror.test/debian stable-backports/main amd64 Packages
";
        assert_eq!(
            version_of(offered, "1.95.0"),
            Some("1.95.0+dfsg1-2~bpo13+1")
        );
        assert_eq!(
            version_of(offered, "1.96.1"),
            Some("1.96.1+dfsg1-2~bpo13+1")
        );
        assert_eq!(version_of(offered, "1.96"), None);
        assert_eq!(version_of(offered, "1.97.0"), None);
        assert_eq!(version_of("", "1.95.0"), None);
    }

    #[test]
    fn a_source_names_mirror_and_suite() {
        let entry = source("http://mirror.test/debian", "unstable");
        assert!(
            entry.contains("URIs: http://mirror.test/debian\nSuites: unstable\n"),
            "{entry}"
        );
    }
}

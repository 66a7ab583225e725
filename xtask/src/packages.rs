//! The real servers and clients that tests, benchmarks and virtual machines run.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use crate::arch::Arch;
use crate::process::{as_root, find_program, run, say};

/// A program or Python module, the Debian package that contains it, and its purpose.
#[derive(Clone, Copy)]
pub(crate) struct Need {
    kind: Kind,
    program: &'static str,
    package: &'static str,
    why: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Program,
    /// A module of the distribution's Python.
    Module,
}

const fn need(program: &'static str, package: &'static str, why: &'static str) -> Need {
    Need {
        kind: Kind::Program,
        program,
        package,
        why,
    }
}

const fn client(module: &'static str, package: &'static str) -> Need {
    Need {
        kind: Kind::Module,
        program: module,
        package,
        why: "a Python client whose connection is reset",
    }
}

const fn server(module: &'static str, package: &'static str) -> Need {
    Need {
        kind: Kind::Module,
        program: module,
        package,
        why: "both ends of a protocol",
    }
}

/// The programs of the privileged tests. They are looked up by program and not by package, so that other
/// distributions' or self-built ones are accepted.
pub(crate) const TESTS: [Need; 42] = [
    need("ip", "iproute2", "network namespaces and addresses"),
    need(
        "ss",
        "iproute2",
        "a second opinion on what the kernel's sockets are",
    ),
    need(
        "nft",
        "nftables",
        "packet filter rules of a user's network namespace",
    ),
    need("tmux", "tmux", "a terminal for `session-enforcer top`"),
    need(
        "initdb",
        "postgresql",
        "a PostgreSQL cluster of the test's own",
    ),
    need("postgres", "postgresql", "sessions of a real database"),
    need("psql", "postgresql", "sessions of a real database"),
    need("pgbench", "postgresql", "load on a real database"),
    need(
        "pg_receivewal",
        "postgresql",
        "a replica of a real database",
    ),
    need(
        "pgbouncer",
        "pgbouncer",
        "a pooler in front of a real database",
    ),
    need("mariadbd", "mariadb-server", "sessions of a real database"),
    need("sshd", "openssh-server", "sessions of a real OpenSSH"),
    need("ssh", "openssh-client", "sessions of a real OpenSSH"),
    need("sftp", "openssh-client", "a transfer over a real OpenSSH"),
    need(
        "ssh-keygen",
        "openssh-client",
        "host and user keys of the test's own",
    ),
    need(
        "redis-server",
        "redis-server",
        "long-lived, often idle connections",
    ),
    need(
        "redis-cli",
        "redis-tools",
        "long-lived, often idle connections",
    ),
    need(
        "prometheus",
        "prometheus",
        "scraping the daemon's metrics as in production",
    ),
    need(
        "promtool",
        "prometheus",
        "checking the format of the daemon's metrics",
    ),
    need("openssl", "openssl", "a certificate of the test's own"),
    need("journalctl", "systemd", "a journal of the test's own"),
    need("nginx", "nginx", "sessions of a real web server"),
    need("slapd", "slapd", "sessions of a real LDAP server"),
    need("ldapsearch", "ldap-utils", "sessions of a real LDAP server"),
    need(
        "rabbitmq-server",
        "rabbitmq-server",
        "sessions of a real broker",
    ),
    need(
        "Xvnc",
        "tigervnc-standalone-server",
        "sessions of a real VNC server",
    ),
    need(
        "xtigervncviewer",
        "tigervnc-viewer",
        "sessions of a real VNC server",
    ),
    need("xsetroot", "x11-xserver-utils", "a screen that changes"),
    server("ldap3", "python3-ldap3"),
    server("pika", "python3-pika"),
    server("h2", "python3-h2"),
    server("grpc", "python3-grpcio"),
    server("websockets", "python3-websockets"),
    server("pyftpdlib", "python3-pyftpdlib"),
    server("aiosmtpd", "python3-aiosmtpd"),
    need("node", "nodejs", "clients of Node's"),
    need("npm", "npm", "clients of Node's"),
    client("psycopg_pool", "python3-psycopg-pool"),
    client("sqlalchemy", "python3-sqlalchemy"),
    client("psycopg2", "python3-psycopg2"),
    client("asyncpg", "python3-asyncpg"),
    client("redis", "python3-redis"),
];

/// The programs that every benchmark needs.
pub(crate) const BENCH: [Need; 2] = [
    need("ip", "iproute2", "network namespaces and addresses"),
    need("ss", "iproute2", "killing connections by hand, to compare"),
];

/// The programs for comparison.
pub(crate) const PEERS: [Need; 3] = [
    need("haproxy", "haproxy", "a proxy with timeouts, to compare"),
    need(
        "nginx",
        "libnginx-mod-stream",
        "a proxy with timeouts, to compare",
    ),
    need("nft", "nftables", "connection tracking, to compare"),
];

/// The emulator of each architecture.
const QEMU: [Need; 2] = [
    need(
        "qemu-system-x86_64",
        "qemu-system-x86",
        "the virtual machines",
    ),
    need(
        "qemu-system-aarch64",
        "qemu-system-arm",
        "the virtual machines",
    ),
];

/// The program that runs virtual machines of an architecture.
pub(crate) const fn qemu(arch: Arch) -> Need {
    match arch {
        Arch::X86_64 => QEMU[0],
        Arch::Aarch64 => QEMU[1],
    }
}

impl Need {
    /// The name of the program.
    pub(crate) const fn program(&self) -> &'static str {
        self.program
    }
}

/// Further programs of `cargo xtask vm`.
pub(crate) const VIRTUAL_MACHINES: [Need; 3] = [
    need("busybox", "busybox-static", "starting in an initramfs"),
    need("modprobe", "kmod", "the modules of a kernel"),
    need("xz", "xz-utils", "unpacking the modules of a kernel"),
];

/// The programs that `cargo xtask dist` needs for the image.
pub(crate) const IMAGES: [Need; 1] = [need("buildah", "buildah", "the image for containers")];

/// The programs of `cargo xtask dist --test`.
pub(crate) const MACHINES: [Need; 8] = [
    need(
        "kubectl",
        "kubernetes-client",
        "putting the manifests of Kubernetes together",
    ),
    need("podman", "podman", "containers of the image"),
    need("runc", "runc", "containers of the image"),
    need(
        "busybox",
        "busybox-static",
        "a container beside that of the daemon",
    ),
    need("rpm", "rpm", "checking the content of the RPM"),
    need("lintian", "lintian", "the rules of Debian's packages"),
    need("mmdebstrap", "mmdebstrap", "the root of a Debian machine"),
    need(
        "systemd-nspawn",
        "systemd-container",
        "a machine with systemd, to install the package in",
    ),
];

/// Also needed for virtual machines. Older QEMU packages contain it, and no separate package exists for them.
pub(crate) const SHARING: [Need; 1] = [need(
    "virtiofsd",
    "virtiofsd",
    "sharing this machine's files with virtual machines",
)];

/// The folders of virtiofsd: that of its own package and that of older QEMU packages.
pub(crate) const VIRTIOFSD: [&str; 2] = ["/usr/libexec", "/usr/lib/qemu"];

/// The script installs packages without leaving a running service behind.
const INSTALLER: &str = include_str!("install.sh");

/// The policy for missing programs.
#[derive(Clone, Copy)]
pub(crate) enum Missing {
    /// Install them with the system's package manager.
    Install,
    /// Fail and name them.
    Refuse,
}

impl Missing {
    /// The policy for the flag `--no-install`.
    pub(crate) fn unless(no_install: bool) -> Self {
        if no_install {
            Self::Refuse
        } else {
            Self::Install
        }
    }
}

/// Ensures that each of these programs is installed.
pub(crate) fn ensure(needs: &[Need], policy: Missing) -> Result<()> {
    let missing = missing(needs);
    if missing.is_empty() {
        return Ok(());
    }
    if matches!(policy, Missing::Refuse) {
        bail!("{}", complaint(&missing));
    }
    if find_program("apt-get", &[]).is_none() {
        bail!(
            "{}\nThis system has no apt-get: install them with its package manager (the package \
             names are those of Debian)",
            complaint(&missing)
        );
    }
    install(&missing)?;
    let still = self::missing(needs);
    if !still.is_empty() {
        bail!("the installation succeeded, but {}", complaint(&still));
    }
    Ok(())
}

fn missing(needs: &[Need]) -> Vec<Need> {
    let mut outside_path = postgresql_folders();
    outside_path.extend(VIRTIOFSD.map(PathBuf::from));
    let is_missing = |need: &&Need| match need.kind {
        Kind::Program => find_program(need.program, &outside_path).is_none(),
        Kind::Module => !has_module(need.program),
    };
    needs.iter().filter(is_missing).copied().collect()
}

/// Whether the distribution's Python, which the tests run, has a module.
fn has_module(name: &str) -> bool {
    let mut python = Command::new("/usr/bin/python3");
    let found = python.args(["-c", &format!("import {name}")]).output();
    found.is_ok_and(|found| found.status.success())
}

/// Debian keeps the server programs of each PostgreSQL version in a folder outside PATH.
fn postgresql_folders() -> Vec<PathBuf> {
    let Ok(versions) = fs::read_dir("/usr/lib/postgresql") else {
        return Vec::new();
    };
    versions
        .filter_map(|version| Some(version.ok()?.path().join("bin")))
        .collect()
}

fn complaint(missing: &[Need]) -> String {
    let mut text = String::from("these programs and Python modules are missing:");
    for need in missing {
        text.push_str(&format!(
            "\n  {} (package {}): {}",
            need.program, need.package, need.why
        ));
    }
    text
}

fn install(missing: &[Need]) -> Result<()> {
    let packages = packages_of(missing);
    say!("{}", complaint(missing));
    say!(
        "installing {}, without starting or enabling their services",
        packages.join(", ")
    );
    run(as_root("sh")?
        .args(["-c", INSTALLER, "install.sh"])
        .args(&packages))
    .with_context(|| {
        format!(
            "cannot install; remedy: `apt-get install {}`",
            packages.join(" ")
        )
    })
}

/// The packages without duplicates, in the order of the table.
fn packages_of(needs: &[Need]) -> Vec<&'static str> {
    let mut packages = Vec::new();
    for need in needs {
        if !packages.contains(&need.package) {
            packages.push(need.package);
        }
    }
    packages
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_tables_name_each_program_once_and_in_full() {
        for needs in [
            &TESTS[..],
            &BENCH,
            &PEERS,
            &QEMU,
            &VIRTUAL_MACHINES,
            &MACHINES,
        ] {
            let programs: HashSet<_> = needs.iter().map(|need| need.program).collect();
            assert_eq!(programs.len(), needs.len());
        }
        let all = TESTS.into_iter().chain(BENCH).chain(PEERS);
        for need in all.chain(QEMU).chain(VIRTUAL_MACHINES).chain(MACHINES) {
            assert!(
                !need.program.contains(['/', ' ']),
                "{}: a bare name",
                need.program
            );
            assert!(
                !need.package.is_empty() && !need.why.is_empty(),
                "{}",
                need.program
            );
        }
    }

    #[test]
    fn a_package_is_installed_once_however_many_of_its_programs_are_missing() {
        assert_eq!(
            packages_of(&TESTS),
            [
                "iproute2",
                "nftables",
                "tmux",
                "postgresql",
                "pgbouncer",
                "mariadb-server",
                "openssh-server",
                "openssh-client",
                "redis-server",
                "redis-tools",
                "prometheus",
                "openssl",
                "systemd",
                "nginx",
                "slapd",
                "ldap-utils",
                "rabbitmq-server",
                "tigervnc-standalone-server",
                "tigervnc-viewer",
                "x11-xserver-utils",
                "python3-ldap3",
                "python3-pika",
                "python3-h2",
                "python3-grpcio",
                "python3-websockets",
                "python3-pyftpdlib",
                "python3-aiosmtpd",
                "nodejs",
                "npm",
                "python3-psycopg-pool",
                "python3-sqlalchemy",
                "python3-psycopg2",
                "python3-asyncpg",
                "python3-redis"
            ]
        );
        assert!(packages_of(&[]).is_empty());
    }

    #[test]
    fn the_complaint_says_program_package_and_reason() {
        let text = complaint(&[need("sshd", "openssh-server", "sessions of a real OpenSSH")]);
        assert_eq!(
            text,
            "these programs and Python modules are missing:\n  sshd (package openssh-server): sessions of a real OpenSSH"
        );
    }

    #[test]
    fn the_installer_is_a_sound_shell_script() {
        let mut shell = Command::new("sh");
        assert!(run(shell.args(["-n", "-c", INSTALLER])).is_ok());
    }
}

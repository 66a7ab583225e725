//! A host of containers: podman in separate namespaces, which runs the image.
//!
//! It has its own cgroups (below one of the test), network, processes, bpffs and podman storage. All of it is
//! removed with its top process.

use std::{
    fs,
    process::{Child, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use tempfile::TempDir;

use crate::{
    cgroup::Cgroup,
    clock::eventually,
    machine::{child_of, entering, kill, required},
    pace::{patience, scaled},
    process::{Finished, die_with_parent, run_to_end},
};

/// This variable names the archive of the image.
const IMAGE: &str = "SESSION_ENFORCER_IMAGE";

/// A shell runs this script in new namespaces, with a scratch folder. A tmpfs keeps podman's storage from
/// being left behind.
const PREPARE: &str = r#"
umount --recursive /sys/fs/cgroup
mount -t cgroup2 cgroup2 /sys/fs/cgroup
mkdir /sys/fs/cgroup/tools
echo 0 >/sys/fs/cgroup/tools/cgroup.procs
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs "$1"
mount -t bpf -o mode=0700 bpf /sys/fs/bpf
ip link set lo up
mkdir -p "$1/files/bin" "$1/tmp"
cp "$(command -v busybox)" "$1/files/bin/"
touch "$1/prepared"
exec sleep infinity
"#;

/// The prefix of each line that runs in the host. crun refuses a hierarchy without controllers, and such a
/// hierarchy cannot limit the number of processes.
const PODMAN: &str = r#"
podman() {
    command podman --root "$SCRATCH/storage" --runroot /run/podman --storage-driver vfs \
        --cgroup-manager cgroupfs --runtime runc --events-backend none "$@"
}
start() {
    podman run --detach --pids-limit -1 --ulimit nofile=1024:4096 --ulimit nproc=1024:4096 "$@"
}
"#;

/// The host. Dropping it removes it with its containers.
#[derive(Debug)]
pub struct ContainerHost {
    top: Child,
    /// The first process in its PID namespace.
    init: u32,
    scratch: TempDir,
    cgroup: Cgroup,
}

impl ContainerHost {
    /// Creates a host and loads the image of the environment variable as `session-enforcer`. Another image is
    /// `busybox`.
    ///
    /// # Errors
    ///
    /// Fails if the environment names no image, or if podman refuses it.
    pub fn new() -> Result<Self> {
        let image = required(IMAGE)?;
        let cgroup = Cgroup::new()?;
        let scratch = tempfile::tempdir()?;
        let mounts = scratch.path().join("mounts");
        fs::create_dir(&mounts)?;
        let log = fs::File::create(scratch.path().join("log"))?;
        let mut command = entering(cgroup.path());
        command
            .args(["unshare", "--mount", "--cgroup", "--net", "--pid", "--fork"])
            .args(["--mount-proc", "--kill-child", "sh", "-euc", PREPARE, "sh"])
            .arg(&mounts)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let top = die_with_parent(&mut command).spawn()?;
        let mut host = Self {
            top,
            init: 0,
            scratch,
            cgroup,
        };
        let prepared = host.wait_until_prepared();
        prepared.with_context(|| host.log())?;
        host.ask(&format!(
            "id=$(podman pull --quiet oci-archive:{}); podman tag $id session-enforcer; \
             tar --create --directory \"$SCRATCH/files\" . | podman import --quiet - busybox",
            image.display()
        ))?;
        Ok(host)
    }

    fn wait_until_prepared(&mut self) -> Result<()> {
        eventually("the host of containers is there", patience(), || {
            ensure!(self.top.try_wait()?.is_none(), "it ended");
            let Some(init) = child_of(self.top.id()) else {
                return Ok(None);
            };
            self.init = init;
            let mounts = self.scratch.path().join("mounts");
            let mark = format!("/proc/{init}/root{}/prepared", mounts.display());
            Ok(fs::exists(mark)?.then_some(()))
        })
    }

    fn log(&self) -> String {
        fs::read_to_string(self.scratch.path().join("log")).unwrap_or_default()
    }

    /// Runs a shell command in the host to its end. The functions `podman` and `start` are available; `start`
    /// is `podman run` of a container that keeps running.
    ///
    /// # Errors
    ///
    /// Fails if the command does not end.
    pub fn run(&self, line: &str) -> Result<Finished> {
        let mounts = self.scratch.path().join("mounts");
        let mut command = entering(&self.cgroup.path().join("tools"));
        command
            .args(["nsenter", "--all", "--target", &self.init.to_string(), "--"])
            .args(["bash", "-euc", &format!("{PODMAN}{line}")])
            .env("SCRATCH", &mounts)
            .env("TMPDIR", mounts.join("tmp"));
        run_to_end(command, scaled(patience()))
    }

    /// Runs a command and returns its output.
    ///
    /// # Errors
    ///
    /// Fails if the command fails.
    pub fn ask(&self, line: &str) -> Result<String> {
        self.run(line)?.output(line)
    }
}

impl Drop for ContainerHost {
    fn drop(&mut self) {
        kill(&mut self.top, "the host of containers");
    }
}

//! Runs a virtual machine: QEMU and the programs that share files with it.

use std::fs::{self, File};
use std::io::Read as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use session_enforcer_tests::die_with_parent;

use super::debugger;
use super::kernels::Kernel;
use super::plan::MARK;
use crate::arch::Arch;
use crate::packages::{self, VIRTIOFSD};
use crate::process::{as_root, find_program, is_root, output_of, say};

/// The interval of checks on the machine.
const POLL_INTERVAL: Duration = Duration::from_millis(200);

/// The number of console lines in an error.
const CONSOLE_LINES: usize = 30;

/// The time limit of a boot. Emulated beside two others, a boot takes about 20 s. Linux 7.3.4 was seen to
/// spin on both processors forever, with an empty console.
const BOOT: Duration = Duration::from_secs(180);

/// The number of resets for the same boot before the run fails.
const RESETS: u32 = 2;

/// With a working KVM, a kernel panics for lack of a root within this time.
const PROBE: Duration = Duration::from_secs(10);

/// The method that runs the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// Hardware virtualisation.
    Kvm,
    /// Emulation by QEMU, at least ten times slower.
    Emulation,
}

impl Accelerator {
    /// Returns KVM if a kernel really runs with it; the existence of `/dev/kvm` does not prove that. Another
    /// architecture is emulated.
    pub(super) fn find(kernel: &Kernel) -> Result<Self> {
        if kernel.arch != Arch::HOST {
            return Ok(Self::Emulation);
        }
        let may = File::options().read(true).write(true).open("/dev/kvm");
        if may.is_err() {
            return Ok(Self::Emulation);
        }
        // Without an initramfs the kernel panics, which ends the machine.
        let mut qemu = Self::Kvm.command(kernel.arch)?;
        qemu.args(["-m", "512M", "-no-reboot", "-append", "panic=-1", "-kernel"])
            .arg(kernel.image())
            .stderr(Stdio::null());
        let mut qemu = Running(die_with_parent(&mut qemu).spawn()?);
        let start = Instant::now();
        while start.elapsed() < PROBE {
            if let Some(status) = qemu.0.try_wait()? {
                let works = status.success();
                return Ok(if works { Self::Kvm } else { Self::Emulation });
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(Self::Emulation)
    }

    /// The slowdown factor for the tests' time limits.
    pub(super) fn slower(self) -> Option<&'static str> {
        match self {
            Self::Kvm => None,
            Self::Emulation => Some("10"),
        }
    }

    /// The number of test programs that run at the same time. They mostly wait for deadlines, but under
    /// emulation each start of a daemon uses a processor for seconds.
    pub(super) fn programs_at_once(self) -> usize {
        match self {
            Self::Kvm => 2,
            Self::Emulation => 1,
        }
    }

    /// The number of tests of one program that run at the same time, for the same reasons.
    pub(super) fn tests_at_once(self) -> usize {
        match self {
            Self::Kvm => 4,
            Self::Emulation => 2,
        }
    }

    /// The QEMU command without devices.
    fn command(self, arch: Arch) -> Result<Command> {
        let program = find_program(packages::qemu(arch).program(), &[]);
        let program = program.context("QEMU is missing")?;
        let mut qemu = Command::new(program);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        match self {
            Self::Kvm => qemu.args(["-accel", "kvm", "-cpu", "max"]),
            Self::Emulation => qemu.args(["-accel", "tcg,thread=multi", "-cpu", emulated(arch)]),
        };
        if arch == Arch::Aarch64 {
            // QEMU has no default machine for this architecture.
            qemu.args(["-machine", "virt"]);
        }
        Ok(qemu)
    }
}

/// The CPU model: all features that QEMU can emulate, except slow ones (five-level page tables, architectural
/// pointer signatures).
const fn emulated(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "max,la57=off",
        Arch::Aarch64 => "max,pauth-impdef=on",
    }
}

/// The kernel's name of the serial port.
const fn console(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "ttyS0",
        Arch::Aarch64 => "ttyAMA0",
    }
}

/// A machine to start.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) accelerator: Accelerator,
    pub(super) initramfs: &'a Path,
    /// The folder that the machine can write to. The console log and the sockets are there too.
    pub(super) shared: &'a Path,
    pub(super) processors: u32,
    pub(super) memory_mib: u32,
}

impl Machine<'_> {
    /// Runs the machine until it powers off. `watch` is called regularly and returns the boot that is
    /// awaited, if any. If that boot does not start in time, the machine is reset.
    ///
    /// # Errors
    ///
    /// Fails if the machine does not start or boot, or still runs after `limit`. The error has the last lines
    /// of its console.
    pub(super) fn run(
        &self,
        limit: Duration,
        mut watch: impl FnMut() -> Option<usize>,
    ) -> Result<()> {
        let _root = self.share("root", Path::new("/"))?;
        let _own = self.share("own", self.shared)?;
        let mut qemu = Running(
            die_with_parent(&mut self.qemu()?)
                .spawn()
                .context("cannot start QEMU")?,
        );
        let start = Instant::now();
        let mut awaited = Awaited::new(start);
        let ended = loop {
            if let Some(status) = qemu.0.try_wait()? {
                break status;
            }
            if start.elapsed() > limit {
                bail!("not finished after {limit:?}; {}", self.last_words());
            }
            if awaited.is_overdue(watch(), Instant::now()) {
                self.reset(&awaited)?;
            }
            debugger::serve(self.shared, &self.socket("debugger"));
            thread::sleep(POLL_INTERVAL);
        };
        watch();
        if !ended.success() {
            bail!("QEMU failed ({ended}); {}", self.last_words());
        }
        Ok(())
    }

    fn reset(&self, awaited: &Awaited) -> Result<()> {
        if awaited.overdue > RESETS {
            bail!(
                "still not booted after {RESETS} resets; {}",
                self.last_words()
            );
        }
        let release = &self.kernel.release;
        say!("{release}: not booted after {BOOT:?}: the machine is reset");
        debugger::reset(&self.socket("debugger")).context("cannot reset the machine")
    }

    /// The last lines of the console.
    pub(super) fn last_words(&self) -> String {
        let text = fs::read(self.console()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<_> = text.lines().map(str::trim_end).collect();
        let last = &lines[lines.len().saturating_sub(CONSOLE_LINES)..];
        format!("the console's last lines:\n    {}", last.join("\n    "))
    }

    fn console(&self) -> PathBuf {
        self.shared.join("console.log")
    }

    fn socket(&self, name: &str) -> PathBuf {
        self.shared.join(format!("{name}.socket"))
    }

    fn qemu(&self) -> Result<Command> {
        let memory = self.memory_mib;
        let arch = self.kernel.arch;
        let mut qemu = self.accelerator.command(arch)?;
        qemu.args(["-smp", &self.processors.to_string()])
            .args(["-m", &format!("{memory}M")])
            // The programs that share files need shared memory.
            .arg("-object")
            .arg(format!(
                "memory-backend-memfd,id=memory,size={memory}M,share=on"
            ))
            .args(["-numa", "node,memdev=memory"])
            .arg("-kernel")
            .arg(self.kernel.image())
            .arg("-initrd")
            .arg(self.initramfs)
            .arg("-append")
            .arg(format!("console={} quiet panic=10 {MARK}", console(arch)))
            .arg("-gdb")
            .arg(format!(
                "unix:{},server=on,wait=off",
                self.socket("debugger").display()
            ))
            .arg("-serial")
            .arg(format!("file:{}", self.console().display()));
        for name in ["root", "own"] {
            let path = self.socket(name);
            qemu.arg("-chardev")
                .arg(format!("socket,id={name},path={}", path.display()))
                .arg("-device")
                .arg(format!("vhost-user-fs-pci,chardev={name},tag={name}"));
        }
        qemu.stderr(self.log("qemu")?);
        Ok(qemu)
    }

    /// Shares a folder under this name and waits until it is ready.
    fn share(&self, name: &str, folder: &Path) -> Result<Running> {
        let socket = self.socket(name);
        let program = find_program("virtiofsd", &VIRTIOFSD.map(PathBuf::from));
        let program = program.context("virtiofsd is missing")?;
        let _ = fs::remove_file(&socket);
        let mut sharer = as_root(&program)?;
        sharer.arg(format!("--socket-path={}", socket.display()));
        if !is_root()? {
            let group = output_of(Command::new("id").arg("-gn"))?;
            sharer.arg(format!("--socket-group={}", group.trim()));
        }
        let cache = if name == "root" { "always" } else { "auto" };
        if program.starts_with("/usr/lib/qemu") {
            sharer
                .args(["-o", &format!("source={}", folder.display())])
                .args(["-o", &format!("sandbox=chroot,cache={cache}")]);
        } else {
            sharer
                .arg(format!("--shared-dir={}", folder.display()))
                .args(["--sandbox", "chroot", "--cache", cache]);
        }
        sharer
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(self.log(name)?);
        let child = die_with_parent(&mut sharer).spawn();
        let mut running =
            Running(child.with_context(|| format!("cannot start {}", program.display()))?);
        running.wait_for(&socket, &self.shared.join(format!("{name}.err")))?;
        Ok(running)
    }

    fn log(&self, name: &str) -> Result<File> {
        let path = self.shared.join(format!("{name}.err"));
        File::create(&path).with_context(|| format!("cannot create {}", path.display()))
    }
}

/// An awaited boot.
struct Awaited {
    boot: Option<usize>,
    since: Instant,
    /// How often the boot was overdue.
    overdue: u32,
}

impl Awaited {
    fn new(now: Instant) -> Self {
        Self {
            boot: None,
            since: now,
            overdue: 0,
        }
    }

    /// Whether the awaited boot is overdue. The time counts from the first call for this boot, or from the
    /// last call that returned true.
    fn is_overdue(&mut self, boot: Option<usize>, now: Instant) -> bool {
        if boot != self.boot {
            *self = Self {
                boot,
                ..Self::new(now)
            };
        }
        if boot.is_none() || now.duration_since(self.since) < BOOT {
            return false;
        }
        self.since = now;
        self.overdue += 1;
        true
    }
}

/// A program that is killed with the machine.
struct Running(Child);

impl Running {
    fn wait_for(&mut self, socket: &Path, log: &Path) -> Result<()> {
        let start = Instant::now();
        while !fs::metadata(socket).is_ok_and(|found| found.file_type().is_socket()) {
            let mut said = String::new();
            if self.0.try_wait()?.is_some() || start.elapsed() > Duration::from_secs(30) {
                File::open(log).and_then(|mut log| log.read_to_string(&mut said))?;
                bail!("virtiofsd does not serve {}: {said}", socket.display());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // File-sharing programs end with QEMU. Those of root cannot be killed by other users.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_boot_that_does_not_come_is_overdue_and_each_has_its_own_time() {
        let start = Instant::now();
        let mut awaited = Awaited::new(start);
        let late = start + BOOT;
        assert!(!awaited.is_overdue(Some(0), start));
        assert!(!awaited.is_overdue(Some(0), late - POLL_INTERVAL));
        // The boot has started and runs for long.
        assert!(!awaited.is_overdue(None, late));
        assert!(!awaited.is_overdue(None, late + BOOT));
        // The next boot does not start, and not after a reset either.
        let start = late + BOOT;
        assert!(!awaited.is_overdue(Some(1), start));
        assert!(awaited.is_overdue(Some(1), start + BOOT));
        assert!(!awaited.is_overdue(Some(1), start + BOOT + POLL_INTERVAL));
        assert!(awaited.is_overdue(Some(1), start + 2 * BOOT));
        assert_eq!(awaited.overdue, 2);
        assert!(!awaited.is_overdue(Some(2), start + 3 * BOOT));
        assert_eq!(awaited.overdue, 0);
    }
}

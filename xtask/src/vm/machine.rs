//! A virtual machine: QEMU, and what shares this machine's files with it.

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

/// How often the machine is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// How much of the console an error shows.
const CONSOLE_LINES: usize = 30;

/// How long a boot may take before the machine has hung: under emulation beside two others it takes
/// some 20 s. 7.3.4 was seen to spin on both processors forever, with an empty console.
const BOOT: Duration = Duration::from_secs(180);

/// How often a machine is reset for the same boot before it is given up.
const RESETS: u32 = 2;

/// How long a kernel may take to find that it has nothing to start, where KVM works.
const PROBE: Duration = Duration::from_secs(10);

/// Who runs the machine's instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accelerator {
    /// The processor.
    Kvm,
    /// QEMU, ten times slower or more.
    Emulation,
}

impl Accelerator {
    /// KVM where a kernel runs with it: that there is a `/dev/kvm` does not say so. Another processor than this
    /// machine's is emulated.
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

    /// How many times slower its machines are, for the patience of the tests.
    pub(super) fn slower(self) -> Option<&'static str> {
        match self {
            Self::Kvm => None,
            Self::Emulation => Some("10"),
        }
    }

    /// How many test programs run at the same time: they wait for deadlines most of the time, but
    /// under emulation the start of each daemon keeps a processor busy for seconds.
    pub(super) fn programs_at_once(self) -> usize {
        match self {
            Self::Kvm => 2,
            Self::Emulation => 1,
        }
    }

    /// How many tests of a program run at the same time, for the same reasons.
    pub(super) fn tests_at_once(self) -> usize {
        match self {
            Self::Kvm => 4,
            Self::Emulation => 2,
        }
    }

    /// QEMU, without any device.
    fn command(self, arch: Arch) -> Result<Command> {
        let program = find_program(packages::qemu(arch).program(), &[]);
        let program = program.context("there is no QEMU")?;
        let mut qemu = Command::new(program);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none"])
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        match self {
            Self::Kvm => qemu.args(["-accel", "kvm", "-cpu", "max"]),
            Self::Emulation => qemu.args(["-accel", "tcg,thread=multi", "-cpu", emulated(arch)]),
        };
        if arch == Arch::Aarch64 {
            // There is no machine that all processors of this kind would start on.
            qemu.args(["-machine", "virt"]);
        }
        Ok(qemu)
    }
}

/// All that QEMU can emulate of a processor, but for what is slow: five-level page tables, and pointers that are
/// signed as the architecture does it.
const fn emulated(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "max,la57=off",
        Arch::Aarch64 => "max,pauth-impdef=on",
    }
}

/// What the kernel calls the machine's serial port.
const fn console(arch: Arch) -> &'static str {
    match arch {
        Arch::X86_64 => "ttyS0",
        Arch::Aarch64 => "ttyAMA0",
    }
}

/// A machine that is to be started.
pub(super) struct Machine<'a> {
    pub(super) kernel: &'a Kernel,
    pub(super) accelerator: Accelerator,
    pub(super) initramfs: &'a Path,
    /// The folder that it can write to. The console's text and the sockets are put there too.
    pub(super) shared: &'a Path,
    pub(super) processors: u32,
    pub(super) memory_mib: u32,
}

impl Machine<'_> {
    /// Runs it until it powers off. `watch` is called now and then, and says which boot is waited
    /// for, if any. Where one does not come, the machine is reset.
    ///
    /// # Errors
    ///
    /// Where it does not run or boot, or still runs after `limit`, with the last lines of its
    /// console.
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
            thread::sleep(LOOK);
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

    /// The end of what the console said.
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
            // The memory is shared with the programs that share files.
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

    /// Shares a folder under this name, and waits until it is ready.
    fn share(&self, name: &str, folder: &Path) -> Result<Running> {
        let socket = self.socket(name);
        let program = find_program("virtiofsd", &VIRTIOFSD.map(PathBuf::from));
        let program = program.context("there is no virtiofsd")?;
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

/// A boot that is waited for.
struct Awaited {
    boot: Option<usize>,
    since: Instant,
    /// How often it has not come in time.
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

    /// Whether the boot that is waited for has not come in time, since it was first waited for or
    /// since this was last said.
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

/// A program that ends with the machine.
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
        // Those that share files end by themselves with QEMU; root's cannot be killed by others.
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
        assert!(!awaited.is_overdue(Some(0), late - LOOK));
        // It has come, and runs for long.
        assert!(!awaited.is_overdue(None, late));
        assert!(!awaited.is_overdue(None, late + BOOT));
        // The next does not, nor after a reset.
        let start = late + BOOT;
        assert!(!awaited.is_overdue(Some(1), start));
        assert!(awaited.is_overdue(Some(1), start + BOOT));
        assert!(!awaited.is_overdue(Some(1), start + BOOT + LOOK));
        assert!(awaited.is_overdue(Some(1), start + 2 * BOOT));
        assert_eq!(awaited.overdue, 2);
        assert!(!awaited.is_overdue(Some(2), start + 3 * BOOT));
        assert_eq!(awaited.overdue, 0);
    }
}

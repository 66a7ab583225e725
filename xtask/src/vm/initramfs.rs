//! Builds the initramfs: busybox, the modules for the root, and `init.sh`.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};

use super::kernels::Kernel;
use super::system;
use crate::process::find_program;

const INIT: &str = include_str!("init.sh");

/// The modules for the root file system, unless they are built into the kernel.
const MODULES: [&str; 3] = ["virtio_pci", "virtiofs", "overlay"];

/// The files of the host that make up the machine's root.
#[derive(Clone, Debug)]
pub(super) struct Inside {
    /// The program that runs in the shared root.
    pub(super) guest: PathBuf,
    /// The root folder, if it is not that of the host.
    pub(super) system: Option<PathBuf>,
    /// Folders of the host that the root contains under the same paths.
    pub(super) folders: Vec<PathBuf>,
}

impl Inside {
    fn busybox(&self) -> Result<PathBuf> {
        match &self.system {
            Some(root) => Ok(root.join(system::BUSYBOX)),
            None => find_program("busybox", &[]).context("there is no busybox"),
        }
    }

    /// The folders, one per line.
    fn lines(&self) -> Result<String> {
        let lines = self
            .folders
            .iter()
            .map(|folder| Ok(text(folder)?.to_owned() + "\n"));
        lines.collect()
    }
}

fn text(path: &Path) -> Result<&str> {
    let text = path.to_str();
    text.with_context(|| format!("the path {} is no text", path.display()))
}

/// Writes the initramfs for a kernel.
pub(super) fn write(kernel: &Kernel, inside: &Inside, archive: &Path) -> Result<()> {
    let busybox = inside.busybox()?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("reading {}", path.display()));
    let system = inside.system.as_deref().unwrap_or(Path::new("/"));
    let mut cpio = Cpio::default();
    for folder in [
        "bin",
        "dev",
        "lower",
        "modules",
        "proc",
        "root",
        "system-root",
        "upper",
    ] {
        cpio.folder(folder);
    }
    cpio.file("init", INIT.as_bytes());
    cpio.file("guest", text(&inside.guest)?.as_bytes());
    cpio.file("system", text(system)?.as_bytes());
    cpio.file("folders", inside.lines()?.as_bytes());
    cpio.file("bin/busybox", &read(&busybox)?);
    for library in libraries(&busybox)? {
        cpio.file_in_folders(&library, &read(&library)?)?;
    }
    // The modules are loaded in the order of their names.
    for (number, module) in modules(kernel)?.iter().enumerate() {
        let name = module.file_stem().unwrap_or_default().to_string_lossy();
        cpio.file(&format!("modules/{number:02}-{name}"), &unpacked(module)?);
    }
    fs::write(archive, cpio.end()).with_context(|| format!("writing {}", archive.display()))
}

/// The libraries that a program loads. Empty for a static program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    // `ldd` fails if the program loads no library.
    let output = Command::new("ldd").arg(program).output();
    let output = output.context("cannot start ldd")?;
    Ok(loaded(&String::from_utf8_lossy(&output.stdout)))
}

/// Parses the libraries from `ldd`'s output.
fn loaded(shown: &str) -> Vec<PathBuf> {
    let words = shown.lines().map(str::split_whitespace);
    words
        .filter_map(|mut words| words.find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

/// The files of the modules, each after its dependencies.
fn modules(kernel: &Kernel) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for module in MODULES {
        let shown = crate::process::output_of(
            Command::new(find_program("modprobe", &[]).context("there is no modprobe")?)
                .arg("-d")
                .arg(&kernel.folder)
                .args(["-S", &kernel.release, "--show-depends", module]),
        )?;
        for path in files(&shown) {
            if !found.contains(&path) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// Parses the files from the output of `modprobe --show-depends`. Built-in modules have no file.
fn files(shown: &str) -> Vec<PathBuf> {
    let lines = shown.lines().map(str::trim);
    let paths = lines.filter_map(|line| line.strip_prefix("insmod "));
    paths.map(|path| path.trim().into()).collect()
}

/// A module's content without compression, because not every kernel can decompress it.
fn unpacked(module: &Path) -> Result<Vec<u8>> {
    let extension = module.extension().unwrap_or_default().to_string_lossy();
    match extension.as_ref() {
        "ko" => fs::read(module).with_context(|| format!("reading {}", module.display())),
        "xz" => {
            let output = Command::new("xz").arg("-dc").arg(module).output();
            let output = output.context("cannot start xz")?;
            if !output.status.success() {
                bail!("cannot unpack {}", module.display());
            }
            Ok(output.stdout)
        }
        _ => bail!("{} is packed in an unknown way", module.display()),
    }
}

/// An archive in cpio's "newc" format (kernel documentation, `initramfs buffer format`).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    count: u32,
}

impl Cpio {
    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    /// Adds a file with its parent folders.
    fn file_in_folders(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        let path = path.strip_prefix("/").context("no absolute path")?;
        let mut above: Vec<_> = path.ancestors().skip(1).collect();
        above.pop();
        for folder in above.iter().rev() {
            self.folder(&folder.to_string_lossy());
        }
        self.file(&path.to_string_lossy(), content);
        Ok(())
    }

    fn file(&mut self, name: &str, content: &[u8]) {
        self.entry(name, 0o100_755, content);
    }

    fn end(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.count += 1;
        let mut header = String::from("070701");
        let size = u32::try_from(content.len()).expect("no file here has 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("names here are short");
        // ino, mode, uid, gid, nlink, mtime, filesize, four device numbers, namesize, check.
        for field in [self.count, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            write!(header, "{field:08x}").expect("a String takes everything");
        }
        self.bytes.extend_from_slice(header.as_bytes());
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.align();
        self.bytes.extend_from_slice(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_archive_is_made_of_aligned_entries_and_a_trailer() {
        let mut cpio = Cpio::default();
        cpio.folder("bin");
        cpio.file("init", b"12345");
        let bytes = cpio.end();
        let text = String::from_utf8_lossy(&bytes);
        let entries: Vec<_> = text.match_indices("070701").map(|(at, _)| at).collect();
        assert_eq!(entries.len(), 3);
        assert!(entries.iter().all(|at| at % 4 == 0), "{entries:?}");
        // The size of the file is the seventh field.
        let header = &text[entries[1]..];
        assert_eq!(&header[6 + 6 * 8..6 + 7 * 8], "00000005");
        assert!(text.contains("TRAILER!!!\0"));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn the_libraries_of_a_program_are_those_that_ldd_names() {
        let shown = "\tlinux-vdso.so.1 (0x00007ffd0b7d5000)\n\
                     \tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f1c2a000000)\n\
                     \t/lib64/ld-linux-x86-64.so.2 (0x00007f1c2a3a1000)\n";
        let files = [
            "/lib/x86_64-linux-gnu/libc.so.6",
            "/lib64/ld-linux-x86-64.so.2",
        ];
        assert_eq!(loaded(shown), files.map(PathBuf::from));
        assert!(loaded("\tnot a dynamic executable\n").is_empty());
    }

    #[test]
    fn a_built_in_module_needs_no_file() {
        let shown = "builtin virtio_pci\ninsmod /k/virtio.ko \ninsmod /k/fuse.ko.xz \n";
        assert_eq!(
            files(shown),
            [PathBuf::from("/k/virtio.ko"), "/k/fuse.ko.xz".into()]
        );
    }

    #[test]
    fn the_init_is_a_sound_shell_script() {
        let mut shell = Command::new("sh");
        let status = shell.args(["-n", "-c", INIT]).status();
        assert!(status.is_ok_and(|status| status.success()));
    }
}

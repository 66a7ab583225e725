//! The work of the kernel's verifier for each program, compared with a table of earlier figures.
//!
//! The table `verifier.txt` has a line for each kernel and program. This test writes the lines of
//! the running kernel to standard error, even when it passes.

use std::{
    arch::asm,
    collections::BTreeSet,
    env,
    ffi::c_long,
    fmt::Write as _,
    fs,
    io::{self, Write as _},
    sync::Mutex,
};

use anyhow::{Context as _, Result, ensure};
use session_enforcer::datapath::{Datapath, Options};

/// The table is compiled in, because the test may run on a machine without a checkout.
const TABLE: &str = include_str!("../verifier.txt");

/// Figures may differ by this percentage between compilers.
const TOLERANCE: u64 = 20;

/// The largest number of instructions that the verifier follows for one program
/// (`kernel/bpf/verifier.c`).
const MOST_INSTRUCTIONS: u64 = 1_000_000;

/// The loaded programs.
static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

/// A loaded program.
#[derive(Debug)]
struct Loaded {
    name: String,
    /// The verifier's log.
    text: String,
    /// The number of barriers in its first function: see `words::order` of the programs.
    barriers: usize,
}

/// Replaces libc's `syscall`, through which aya calls bpf(2). It requests the verifier's figures
/// for each loaded program; aya itself requests a log only after a failure.
#[unsafe(no_mangle)]
pub extern "C" fn syscall(
    number: c_long,
    first: c_long,
    second: c_long,
    third: c_long,
    fourth: c_long,
    fifth: c_long,
    sixth: c_long,
) -> c_long {
    if let Some(mut load) = ProgramLoad::of(number, first, second, third) {
        let attributes = load.attributes.as_mut_ptr() as c_long;
        let result = call(number, [first, attributes, third, fourth, fifth, sixth]);
        // If the load fails, this log has the reason, and the daemon's error has none.
        load.remember();
        return result;
    }
    call(number, [first, second, third, fourth, fifth, sixth])
}

/// A system call, as libc's `syscall` makes it. A static program has no second `syscall` to call.
fn call(number: c_long, arguments: [c_long; 6]) -> c_long {
    let [first, second, third, fourth, fifth, sixth] = arguments;
    let result: c_long;
    // SAFETY: the caller's system call with the caller's arguments.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        asm!(
            "syscall",
            inlateout("rax") number => result,
            in("rdi") first, in("rsi") second, in("rdx") third,
            in("r10") fourth, in("r8") fifth, in("r9") sixth,
            lateout("rcx") _, lateout("r11") _,
            options(nostack),
        );
        #[cfg(target_arch = "aarch64")]
        asm!(
            "svc 0",
            in("x8") number,
            inlateout("x0") first => result,
            in("x1") second, in("x2") third, in("x3") fourth, in("x4") fifth, in("x5") sixth,
            options(nostack),
        );
    }
    // The kernel returns negative error numbers; C returns -1 and sets errno.
    let Ok(error @ 1..4096) = libc::c_int::try_from(-result) else {
        return result;
    };
    // SAFETY: errno is a variable of this thread.
    unsafe { *libc::__errno_location() = error };
    -1
}

/// A bpf(2) call that loads a program, with its own log buffer.
struct ProgramLoad {
    attributes: Vec<u8>,
    log: Vec<u8>,
}

impl ProgramLoad {
    const BPF_PROG_LOAD: c_long = 5;
    /// Log only the figures.
    const BPF_LOG_STATS: u32 = 4;
    /// Offsets in `union bpf_attr`: the log (level, size, address) and the program's name.
    const LOG: usize = 24;
    const NAME: usize = 48;
    /// Offsets of the count and address of the instructions, and of the address and count of the
    /// function records.
    const INSTRUCTIONS: (usize, usize) = (4, 8);
    const FUNCTIONS: (usize, usize) = (80, 88);
    /// An atomic operation on 64 bits (`BPF_STX | BPF_ATOMIC | BPF_DW`), and its kind: `BPF_ADD |
    /// BPF_FETCH`.
    const ATOMIC: u64 = 0xdb;
    const FETCH_ADD: u64 = 1;

    fn of(number: c_long, command: c_long, attributes: c_long, size: c_long) -> Option<Self> {
        if number != libc::SYS_bpf || command != Self::BPF_PROG_LOAD {
            return None;
        }
        let size = usize::try_from(size).ok()?;
        // SAFETY: the caller passes the address and size of a value to bpf(2).
        let given = unsafe { std::slice::from_raw_parts(attributes as *const u8, size) };
        let mut load = Self {
            attributes: given.to_vec(),
            log: vec![0; 1 << 16],
        };
        let place = load.log.as_mut_ptr() as u64;
        let fields = load.attributes.get_mut(Self::LOG..Self::LOG + 16)?;
        fields[..4].copy_from_slice(&Self::BPF_LOG_STATS.to_ne_bytes());
        fields[4..8].copy_from_slice(&(1u32 << 16).to_ne_bytes());
        fields[8..].copy_from_slice(&place.to_ne_bytes());
        Some(load)
    }

    fn remember(&self) {
        let name = self.attributes.get(Self::NAME..Self::NAME + 16);
        let texts = [name.unwrap_or_default(), &self.log].map(|bytes| {
            let text = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
            String::from_utf8_lossy(text).into_owned()
        });
        let [name, text] = texts;
        let barriers = self.barriers().unwrap_or_default();
        let loaded = Loaded {
            name,
            text,
            barriers,
        };
        LOADED.lock().expect("no test panics with it").push(loaded);
    }

    fn number<const N: usize>(&self, at: usize) -> Option<[u8; N]> {
        self.attributes.get(at..at + N)?.try_into().ok()
    }

    fn barriers(&self) -> Option<usize> {
        let (count, place) = Self::INSTRUCTIONS;
        let count = u32::from_ne_bytes(self.number(count)?) as usize;
        let place = u64::from_ne_bytes(self.number(place)?) as *const u64;
        let (functions, of_functions) = Self::FUNCTIONS;
        let functions = u64::from_ne_bytes(self.number(functions)?) as *const [u32; 2];
        if u32::from_ne_bytes(self.number(of_functions)?) < 2 {
            return None;
        }
        // SAFETY: the caller passes this many instructions to bpf(2), and a record of two numbers
        // for each function. There are at least two functions.
        let (instructions, [end, _]) =
            unsafe { (std::slice::from_raw_parts(place, count), *functions.add(1)) };
        let first = instructions.get(..end as usize)?;
        let is_barrier =
            |word: &&u64| **word & 0xff == Self::ATOMIC && **word >> 32 == Self::FETCH_ADD;
        Some(first.iter().filter(is_barrier).count())
    }
}

/// The verifier's figures of one program.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Figures {
    program: String,
    /// Instructions followed on all paths.
    instructions: u64,
    /// States of registers and stack that the verifier kept.
    states: u64,
    /// Bytes of stack of the program and of each function that it calls, or only the sum of the
    /// longest call chain.
    stack: Vec<u64>,
}

impl Figures {
    fn read(program: &str, text: &str) -> Result<Self> {
        let number_after = |words: &str| -> Result<u64> {
            let rest = text.split_once(words).context("no such figure")?.1;
            let digits = rest.split(|letter: char| !letter.is_ascii_digit()).next();
            Ok(digits.unwrap_or_default().parse()?)
        };
        let after = text.split_once("stack depth ").context("no stack depth")?.1;
        // Linux 7.3 prints `max` and the longest chain; earlier kernels print the program and its
        // functions.
        let mut words = after.split_whitespace().skip_while(|word| *word == "max");
        let stack = words.next().unwrap_or_default();
        Ok(Self {
            program: program.to_owned(),
            instructions: number_after("processed ")?,
            states: number_after("total_states ")?,
            stack: stack.split('+').map(str::parse).collect::<Result<_, _>>()?,
        })
    }

    /// The sum of all stacks, which is at least that of the longest call chain. The verifier allows
    /// 512 bytes for that chain.
    fn whole_stack(&self) -> u64 {
        self.stack.iter().sum()
    }

    fn line(&self, kernel: &str) -> String {
        let stack: Vec<_> = self.stack.iter().map(u64::to_string).collect();
        format!(
            "verifier {kernel:<12} {:<15} {:>7} {:>5}  {}",
            self.program,
            self.instructions,
            self.states,
            stack.join("+")
        )
    }

    fn of_line(line: &str) -> Result<(&str, Self)> {
        let words: Vec<_> = line.split_whitespace().collect();
        let ["verifier", kernel, program, instructions, states, stack] = words[..] else {
            anyhow::bail!("not six words in a line of the table: {line}");
        };
        let figures = Self {
            program: program.to_owned(),
            instructions: instructions.parse()?,
            states: states.parse()?,
            stack: stack.split('+').map(str::parse).collect::<Result<_, _>>()?,
        };
        Ok((kernel, figures))
    }

    /// The figures that exceed the limits or the table's line.
    fn complaints(&self, before: Option<&Self>) -> String {
        let mut text = String::new();
        let mut compare = |what: &str, now: u64, most: Option<u64>, before: Option<u64>| {
            let program = &self.program;
            if let Some(most) = most.filter(|most| now > most / 2) {
                let _ = writeln!(text, "{program}: {now} {what}, more than half of {most}");
            }
            let allowed = |before: u64| before + before * TOLERANCE / 100;
            if let Some(before) = before.filter(|before| now > allowed(*before)) {
                let _ = writeln!(text, "{program}: {now} {what}, the table has {before}");
            }
        };
        compare(
            "instructions",
            self.instructions,
            Some(MOST_INSTRUCTIONS),
            before.map(|figures| figures.instructions),
        );
        compare(
            "states",
            self.states,
            None,
            before.map(|figures| figures.states),
        );
        compare(
            "bytes of stack",
            self.whole_stack(),
            None,
            before.map(Self::whole_stack),
        );
        text
    }
}

/// `6.12` of `6.12.107+deb13-cloud-amd64`, and `6.12-aarch64` on that processor, which runs other
/// programs (`words::order`).
fn kernel_series() -> Result<String> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let mut numbers = release.split(['.', '-', '+']);
    let series = [numbers.next(), numbers.next()].map(Option::unwrap_or_default);
    let series = series.join(".");
    Ok(match env::consts::ARCH {
        "x86_64" => series,
        other => format!("{series}-{other}"),
    })
}

/// The figures of all programs of the daemon.
fn figures() -> Result<Vec<Figures>> {
    let options = Options {
        max_sessions: 1024,
        only_netns: None,
        notes_owners: true,
        verbose: false,
    };
    // The ring buffer needs an event loop.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    let loaded = runtime.block_on(async { Datapath::load(options, None).map(drop) });
    let all = LOADED.lock().expect("no test panics with it");
    loaded.with_context(|| format!("{all:?}"))?;
    // aya's feature probes have no name or a name of aya's.
    let of_aya = |name: &str| name.is_empty() || name.starts_with("aya_");
    all.iter()
        .filter(|loaded| !of_aya(&loaded.name))
        .map(|Loaded { name, text, .. }| {
            Figures::read(name, text).with_context(|| format!("{name}: {text:?}"))
        })
        .collect()
}

/// Asserts that the programs that run for each packet have barriers on processors that need them,
/// and none on x86-64.
fn check_barriers() -> Result<()> {
    let all = LOADED.lock().expect("no test panics with it");
    for name in ["track_ingress", "track_egress"] {
        let loaded = all.iter().find(|loaded| loaded.name == name);
        let barriers = loaded.context("not loaded")?.barriers;
        let is_right = match env::consts::ARCH {
            "x86_64" => barriers == 0,
            _ => barriers >= 4,
        };
        ensure!(is_right, "{name} has {barriers} barriers");
    }
    Ok(())
}

#[test]
fn the_verifier_follows_no_more_instructions_than_the_table_says() -> Result<()> {
    let series = kernel_series()?;
    let table = TABLE
        .lines()
        .filter(|line| line.starts_with("verifier "))
        .map(Figures::of_line)
        .collect::<Result<Vec<_>>>()?;
    let mut complaints = String::new();
    let mut lines = String::new();
    let figures = figures()?;
    let loaded: BTreeSet<&str> = figures.iter().map(|now| now.program.as_str()).collect();
    let listed = table.iter().map(|(_, before)| before.program.as_str());
    assert_eq!(
        loaded,
        listed.collect(),
        "the loaded programs are not those of the table"
    );
    for now in &figures {
        let is_same = |(kernel, before): &&(&str, Figures)| {
            *kernel == series && before.program == now.program
        };
        let before = table.iter().find(is_same).map(|(_, before)| before);
        complaints += &now.complaints(before);
        writeln!(lines, "{}", now.line(&series))?;
    }
    check_barriers()?;
    // Writes past the output capture, because these lines are for the table.
    write!(io::stderr(), "{lines}")?;
    ensure!(
        complaints.is_empty(),
        "{complaints}If this is intended, put these lines into tests/verifier.txt:\n{lines}"
    );
    Ok(())
}

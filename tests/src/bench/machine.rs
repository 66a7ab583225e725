//! Describes the machine of the measurements.

use std::{fs, thread};

use anyhow::Result;
use serde_json::{Value, json};

/// The properties of the machine that influence the figures.
#[derive(Debug)]
pub(crate) struct Machine {
    kernel: String,
    processor: String,
    processors: usize,
    memory_gb: f64,
    /// The load average of the last minute.
    load: String,
}

impl Machine {
    /// Reads the properties of this machine.
    pub(crate) fn find() -> Result<Self> {
        let cpuinfo = fs::read_to_string("/proc/cpuinfo")?;
        let meminfo = fs::read_to_string("/proc/meminfo")?;
        let load = fs::read_to_string("/proc/loadavg")?;
        let kib = field(&meminfo, "MemTotal").unwrap_or_default();
        let kib: f64 = kib.trim_end_matches(" kB").parse().unwrap_or(0.0);
        Ok(Self {
            kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
                .trim()
                .to_owned(),
            processor: field(&cpuinfo, "model name").unwrap_or_else(|| "unknown".to_owned()),
            processors: thread::available_parallelism()?.get(),
            memory_gb: kib * 1024.0 / 1e9,
            load: load.split(' ').next().unwrap_or_default().to_owned(),
        })
    }

    /// The description as a sentence.
    pub(crate) fn sentence(&self) -> String {
        format!(
            "Linux {}, {} ({} processors), {:.0} GB; the load before was {}",
            self.kernel, self.processor, self.processors, self.memory_gb, self.load
        )
    }

    /// The description as JSON.
    pub(crate) fn json(&self) -> Value {
        json!({"kernel": self.kernel, "processor": self.processor,
               "processors": self.processors, "memory_gb": self.memory_gb, "load": self.load})
    }
}

/// The first value of this name in a file of lines `name: value`.
fn field(text: &str, name: &str) -> Option<String> {
    let values = text.lines().filter_map(|line| line.split_once(':'));
    let mut named = values.filter(|(found, _)| found.trim() == name);
    named.next().map(|(_, value)| value.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_found_by_their_whole_name() {
        let text = "model\t\t: 17\nmodel name\t: A CPU: fast\n";
        assert_eq!(field(text, "model name").as_deref(), Some("A CPU: fast"));
        assert_eq!(field(text, "MemTotal"), None);
    }

    #[test]
    fn this_machine_has_a_kernel_and_memory() {
        let machine = Machine::find().unwrap();
        assert!(!machine.kernel.is_empty() && machine.memory_gb > 0.0);
    }
}

//! A Prometheus of the test.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tempfile::TempDir;

use super::{
    ReservedPort,
    program::{self, Program},
};
use crate::{agent::Place, lab::Lab, pace::patience};

const PACKAGE: &str = "prometheus";
const READY: &str = "Server is ready to receive web requests";

/// The shipped files for Prometheus, by name.
const SHIPPED: [(&str, &str); 3] = [
    (
        "prometheus.yml",
        include_str!("../../../session-enforcer/monitoring/prometheus.yml"),
    ),
    (
        "rules.yml",
        include_str!("../../../session-enforcer/monitoring/rules.yml"),
    ),
    (
        "rules-tests.yml",
        include_str!("../../../session-enforcer/monitoring/rules-tests.yml"),
    ),
];

/// A running Prometheus on 127.0.0.1 with the shipped configuration and rules. It scrapes one target every
/// second.
#[derive(Debug)]
pub struct Prometheus {
    _server: Program,
    port: ReservedPort,
    _directory: TempDir,
}

impl Prometheus {
    /// Starts a Prometheus in the test's cgroup.
    ///
    /// # Errors
    ///
    /// Fails with the log if Prometheus is not installed or does not start.
    pub fn start(lab: &Lab, target: SocketAddr) -> Result<Self> {
        let port = ReservedPort::take(&lab.outside)?;
        let directory = tempfile::tempdir()?;
        let path = |name: &str| directory.path().join(name);
        write_shipped(directory.path(), |text| every_second(text, target))?;
        let place = Place::here().in_cgroup(&lab.cgroup);
        let prometheus = program::find("prometheus", PACKAGE, &[])?;
        let mut command = place.command(lab.agent_binary(), prometheus);
        command.arg(format!("--web.listen-address=127.0.0.1:{}", port.number));
        command.arg("--config.file").arg(path("prometheus.yml"));
        command.arg("--storage.tsdb.path").arg(path("data"));
        let server = Program::server("prometheus", command, READY)?;
        Ok(Self {
            _server: server,
            port,
            _directory: directory,
        })
    }

    /// The present value of an expression. `None` if no series matches.
    ///
    /// # Errors
    ///
    /// Fails if the answer is not one number.
    pub fn query(&self, expression: &str) -> Result<Option<f64>> {
        let values = self.query_all(expression)?;
        ensure!(
            values.len() <= 1,
            "{expression} is more than one number: {values:?}"
        );
        Ok(values.first().copied())
    }

    /// The present values of an expression, one per series.
    ///
    /// # Errors
    ///
    /// Fails if Prometheus does not understand the expression.
    pub fn query_all(&self, expression: &str) -> Result<Vec<f64>> {
        let body = self.get(&format!("/api/v1/query?query={}", encode(expression)))?;
        let answer: Value = serde_json::from_str(&body).with_context(|| body.clone())?;
        ensure!(answer["status"] == "success", "{expression}: {body}");
        let series = answer["data"]["result"].as_array().context(body.clone())?;
        // The pair has the time and the value.
        let values = series
            .iter()
            .map(|series| series["value"][1].as_str().unwrap_or_default());
        Ok(values.map(str::parse).collect::<Result<_, _>>()?)
    }

    /// The state of the targets.
    ///
    /// # Errors
    ///
    /// Fails if Prometheus does not answer.
    pub fn targets(&self) -> Result<String> {
        self.get("/api/v1/targets")
    }

    fn get(&self, path: &str) -> Result<String> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port.number))?;
        stream.set_read_timeout(Some(patience()))?;
        // With HTTP/1.0 the answer is not chunked and ends with the connection.
        write!(stream, "GET {path} HTTP/1.0\r\nHost: localhost\r\n\r\n")?;
        let mut answer = String::new();
        stream
            .read_to_string(&mut answer)
            .with_context(|| format!("GET {path}"))?;
        let (_, body) = answer
            .split_once("\r\n\r\n")
            .context("an answer without a body")?;
        Ok(body.to_owned())
    }
}

/// Writes the shipped files into a directory, after applying `change`.
fn write_shipped(directory: &Path, change: impl Fn(&str) -> String) -> Result<()> {
    for (name, text) in SHIPPED {
        fs::write(directory.join(name), change(text))?;
    }
    Ok(())
}

fn every_second(text: &str, target: SocketAddr) -> String {
    let often = text
        .replace("_interval: 15s", "_interval: 1s")
        .replace("_timeout: 10s", "_timeout: 1s");
    often.replace("127.0.0.1:9847", &target.to_string())
}

/// Percent-encodes every character with a meaning in a URL.
fn encode(text: &str) -> String {
    let encode = |byte: u8| match byte {
        b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'_' => char::from(byte).to_string(),
        _ => format!("%{byte:02X}"),
    };
    text.bytes().map(encode).collect()
}

/// The exit status and the output of `promtool check metrics` for an exposition.
///
/// # Errors
///
/// Fails if promtool is not installed.
pub fn promtool_check(exposition: &str) -> Result<(Option<i32>, String)> {
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("metrics"), exposition)?;
    let input = fs::File::open(directory.path().join("metrics"))?;
    promtool(directory.path(), &["check", "metrics"], input.into())
}

/// The exit status and the output of `promtool` with these arguments for the shipped files, after applying
/// `change`.
///
/// # Errors
///
/// Fails if promtool is not installed.
pub fn promtool_of_shipped(
    arguments: &[&str],
    change: impl Fn(&str) -> String,
) -> Result<(Option<i32>, String)> {
    let directory = tempfile::tempdir()?;
    write_shipped(directory.path(), change)?;
    promtool(directory.path(), arguments, Stdio::null())
}

fn promtool(directory: &Path, arguments: &[&str], input: Stdio) -> Result<(Option<i32>, String)> {
    let mut promtool = Command::new(program::find("promtool", PACKAGE, &[])?);
    promtool.current_dir(directory).args(arguments).stdin(input);
    let finished = promtool.stderr(Stdio::piped()).output()?;
    let printed = [finished.stdout, finished.stderr].concat();
    Ok((
        finished.status.code(),
        String::from_utf8_lossy(&printed).into_owned(),
    ))
}

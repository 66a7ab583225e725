//! A TLS 1.3 server in the distribution's Python that answers with a delay.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::Result;
use tempfile::TempDir;

use super::{
    ReservedPort,
    program::{self, PYTHON, Program, succeed},
};
use crate::{agent::Place, lab::Lab};

/// The script of both the server and the client.
const SCRIPT: &str = include_str!("../../clients/tls.py");

/// A server on 127.0.0.1.
#[derive(Debug)]
pub struct TlsServer {
    _server: Program,
    /// The lab whose cgroup contains the server.
    pub lab: Lab,
    port: ReservedPort,
    /// The certificate of both ends.
    certificate: PathBuf,
    _directory: TempDir,
}

impl TlsServer {
    /// Starts a server in a new cgroup that answers this long after a request. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails if Python or OpenSSL is not installed, or if the server does not start.
    pub fn start(agent: impl AsRef<Path>, answers_after: Duration) -> Result<Self> {
        let lab = Lab::new(agent)?;
        let port = ReservedPort::take(&lab.outside)?;
        let directory = tempfile::tempdir()?;
        let certificate = directory.path().join("certificate.pem");
        make_certificate(directory.path(), &certificate)?;
        let python = program::find(PYTHON, "python3", &[])?;
        let place = Place::here().in_cgroup(&lab.cgroup);
        let mut command = place.command(lab.agent_binary(), python);
        command.args(["-c", SCRIPT, "server", &port.number.to_string()]);
        command
            .arg(&certificate)
            .arg(answers_after.as_secs().to_string());
        let server = Program::server("the TLS server", command, "ready")?;
        Ok(Self {
            _server: server,
            lab,
            port,
            certificate,
            _directory: directory,
        })
    }

    /// The server's port.
    pub fn port(&self) -> u16 {
        self.port.number
    }

    /// Starts a client outside the cgroup. Its first request is in the last packet of its handshake.
    ///
    /// # Errors
    ///
    /// Fails if Python is not installed.
    pub fn client(&self) -> Result<Program> {
        Program::client("the TLS client", self.python_client()?)
    }

    /// The same, with a certificate of the client.
    ///
    /// # Errors
    ///
    /// See [`client`](Self::client).
    pub fn client_with_certificate(&self) -> Result<Program> {
        let mut python = self.python_client()?;
        python.arg(&self.certificate);
        Program::client("the TLS client with a certificate", python)
    }

    fn python_client(&self) -> Result<Command> {
        let mut python = Command::new(program::find(PYTHON, "python3", &[])?);
        python.args(["-c", SCRIPT, "client", &self.port.number.to_string()]);
        Ok(python)
    }
}

/// Creates a key and its certificate in one file.
fn make_certificate(directory: &Path, into: &Path) -> Result<()> {
    let [key, certificate] = ["key", "certificate"].map(|name| directory.join(name));
    let mut openssl = Command::new(program::find("openssl", "openssl", &[])?);
    openssl.args(["req", "-x509", "-newkey", "ec", "-nodes", "-days", "1"]);
    openssl.args([
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-subj",
        "/CN=test",
    ]);
    openssl
        .arg("-keyout")
        .arg(&key)
        .arg("-out")
        .arg(&certificate);
    succeed(openssl)?;
    let both = [fs::read(key)?, fs::read(certificate)?].concat();
    Ok(fs::write(into, both)?)
}

//! An nginx of the test that serves HTTP, with a slow application behind it.

use std::{fs, path::Path, time::Duration};

use anyhow::Result;
use tempfile::TempDir;

use super::{
    Host, Hosts,
    program::{self, PYTHON, Program},
};
use crate::{lab::Lab, netns::Veth};

/// The script of the application and the clients.
const SCRIPT: &str = include_str!("../../clients/web.py");

/// A running nginx on a separate host.
#[derive(Debug)]
pub struct WebServer {
    server: Program,
    _backend: Program,
    /// The lab whose cgroup contains the server.
    pub lab: Lab,
    hosts: Hosts,
    _directory: TempDir,
}

impl WebServer {
    /// The ports for HTTP/1.1, which are typical for users and for consoles.
    pub const PORTS: [u16; 2] = [443, 8443];
    /// The port for HTTP/2 without TLS.
    pub const HTTP2: u16 = 8080;
    /// The application's port.
    pub const BACKEND: u16 = 9000;
    /// A file that is sent at this number of bytes per second.
    pub const FILE: &str = "/file";
    const BYTES_PER_SECOND: u64 = 20_000;

    /// Starts a server in a new cgroup whose file takes this long to transfer. `agent` as for [`Lab::new`].
    ///
    /// # Errors
    ///
    /// Fails with the output if nginx or Python is not installed or does not start.
    pub fn start(agent: impl AsRef<Path>, file_takes: Duration) -> Result<Self> {
        Self::start_at(agent, file_takes, [Host::Server, Host::Near])
    }

    /// The same with the application inside the cgroup and nginx outside.
    ///
    /// # Errors
    ///
    /// Fails as [`WebServer::start`] does.
    pub fn start_with_backend_in_cgroup(
        agent: impl AsRef<Path>,
        file_takes: Duration,
    ) -> Result<Self> {
        Self::start_at(agent, file_takes, [Host::Near, Host::Server])
    }

    fn start_at(
        agent: impl AsRef<Path>,
        file_takes: Duration,
        [nginx_at, backend_at]: [Host; 2],
    ) -> Result<Self> {
        let (lab, hosts) = (Lab::new(agent)?, Hosts::new()?);
        let directory = tempfile::tempdir()?;
        let path = directory.path();
        fs::write(path.join("nginx.conf"), configuration(path))?;
        let length = Self::BYTES_PER_SECOND * file_takes.as_secs();
        fs::write(path.join("file"), vec![b'x'; length.try_into()?])?;
        let python = program::find(PYTHON, "python3", &[])?;
        let mut command = hosts.command(&lab, backend_at, python);
        command.args(["-u", "-c", SCRIPT, "backend", &Self::BACKEND.to_string()]);
        let backend = Program::server("the application", command, "ready")?;
        let nginx = program::find("nginx", "nginx", &[])?;
        let mut command = hosts.command(&lab, nginx_at, nginx);
        command.args(["-e", "stderr", "-p"]).arg(path);
        command.arg("-c").arg(path.join("nginx.conf"));
        let server = Program::listening_anywhere("nginx", command, Self::PORTS[0])?;
        Ok(Self {
            server,
            _backend: backend,
            lab,
            hosts,
            _directory: directory,
        })
    }

    /// The server's log.
    pub fn log(&self) -> String {
        self.server.output()
    }

    /// Starts a client of this kind (`http1`, `http2`) on the other host that reads commands. Returns it with
    /// its port.
    ///
    /// # Errors
    ///
    /// Fails if Python is not installed, or if the client cannot connect.
    pub fn client(&self, name: &str, kind: &str, port: u16) -> Result<(Program, u16)> {
        let python = program::find(PYTHON, "python3", &[])?;
        let mut command = self.hosts.command(&self.lab, Host::Far, python);
        let address = Veth::LEFT.to_string();
        command.args(["-u", "-c", SCRIPT, kind, &address, &port.to_string()]);
        let mut client = Program::client(name, command)?;
        let [own] = client.numbers_after("port: ")?;
        Ok((client, own.try_into()?))
    }
}

/// Runs one process in the foreground, which itself closes no idle connection.
fn configuration(directory: &Path) -> String {
    let directory = directory.display();
    format!(
        "daemon off;\nmaster_process off;\npid {directory}/pid;\nevents {{}}\n\
         http {{\n    access_log off;\n    keepalive_timeout 1h;\n    keepalive_requests 100000;\n    \
         client_body_temp_path {directory}/a;\n    proxy_temp_path {directory}/b;\n    \
         fastcgi_temp_path {directory}/c;\n    uwsgi_temp_path {directory}/d;\n    scgi_temp_path {directory}/e;\n    \
         upstream backend {{\n        server 127.0.0.1:{backend};\n        keepalive 4;\n        \
         keepalive_timeout 1h;\n    }}\n    \
         server {{\n        listen {web};\n        listen {console};\n        listen {http2} http2;\n        \
         root {directory};\n        location /file {{ limit_rate {rate}; }}\n        \
         location /app/ {{\n            proxy_pass http://backend;\n            \
         proxy_buffering off;\n            proxy_http_version 1.1;\n            proxy_set_header Connection \"\";\n            proxy_read_timeout 1h;\n        }}\n    }}\n}}\n",
        backend = WebServer::BACKEND,
        web = WebServer::PORTS[0],
        console = WebServer::PORTS[1],
        http2 = WebServer::HTTP2,
        rate = WebServer::BYTES_PER_SECOND,
    )
}

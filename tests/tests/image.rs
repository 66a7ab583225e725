//! The container image, run by podman, and the Kubernetes manifests, built by kustomize. `cargo
//! xtask dist --test` runs these tests.

mod schema;

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use session_enforcer_tests::{ContainerHost, eventually, patience, run_to_end};

/// The command of the documentation, without the mount of the configuration file.
const START: &str = "start --name enforcer --network host --pid host --cgroupns host --read-only \
                     --cap-drop all --cap-add BPF,PERFMON,NET_ADMIN,SYS_ADMIN,SYS_PTRACE,DAC_READ_SEARCH \
                     --volume /sys/fs/cgroup:/sys/fs/cgroup:ro --volume /sys/fs/bpf:/sys/fs/bpf";

/// A server and a client in their own network namespace. The server reads the request and never
/// answers. The client prints how its connection ended.
const NEIGHBOUR: &str = "start --name neighbour --network none busybox /bin/busybox sh -c \
                         '/bin/busybox mkfifo /silence; /bin/busybox nc -l -p 7 127.0.0.1 <>/silence >/dev/null & \
                          until /bin/busybox netstat -ltn | /bin/busybox grep -q :7; do /bin/busybox sleep 0.1; done; \
                          exec /bin/busybox wget -q -O - http://127.0.0.1:7/'";

const CONFIG: &str = "[daemon]\ncgroup = \"/sys/fs/cgroup\"\n[[rule]]\nname = \"neighbours\"\n\
                      idle_timeout = \"2s\"\n";

const READY: &str = "enforcer /usr/bin/session-enforcer";

fn metric(host: &ContainerHost, path: &str) -> Result<Option<String>> {
    let line = format!("busybox wget -q -O - http://127.0.0.1:9847{path}");
    let found = host.run(&line)?;
    Ok((found.code == 0).then_some(found.stdout))
}

fn is_ready(host: &ContainerHost) -> Result<()> {
    let ready = eventually("the readiness of the daemon", patience(), || {
        metric(host, "/readyz")
    });
    ready.map(drop).with_context(|| {
        let log = host.run("podman logs enforcer");
        log.map_or_else(|error| error.to_string(), |log| log.stderr)
    })
}

#[test]
fn an_unprivileged_container_with_six_capabilities_enforces_other_containers() -> Result<()> {
    let host = ContainerHost::new()?;
    host.ask(&format!(
        "printf '{}' >\"$SCRATCH/config.toml\"; {START} \
         --volume \"$SCRATCH/config.toml:/etc/session-enforcer/config.toml:ro\" session-enforcer",
        CONFIG.replace('\n', "\\n")
    ))?;
    is_ready(&host)?;
    let inspected = host.ask("podman inspect enforcer")?;
    let inspected: Value = serde_json::from_str(&inspected)?;
    assert_eq!(inspected[0]["HostConfig"]["Privileged"], false);
    let capabilities = inspected[0]["EffectiveCaps"].as_array();
    assert_eq!(capabilities.map(Vec::len), Some(6), "{inspected:#}");

    let id = host.ask(NEIGHBOUR)?;
    let code = host.ask("podman wait neighbour")?;
    let said = host.run("podman logs neighbour")?;
    // The end that is reset first reports the second error.
    let errors = [
        "Connection reset by peer",
        "Software caused connection abort",
    ];
    ensure!(
        code == "1" && errors.iter().any(|it| said.stderr.contains(it)),
        "{code}, {said:?}"
    );
    let log = host.ask("podman logs enforcer 2>/dev/null")?;
    let records: Vec<Value> = log
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<_, _>>()?;
    let ended: Vec<&Value> = records
        .iter()
        .filter(|record| record["event"]["action"] == "session-terminated")
        .collect();
    // Both ends are sockets of this host, so there may be two records.
    ensure!(!ended.is_empty() && ended.len() <= 2, "{log}");
    for record in ended {
        assert_eq!(record["rule"]["name"], "neighbours");
        assert_eq!(record["event"]["reason"], "idle_timeout");
        let cgroup = record["session_enforcer"]["cgroup"].as_str();
        ensure!(cgroup.is_some_and(|it| it.contains(&id)), "{record:#}");
    }
    host.ask("podman stop --time 20 enforcer")?;
    assert_eq!(host.ask("podman wait enforcer")?, "0");
    Ok(())
}

#[test]
fn without_a_file_the_image_observes_and_doctor_reports_missing_privileges() -> Result<()> {
    let host = ContainerHost::new()?;
    host.ask(&format!("{START} session-enforcer"))?;
    is_ready(&host)?;
    let log = host.ask("podman logs enforcer 2>/dev/null")?;
    ensure!(
        log.contains("\"mode\":\"observe\",\"rules\":[\"inbound\"]"),
        "{log}"
    );
    host.ask(&format!("podman exec {READY} check"))?;
    host.ask(&format!("podman exec {READY} doctor"))?;
    let status = host.ask(&format!("podman exec {READY} status --json"))?;
    let status: Value = serde_json::from_str(&status)?;
    assert_eq!(status["ready"], true, "{status:#}");

    let refused = host.run(
        "podman run --rm --network none --pids-limit -1 --ulimit nofile=1024:4096 --ulimit nproc=1024:4096 \
         session-enforcer doctor",
    )?;
    assert_eq!(refused.code, 77, "{refused:?}");
    Ok(())
}

/// Each document that kustomize builds fits the schema of the API.
#[test]
fn kustomize_builds_valid_manifests() -> Result<()> {
    let folder = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../session-enforcer/packaging/kubernetes"
    );
    for (name, kinds) in [
        ("base", &["Namespace", "ConfigMap", "DaemonSet"][..]),
        (
            "with-pod-monitor",
            &["Namespace", "ConfigMap", "DaemonSet", "PodMonitor"],
        ),
    ] {
        let mut command = Command::new("kubectl");
        command.arg("kustomize").arg(format!("{folder}/{name}"));
        let made = run_to_end(command, patience())?;
        assert_eq!(made.code, 0, "{made:?}");
        let documents = made.stdout.split("\n---\n").map(schema::read);
        let documents: Vec<Value> = documents.collect::<Result<_>>()?;
        for document in &documents {
            schema::check(document)?;
        }
        let found: Vec<&str> = documents
            .iter()
            .filter_map(|it| it["kind"].as_str())
            .collect();
        assert_eq!(found, kinds);
        // The DaemonSet refers to the ConfigMap that was built with it.
        let volumes = &documents[2]["spec"]["template"]["spec"]["volumes"];
        assert_eq!(
            volumes[0]["configMap"]["name"],
            documents[1]["metadata"]["name"]
        );
    }
    Ok(())
}

//! The Kubernetes manifests and the configurations in them.

#[path = "../schema/mod.rs"]
mod schema;

use std::{collections::BTreeSet, fs, path::PathBuf};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use session_enforcer::config::{Config, Mode};

const UNIT: &str = include_str!("../../../session-enforcer/packaging/session-enforcer.service");

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../session-enforcer/packaging")
}

fn text(path: &str) -> Result<String> {
    let path = folder().join(path);
    fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
}

fn manifest(name: &str) -> Result<Value> {
    schema::read(&text(&format!("kubernetes/{name}"))?)
}

fn daemon_set() -> Result<Value> {
    manifest("base/daemonset.yaml")
}

#[test]
fn each_manifest_fits_the_schema_of_the_api() -> Result<()> {
    schema::check(&manifest("base/namespace.yaml")?)?;
    schema::check(&daemon_set()?)
}

#[test]
fn the_schema_refuses_wrong_manifests() -> Result<()> {
    let container = "/spec/template/spec/containers/0";
    for (below, key, value) in [
        ("/securityContext", "readonlyRootFilesystem", json!(true)),
        ("/securityContext", "runAsUser", json!("root")),
        ("/livenessProbe/httpGet", "port", json!(null)),
        ("", "volumeMount", json!([])),
    ] {
        let mut wrong = daemon_set()?;
        let place = wrong.pointer_mut(&format!("{container}{below}"));
        place.context("no such path in the manifest")?[key] = value;
        ensure!(schema::check(&wrong).is_err(), "{below}: {key}");
    }
    Ok(())
}

#[test]
fn each_kustomization_names_existing_files() -> Result<()> {
    for name in ["base", "with-pod-monitor"] {
        let kustomization = manifest(&format!("{name}/kustomization.yaml"))?;
        let listed = |key: &str| kustomization[key].as_array().cloned().unwrap_or_default();
        let generated = listed("configMapGenerator");
        let files = generated.iter().filter_map(|it| it["files"].as_array());
        let patches = listed("patches").into_iter().map(|it| it["path"].clone());
        let all = listed("resources").into_iter().chain(patches);
        let all: Vec<Value> = all.chain(files.flatten().cloned()).collect();
        ensure!(all.len() >= 3, "{name}: {all:?}");
        for file in all {
            let file = file.as_str().context("the name of a file is not text")?;
            let path = folder().join("kubernetes").join(name).join(file);
            ensure!(path.exists(), "{} names {file}", path.display());
        }
    }
    Ok(())
}

/// The pod has the six capabilities of the systemd service and is not privileged.
#[test]
fn the_pod_is_not_privileged_and_has_the_capabilities_of_the_service() -> Result<()> {
    let manifest = daemon_set()?;
    let container = &manifest["spec"]["template"]["spec"]["containers"][0];
    let security = &container["securityContext"];
    assert_eq!(security["privileged"], Value::Null);
    assert_eq!(security["readOnlyRootFilesystem"], true);
    assert_eq!(security["capabilities"]["drop"], json!(["ALL"]));
    let added = security["capabilities"]["add"]
        .as_array()
        .context("capabilities.add is not a list")?;
    let added: BTreeSet<&str> = added.iter().filter_map(Value::as_str).collect();
    let line = UNIT
        .lines()
        .find_map(|it| it.strip_prefix("AmbientCapabilities="));
    let of_service = line
        .context("the unit has no AmbientCapabilities")?
        .split(' ');
    let of_service: BTreeSet<&str> = of_service
        .filter_map(|it| it.strip_prefix("CAP_"))
        .collect();
    assert_eq!(added, of_service);
    Ok(())
}

#[test]
fn the_manifest_names_the_image_of_this_version() -> Result<()> {
    let manifest = daemon_set()?;
    let image = &manifest["spec"]["template"]["spec"]["containers"][0]["image"];
    let version = env!("CARGO_PKG_VERSION");
    assert_eq!(*image, json!(format!("session-enforcer:{version}")));
    Ok(())
}

#[test]
fn the_configurations_observe_the_mounted_cgroup_hierarchy() -> Result<()> {
    for name in ["container/config.toml", "kubernetes/base/config.toml"] {
        let config = Config::parse(name, &text(name)?)?;
        assert_eq!(config.mode, Mode::Observe, "{name}");
        let cgroup = config
            .cgroup
            .context("no cgroup; the default is wrong inside a container")?;
        assert_eq!(cgroup.to_str(), Some("/sys/fs/cgroup"), "{name}");
        ensure!(config.warnings.is_empty(), "{name}: {:?}", config.warnings);
    }
    Ok(())
}

//! Manifests of Kubernetes, held to the schema of its API.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Namespace},
    },
    serde::{Serialize, de::DeserializeOwned},
};
use serde_json::Value;

/// Reads a document of YAML.
pub(crate) fn read(text: &str) -> Result<Value> {
    serde_saphyr::from_str(text).with_context(|| format!("no YAML: {text}"))
}

/// Refuses a manifest that the API would not take as it is meant: values of other types, keys that are missing, and
/// keys that it does not know, which it would drop.
pub(crate) fn check(manifest: &Value) -> Result<()> {
    let kind = manifest["kind"].as_str().unwrap_or_default();
    match kind {
        "ConfigMap" => check_as::<ConfigMap>(manifest),
        "DaemonSet" => check_as::<DaemonSet>(manifest),
        "Namespace" => check_as::<Namespace>(manifest),
        // Of the operator, whose definition is no part of the API.
        "PodMonitor" => Ok(()),
        _ => Err(anyhow::anyhow!("no schema for {kind:?}")),
    }
    .with_context(|| format!("{kind}: {manifest:#}"))
}

fn check_as<T: DeserializeOwned + Serialize>(manifest: &Value) -> Result<()> {
    let typed: T = serde_json::from_value(manifest.clone())?;
    let taken = serde_json::to_value(&typed)?;
    ensure!(taken == *manifest, "the API takes this of it: {taken:#}");
    Ok(())
}

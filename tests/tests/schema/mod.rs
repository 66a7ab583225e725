//! Checks Kubernetes manifests against the schema of the API.

use anyhow::{Context as _, Result, ensure};
use k8s_openapi::{
    api::{
        apps::v1::DaemonSet,
        core::v1::{ConfigMap, Namespace},
    },
    serde::{Serialize, de::DeserializeOwned},
};
use serde_json::Value;

/// Reads a YAML document.
pub(crate) fn read(text: &str) -> Result<Value> {
    serde_saphyr::from_str(text).with_context(|| format!("invalid YAML: {text}"))
}

/// Refuses a manifest that the API would reject or change: wrong types, missing keys, and unknown
/// keys, which the API drops.
pub(crate) fn check(manifest: &Value) -> Result<()> {
    let kind = manifest["kind"].as_str().unwrap_or_default();
    match kind {
        "ConfigMap" => check_as::<ConfigMap>(manifest),
        "DaemonSet" => check_as::<DaemonSet>(manifest),
        "Namespace" => check_as::<Namespace>(manifest),
        // A resource of the Prometheus operator, which is not part of the API.
        "PodMonitor" => Ok(()),
        _ => Err(anyhow::anyhow!("no schema for {kind:?}")),
    }
    .with_context(|| format!("{kind}: {manifest:#}"))
}

fn check_as<T: DeserializeOwned + Serialize>(manifest: &Value) -> Result<()> {
    let typed: T = serde_json::from_value(manifest.clone())?;
    let taken = serde_json::to_value(&typed)?;
    ensure!(taken == *manifest, "the API keeps only this: {taken:#}");
    Ok(())
}

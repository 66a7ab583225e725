//! The SBOM in `CycloneDX` JSON: every crate in the binary.
//!
//! It has no serial number and no time, so that the same sources give the same file.

use std::collections::BTreeSet;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::{Arch, NAME};
use crate::process::output_of;
use crate::workspace::Workspace;

/// The SBOM of the daemon's normal dependencies.
pub(super) fn of(checkout: &Workspace) -> Result<String> {
    let mut cargo = checkout.cargo();
    cargo.args(["metadata", "--locked", "--format-version=1"]);
    for arch in Arch::ALL {
        cargo.arg("--filter-platform").arg(arch.triple());
    }
    let metadata: Value = serde_json::from_str(&output_of(&mut cargo)?)
        .context("what `cargo metadata` prints is no JSON")?;
    let mut bill = serde_json::to_string_pretty(&bill(&metadata)?)?;
    bill.push('\n');
    Ok(bill)
}

fn bill(metadata: &Value) -> Result<Value> {
    let packages = array(&metadata["packages"]);
    let package = |id: &str| packages.iter().find(|package| package["id"] == id);
    let own = packages.iter().find(|package| package["name"] == NAME);
    let own = own.context("cargo knows no package session-enforcer")?;
    let nodes = array(&metadata["resolve"]["nodes"]);
    let mut open = vec![text(&own["id"]).to_owned()];
    let mut found = BTreeSet::new();
    let mut dependencies = Vec::new();
    while let Some(id) = open.pop() {
        if !found.insert(id.clone()) {
            continue;
        }
        let node = nodes.iter().find(|node| node["id"] == id.as_str());
        let needs = linked(node.context("a crate is not in cargo's graph")?);
        dependencies.push((id, needs.clone()));
        open.extend(needs);
    }
    let reference = |id: &str| package(id).map(purl).unwrap_or_default();
    let components = found.iter().filter_map(|id| package(id));
    let components: Vec<Value> = components
        .filter(|package| package["name"] != NAME)
        .map(|package| component(package, "library"))
        .collect();
    dependencies.sort();
    let dependencies: Vec<Value> = dependencies
        .iter()
        .map(|(id, needs)| {
            let needs: Vec<String> = needs.iter().map(|id| reference(id)).collect();
            json!({ "ref": reference(id), "dependsOn": needs })
        })
        .collect();
    Ok(json!({
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": { "component": component(own, "application") },
        "components": components,
        "dependencies": dependencies,
    }))
}

/// The crates that a crate is linked with, without build and test dependencies.
fn linked(node: &Value) -> BTreeSet<String> {
    let is_normal = |need: &&Value| {
        let kinds = array(&need["dep_kinds"]);
        kinds.iter().any(|kind| kind["kind"].is_null())
    };
    let needs = array(&node["deps"]).iter().filter(is_normal);
    needs.map(|need| text(&need["pkg"]).to_owned()).collect()
}

fn component(package: &Value, kind: &str) -> Value {
    let mut component = json!({
        "type": kind,
        "bom-ref": purl(package),
        "name": package["name"],
        "version": package["version"],
        "purl": purl(package),
    });
    if let Some(license) = package["license"].as_str() {
        // Older crates write "MIT/Apache-2.0" instead of SPDX's OR.
        let parts: Vec<&str> = license.split('/').map(str::trim).collect();
        component["licenses"] = json!([{ "expression": parts.join(" OR ") }]);
    }
    component
}

/// The package URL of a crate.
fn purl(package: &Value) -> String {
    format!(
        "pkg:cargo/{}@{}",
        text(&package["name"]),
        text(&package["version"])
    )
}

fn array(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_bill_has_what_is_linked_and_not_what_only_builds_or_tests() {
        let need = |name: &str, kind: Value| json!({"pkg": name, "dep_kinds": [{"kind": kind}]});
        let metadata = json!({
            "packages": [
                {"id": "own", "name": NAME, "version": "0.2.0", "license": "MIT"},
                {"id": "a", "name": "a", "version": "1.0.0", "license": "MIT/Apache-2.0"},
                {"id": "b", "name": "b", "version": "2.0.0"},
                {"id": "c", "name": "c", "version": "3.0.0"},
            ],
            "resolve": {"nodes": [
                {"id": "own", "deps": [need("a", Value::Null), need("b", json!("build"))]},
                {"id": "a", "deps": [need("c", json!("dev"))]},
                {"id": "b", "deps": []},
                {"id": "c", "deps": []},
            ]},
        });
        let bill = bill(&metadata).expect("a whole graph");
        assert_eq!(
            bill["components"],
            json!([{
                "type": "library", "bom-ref": "pkg:cargo/a@1.0.0", "name": "a",
                "version": "1.0.0", "purl": "pkg:cargo/a@1.0.0",
                "licenses": [{"expression": "MIT OR Apache-2.0"}],
            }])
        );
        assert_eq!(bill["dependencies"].as_array().map(Vec::len), Some(2));
    }
}
